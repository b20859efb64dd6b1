"""Generators of shapes that are told pictures, from lines and shading to the command line; and captions of shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate import PartialState
from PIL import Image

from genkit import quickstart, train
from genkit.backbones.octgpt import OctGPT
from genkit.cli import main
from genkit.conditions import pictures
from genkit.conditions.captions import Captions
from genkit.conditions.held_out import of_class
from genkit.conditions.label import Label
from genkit.conditions.neighbours import Neighbours
from genkit.conditions.pictures import Encoder, Pictures, framed
from genkit.data.shapes import Shapes
from genkit.errors import UsageError
from genkit.guidance import CONTEXTS
from genkit.job import told
from genkit.meshes import storage
from genkit.meshes.lines import outlined
from genkit.meshes.marching_cubes import marching_cubes
from genkit.meshes.mesh import Mesh
from genkit.meshes.render import orbit
from genkit.nn.pictures import PictureEncoder
from genkit.objectives.octree_masked import OctreeMasked
from genkit.octree import build
from genkit.octree.tokens import OctreeTokens, samples_of, splits_of
from genkit.pipeline import open_run
from genkit.requests import Request
from genkit.rng import Rng
from genkit.shapes import picture_sheet, write_samples
from tests.mistakes import told_error

DATA = {"type": "shapes", "num_shapes": 4, "classes": ["chair", "bottle"], "num_points": 300, "num_distances": 0}
SMALL: dict[str, Any] = {"size": 32, "cells": 2, "views": 4, "resolution": 24}
NAMES = ("chair", "bottle")
TREE: dict[str, Any] = {
    "full_depth": 1,
    "code_depth": 3,
    "bits": 6,
    "dim": 24,
    "depth": 4,
    "num_heads": 2,
    "window": 16,
}


@pytest.fixture(autouse=True)
def kept(monkeypatch, tmp_path_factory) -> Path:
    """Pictures are drawn once for all tests here."""
    folder = tmp_path_factory.getbasetemp() / "pictures-cache"
    monkeypatch.setenv("GENKIT_CACHE", str(folder))
    return folder


def small(**options) -> Pictures:
    return Pictures(**{**SMALL, **options}, class_names=NAMES, data=DATA)


def batch(positions: list[int]) -> dict[str, Any]:
    numbers = [p % 4 for p in positions]
    return {
        "index": torch.tensor(numbers),
        "position": torch.tensor(positions),
        "label": torch.tensor([n % 2 for n in numbers]),
        "key": [f"train/{n:05d}" for n in numbers],
    }


def cube() -> Mesh:
    axis = torch.linspace(-1, 1, 25)
    x, y, z = torch.meshgrid(axis, axis, axis, indexing="ij")
    return marching_cubes(torch.stack([x, y, z]).abs().amax(0) - 0.51)


# What is drawn


def test_a_cube_is_drawn_by_its_outline_and_the_edges_that_are_seen():
    ink = outlined(cube(), orbit(45, 30, 3.6, 36), 96)
    assert ink.shape == (96, 96)
    assert ink.min() == 0
    assert 0.95 < ink.max() <= 1
    # From above one of its edges three faces are seen: lines along the middle below, paper within each face and around.
    column = (ink > 0.3).any(1).nonzero()
    top, bottom = int(column.min()), int(column.max())
    middle = ink[:, 47:49].amax(1)
    corner = int((middle[top + 8 :] > 0.3).nonzero()[0]) + top + 8  # where the three edges meet
    assert (middle[corner + 2 : bottom] > 0.3).float().mean() > 0.9, "the edge in front"
    assert (middle[top + 4 : corner - 2] < 0.3).all(), "the top face is paper"
    assert 0.02 < float((ink > 0.3).float().mean()) < 0.15
    front = outlined(cube(), orbit(0, 0, 3.6, 36), 96)
    assert (front[30:66, 30:66] == 0).all(), "a face from the front has no lines in it"
    thick = outlined(cube(), orbit(0, 0, 3.6, 36), 96, width=3.0)
    assert thick.sum() > 1.5 * front.sum()


def test_a_part_in_front_of_another_is_outlined():
    near = cube()
    behind = Mesh(cube().vertices * 1.6 - torch.tensor([0.0, 0, 2.0]), cube().faces)
    both = Mesh(torch.cat([near.vertices, behind.vertices]), torch.cat([near.faces, behind.faces + len(near.vertices)]))
    camera = orbit(0, 0, 3.6, 36)
    alone, front = outlined(behind, camera, 64), outlined(both, camera, 64)
    seen = (outlined(near, camera, 64) > 0.5) & (alone < 0.1)
    assert seen.any()
    assert (front[seen] > 0.5).all()


def test_what_is_drawn_is_cut_out_and_brought_to_the_middle():
    paper = torch.zeros(80, 60)
    paper[50:70, 5:15] = 0.8
    found = framed(paper, 32)
    rows, columns = (found > 0.4).nonzero().unbind(1)
    assert (int(rows.min()), int(rows.max())) == (2, 29), "as large as the margin allows"
    assert int(columns.min()) + int(columns.max()) == 31, "in the middle"
    moved = torch.zeros(100, 100)
    moved[10:30, 70:80] = 0.8
    torch.testing.assert_close(framed(moved, 32), found)
    assert not framed(torch.zeros(9, 9), 32).any()


@pytest.mark.parametrize("kind", ["shaded", "sketch", "both"])
def test_pictures_of_a_sample_are_those_of_its_position_alone(kind):
    condition = small(kind=kind)
    assert condition.takes == {"num_classes": 0, "picture_size": 32, "picture_cells": 2}
    ink = condition.of_batch(batch([0, 1, 2, 3, 4, 5]))["picture"]
    assert ink.shape == (6, 1, 32, 32)
    assert 0 <= ink.min() < ink.max() <= 1
    assert (ink.flatten(1) > 0).any(1).all()
    assert torch.equal(small(kind=kind).of_batch(batch([5, 2]))["picture"], ink[[5, 2]])
    views = condition.pictures("train", 1)
    seen = torch.cat([condition.of_batch(batch([p]))["picture"] for p in range(1, 160, 4)])
    assert torch.equal(seen.unique(dim=0), views.unique(dim=0)), "all views come up, and nothing else"
    assert len(views.unique(dim=0)) == 4
    assert not torch.equal(small(kind=kind, seed=1).pictures("train", 1), views)


def test_lines_and_shading_come_by_turns():
    both, shaded, sketch = (small(kind=kind).pictures("train", 0) for kind in ("both", "shaded", "sketch"))
    assert torch.equal(both[::2], shaded[::2])
    assert torch.equal(both[1::2], sketch[1::2])
    assert not torch.equal(shaded, sketch)


def test_pictures_are_kept_and_what_is_broken_is_drawn_again(kept, monkeypatch):
    options = {"seed": 77, "views": 2}
    first = small(**options).pictures("train", 3)
    (place,) = [p for p in (kept / "pictures").iterdir() if np.load(p).shape[0] == 2]
    with monkeypatch.context() as patch:
        patch.setattr(pictures, "portrait", None)  # nothing is drawn
        assert torch.equal(small(**options).pictures("train", 3), first)
    place.write_bytes(place.read_bytes()[:200])
    assert torch.equal(small(**options).pictures("train", 3), first)
    monkeypatch.setenv("GENKIT_CACHE", str(place))
    with pytest.raises(Exception, match="set GENKIT_CACHE to another folder"):
        small(**options).pictures("train", 2)


def test_meshes_of_a_folder_are_drawn_and_those_that_are_broken_left_out(tmp_path):
    shapes = Shapes(**{k: v for k, v in DATA.items() if k != "type"})
    for i, name in enumerate(["a/1.ply", "a/2.ply", "b/1.ply"]):
        storage.save(shapes.mesh(i, 24), tmp_path / name)
    (tmp_path / "a/0.ply").write_bytes(b"ply\nnothing")
    data = {"type": "meshes", "path": str(tmp_path), "num_distances": 0}
    condition = Pictures(**SMALL, class_names=("a", "b"), data=data)
    # A cache of tokens has left out the broken one, so that its numbers are others than those of the files.
    keys = ["a/1.ply", "b/1.ply"]
    told = {"index": torch.tensor([0, 2]), "position": torch.tensor([0, 1]), "label": torch.tensor([0, 1]), "key": keys}
    ink = condition.of_batch(told)["picture"]
    views = [condition.pictures("train", condition.shapes.keys.index(key)) for key in keys]
    assert all((own == one).flatten(1).all(1).any() for own, one in zip(views, ink, strict=True))
    drawn = condition.of_request(torch.tensor([0, 1, -1, 0]), Rng.at(0, 0, 4))["picture"]
    assert (drawn.flatten(1) > 0).any(1).all()


def test_held_out_shapes_stand_in_for_pictures_that_are_not_given():
    condition = small()
    labels, rng = torch.tensor([0, 1, 1, -1]), Rng.at(0, 0, 4)
    ink = condition.of_request(labels, rng)["picture"]
    assert torch.equal(condition.of_request(labels[2:], Rng.at(0, 2, 2))["picture"], ink[2:]), "of its stream alone"
    assert condition.held_out.info.fingerprint != condition.shapes.info.fingerprint
    views = [condition.pictures("held out", n) for n in range(2)]
    assert all((views[label] == one).flatten(1).all(1).any() for label, one in zip((0, 1, 1), ink, strict=False))
    assert not any((condition.pictures("train", n)[:, None] == ink).flatten(2).all(2).any() for n in range(4))


def test_captions_of_held_out_shapes_stand_in_for_those_that_are_not_given():
    said = Captions(length=64, class_names=NAMES, data=DATA)
    labels = torch.tensor([0, 1, -1, 0])
    text = said.of_request(labels, Rng.at(0, 0, 4))["text"]
    assert torch.equal(said.of_request(labels[3:], Rng.at(0, 3, 1))["text"], text[3:])
    val = Shapes(**{k: v for k, v in DATA.items() if k != "type"}, split="val")
    assert [bytes(row[row > 0].tolist()).decode() for row in text] == [
        val.caption(0),
        val.caption(1),
        "",
        val.caption(0),
    ]
    assert val.caption(0) == val[0]["caption"]
    with pytest.raises(UsageError, match="no held-out shape is of class bottle; say what to draw"):
        of_class([], 1, NAMES)


# What is given


def png(path: Path, pixels: np.ndarray, mode: str | None = None) -> Path:
    Image.fromarray(pixels, mode).save(path)
    return path


def test_a_picture_is_the_same_on_white_and_transparent_ground_in_any_place_and_form(tmp_path):
    condition = small()
    pixels = np.full((90, 120), 255, np.uint8)
    pixels[20:60, 30:50] = 60
    plain = condition.read(png(tmp_path / "plain.png", pixels))
    assert plain.shape == (1, 32, 32)
    assert 0.7 < float(plain.max()) < 0.8
    clear = np.zeros((90, 120, 4), np.uint8)
    clear[20:60, 30:50] = (60, 60, 60, 255)
    torch.testing.assert_close(condition.read(str(png(tmp_path / "clear.png", clear))), plain, atol=0.01, rtol=0)
    torch.testing.assert_close(condition.read(Image.fromarray(np.roll(pixels, 20, 1))), plain)
    torch.testing.assert_close(condition.read(torch.from_numpy(pixels)[None] / 127.5 - 1), plain)
    cond = condition.of_request(torch.tensor([-1, -1]), Rng.at(0, 0, 2), images=[tmp_path / "plain.png"] * 2)
    assert torch.equal(cond["picture"], plain.expand(2, -1, -1, -1))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path, "cannot be read as a picture: No such file"),
        (lambda path: path.mkdir() or path, "cannot be read as a picture: Is a directory"),
        (lambda path: path.write_bytes(b"no") and path, "cannot be read as a picture: cannot identify"),
        (lambda path: png(path, np.full((9, 9), 255, np.uint8)), "is empty: nothing on it is darker"),
        (lambda path: png(path, np.zeros((9, 9), np.uint8)), "has a dark ground"),
        (lambda path: torch.full((1, 9, 9), torch.nan), r"must be \[C, Y, X\] of finite"),
        (lambda path: torch.zeros(9, 9), r"must be \[C, Y, X\]"),
    ],
)
def test_pictures_that_cannot_be_are_refused(make, words, tmp_path):
    with pytest.raises(UsageError, match=words):
        small().read(make(tmp_path / "x.png"))


def test_a_cut_off_picture_is_refused(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)
    path = png(tmp_path / "x.png", pixels)
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(UsageError, match=r"x\.png cannot be read as a picture"):
        small().read(path)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: small(size=8), r"condition\.size=8 must be at least 16"),
        (lambda: small(views=0), r"condition\.views=0"),
        (lambda: small(azimuth=(30, -30)), r"condition\.azimuth=\[30, -30\] must rise"),
        (lambda: small(elevation=(0, 90)), r"condition\.elevation=\[0, 90\] must rise, from -85 to 85"),
        (lambda: small(encoder="no/such/folder"), "is no image encoder that transformers can open"),
        (lambda: Pictures(data={"type": "fashion"}), r"draws shapes, data\.type=shapes or meshes; found fashion"),
        (lambda: Pictures().shapes, "was saved without its data; give pictures"),
        (lambda: Pictures(data={"type": "meshes", "path": "no/such"}).shapes, "or given .genkit sample RUN --image"),
        (lambda: PictureEncoder(dim=8, size=48, cells=4), "48 pixels in 4 cells"),
        (lambda: OctGPT(**TREE, picture_size=64, buffer=15), r"of 16 parts of a picture; set backbone\.buffer=16"),
        (lambda: OctGPT(**TREE, text_length=64, buffer=15), r"of 64 letters; set backbone\.buffer=64"),
        (lambda: PictureEncoder(dim=8, size=32)(torch.zeros(2, 1, 64, 64)), r"expected \[B, 1, 32, 32\]"),
    ],
)
def test_what_cannot_be_is_refused(make, words):
    with pytest.raises(UsageError, match=words):
        make()


def test_what_is_asked_must_be_what_it_was_trained_on():
    labels, rng = torch.tensor([0]), Rng.at(0, 0, 1)
    for other, words in ((Label(), "classes alone"), (Captions(), "on captions"), (Neighbours(), "on neighbours")):
        with pytest.raises(UsageError, match=f"pictures were given, and this generator was trained .*{words}"):
            other.of_request(labels, rng, images=["x.png"])
    with pytest.raises(UsageError, match="captions were given, and this generator was trained on pictures"):
        small().of_request(labels, rng, texts=["x"])
    with pytest.raises(UsageError, match="a database was given"):
        small().of_request(labels, rng, database=1)
    with pytest.raises(UsageError, match="2 pictures for 1 samples"):
        small().of_request(labels, rng, images=["x", "y"])
    with pytest.raises(UsageError, match=r"needs a backbone with picture_size, and masked has none.*: octgpt"):
        told({"backbone": {"type": "masked"}, "condition": {"type": "pictures"}}, {"picture_size": 64})  # type: ignore[arg-type]


# What reads it


def test_an_image_encoder_of_transformers_is_attended_to(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}
    model = transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).eval()
    model.save_pretrained(tmp_path)
    shape = {"height": 28, "width": 28}
    processor = transformers.ViTImageProcessor(size=shape, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    processor.save_pretrained(tmp_path)
    condition = small(encoder=str(tmp_path))
    assert condition.takes == {"num_classes": 0, "context_dim": 12}
    ink = condition.pictures("train", 0)
    context = condition._cond(torch.cat([ink, torch.zeros_like(ink[:1])]), torch.device("cpu"))["context"]
    assert context.shape == (5, 5, 12)
    assert not context[4].any(), "no picture is nothing"
    paper = ((1 - ink[0]) * 255).round().to(torch.uint8).expand(3, -1, -1).permute(1, 2, 0).numpy()
    with torch.no_grad():
        states = model(**processor(images=[paper], return_tensors="pt")).last_hidden_state[0]
    torch.testing.assert_close(context[0, 0], states[0])
    corner = states[1:].unflatten(0, (4, 4))[:2, :2].mean((0, 1))
    torch.testing.assert_close(context[0, 1], corner, atol=1e-5, rtol=1e-5)
    again = Encoder(str(tmp_path), 2)
    torch.testing.assert_close(again(ink[[0, 0, 3]]), context[[0, 0, 3]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("context", ["concat", "cross"])
def test_a_picture_reaches_its_own_shape_and_its_encoder_learns(context):
    torch.manual_seed(0)
    model = OctGPT(**TREE, dilation=2, buffer=4, dropout=0.0, picture_size=32, picture_cells=2, context=context)
    assert model.picture.blocks[0].mlp.up.weight.std() > 0.05 > model.split_head.weight.std() > 0.01, "as torch begins"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    random = torch.Generator().manual_seed(0)
    points, owner = torch.rand(60, 3, generator=random) * 1.6 - 0.8, torch.arange(3).repeat_interleave(20)
    octree = build.from_points(points, samples=owner, batch_size=3, depth=3, full_depth=1)
    tokens = OctreeTokens(octree, splits_of(octree), torch.randint(0, 2, (octree.count(3), 6), generator=random))
    owner = samples_of(octree)[: len(tokens.splits)]
    known = torch.zeros(len(samples_of(octree)), dtype=torch.bool)
    ink = torch.stack([small().pictures("train", n)[0] for n in range(3)])
    model.eval()
    before = model(tokens, known, {"picture": ink})[0]
    changed = ink.clone()
    changed[1] = small().pictures("train", 1)[2]
    after = model(tokens, known, {"picture": changed})[0]
    assert owner[(before != after).any(1)].unique().tolist() == [1]
    with pytest.raises(UsageError, match=r"cond\['picture'\] is missing"):
        model(tokens, known, {})
    # Nothing is dropped to, guided away from, and the same whatever the states of empty paper are.
    assert "picture" in CONTEXTS
    objective, heard = OctreeMasked(cond_drop=1.0), []
    objective(lambda *a: heard.append(a[2]) or model(*a), tokens, {"picture": ink}, None, Rng.at(0, 0, 3))
    assert not heard[0]["picture"].any()
    nothing = model(tokens, known, {"picture": ink * 0})[0]
    with torch.no_grad():
        model.picture.place.weight.add_(1.0)
    assert torch.equal(model(tokens, known, {"picture": ink * 0})[0], nothing)
    model.train()
    losses = objective.__class__(cond_drop=0.0)(model, tokens, {"picture": ink}, None, Rng.at(0, 0, 3))
    (losses["split"].mean() + losses["code"].mean()).backward()
    assert [n for n, p in model.picture.named_parameters() if p.grad is None or not p.grad.any()] == []
    with pytest.raises(UsageError, match="one or the other"):
        OctGPT(**TREE, picture_size=32, text_length=4)


# Whole lines


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A tokenizer, and generators told pictures and captions, of a few steps."""
    folder = tmp_path_factory.mktemp("lines")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("GENKIT_CACHE", str(tmp_path_factory.getbasetemp() / "pictures-cache"))
        patch.setattr("genkit.shapes.picture", lambda *_: Image.new("L", (1, 1)))
        short = {"num_images": 1, "every_steps": 1, "sample_every_steps": 100, "save_every_steps": 100}
        tokenizer = yaml.safe_load((quickstart.RECIPES / "octree-shapes.yaml").read_text())
        tokenizer["data"] |= DATA | {"num_distances": 300, "num_kept": 0}
        tokenizer["train"] |= {"num_samples": 2, "batch_size": 2}
        train(tokenizer | {"name": "octree", "log": short})
        own = yaml.safe_load((quickstart.RECIPES / "octgpt-pictures-shapes.yaml").read_text())
        own |= {"data": DATA, "tokenizer": {"from": "runs/octree"}, "log": short}
        own["backbone"] |= {"dim": 24, "num_heads": 2}
        own["sampler"] |= {"num_steps": [2, 2]}
        own["train"] |= {"num_samples": 8, "batch_size": 4}
        train(own | {"name": "pictures", "condition": {"type": "pictures", **SMALL}})
        train(own | {"name": "captions", "condition": {"type": "captions", "length": 12}})
    return folder


