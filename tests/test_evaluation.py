"""Evaluation of pipelines, folders and npz files, with stand-ins for trained models."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from genkit import config
from genkit.data.fashion import CLASS_NAMES, Fashion
from genkit.errors import GenkitError, UsageError
from genkit.evaluation.evaluate import evaluate
from genkit.evaluation.subjects import Sampling
from genkit.images import to_uint8
from genkit.interfaces import Encoded
from genkit.metrics.frechet import Frechet

DATA = {"type": "fashion", "source": "embedded", "split": "train", "size": None}
VAL = Fashion(source="embedded", split="val")
IMAGES = VAL.pixels.float() / 127.5 - 1
OF_CLASS = [(VAL.labels == c).nonzero().flatten() for c in range(10)]


class Generator:
    """ "Samples" real images of the class asked for, chosen by the seed."""

    num_classes = 10
    class_names = CLASS_NAMES
    weights_variant = "ema"
    sampler = {"type": "masked", "num_steps": 12, "guidance": 2.0}  # noqa: RUF012

    def __init__(self, metrics=()):
        self.run_config = {
            "data": DATA,
            "metrics": list(metrics),
            "sampler": self.sampler,
            "train": {"batch_size": 4},
        }
        self.labels, self.seeds, self.calls = [], [], []

    def generate(self, labels, seeds, *, steps=None, guidance=None):
        self.labels += labels.tolist()
        self.seeds += list(seeds)
        self.calls.append((len(labels), steps, guidance))
        own = [OF_CLASS[c] for c in labels.tolist()]
        return IMAGES[torch.stack([rows[seed // 10 % len(rows)] for rows, seed in zip(own, seeds, strict=True)])]


class Choosing(Generator):
    """A generator whose sampler may be changed."""

    def chosen_sampler(self, changes):
        return config.with_sampler({"type": "euler", "num_steps": 5, "guidance": 2.0}, changes)

    def generate(self, labels, seeds, *, steps=None, guidance=None, sampler=()):
        self.changes = list(sampler)
        return super().generate(labels, seeds, steps=steps, guidance=guidance)


class Identity(torch.nn.Module):
    """A tokenizer that loses nothing and uses 8 of its 16 codes."""

    channels, stride, num_levels, codebook_size = 1, 28, 1, 16

    def encode(self, x):
        assert not self.training
        return Encoded(z=x, ids=(torch.arange(len(x)) % 8)[:, None, None, None])

    def decode(self, z):
        return z

    def codes(self, ids):
        raise NotImplementedError


def tokenizer_pipeline(data=DATA):
    module = Identity().train()
    return SimpleNamespace(tokenizer=module, run_config={"data": data}, components={"tokenizer": module}, device="cpu")


def test_generator_is_compared_with_its_training_data_and_judged_by_class():
    pipe = Generator()
    report = evaluate(pipe, count=200, batch_size=64, seed=3, steps=4, guidance=1.5)
    assert report.keys() == ["FD (fashion-cnn-v1)", "class accuracy"]
    assert 0 < report["FD"] < 100
    assert report["class accuracy"] > 0.85
    assert pipe.calls == [(64, 4, 1.5)] * 3 + [(8, 4, 1.5)]
    assert pipe.seeds == [3 * 2**32 + i for i in range(200)]
    assert [pipe.labels.count(c) for c in range(10)] == [20] * 10
    protocol = report.rows[0]["protocol"]
    for word in (
        "N=200",
        "labels balanced",
        "ema",
        "masked steps=4 guidance=1.5",
        "seed 3",
        "fashion train, n=9000, sha ",
    ):
        assert word in protocol
    assert report.rows[1]["protocol"].count("reference") == 0
    assert "report" not in str(report)
    assert str(report).splitlines()[0].startswith("FD (fashion-cnn-v1)")
    assert "biased" in str(report)  # 200 images, 128 features
    assert "class accuracy: ankle boot" in report.details


def test_batch_size_does_not_change_the_numbers():
    metrics = ["frechet", {"type": "kid", "subsets": None}, "precision_recall", "vendi", "class_accuracy"]
    options = {"count": 90, "reference": "val", "metrics": metrics}
    one, two = (evaluate(Generator(), batch_size=size, **options) for size in (90, 37))
    for a, b in zip(one.rows, two.rows, strict=True):
        assert b["value"] == pytest.approx(a["value"], rel=1e-6), a["metric"]


def test_metrics_of_the_recipe_are_the_default_and_say_how_many():
    pipe = Generator(metrics=[{"type": "frechet", "count": 30, "reference": "val"}])
    report = evaluate(pipe)
    assert report.keys() == ["FD (fashion-cnn-v1)"]
    assert len(pipe.seeds) == 30
    assert "fashion val, n=1000" in report.rows[0]["protocol"]


def test_tokenizer_that_loses_nothing_is_perfect_on_the_validation_split():
    pipe = tokenizer_pipeline()
    report = evaluate(pipe)
    assert report["PSNR"] == pytest.approx(100)
    assert report["SSIM"] == pytest.approx(1)
    assert report["rFD"] == pytest.approx(0, abs=1e-6)
    assert report["codebook usage"] == 0.5
    assert report["codebook perplexity"] == pytest.approx(8)
    assert report["dead codes"] == 8
    assert "fashion val, n=1000" in report.rows[0]["protocol"]
    assert pipe.tokenizer.training  # as it was


def test_frechet_of_a_tokenizer_uses_its_own_reference():
    report = evaluate(tokenizer_pipeline(), metrics=[{"type": "frechet", "reference": "val"}], count=300)
    alone = Frechet()
    alone.update(real=IMAGES, fake=IMAGES[:300])  # the images it encodes are no part of the reference
    assert report["FD"] == pytest.approx(alone.result()["FD (fashion-cnn-v1)"], rel=1e-5)
    assert "reference fashion val, n=1000" in report.rows[0]["protocol"]


def test_folder_npz_and_stream_of_the_same_images_score_the_same(tmp_path):
    count = 60
    pipe = Generator()
    streamed = evaluate(pipe, count=count, reference="val")
    x = pipe.generate(torch.tensor(pipe.labels), list(pipe.seeds))
    pixels = to_uint8(x).numpy()
    for i, image in enumerate(pixels[..., 0]):
        folder = tmp_path / "out" / CLASS_NAMES[i % 10]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i:03d}.png")
    Image.new("L", (99, 99)).save(tmp_path / "out" / "grid.png")
    np.savez(tmp_path / "nyxc.npz", arr_0=pixels, arr_1=np.arange(count) % 10)
    np.savez(tmp_path / "ncyx.npz", arr_0=pixels.transpose(0, 3, 1, 2))
    for name in ("out", "nyxc.npz", "ncyx.npz"):
        report = evaluate(tmp_path / name, reference="fashion:val")
        assert report["FD"] == pytest.approx(streamed["FD"], rel=1e-5)
        if name == "ncyx.npz":
            assert "class accuracy" not in report.keys()
        else:
            assert report["class accuracy"] == streamed["class accuracy"]
        assert any("grid" in note for note in report.notes) == (name == "out")


def test_labels_of_a_sampled_folder_come_from_its_record(tmp_path):
    rows = []
    for i in range(20):
        Image.fromarray(VAL.pixels[i, 0].numpy()).save(tmp_path / f"{i:06d}.png")
        rows.append({"file": f"{i:06d}.png", "label": int(VAL.labels[i]), "seed": i})
    (tmp_path / "samples.json").write_text(json.dumps({"samples": rows}))
    assert evaluate(tmp_path, metrics=["class_accuracy"])["class accuracy"] > 0.8
    (tmp_path / "samples.json").write_text("[]")
    with pytest.raises(GenkitError, match=r"samples\.json is not the list"):
        evaluate(tmp_path, metrics=["class_accuracy"])


def test_npz_of_statistics_replaces_the_images_it_was_made_from(tmp_path):
    by_images = evaluate(Generator(), count=40, reference="fashion:val", metrics=["frechet"])
    metric = Frechet()
    metric.update(real=IMAGES)
    metric.real.moments(metric.net.sha256, metric.net.protocol, "fashion val").save(tmp_path / "ref.npz")
    by_file = evaluate(Generator(), count=40, reference=str(tmp_path / "ref.npz"), metrics=["frechet", "frechet"])
    assert by_file["FD"] == pytest.approx(by_images["FD"], rel=1e-9)
    assert "reference fashion val, n=1000, sha " in by_file.rows[1]["protocol"]
    metric.real.moments("0" * 64, "other", "x").save(tmp_path / "other.npz")
    with pytest.raises(GenkitError, match="cannot be compared with fashion-cnn-v1"):
        evaluate(Generator(), count=40, reference=str(tmp_path / "other.npz"), metrics=["frechet"])


def test_report_is_written_with_everything_to_repeat_it(tmp_path):
    report = evaluate(Generator(), count=20, metrics=["class_accuracy"], out=tmp_path / "eval" / "a.json")
    saved = json.loads((tmp_path / "eval" / "a.json").read_text())
    assert saved == report.to_dict()
    assert saved["settings"]["metrics"] == [
        {"type": "class_accuracy", "features": "fashion-cnn", "count": 5000, "weights": None}
    ]
    assert saved["settings"]["count"] == 20
    assert len(saved["settings"]["feature_nets"]["fashion-cnn-v1"]) == 64
    assert saved["settings"]["versions"]["torch"] == torch.__version__


def test_report_of_a_run_is_kept_in_it_by_step(tmp_path, monkeypatch):
    from genkit import pipeline

    (tmp_path / "config.resolved.yaml").touch()
    pipe = Generator()
    pipe.folder = tmp_path / "checkpoints" / "0000005" / "pipeline"
    asked = []
    monkeypatch.setattr(pipeline, "open_run", lambda path, **options: asked.append((path, options["ema"])) or pipe)
    report = evaluate(tmp_path, count=20, metrics=["class_accuracy"], ema=False)
    assert asked == [(tmp_path, False)]
    assert json.loads((tmp_path / "eval" / "0000005-raw-class_accuracy-20.json").read_text()) == report.to_dict()


def test_another_sampler_is_asked_for_told_and_kept_apart():
    changes = ["type=heun", "num_steps=9", "reuse={type: skip_blocks}"]
    pipe = Choosing()
    report = evaluate(pipe, count=10, metrics=["class_accuracy"], sampler=changes)
    assert pipe.changes == changes
    assert "heun steps=9 guidance=2.0" in report.rows[0]["protocol"]
    assert f"sampler {' '.join(changes)}" in report.rows[0]["protocol"]
    assert report.settings["sampler_changes"] == changes
    assert Sampling(0, None, None, "balanced", sampler=("type=heun", "rtol=0.1")).suffix == "-type-heun-rtol-0.1"
    with pytest.raises(UsageError, match=r"unknown key sampler\.rtol"):
        evaluate(Choosing(), count=10, metrics=["class_accuracy"], sampler=["rtol=0.1"])


def images_of(path: Path, *sizes, mode="L"):
    path.mkdir()
    for i, size in enumerate(sizes):
        Image.new(mode, size).save(path / f"{i}.png")
    return path


def pictures(path: Path, count: int) -> Path:
    """Held-out images in folders by class, so that they have labels."""
    for i in range(count):
        file = path / CLASS_NAMES[int(VAL.labels[i])] / f"{i:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(VAL.pixels[i, 0].numpy()).save(file)
    return path


def npz(path, **arrays):
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda tmp: tmp / "nowhere", "does not exist"),
        (lambda tmp: images_of(tmp / "empty"), "has no images"),
        (lambda tmp: images_of(tmp / "mixed", (28, 28), (30, 30)), "mixes sizes: 0.png is 1x28x28, 1.png is 1x30x30"),
        (lambda tmp: npz(tmp / "keys.npz", images=np.zeros((2, 4, 4, 3), np.uint8)), "no arr_0 .* found images uint8 "),
        (
            lambda tmp: npz(tmp / "float.npz", arr_0=np.zeros((2, 4, 4, 3))),
            "arr_0 must be uint8 .* found arr_0 float64",
        ),
        (lambda tmp: npz(tmp / "axes.npz", arr_0=np.zeros((2, 4, 4, 5), np.uint8)), "with 1 or 3 channels"),
        (
            lambda tmp: npz(tmp / "object.npz", arr_0=np.array([{}], dtype=object)),
            "pickled objects, which are never loaded",
        ),
    ],
)
def test_unusable_targets_are_one_line(tmp_path, make, message):
    with pytest.raises(GenkitError, match=message) as caught:
        evaluate(make(tmp_path), reference="fashion:val", metrics=["frechet"])
    assert "\n" not in str(caught.value)


def test_damaged_image_is_named(tmp_path):
    folder = images_of(tmp_path / "folder", (28, 28), (28, 28))
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:40])
    with pytest.raises(GenkitError, match=r"1\.png cannot be decoded"):
        evaluate(folder, reference="fashion:val")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count=0: at least one"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"metrics": ["fid"]}, "metrics.type=fid is not a metrics"),
        ({"metrics": [{"type": "frechet", "refrence": "val"}]}, "unknown key .*refrence; did you mean 'reference'"),
        ({"reference": "fashon"}, "reference=fashon is neither .* did you mean 'fashion'"),
        ({"metrics": []}, "nothing to measure"),
        ({"count": 1, "reference": "val"}, "at least 2 images"),
    ],
)
def test_wrong_options_are_one_line(options, message):
    with pytest.raises(GenkitError, match=message) as caught:
        evaluate(Generator(), **({"count": 10} | options))
    assert "\n" not in str(caught.value)


def test_more_images_than_there_are_is_refused():
    with pytest.raises(UsageError, match="count=2000, but there are only 1000 images"):
        evaluate(tokenizer_pipeline(), count=2000)


def test_folder_without_a_run_has_no_training_data(tmp_path):
    with pytest.raises(UsageError, match="reference=train means a split of a run's own data"):
        evaluate(images_of(tmp_path / "folder", (28, 28), (28, 28)))


def test_images_too_large_for_the_small_net_need_named_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("GENKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GENKIT_WEIGHTS", raising=False)
    folder = images_of(tmp_path / "folder", (64, 64), (64, 64), mode="RGB")
    with pytest.raises(GenkitError, match="weights of inception-2015 are not here"):
        evaluate(folder, reference="fashion:val")


TWO_PROCESSES = """
import sys
sys.path[:0] = {paths!r}
import torch
torch.distributed.init_process_group("gloo", init_method="file://{file}", rank=int(sys.argv[1]), world_size=2)
from test_evaluation import Generator, evaluate
report = evaluate(Generator(), count=50, batch_size=8, metrics=["frechet", "class_accuracy"], reference="fashion:val",
                  out="{out}" if sys.argv[1] == "0" else None)
