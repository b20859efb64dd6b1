"""Numbers about shapes: agreement of surfaces in closed form, and `genkit eval` on folders of meshes."""

from __future__ import annotations

import json
import math

import pytest
import torch

from genkit.cli import main
from genkit.data.shape_classes.classes import CLASSES
from genkit.data.shapes import Shapes
from genkit.errors import GenkitError, UsageError
from genkit.evaluation import shape_figures, shape_subjects
from genkit.evaluation.shape_subjects import is_of_shapes
from genkit.evaluation.shapes import evaluate
from genkit.meshes import storage
from genkit.meshes.mesh import Mesh
from genkit.metrics import shape_nets
from genkit.metrics.shape_agreement import iou, surface_agreement
from genkit.rng import Rng

DATA = Shapes(num_shapes=240, seed=5, num_points=256, num_distances=0)


def test_agreement_of_two_planes_a_step_apart():
    axis = torch.arange(20) / 20
    plane = torch.cat([torch.cartesian_prod(axis, axis), torch.zeros(400, 1)], 1)
    up, tilted = torch.tensor([0.0, 0, 1]).expand(400, 3), torch.tensor([0.6, 0, 0.8]).expand(400, 3)
    same = surface_agreement(plane, up, plane, up)
    assert same == {"chamfer": 0.0, "normal_consistency": 1.0, "f_score": 1.0}
    above = surface_agreement(plane, up, plane + torch.tensor([0, 0, 0.01]), tilted)
    assert above["chamfer"] == pytest.approx(2e-4, rel=1e-3)
    assert above["normal_consistency"] == pytest.approx(0.8, rel=1e-5)
    assert above["f_score"] == 1.0
    half = surface_agreement(plane, up, plane[plane[:, 0] < 0.5], up[:200])
    assert half["f_score"] == pytest.approx(2 * 0.5 / 1.5)  # all that is there is right, half is missing
    assert surface_agreement(plane, up, plane + 5, up)["f_score"] == 0
    with pytest.raises(UsageError, match="400 and 0 points"):
        surface_agreement(plane, up, plane[:0], up[:0])


def test_common_volume():
    a, b = torch.tensor([1, 1, 0, 0]).bool(), torch.tensor([1, 0, 1, 0]).bool()
    assert iou(a, b) == pytest.approx(1 / 3)
    assert iou(a, a) == iou(a & ~a, a & ~a) == 1


def test_judges_know_shapes_they_have_not_seen():
    assert list(CLASSES) == list(shape_nets.CLASS_NAMES)
    judge = shape_nets.load(shape_nets.PointNet)
    batch = DATA.__getitems__(range(60))
    features, logits = shape_nets.features_and_logits(judge, batch["points"])
    assert features.shape == (60, 128)
    assert features.min() >= 0
    assert (logits.argmax(1) == batch["label"]).float().mean() > 0.9
    mixed = batch["points"][:, Rng([0]).order(256)[0]]
    torch.testing.assert_close(shape_nets.features_and_logits(judge, mixed)[0], features, rtol=0, atol=1e-4)
    noisy = batch["points"] + 0.3 * torch.randn(batch["points"].shape, generator=torch.Generator().manual_seed(0))
    assert (shape_nets.features_and_logits(judge, noisy)[1].argmax(1) == batch["label"]).float().mean() < 0.6
    with pytest.raises(UsageError, match="multiples of 64"):
        shape_nets.ViewNet().features(torch.zeros(1, 65, 65))


