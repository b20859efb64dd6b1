"""Mistakes with generators of latents, as a user makes them: one line that says what was found, what to do, and no traceback."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from genkit import AutoPipeline
from genkit.cli import main
from genkit.errors import UsageError

DATA = {"type": "emoji", "size": 8}
BASE = {
    "data": DATA,
    "tokenizer": {"type": "pixels"},
    "backbone": {"type": "dit", "dim": 16, "depth": 1, "patch_size": 4, "mixer": {"type": "attention", "num_heads": 2}},
    "objective": {"type": "flow"},
    "sampler": {"type": "euler", "num_steps": 2, "guidance": 1.0},
    "train": {"num_samples": 8, "batch_size": 4, "precision": "fp32"},
    "log": {"num_images": 2},
}
DIT = BASE["backbone"]
FIT = {"type": "fit", "dim": 16, "depth": 1, "patch_size": 4, "num_heads": 2}
SIZES = {**DATA, "sizes": ["8x8", "4x12"]}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with small runs: "flow", "chain" (diffusion without variances), "fit" (two sizes) and "nameless" (no classes)."""
    folder = tmp_path_factory.mktemp("home")
    pictures = folder / "pictures"
    pictures.mkdir()
    for i in range(4):
        Image.fromarray(np.full((8, 8, 3), 60 * i, np.uint8)).save(pictures / f"{i}.png")
    recipes = {
        "flow": {},
        "chain": {"objective": {"type": "diffusion"}},
        "fit": {"data": SIZES, "backbone": FIT},
        "nameless": {"data": {"type": "folder", "path": str(pictures), "size": 8}},
    }
    for name, changes in recipes.items():
        write(folder, name, **changes)
        assert main(["train", str(folder / f"{name}.yaml"), "--out", str(folder), "--device", "cpu", "-q"]) == 0
    return folder


def write(folder: Path, name: str, **changes) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text("# A recipe.\n" + yaml.safe_dump({**BASE, **changes}))
    return path


def fails(words: list[str], message: str, capsys, code: int = 2) -> None:
    """The command ends with one line that holds all of `message`'s parts, "..." between them."""
    capsys.readouterr()
    assert main([*words, "-q"]) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    place = 0
    for part in message.split("..."):
        place = lines[0].find(part, place)
        assert place >= 0, f"{part!r} is not in {lines[0]!r}"


@pytest.mark.parametrize(
    ("run", "words", "message"),
    [
        ("flow", ["--size", "8x10"], "size 8x10 (rows x columns) is not divisible by 4...nearest sizes that are: 8x8 or 8x12"),
        ("flow", ["--size", "2x8"], "size 2x8...nearest sizes that are: 4x8"),
        ("flow", ["--size", "big"], "size=big is no size; write rows x columns, as in 48x64"),
        ("flow", ["--size", "0"], "size=0 is no size"),
        ("flow", ["--labels", "16"], "labels '16': 16 is not a class of this model (classes 0-15)"),
        ("flow", ["--labels", "face"], "no class is called 'face'; did you mean 'faces'?"),
        ("nameless", ["--labels", "0"], "0 is not a class of this model (classes none: the model is unconditional)"),
        ("flow", ["--steps", "0"], "steps=0: a sampler takes at least one step"),
        ("flow", ["--sampler", "num_steps=0"], "sampler.num_steps=0 must be at least 1"),
        ("nameless", ["--guidance", "2"], "guidance 2 of a model that was trained without classes"),
        ("flow", ["--guidance", "-1"], "guidance -1 must be at least 0"),
        ("flow", ["-n", "0"], "-n 0: at least one sample is needed"),
        ("flow", ["--rope", "ntk"], "DiT has no rotary positions that could be extrapolated...the backbone fit has"),
        ("fit", ["--rope", "ntkk"], "rope method ntkk is none of none, plain, interpolate, ntk, ntk_by_parts, yarn"),
        ("fit", ["--rope-gain", "much"], "rope gain much is none of none, paper, release"),
        ("fit", ["--rope", "yarn", "--rope-gain", "paper"], "rope_gain=paper goes neither with rope=yarn"),
        ("chain", ["--sampler", "type=ancestral", "variance=learned"], "this model has no variances...use small or large"),
        ("flow", ["--sampler", "type=scheduler", "name=DDIMSchedular"], "sampler.name=DDIMSchedular is no scheduler...did you mean 'DDIMScheduler'?"),
        ("flow", ["--sampler", "type=scheduler", "name=DDIMScheduler"], "DDIMScheduler needs the discrete chain (objective.type=diffusion)"),
        ("chain", ["--sampler", "type=scheduler", "name=FlowMatchEulerDiscreteScheduler"], "needs a straight path (objective.type=flow)"),
        ("flow", ["--sampler", "type=ruler"], "sampler.type=ruler is not a sampler; did you mean 'euler'?"),
        ("flow", ["--sampler", "type=masked"], "sampler.type=masked draws ids...objective.type=flow learns noisy latents...euler"),
    ],
)  # fmt: skip
def test_sampling(home, tmp_path, capsys, run, words, message):
    fails(["sample", str(home / run), "-o", str(tmp_path / "out"), "--device", "cpu", *words], message, capsys)
    assert not list(tmp_path.glob("out/*.png"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--size", "8x10"], "not divisible by 4"),
        (["--size", "4x12", "--rope", "ntk"], "no rotary positions"),
        (["--steps", "0"], "at least one step"),
    ],
)
def test_evaluating(home, capsys, words, message):
    command = ["eval", str(home / "flow"), "-n", "4", "--device", "cpu"]
    fails([*command, *words], message, capsys)


