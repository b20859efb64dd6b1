"""Arguments, results, errors and exit codes of every verb; what the verbs call has tests of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from genkit import cli, console, optional, recipes, show
from genkit.errors import GenkitError, UsageError

ROOT = Path(__file__).parent.parent


@pytest.fixture
def stub(monkeypatch):
    """stub("genkit.training", train=f): a module of that name with nothing else in it."""

    def put(name: str, **members) -> None:
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(sys.modules["genkit"], name.rpartition(".")[2], module, raising=False)

    return put


@pytest.fixture
def run_directory(recipe, tmp_path):
    """A run as training leaves it, of 100 samples, half done."""
    from genkit import config

    run = tmp_path / "runs" / "toy"
    (run / "checkpoints" / "0000005" / "state").mkdir(parents=True)
    (run / "checkpoints" / "last").symlink_to("0000005")
    (run / "config.resolved.yaml").write_text(config.dump(config.load(recipe())))
    (run / "metrics.jsonl").write_text('{"step": 1, "samples": 10}\n{"step": 5, "samples": 50, "loss": 0.25}\n{"st')
    (run / "samples").mkdir()
    (run / "samples" / "0000005-ema.png").write_bytes(b"")
    (run / "eval").mkdir()
    (run / "eval" / "0000005.json").write_text('{"rows": [{"metric": "psnr", "value": 21.5}], "settings": {"a": 1}}')
    return run


# Errors and exit codes


def test_no_command_prints_help_and_fails(capsys):
    assert cli.main([]) == 2
    assert "quickstart" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "genkit: no such command: trian; did you mean 'train'?"),
        (["train"], "genkit train: the following arguments are required: RECIPE"),
        (["train", "r.yaml", "--nmae", "x"], "genkit train: unexpected argument --nmae; did you mean '--name'?"),
        (["sample", "run", "stray"], "genkit sample: unexpected argument stray"),
        (["sample", "run", "-n", "many"], "genkit sample: argument -n/--count: invalid int value: 'many'"),
        (["sample", "run", "guidance=3"], "genkit sample: unexpected argument guidance=3"),
        (["data", "chekc", "x"], "genkit data: argument action: invalid choice: 'chekc'"),
        (["config", "diff", "a"], "genkit config: `config diff` takes two recipes or runs"),
        (["ls", "tokenisers"], "genkit ls: nothing is listed under tokenisers; did you mean 'tokenizers'?"),
        (["train", "no-such-recipe.yaml"], "genkit train: no such recipe: no-such-recipe.yaml"),
        (["show", "runs/no-such-run"], "genkit show: run runs/no-such-run does not exist"),
        (["train", "r.yaml", "--launch", "0"], "genkit train: --launch 0"),
        (["-q"], "genkit: the following arguments are required: COMMAND"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text("")
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith(message)
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (GenkitError("the disk is full"), 1, "genkit env: the disk is full"),
        (UsageError("lr is wrong"), 2, "genkit env: lr is wrong"),
        (OSError(28, "No space left on device", "x.png"), 1, "genkit env: [Errno 28] No space left on device: 'x.png'"),
        (KeyboardInterrupt(), 130, "genkit env: interrupted"),
        (
            ValueError("two\nlines"),
            1,
            "genkit env: unexpected ValueError: two lines; run again with -v for the traceback",
        ),
    ],
)
def test_every_error_is_one_line_with_its_exit_code(stub, error, code, message, capsys):
    def fail():
        raise error

    stub("genkit.env", collect=fail, render=str)
    assert cli.main(["env"]) == code
    assert capsys.readouterr().err.strip() == message


def test_an_error_may_bring_its_own_exit_code(stub):
    def stop():
        error = GenkitError("stopped by SIGTERM; the same command continues")
        error.exit_code = 85
        raise error

    stub("genkit.env", collect=stop, render=str)
    assert cli.main(["env"]) == 85


def test_tracebacks_are_for_v(stub, capsys):
    stub("genkit.env", collect=lambda: 1 / 0, render=str)
    assert cli.main(["env", "-v"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_reader_that_leaves_early_is_no_error():
    # `true` ends long before genkit writes: importing alone takes longer.
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m genkit --json ls | true"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stderr == ""


# Results


def test_json_is_all_there_is_on_stdout(stub, capsys):
    def collect():
        print("a library talks")
        console.say("progress")
        return {"path": Path("x"), "nan": float("nan"), "array": np.float32(0.5), "list": (1, 2)}

    stub("genkit.env", collect=collect, render=str)
    assert cli.main(["env", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"path": "x", "nan": None, "array": 0.5, "list": [1, 2]}
    assert "a library talks" in err
    assert "progress" in err


def test_flags_may_stand_before_the_verb(stub, capsys):
    stub("genkit.env", collect=lambda: {"a": 1}, render=str)
    assert cli.main(["--json", "-q", "env"]) == 0
    assert json.loads(capsys.readouterr().out) == {"a": 1}


def test_quiet_silences_progress_but_not_warnings(stub, capsys):
    def collect():
        console.say("progress")
        console.warn("careful")
        return {}

    stub("genkit.env", collect=collect, render=lambda found: "result")
    cli.main(["env", "-q"])
    out, err = capsys.readouterr()
    assert (out, err) == ("result\n", "warning: careful\n")


def test_only_the_first_of_several_processes_speaks(stub, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    stub("genkit.env", collect=dict, render=lambda found: "result")
    assert cli.main(["env"]) == 0
    assert capsys.readouterr() == ("", "")


# What the verbs call


def test_train_passes_recipe_overrides_and_seed(stub, tmp_path, capsys):
    calls = []

    def train(*args, **kwargs):
        calls.append((args, kwargs))
        return SimpleNamespace(path=Path("runs/x"), metrics={"loss": 0.5}, last=Path("runs/x/checkpoints/0000001"))

    stub("genkit.training", train=train)
    path = tmp_path / "r.yaml"
    path.write_text("")
    words = [
        "train",
        str(path),
        "a.b=1",
        "--name",
        "x",
        "c=[1, 2]",
        "--seed",
        "3",
        "d+=-1",
        "--device",
        "cpu",
        "--json",
    ]
    assert cli.main(words) == 0
    assert calls == [
        ((path, ["a.b=1", "c=[1, 2]", "d+=-1", "train.seed=3"]), {"name": "x", "out": "runs", "device": "cpu"})
    ]
    assert json.loads(capsys.readouterr().out)["metrics"] == {"loss": 0.5}


def test_sample_passes_its_options(stub, capsys):
    calls = []

    def sample(run, **kwargs):
        calls.append((run, kwargs))
        return {"images": 4, "out": "o", "grid": "o/grid.png", "json": "o/samples.json", "seconds": 61.0}

    stub("genkit.sampling", sample=sample)
    words = "sample runs/x -n 4 --labels 0-9 --seed 7 --steps 3 --guidance 1.5 -o o --raw --batch-size 2 --device cpu"
    words += " --size 48x64 --rope ntk --rope-gain paper --rope-longest --known a.png --keep left"
    words += (
        " --format glb --resolution 32 --turntable --caption red --caption blue --database my/photos --classes bag,boot"
    )
    assert cli.main([*words.split(), "--sampler", "type=heun", "reuse.type=skip_blocks"]) == 0
    settings = {"count": 4, "labels": "0-9", "seed": 7, "steps": 3, "guidance": 1.5, "out": "o"}
    settings["sampler"] = ["type=heun", "reuse.type=skip_blocks"]
    settings |= {"size": "48x64", "rope": {"method": "ntk", "gain": "paper", "per_axis": False}}
    settings |= {"known": "a.png", "keep": "left", "format": "glb", "resolution": 32, "turntable": True}
    settings |= {"captions": ["red", "blue"], "database": "my/photos", "classes": "bag,boot"}
    assert calls == [("runs/x", {**settings, "ema": False, "batch_size": 2, "device": "cpu"})]
    assert "1 min 01 s" in capsys.readouterr().out


def test_eval_passes_its_options(stub, run_directory, capsys):
    calls = []

    class Report:
        path = Path("r.json")

        def to_dict(self):
            return {"rows": []}

        def __str__(self):
            return "a table"

    def evaluate(target, **kwargs):
        calls.append((target, kwargs))
        return Report()

    stub("genkit.evaluation", evaluate=evaluate)
    assert cli.main("eval out --ref ref.npz --metrics fd,kid -n 9 --weights w -o r.json".split()) == 0
    target, settings = calls[0]
    assert target == "out"
    assert settings["metrics"] == ["fd", "kid"]
    assert settings["reference"] == "ref.npz"
    assert settings["count"] == 9
    assert settings["weights"] == "w"
    assert settings["out"] == "r.json"
    assert settings["ema"] is True
    assert capsys.readouterr().out == "a table\nreport: r.json\n"
    cli.main(["eval", str(run_directory)])
    assert calls[1][1]["out"] is None  # evaluate itself knows where a run's report belongs


def test_bench_prints_rows(stub, capsys):
    stub(
        "genkit.bench", run=lambda suite, quick, threads: [{"case": suite, "quick": quick}], render=lambda rows: "rows"
    )
    assert cli.main(["bench", "vq", "--quick", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"case": "vq", "quick": True}]


def test_quickstart_ends_with_figures_seconds_and_pictures(stub, capsys):
    found = {
        "figures": [{"metric": "psnr", "value": 21.5}],
        "seconds": {"train": 125.0},
        "pictures": {"samples": "runs/grid.png"},
    }
    calls = []
    stub(
        "genkit.quickstart",
        quickstart=lambda **settings: calls.append(settings) or found,
        render=lambda found: f"{found['figures']} {found['pictures']}",
    )
    assert cli.main(["quickstart", "--seed", "2"]) == 0
    assert calls == [{"what": "images", "out": "runs", "seed": 2, "device": None}]
    out = capsys.readouterr().out
    for word in ("psnr", "21.5", "runs/grid.png"):
        assert word in out


def test_env_says_what_there_is(capsys):
    assert cli.main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["packages"]["torch"]
    assert set(found["optional"]) == set(optional.EXTRAS)
    assert found["threads"] >= 1
    assert cli.main(["env"]) == 0
    assert capsys.readouterr().out.startswith("genkit")


# Configs and recipes


def test_config_check_and_show(recipe, capsys):
    assert cli.main(["config", "check", str(recipe()), "train.lr=2e-4"]) == 0
    assert capsys.readouterr().out.startswith("toy is fine: tokenizer outside_parts:Codes")
    assert cli.main(["config", "show", str(recipe()), "train.lr=2e-4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["train"]["lr"] == 2e-4


def test_config_diff_takes_recipes_and_runs(recipe, run_directory, capsys):
    other = recipe(recipe().read_text().replace("0.5", "0.75"), "other.yaml")
    assert cli.main(["config", "diff", str(run_directory), str(other)]) == 0
    assert "tokenizer.beta: 0.5 -> 0.75" in capsys.readouterr().out
    assert cli.main(["config", "diff", str(run_directory), str(run_directory)]) == 0
    assert capsys.readouterr().out == "no differences\n"


def test_config_explain_names_type_default_and_meaning(capsys):
    assert cli.main(["config", "explain", "train.ema"]) == 0
    out = capsys.readouterr().out
    for word in ("train.ema", "float or null", "0.999", "decay per optimiser step"):
        assert word in out


def test_config_explain_reads_constructors(capsys):
    assert cli.main(["config", "explain", "data.folder.size", "--json"]) == 0
    (key,) = json.loads(capsys.readouterr().out)
    assert key["default"] == "required"
    assert key["about"].startswith("pixels per side")


def test_explain_reads_argument_lists_with_continuation_lines(outside):
    from genkit import explain

    found = {key.path.rpartition(".")[2]: key.about for key in explain.keys("data", f"{outside}:Pixels")}
    assert found["size"] == "pixels per side, or (Y, X)."
    assert found["path"] == found["root"] == "where the files lie."
    assert found["flip"] == ""


@pytest.mark.parametrize("key", ["trian.lr", "train.lrr", "data.folder.sise", "train.lr.deep"])
def test_config_explain_of_an_unknown_key_is_a_usage_error(key, capsys):
    assert cli.main(["config", "explain", key]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_config_schema_lists_sections_and_parts(capsys):
    assert cli.main(["config", "schema"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sections"]["train"]["num_samples"]["default"] == "required"
    assert found["parts"]["data"]["folder"]["keys"]["size"]["about"]


def test_ls_lists_everything_or_one_kind(capsys):
    assert cli.main(["ls", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == set(recipes.KINDS)
    assert cli.main(["ls", "data"]) == 0
    assert "folder" in capsys.readouterr().out


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """Two recipes that come with the package, one on top of the other."""
    folder = tmp_path / "package" / "configs"
    (folder / "toy").mkdir(parents=True)
    (folder / "base.yaml").write_text("# What both share.\ntrain: {num_samples: 1}\n")
    (folder / "toy" / "vq-small.yaml").write_text(
        "# Small. # really\nextends: ../base.yaml  # kept\nname: small # why\n"
    )
    monkeypatch.setattr(recipes, "FOLDER", folder)
    return folder


@pytest.mark.parametrize(
    "word", ["toy/vq-small", "vq-small", "configs/toy/vq-small.yaml", "./configs/toy/vq-small.yaml"]
)
def test_a_recipe_is_found_by_any_of_its_names(shipped, word):
    assert recipes.resolve(word) == shipped / "toy" / "vq-small.yaml"


def test_an_unknown_recipe_names_the_nearest(shipped):
    with pytest.raises(UsageError, match=r"no such recipe: vq-smal; did you mean 'vq-small'?"):
        recipes.resolve("vq-smal")


def test_init_copies_comments_and_keeps_the_parent(shipped, tmp_path, monkeypatch, capsys):
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    assert cli.main(["init", "vq-small", "mine.yaml"]) == 0
    text = Path("mine.yaml").read_text()
    assert text.startswith("# Small. # really\n")
    assert text.endswith("  # kept\nname: small # why\n")
    parent = text.splitlines()[1].split()[1]
    assert (work / parent).resolve() == shipped / "base.yaml"


def test_init_does_not_overwrite(shipped, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("vq-small.yaml").write_text("mine")
    assert cli.main(["init", "vq-small"]) == 1
    assert "vq-small.yaml exists" in capsys.readouterr().err
    assert Path("vq-small.yaml").read_text() == "mine"


# Runs


def test_show_says_what_is_known_of_a_run(run_directory, capsys):
    assert cli.main(["show", str(run_directory)]) == 0
    out = capsys.readouterr().out
    for word in ("50 of 100 samples (50%)", "loss", "0.25", "last: 0000005", "0000005-ema.png", "psnr", "21.5"):
        assert word in out


def test_show_of_a_run_that_has_just_begun(run_directory):
    for name in ("metrics.jsonl", "eval/0000005.json", "samples/0000005-ema.png"):
        (run_directory / name).unlink()
    found = show.summary(str(run_directory))
    assert found["metrics"] == {}
    assert "0 of 100" in show.render(found)


def test_show_names_the_nearest_run(run_directory):
    with pytest.raises(UsageError, match=r"does not exist; did you mean 'toy'?"):
        show.summary(str(run_directory.parent / "tooy"))


def test_ls_runs(run_directory, capsys):
    assert cli.main(["ls", "runs", "-o", str(run_directory.parent), "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == [str(run_directory)]


# Several processes

WORKER = """
import os, signal, sys, time
from pathlib import Path
rank, folder = os.environ["RANK"], Path(sys.argv[-1])
if sys.argv[2] == "fail":
    sys.exit(7 if rank == "1" else 0)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(85))
