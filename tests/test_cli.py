"""Arguments, results, errors and exit codes of every verb; what the verbs call has tests of its own."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from genkit import cli, console, optional
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


def test_quiet_silences_progress_but_not_warnings(stub, capsys, caplog):
    def collect():
        console.say("progress")
        logging.getLogger("genkit.part").warning("careful")
        return {}

    stub("genkit.env", collect=collect, render=lambda found: "result")
    cli.main(["env", "-q"])
    out, err = capsys.readouterr()
    assert out == "result\n"
    assert "progress" not in err
    assert caplog.messages == ["careful"]


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
    words += " --format glb --resolution 32 --turntable --caption red --caption blue --image chair.png"
    words += " --database my/photos --classes bag,boot"
    assert cli.main([*words.split(), "--sampler", "type=heun", "reuse.type=skip_blocks"]) == 0
    settings = {"count": 4, "labels": "0-9", "seed": 7, "steps": 3, "guidance": 1.5, "out": "o"}
    settings["sampler"] = ["type=heun", "reuse.type=skip_blocks"]
    settings |= {"size": "48x64", "rope": {"method": "ntk", "gain": "paper", "per_axis": False}}
    settings |= {"known": "a.png", "keep": "left", "format": "glb", "resolution": 32, "turntable": True}
    settings |= {"captions": ["red", "blue"], "pictures": ["chair.png"], "database": "my/photos", "classes": "bag,boot"}
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

    stub("genkit.evaluation.evaluate", evaluate=evaluate)
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
    stub("genkit.bench", run=lambda suite, on_row, **how: [{"case": suite, **how}], render=lambda rows: "rows")
    assert cli.main(["bench", "vq", "--quick", "--json", "--only", "16k"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"case": "vq", "quick": True, "threads": None, "only": "16k"}]


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