@pytest.fixture
def here(runs, monkeypatch) -> Path:
    monkeypatch.chdir(runs)
    return runs


FAST = ("--resolution", "16", "-q")


def lively(run: str) -> Any:
    """The pipeline of a run whose network listens, as a few steps have not taught it to; it gives bits, a row per shape, instead of meshes."""
    pipe = open_run(f"runs/{run}")
    torch.manual_seed(1)
    for parameter in pipe.backbone.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    pipe.backbone.context_proj.weight.mul_(10)

    def bits(tokens: OctreeTokens, resolution: int | None) -> list[torch.Tensor]:
        of_splits, of_codes = tokens.samples.split([len(tokens.splits), len(tokens.codes)])
        rows = range(tokens.batch_size)
        return [torch.cat([tokens.splits[of_splits == i], tokens.codes[of_codes == i].flatten()]) for i in rows]

    pipe.tokenizer.meshes = bits
    return pipe


def test_shapes_by_picture_from_the_command_line(here, capsys, tmp_path):
    pixels = np.full((40, 40), 255, np.uint8)
    pixels[5:35, 10:20] = 40
    one, two = png(tmp_path / "one.png", pixels), png(tmp_path / "two.png", pixels.T.copy())
    words = ["sample", "runs/pictures", "--image", str(one), "--image", str(two), "-n", "3", *FAST]
    assert main(words) == 0
    folder = here / "runs/pictures/samples/seed-0-one"
    rows = json.loads((folder / "samples.json").read_text())["samples"]
    assert [row["picture"] for row in rows] == [str(one), str(two), str(one)]
    sheet = np.asarray(Image.open(folder / "grid.png").convert("L"))
    assert sheet.shape == (2 * 194 + 2, 3 * 194 + 2), "a row per picture, itself and up to two samples"
    assert (sheet[20:170, 80:110] < 60).all(), "the first picture stands in front"
    assert main(words) == 0, "the same again is there already"
    assert main(["sample", "runs/pictures", "-n", "2", "-o", "held", *FAST]) == 0, "held-out shapes by class"
    capsys.readouterr()
    pipe = lively("pictures")
    labels = torch.full((2,), -1)
    first = pipe.generate(labels, [1, 2], images=[one, two])
    (alone,) = pipe.generate(labels[1:], [2], images=[two])
    assert torch.equal(alone, first[1]), "in any batch"
    other = pipe.generate(labels, [1, 2], images=[two, two])
    assert torch.equal(other[1], first[1])
    assert not torch.equal(other[0], first[0]), "it listens"
    assert not torch.equal(pipe.generate(labels, [1, 2], images=[one, two], guidance=3.0)[0], first[0])