torch.distributed.destroy_process_group()
"""


def test_two_processes_give_the_numbers_of_one(tmp_path):
    tests = Path(__file__).parent
    script = TWO_PROCESSES.format(
        paths=[str(tests), str(tests.parent)], file=tmp_path / "store", out=tmp_path / "two.json"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([sys.executable, "-c", script, str(rank)], env=environment) for rank in range(2)]
    assert [rank.wait(timeout=200) for rank in ranks] == [0, 0]
    together = json.loads((tmp_path / "two.json").read_text())
    alone = evaluate(
        Generator(), count=50, batch_size=8, metrics=["frechet", "class_accuracy"], reference="fashion:val"
    )
    assert together["settings"]["processes"] == 2
    for two, one in zip(together["rows"], alone.rows, strict=True):
        assert two["value"] == pytest.approx(one["value"], rel=1e-6)
        assert two["protocol"] == one["protocol"]


def test_launched_processes_share_a_folder_out(tmp_path):
    folder = pictures(tmp_path / "some", 21)
    words = [
        "eval",
        str(folder),
        "--ref",
        "fashion:val",
        "--metrics",
        "frechet,kid,precision_recall",
        "--batch-size",
        "4",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "genkit", *words, "--launch", "2", "-o", str(tmp_path / "two.json"), "-q"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("FD (fashion-cnn-v1)  ") == 1  # one of them speaks
    together = json.loads((tmp_path / "two.json").read_text())
    assert together["settings"]["processes"] == 2
    alone = evaluate(folder, reference="fashion:val", metrics=["frechet", "kid", "precision_recall"])
    for two, one in zip(together["rows"], alone.rows, strict=True):
        assert two["value"] == pytest.approx(one["value"], rel=1e-6)
        assert two["protocol"] == one["protocol"]


def test_reports_of_images_lie_beside_them_one_per_reference(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = pictures(tmp_path / "some", 12).relative_to(tmp_path)
    first = evaluate(folder, reference="fashion:val", metrics=["class_accuracy"])
    second = evaluate(folder, reference="fashion", metrics=["class_accuracy"])
    assert {first.path.parent, second.path.parent} == {folder.parent}
    assert [path.name for path in (first.path, second.path)] == [
        f"{folder.name}.eval-class_accuracy-12-{word}.json" for word in ("fashion-val", "fashion")
    ]
    assert type(first).load(first.path).rows == first.rows
    monkeypatch.chdir(folder)
    inside = evaluate(".", reference="fashion:val", metrics=["class_accuracy"])
    assert inside.path.resolve() == (tmp_path / first.path).resolve()


def test_a_folder_that_cannot_be_written_to_costs_the_report_and_not_the_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    report = evaluate(pictures(tmp_path / "some", 12), reference="fashion:val", metrics=["class_accuracy"])
    assert report.path is None
    assert any("the report is not kept" in note and "-o" in note for note in report.notes)


def test_a_split_that_does_not_exist_is_one_line(tmp_path):
    with pytest.raises(UsageError, match=r"data.split='tset'.*'train', 'val'"):
        evaluate(pictures(tmp_path / "some", 12), reference="fashion:tset")