(folder / rank).write_text(" ".join([os.environ["WORLD_SIZE"], os.environ["MASTER_PORT"], *sys.argv[1:3]]))
time.sleep(20 if sys.argv[2] == "wait" else 0)
"""


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """`python -m genkit` runs WORKER, in this process's children."""
    (tmp_path / "genkit").mkdir()
    (tmp_path / "genkit" / "__main__.py").write_text(WORKER)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_launch_starts_processes_that_find_each_other(worker):
    from genkit.launch import launch

    assert launch(["train", "go", str(worker)], 3) == 0
    told = {(worker / str(rank)).read_text() for rank in range(3)}
    assert len(told) == 1
    assert told.pop().startswith("3 ")


def test_launch_reports_the_exit_code_of_the_one_that_failed(worker):
    from genkit.launch import launch

    assert launch(["train", "fail", str(worker)], 2) == 7


def test_launch_passes_signals_on(worker):
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from genkit.launch import launch; "
    program += f"sys.exit(launch(['train', 'wait', {str(worker)!r}], 2))"
    process = subprocess.Popen([sys.executable, "-c", program], cwd=worker)
    while not all((worker / rank).exists() for rank in "01"):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=15) == 85


@pytest.mark.parametrize("words", [["--launch", "2"], ["--launch=2"]])
def test_launched_processes_get_the_same_command_without_launch(monkeypatch, tmp_path, words):
    path = tmp_path / "r.yaml"
    path.write_text("")
    calls = []
    monkeypatch.setattr("genkit.launch.launch", lambda words, processes: calls.append((words, processes)) or 85)
    assert cli.main(["train", str(path), *words, "a=1", "--json"]) == 85
    assert calls == [(["train", str(path), "a=1", "--json"], 2)]