def test_what_is_wrong_with_a_picture_is_one_line(here, capsys, tmp_path):
    run = ("runs/pictures", "-o", str(tmp_path / "out"))
    assert "nothing.png cannot be read as a picture" in told_error(
        capsys, "sample", "-q", *run, "--image", "nothing.png"
    )
    assert "--image and --labels both say" in told_error(
        capsys, "sample", "-q", *run, "--image", "x.png", "--labels", "chair"
    )
    assert "--caption and --image both say" in told_error(
        capsys, "sample", "-q", *run, "--image", "x.png", "--caption", "x"
    )
    assert "trained on pictures" in told_error(capsys, "sample", "-q", *run, "--caption", "a chair")
    assert "trained on captions" in told_error(capsys, "sample", "-q", "runs/captions", "--image", "x.png")


def test_shapes_by_caption_from_the_command_line(here):
    assert main(["sample", "runs/captions", "--caption", "a bottle", "--caption", "a chair", "-n", "3", *FAST]) == 0
    folder = here / "runs/captions/samples/seed-0-captions"
    rows = json.loads((folder / "samples.json").read_text())["samples"]
    assert [row["caption"] for row in rows] == ["a bottle", "a chair", "a bottle"]
    # The words reach the generator, and are those of the row.
    pipe = lively("captions")
    labels, seeds = torch.full((2,), -1), [1, 2]
    said = pipe.generate(labels, seeds, texts=["a bottle", "a chair"])
    other = pipe.generate(labels, seeds, texts=["a table", "a chair"])
    assert torch.equal(other[1], said[1])
    assert not torch.equal(other[0], said[0])
    asked = []
    pipe.generate = lambda labels, seeds, **how: asked.append(how["texts"]) or [cube()] * len(labels)
    how = {"format": "ply", "resolution": None, "turntable": False, "batch_size": 2}
    write_samples(
        pipe, PartialState(), here / "again", {}, Request([-1] * 3, [0, 1, 2], (), texts=["a", "b", "c"]), **how
    )
    assert asked == [["a", "b"], ["c"]]


def test_a_sheet_of_pictures_has_a_row_for_each():
    mesh = cube()
    ink = torch.stack([small().pictures("train", n)[0] for n in (0, 1, 1)])
    assert picture_sheet([mesh] * 3, ink).size == (3 * 194 + 2, 2 * 194 + 2)
    assert picture_sheet([mesh] * 2, ink[:2]).size == (8 * 194 + 2, 194 + 2)