def test_data_that_have_no_such_size(home, capsys, tmp_path):
    recipe = write(tmp_path, "fashion", data={"type": "fashion", "source": "embedded"})
    assert main(["train", str(recipe), "--out", str(tmp_path), "train.num_samples=4", "--device", "cpu", "-q"]) == 0
    fails(
        ["eval", str(tmp_path / "fashion"), "--size", "28x56"],
        "no images of 28x56 to compare with; name others, --ref",
        capsys,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {**DATA, "size": 10}}, "a grid of (10, 10) cannot be cut into patches of (4, 4)"),
        ({"data": {**DATA, "sizes": ["8x8", "6x12"]}}, "sides of these images are multiples of 2 pixels...patches of 4...data.sizes"),
        ({"data": {**DATA, "sizes": ["8by8"]}}, "data.sizes=8by8 is no size"),
        ({"data": SIZES, "backbone": {"type": "dimsum", "dim": 32, "depth": 1}}, "backbone.type=dimsum cannot be trained on batches of several sizes...fit...train.one_size_batches=true"),
        ({"data": SIZES, "backbone": {**DIT, "mixer": {"type": "mamba"}}}, "mixer.type=mamba...The backbones fit...train.one_size_batches=true"),
        ({"data": SIZES, "tokenizer": {"type": "vq"}, "backbone": None, "objective": {"type": "reconstruction"}, "sampler": None}, "a tokenizer is trained on images of one size...data.sizes=null"),
        ({"train": {**BASE["train"], "one_size_batches": True}}, "train.one_size_batches=true is for data in sizes of their own"),
        ({"sampler": {"type": "euler", "num_steps": 0}}, "sampler.num_steps=0 must be at least 1"),
        ({"sampler": {"type": "scheduler", "name": "DDIM"}}, "sampler.name=DDIM is no scheduler"),
        ({"sampler": {"type": "ancestral", "variance": "learned"}, "objective": {"type": "diffusion"}}, "no variances (a backbone with learn_sigma"),
        ({"sampler": {"type": "masked"}}, "sampler.type=masked draws ids"),
        ({"sampler": {"type": "euler", "guidance_interval": [0.5]}}, "guidance_interval"),
        ({"objective": {"type": "flow", "cond_drop": 2}}, "objective.cond_drop=2"),
        ({"objective": {"type": "edm", "sigma_min": 5, "sigma_max": 1}}, "sigma_min=5"),
        ({"backbone": {**FIT, "num_heads": 3}}, "num_heads=3 does not divide"),
        ({"data": {"type": "tokens", "path": "nowhere"}}, "no such token cache: nowhere"),
    ],
)  # fmt: skip
def test_training(tmp_path, capsys, changes, message):
    changed = {**BASE, **changes}
    recipe = write(tmp_path, "wrong", **changes)
    recipe.write_text("# x\n" + yaml.safe_dump({key: value for key, value in changed.items() if value is not None}))
    fails(["train", str(recipe), "--out", str(tmp_path), "--device", "cpu"], message, capsys)


def test_a_mistake_at_the_start_does_not_take_the_name(tmp_path, capsys):
    wrong = write(tmp_path, "run", sampler={"type": "scheduler", "name": "DDIM"})
    fails(["train", str(wrong), "--out", str(tmp_path), "--device", "cpu"], "is no scheduler", capsys)
    right = write(tmp_path, "run")
    assert main(["train", str(right), "--out", str(tmp_path), "--device", "cpu", "-q"]) == 0
    more = ["train", str(right), "train.num_samples=64", "--out", str(tmp_path), "--device", "cpu", "-q"]
    fails(more, "was started with another config", _Whole(capsys))
    fails(more, f"a new run (train.init={tmp_path / 'run'} starts it from these weights)", _Whole(capsys))
    assert main([*more, "--name", "longer", f"train.init={tmp_path / 'run'}"]) == 0  # as the error says


class _Whole:
    """Several lines as one."""

    def __init__(self, capsys):
        self.capsys = capsys

    def readouterr(self):
        found = self.capsys.readouterr()
        return type(found)(found.out, " ".join(found.err.split("\n")))