# The console


def test_progress_prints_lines_where_there_is_no_terminal(capsys):
    with console.Progress(100, "images", "vq") as progress:
        progress.advance(50, loss=0.5)
        progress.report({"step": 5, "samples": 50, "loss": 0.25})
        progress.line("saved")
        progress.advance(50)
        progress.report({"step": 10, "samples": 100, "loss": 0.125})
    first, saved, last = capsys.readouterr().err.splitlines()
    assert first == "vq 50/100 images, 0 s left: step 5  loss 0.25"
    assert saved == "saved"
    assert last == "vq 100/100 images: step 10  loss 0.125"


def test_progress_draws_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with console.Progress(100, "images", "vq", initial=20) as progress:
        progress.advance(40)
        progress.report({"loss": 0.25, "lr": 1e-3})
        progress.line("a step was skipped")
        progress.log("not shown beside a bar")
        progress.advance(40)
    err = capsys.readouterr().err
    for word in ("vq", "100/100", "images/s", "loss 0.25", "a step was skipped"):
        assert word in err
    assert "not shown" not in err


@pytest.mark.parametrize("quiet", [True, False])
def test_progress_can_be_silent(capsys, monkeypatch, quiet):
    monkeypatch.setattr(console, "_quiet", quiet)
    with console.Progress(10, "images", "vq", enabled=quiet) as progress:
        progress.advance(5)
        progress.report({"loss": 1.0})
        progress.line("event")
    assert capsys.readouterr().err == ""