def test_a_changed_judge_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(shape_nets, "FOLDER", tmp_path)
    (tmp_path / "shape-points-v1.safetensors").write_bytes(b"other")
    shape_nets.load.cache_clear()
    try:
        with pytest.raises(GenkitError, match="shape-points-v1"):
            shape_nets.load(shape_nets.PointNet)
    finally:
        shape_nets.load.cache_clear()


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in {"EMD_SHAPES": 6, "EMD_POINTS": 32, "QUICK_VIEWS": (0,), "RESOLUTION": 24}.items():
        monkeypatch.setattr(shape_subjects if name == "RESOLUTION" else shape_figures, name, value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("drawn")
    samples = []
    for i in range(12):
        storage.save(DATA.mesh(i, 40), root / f"{i:06d}.ply")
        samples.append({"file": f"{i:06d}.ply", "label": i % 12, "class": DATA.classes[i % 12], "seed": i})
    samples.append({"file": "000012.ply", "label": 0, "class": "chair", "seed": 12})  # had no surface
    (root / "samples.json").write_text(json.dumps({"samples": samples}))
    return root


def test_eval_of_a_folder_of_meshes(folder, capsys):
    assert main(["eval", str(folder), "--ref", "shapes:test", "-q"]) == 0
    text = capsys.readouterr().out
    report = json.loads((folder.parent / f"{folder.name}.eval.json").read_text())
    rows = {row["metric"]: row for row in report["rows"]}
    assert rows["watertight"]["value"] == 12 / 13
    assert 0.6 < rows["one piece"]["value"] <= 12 / 13  # thin parts break on so coarse a grid
    assert rows["empty"]["value"] == 1 / 13
    assert rows["class accuracy (shape-points-v1)"]["value"] > 0.8
    assert 0.1 <= rows["1-NNA-CD"]["value"] <= 0.9
    assert rows["COV-CD"]["value"] > 0.4
    assert {
        "MMD-CD",
        "MMD-EMD",
        "COV-EMD",
        "1-NNA-EMD",
        "FD (shape-points-v1)",
        "shading-FD (shape-views-v1)",
        "nearest CD",
    } <= set(rows)
    assert (
        "mean squared both ways summed, 512 points, reference shapes:test, n=12, box 1.6"
        in rows["MMD-CD"]["comparable"]
    )
    assert "n=13" in rows["watertight"]["protocol"]
    assert "report: " in text
    assert (folder.parent / f"{folder.name}.eval.nearest.png").exists()
    # The same meshes on both sides: no distance, every reference met, and none of them told apart.
    same = evaluate(folder, reference=str(folder), out=folder.parent / "same.json")
    assert same["MMD-CD"] == same["FD (shape-points-v1)"] == pytest.approx(0, abs=1e-6)
    assert same["COV-CD"] == 1
    assert same["1-NNA-CD"] == 0
    assert same["nearest CD"] == 0


def test_worse_samples_have_worse_numbers(folder, tmp_path):
    generator = torch.Generator().manual_seed(0)
    for i in range(12):
        mesh = storage.load(folder / f"{i:06d}.ply")
        noise = 0.06 * torch.randn(mesh.vertices.shape, generator=generator)
        storage.save(Mesh(mesh.vertices + noise, mesh.faces), tmp_path / "noisy" / DATA.classes[i % 12] / f"{i}.obj")
    good = evaluate(folder, reference="shapes:test", out=tmp_path / "good.json")
    bad = evaluate(tmp_path / "noisy", reference="shapes:test", out=tmp_path / "bad.json")
    for name in ("MMD-CD", "FD (shape-points-v1)", "shading-FD (shape-views-v1)", "nearest CD"):
        assert bad[name] > good[name], name


def test_what_eval_says_of_bad_folders(folder, tmp_path, capsys):
    assert is_of_shapes(folder)
    assert not is_of_shapes(tmp_path)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "broken.stl").write_bytes(b"x")
    assert main(["eval", str(tmp_path / "m")]) == 1
    assert "none of the 1 shapes" in capsys.readouterr().err
    storage.save(storage.load(folder / "000000.ply"), tmp_path / "m" / "good.ply")
    assert main(["eval", str(tmp_path / "m"), "-q"]) == 0
    text = capsys.readouterr().out
    assert "note: left out" in text
    assert "broken.stl: 1 bytes are no STL" in text
    assert "name one with --ref" in text
    found = {row["metric"]: row for row in json.loads((tmp_path / "m.eval.json").read_text())["rows"]}
    assert (found["watertight"]["value"], found["empty"]["value"]) == (1 / 2, 1 / 2)  # of two files, one unreadable
    assert found["empty"]["comparable"].endswith("n=2")
    assert main(["eval", str(tmp_path / "m" / "good.ply"), "-q"]) == 0
    for words, reason in (
        (["--ref", "train"], "a folder has none"),
        (["--ref", "shapes:tset"], "splits train, val and test"),
        (["--protocol", "adm"], "is for images"),
        (["-n", "0"], "at least one"),
    ):
        assert main(["eval", str(folder), *words]) == 2
        assert reason in capsys.readouterr().err
    assert math.isfinite(json.loads((tmp_path / "m" / "good.eval.json").read_text())["rows"][0]["value"])


class Exact:
    """A tokenizer that gives back the shape it was shown, or nothing."""

    def __init__(self, data: Shapes, is_good: bool = True):
        self.data, self.is_good, self.number = data, is_good, -1

    def parameters(self):
        yield torch.zeros(1)

    def encode(self, points, normals):
        self.number += 1
        return points

    def meshes(self, tokens):
        mesh = self.data.mesh(self.number, 48)
        return [mesh if self.is_good else Mesh(mesh.vertices, mesh.faces[:0])]


class Pipe:
    weights_variant = "raw"

    def __init__(self, tokenizer=None, made=None):
        self.tokenizer, self.class_names = tokenizer, list(DATA.classes)
        self.run_config = {"data": {"type": "shapes", "num_shapes": 24, "num_points": 256, "num_distances": 0}}
        if made is not None:
            self.generate = lambda labels, seeds, **how: [made(int(seed)) for seed in seeds]


def test_reconstructions_of_a_tokenizer(tmp_path):
    held_out = Shapes(num_shapes=24, split="val", num_points=256, num_distances=0)
    good = evaluate(Pipe(Exact(held_out)), count=3, out=tmp_path / "a.json")
    assert good["IoU"] > 0.85
    assert good["F-score"] > 0.9
    assert good["normal consistency"] > 0.9
    assert good["chamfer"] < 1.5e-3
    assert (good["watertight"], good["empty"]) == (1, 0)
    assert "val of shapes, n=3" in good.rows[0]["protocol"]
    bad = evaluate(Pipe(Exact(held_out, False)), count=2, out=tmp_path / "b.json")
    assert (bad["IoU"], bad["F-score"], bad["empty"]) == (0, 0, 1)


def test_samples_of_a_generator_and_very_few_of_them(tmp_path):
    made = Shapes(num_shapes=12, seed=9, num_points=16, num_distances=0)
    report = evaluate(Pipe(made=lambda seed: made.mesh(seed, 32)), count=2, out=tmp_path / "a.json")
    assert {"1-NNA-CD", "FD (shape-points-v1)", "class accuracy (shape-points-v1)"} <= set(report.keys())
    assert report.settings["reference"] == "val of shapes"
