"""Saved runs as pipelines, samples on disk, the front door in Python."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from genkit import AutoPipeline, AutoTokenizer
from genkit.errors import GenkitError, UsageError
from genkit.labels import parse_labels
from genkit.pipeline import draw_seeds, open_run
from genkit.sampling import sample
from genkit.training import train
from tests.tiny import GENERATOR, TOKENIZER


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("work") / "runs"
    train(TOKENIZER, {"train.num_samples": 64}, out=out)
    train(GENERATOR, {"train.num_samples": 64, "tokenizer.from": str(out / "vq")}, out=out)
    return out


@pytest.fixture(scope="module")
def pipe(runs):
    return AutoPipeline.from_pretrained(runs / "masked")


def test_call_gives_pil_images_and_a_generator_decides_them(pipe):
    images = pipe(class_labels=[3, "Sneaker", 7], generator=torch.Generator().manual_seed(1)).images
    again = pipe(class_labels=[3, "Sneaker", 7], generator=torch.Generator().manual_seed(1)).images
    assert [image.size for image in images] == [(28, 28)] * 3
    assert all(np.array_equal(a, b) for a, b in zip(images, again, strict=True))


@pytest.mark.parametrize(("kind", "shape"), [("np", (2, 28, 28, 1)), ("pt", (2, 1, 28, 28))])
def test_output_types(pipe, kind, shape):
    assert tuple(pipe(class_labels=[0, 1], output_type=kind).images.shape) == shape


def test_sample_is_the_same_in_any_batch(pipe):
    labels, seeds = torch.arange(5), [11, 12, 13, 14, 15]
    whole = pipe.generate(labels, seeds)
    parts = torch.cat([pipe.generate(labels[i : i + 2], seeds[i : i + 2]) for i in range(0, 5, 2)])
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-5)


def test_step_callback_sees_every_step(pipe):
    seen = []
    pipe(
        class_labels=[0],
        num_inference_steps=3,
        callback_on_step_end=lambda pipe, step, total, state: seen.append((step, total)),
    )
    assert seen == [(0, 3), (1, 3), (2, 3)]


def test_guidance_changes_samples_and_one_means_off(pipe):
    labels, seeds = torch.zeros(4, dtype=torch.int64), [1, 2, 3, 4]
    assert not torch.equal(pipe.generate(labels, seeds, guidance=30.0), pipe.generate(labels, seeds, guidance=1.0))


@pytest.mark.parametrize("labels", [[10], [-2], ["Trousrs"]])
def test_labels_out_of_range_are_refused(pipe, labels):
    with pytest.raises(UsageError, match=r"out of range|did you mean 'trouser'"):
        pipe(class_labels=labels)


def test_one_generator_per_image():
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    seeds = draw_seeds(generators, 3)
    assert seeds == [draw_seeds(torch.Generator().manual_seed(i), 1)[0] for i in range(3)] or len(set(seeds)) == 3
    with pytest.raises(UsageError, match="2 generators for 3 images"):
        draw_seeds(generators[:2], 3)


def test_saved_pipeline_loads_in_a_fresh_process_through_diffusers(runs, pipe):
    index = json.loads((pipe.folder / "model_index.json").read_text())
    assert index["tokenizer"] == ["genkit", "VQ"]
    assert index["backbone"] == ["genkit", "Masked"]
    code = (
        "import sys, torch, genkit\n"
        "pipe = genkit.GeneratorPipeline.from_pretrained(sys.argv[1])\n"
        "print(pipe(class_labels=[1], generator=torch.Generator().manual_seed(0)).images[0].size)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(pipe.folder)], capture_output=True, text=True, timeout=120)
    assert "(28, 28)" in done.stdout, done.stderr


def test_averaged_weights_are_the_default(runs, pipe):
    raw = AutoPipeline.from_pretrained(runs / "masked", ema=False)
    assert pipe.weights_variant == "ema"
    assert raw.weights_variant == "raw"
    assert not torch.equal(next(pipe.backbone.parameters()), next(raw.backbone.parameters()))


def test_tokenizer_round_trip(runs):
    tokenizer = AutoTokenizer.from_pretrained(runs / "vq")
    encoded = tokenizer.encode(torch.rand(2, 1, 28, 28) * 2 - 1)
    assert encoded.ids.shape == (2, 1, 7, 7)
    torch.testing.assert_close(tokenizer.codes(encoded.ids), encoded.z)


def test_missing_run_names_a_near_one(runs):
    with pytest.raises(UsageError, match="did you mean 'masked'"):
        AutoPipeline.from_pretrained(runs / "maskd")


@pytest.mark.parametrize("name", ["model_index.json", "tokenizer/diffusion_pytorch_model.ema.safetensors"])
def test_a_damaged_checkpoint_says_what_to_do(runs, tmp_path, name):
    copied = tmp_path / "copy"
    shutil.copytree(runs / "vq", copied, symlinks=True)
    file = copied / "checkpoints" / "last" / "pipeline" / name
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(GenkitError, match=r"is damaged .*restore it, or train it again"):
        open_run(copied)


def test_samples_on_disk_continue_and_refuse_to_mix(runs, tmp_path):
    out = tmp_path / "out"
    report = sample(runs / "masked", count=6, labels="0-2", out=out, batch_size=4)
    files = sorted(out.glob("0*.png"))
    before = [Image.open(file).tobytes() for file in files]
    assert len(files) == report["images"] == 6
    record = json.loads((out / "samples.json").read_text())
    assert [row["label"] for row in record["samples"]] == [0, 1, 2, 0, 1, 2]
    assert record["samples"][4]["seed"] == 4
    files[4].unlink()
    sample(runs / "masked", count=6, labels="0-2", out=out, batch_size=1)
    assert [Image.open(file).tobytes() for file in files] == before
    with pytest.raises(UsageError, match="holds other samples"):
        sample(runs / "masked", count=6, labels="0-3", out=out)


def test_sampling_shows_how_far_it_is(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    sample(runs / "masked", count=3, out=tmp_path / "out", batch_size=2, steps=4)
    shown = capsys.readouterr().err
    assert "sample masked" in shown
    assert "100%" in shown
    assert "3/3" in shown
    assert "step 4" in shown


def test_two_processes_share_out_the_samples(runs, tmp_path):
    sample(runs / "masked", count=5, out=tmp_path / "one")
    code = f"from genkit.sampling import sample; sample({str(runs / 'masked')!r}, count=5, out={str(tmp_path / 'two')!r}, device='cpu')"
    script = tmp_path / "go.py"
    script.write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for i in range(5):
        one, two = (np.asarray(Image.open(tmp_path / name / f"{i:06d}.png")).astype(int) for name in ("one", "two"))
        assert np.abs(one - two).max() <= 1
    assert (tmp_path / "two/grid.png").exists()


@pytest.mark.parametrize(
    ("text", "expected"), [("0-2", [0, 1, 2]), ("2, b", [2, 1]), ([1, "c"], [1, 2]), (None, [0, 1, 2]), ("-1", [-1])]
)
def test_labels_by_range_number_and_name(text, expected):
    assert parse_labels(text, ("a", "b", "c")) == expected


@pytest.mark.parametrize("text", ["3", "0-5", "", "x"])
def test_wrong_labels_are_refused(text):
    with pytest.raises(UsageError):
        parse_labels(text, ("a", "b", "c"))


def test_sampling_a_tokenizer_says_what_to_do(runs):
    with pytest.raises(UsageError, match="is a tokenizer"):
        sample(runs / "vq")