def test_table_aligns_numbers_right_and_words_left():
    assert console.table([("a", 1), ("long", 22.5)], ("name", "n")) == "name     n\n----  ----\na        1\nlong  22.5"
    assert console.table([]) == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.7, "1 min 00 s"), (125, "2 min 05 s"), (7260, "2 h 01 min")]
)
def test_durations_are_read_by_people(seconds, text):
    assert console.duration(seconds) == text


# Optional packages


def test_a_missing_optional_package_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "open3d", None)
    with pytest.raises(GenkitError, match=r"open3d is not installed; pip install 'genkit-torch\[3d\]'"):
        optional.require("open3d")


def test_a_missing_system_library_names_the_debian_packages(tmp_path, monkeypatch):
    body = "raise OSError('libGL.so.1: cannot open shared object file')"
    (tmp_path / "open3d.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "open3d", raising=False)
    with pytest.raises(
        GenkitError, match=r"libGL\.so\.1.*apt-get install libusb-1\.0-0 libgl1 libegl1 libx11-6 libgomp1$"
    ):
        optional.require("open3d")


def test_an_optional_package_that_is_there_is_returned():
    assert optional.require("scipy").__name__ == "scipy"


# Codes


@pytest.fixture
def coder(monkeypatch):
    """A run whose tokenizer has one level of 256 codes, the grey values themselves, on 4x6 images with stride 2."""
    import torch
    from torch import nn

    from genkit import pipeline
    from genkit.interfaces import Encoded

    class Grey(nn.Module):
        num_levels, codebook_size, stride, channels = 1, 256, 2, 1

        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(127.5))
            self.config = {"image_channels": 1}

        def encode(self, x):
            ids = ((x[:, :, ::2, ::2] + 1) * self.scale).round().long()
            return Encoded(z=ids.float(), ids=ids)

        def codes(self, ids):
            return ids / self.scale - 1

        def decode(self, z):
            return z.repeat_interleave(2, -1).repeat_interleave(2, -2)

    tokenizer = Grey()
    run = SimpleNamespace(tokenizer=tokenizer, run_config={"data": {"type": "folder", "size": [4, 6]}}, device="cpu")
    monkeypatch.setattr(pipeline, "open_run", lambda path, **_: run)
    return tokenizer