def test_a_loss_that_is_not_finite(tmp_path, capsys):
    recipe = write(
        tmp_path, "nan", train={**BASE["train"], "num_samples": 80, "lr": 1e30, "max_bad_steps": 2, "clip": None}
    )
    fails(
        ["train", str(recipe), "--out", str(tmp_path), "--device", "cpu"],
        "the loss was not finite for 2 steps in a row...A lower train.lr or train.clip usually helps",
        _Last(capsys),
        code=1,
    )
    dump = next((tmp_path / "nan").glob("bad-step-*.json"))
    assert len(json.loads(dump.read_text())["index"]) == 4


class _Last(_Whole):
    """The last line: those before it tell of every step that was skipped."""

    def readouterr(self):
        found = self.capsys.readouterr()
        return type(found)(found.out, (found.err.strip().splitlines() or [""])[-1])


def test_stale_caches(tmp_path, capsys, monkeypatch):
    """A cache named as the data, of a tokenizer that was trained on."""
    monkeypatch.chdir(tmp_path)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(4):
        Image.fromarray(np.full((8, 8, 3), 60 * i, np.uint8)).save(pictures / f"{i}.png")
    data = {"type": "folder", "path": "pictures", "size": 8}
    tokenizer = {
        "data": data,
        "tokenizer": {"type": "kl", "stride": 4, "width": 8, "num_blocks": 1, "channels": 2},
        "objective": {"type": "reconstruction"},
        "train": {"num_samples": 4, "batch_size": 4},
    }
    for seed, name in enumerate(("kl", "other")):
        tokenizer["train"] = {"num_samples": 4, "batch_size": 4, "seed": seed}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(tokenizer))
        assert main(["train", f"{name}.yaml", "--device", "cpu", "-q"]) == 0
    flow = {"tokenizer": {"from": "runs/kl"}, "data": {**data, "flip": True}, "backbone": {**DIT, "patch_size": 1}}
    write(tmp_path, "gen", **flow)
    capsys.readouterr()
    assert main(["cache", "gen.yaml", "--json", "-q"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["mirrored"]
    assert len(made["latent_mean"]) == len(made["latent_std"]) == 2
    for path in pictures.iterdir():  # training needs no image any more
        path.unlink()
    write(tmp_path, "cached", **{**flow, "data": {"type": "tokens", "path": made["path"]}})
    assert main(["train", "cached.yaml", "--device", "cpu", "-q"]) == 0
    assert main(["sample", "runs/cached", "-n", "1", "--size", "8x16", "--device", "cpu", "-q"]) == 0
    other = ["train", "cached.yaml", "tokenizer.from=runs/other", "--name", "x", "--device", "cpu"]
    fails(
        other,
        "is stale: it was made by a tokenizer with weights...has...now. Make it again with `genkit cache`",
        capsys,
    )
    fails([*other[:2], "tokenizer={type: pixels}", "--name", "x"], "holds what a tokenizer made", capsys)
    fails(["eval", "runs/cached", "-n", "4"], "holds latents and no images; name what to compare with: --ref", capsys)


def test_the_same_mistakes_in_python(home):
    pipe = AutoPipeline.from_pretrained(home / "flow", device="cpu")
    for options, message in (
        ({"size": (8, 9)}, "not divisible"),
        ({"size": "8x12x4"}, "rows x columns"),
        ({"num_inference_steps": 0}, "at least one step"),
        ({"class_labels": [99]}, "out of range; classes: 0-15"),
        ({"rope": {"method": "ntk"}}, "no rotary positions"),
        ({"output_type": "jpg"}, "known: pil, np, pt"),
    ):
        with pytest.raises(UsageError, match=message):
            pipe(**{"class_labels": [0], **options})
    images = pipe(
        class_labels=[0, 1], size=(8, 12), output_type="pt", generator=torch.Generator().manual_seed(0)
    ).images
    assert images.shape == (2, 3, 8, 12)
    alone = pipe.generate(torch.tensor([1]), [7], size="8x12")
    torch.testing.assert_close(pipe.generate(torch.tensor([3, 1]), [2, 7], size="8x12")[1:], alone, atol=1e-5, rtol=0)


def test_a_report_at_another_size_is_verified(home, capsys):
    """The same figures again, and nothing that is said to have changed."""
    out = home / "wide.json"
    words = [
        "eval",
        str(home / "fit"),
        "--size",
        "8x12",
        "--rope",
        "ntk",
        "-n",
        "8",
        "-o",
        str(out),
        "--device",
        "cpu",
        "-q",
    ]
    assert main(words) == 0
    assert json.loads(out.read_text())["settings"]["size"] == [8, 12]
    capsys.readouterr()
    assert main(["eval", "--verify", str(out), "--device", "cpu", "-q"]) == 0
    assert "size" not in capsys.readouterr().out