@pytest.fixture
def pictures(tmp_path):
    from PIL import Image

    folder = tmp_path / "pictures"
    (folder / "b").mkdir(parents=True)
    for i, name in enumerate(["a.png", "b/a.png", "b/c.jpg"]):
        Image.fromarray(np.full((4, 6), 40 * i, np.uint8)).save(folder / name)
    (folder / "broken.png").write_bytes(b"not a picture")
    return folder


def test_encode_and_decode_give_the_images_back(coder, pictures, tmp_path, capsys):
    from PIL import Image

    codes, out = str(tmp_path / "codes.npz"), tmp_path / "out"
    assert cli.main(["encode", "runs/x", str(pictures), "-o", codes, "--batch-size", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["images"], found["tokens"], list(found["skipped"])) == (3, 6, ["broken.png"])
    assert found["bits_per_pixel"] == pytest.approx(6 * 8 / 24)
    assert found["entropy_bits_per_pixel"] == pytest.approx(np.log2(3) * 6 / 24, rel=0.05)
    assert np.load(codes)["ids"].dtype == np.uint16
    assert cli.main(["decode", "runs/x", codes, "-o", str(out)]) == 0
    assert sorted(p.relative_to(out).as_posix() for p in out.rglob("*.png")) == ["a.png", "b/a.png", "b/c.png"]
    assert np.asarray(Image.open(out / "b" / "a.png")).tolist() == np.full((4, 6), 40).tolist()


def test_encode_of_one_file(coder, pictures, tmp_path):
    from genkit.coding import encode, read

    assert encode("run", str(pictures / "b" / "c.jpg"), str(tmp_path / "one.npz"))["images"] == 1
    assert read(str(tmp_path / "one.npz"))["names"] == ["c.jpg"]


def test_a_continuous_tokenizer_has_nothing_to_encode(coder, pictures, tmp_path):
    from genkit.coding import encode

    coder.num_levels = 0
    with pytest.raises(UsageError, match="continuous latents"):
        encode("run", str(pictures), str(tmp_path / "codes.npz"))


def test_codes_of_another_tokenizer_are_refused(coder, pictures, tmp_path):
    from genkit.coding import decode, encode

    path = str(tmp_path / "codes.npz")
    encode("run", str(pictures), path)
    coder.scale.data += 1
    with pytest.raises(GenkitError, match="was written by tokenizer"):
        decode("run", path, str(tmp_path / "out"))


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-40])


def _empty(path):
    path.write_bytes(b"")


def _change(**changes):
    def change(path):
        with np.load(path) as stored:
            content = dict(stored)
        np.savez(path, **{**content, **changes})

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "is not a complete codes file"),
        (_empty, "is not a complete codes file"),
        (Path.unlink, "no such codes file"),
        (_change(version=np.int64(99)), "has format version 99"),
        (_change(ids=np.full((3, 1, 2, 3), 300)), "is not a complete codes file"),
        (_change(ids=np.zeros((2, 1, 2, 3), np.uint16)), "is not a complete codes file"),
        (_change(names=np.array([object()] * 3)), "is not a complete codes file"),
        (_change(version=np.array("x")), "is not a complete codes file"),
    ],
)
def test_a_damaged_codes_file_is_one_line(coder, pictures, tmp_path, damage, message):
    from genkit.coding import encode, read

    path = tmp_path / "codes.npz"
    encode("run", str(pictures), str(path))
    damage(path)
    with pytest.raises(GenkitError, match=message) as caught:
        read(str(path))
    assert "\n" not in str(caught.value)


def test_a_codes_file_cannot_write_outside_its_folder(coder, pictures, tmp_path):
    from genkit.coding import decode, encode

    path = tmp_path / "codes.npz"
    encode("run", str(pictures), str(path))
    _change(names=np.array(["../../up.png", "/abs.png", "../../up.png"]))(path)
    out = tmp_path / "deep" / "out"
    decode("run", str(path), str(out))
    assert sorted(p.relative_to(tmp_path / "deep").as_posix() for p in tmp_path.joinpath("deep").rglob("*.png")) == [
        "out/abs.png",
        "out/up-2.png",
        "out/up.png",
    ]


# Set-up scripts


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A copy of the scripts with a virtual environment whose pip and genkit only write down how they were called."""
    for name in ("setup.sh", "quickstart"):
        target = tmp_path / "checkout" / "scripts" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / "scripts" / name).read_bytes())
        target.chmod(0o755)
    (tmp_path / "checkout" / "pyproject.toml").write_text("[project]\n")
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        f"""#!/bin/bash
if [ "$1 $2 $3" = "-m pip --version" ]; then exit 0; fi
if [ "$1 $2" = "-m pip" ]; then echo "pip ${{@: -1}}" >>"{tmp_path}/calls"; exit "${{PIP_EXIT:-0}}"; fi
if [ "$1 $2" = "-m genkit" ]; then echo "genkit ${{*:3}}" >>"{tmp_path}/calls"; exit 0; fi
if [[ "$2" == *sys.prefix* ]]; then echo "{tmp_path}/venv"; exit 0; fi
exec "{sys.executable}" "$@"
"""
    )
    python.chmod(0o755)
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path / "venv"))
    monkeypatch.delenv("GENKIT_EXTRAS", raising=False)
    return tmp_path


def quickstart(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    script = folder / "checkout" / "scripts" / "quickstart"
    return subprocess.run([script, *words], capture_output=True, text=True, cwd="/", env={**os.environ, **environment})


def test_quickstart_installs_once_and_passes_its_options(checkout):
    assert quickstart(checkout, "--seed", "1").returncode == 0
    assert quickstart(checkout).returncode == 0
    assert (checkout / "calls").read_text() == "pip .\ngenkit quickstart --seed 1\ngenkit quickstart\n"


def test_quickstart_installs_again_when_the_dependencies_changed(checkout):
    quickstart(checkout)
    (checkout / "checkout" / "pyproject.toml").write_text("[project]\n# new\n")
    quickstart(checkout)
    assert (checkout / "calls").read_text().count("pip .") == 2


def test_a_failed_installation_is_told_and_tried_again(checkout):
    done = quickstart(checkout, PIP_EXIT="1")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert quickstart(checkout).returncode == 0
    assert (checkout / "calls").read_text().endswith("pip .\ngenkit quickstart\n")
