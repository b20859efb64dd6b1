"""What scripts/results_shapes.py measures: one function per table, folder of runs -> figures."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genkit.backbones.octgpt import OctGPT
from genkit.data.meshes import Meshes
from genkit.data.shapes import Shapes
from genkit.evaluation.shape_figures import SIZE
from genkit.images import write_png
from genkit.meshes import storage
from genkit.meshes.marching_cubes import marching_cubes
from genkit.meshes.mesh import Mesh, inspect, normalised
from genkit.meshes.pictures import contact_sheet
from genkit.meshes.sampling import sample_surface
from genkit.metrics import shape_nets
from genkit.metrics.point_sets import mmd_coverage, nearest_neighbour_accuracy, pairwise_chamfer
from genkit.metrics.shape_agreement import iou, surface_agreement
from genkit.objectives.octree_masked import Grow
from genkit.octree import build
from genkit.octree.octree import Octree
from genkit.octree.tokens import splits_of
from genkit.pipeline import open_run
from genkit.registry import build as make
from genkit.rng import Rng, sample_seeds
from genkit.samplers.octree_masked import OctreeMasked as Sampler
from genkit.tokenizers.octree_vq import BOX, LEVEL

TOKENIZER, GENERATOR = "octree-shapes", "octgpt-shapes"
LONGER, LONGER_SAMPLES = "octgpt-shapes-long", 16_000  # the generator trained two and a half times as long
SHAPES, POINTS, CELLS = 24, 512, 64
# Steps of the two depths; the last reveals one token at a time wherever a shape has no more tokens than steps.
STEPS = ([1, 1], [3, 6], [12, 24], [24, 48], [64, 400])
GUIDANCE = (1.0, 2.0, 3.0)
DEPTHS = (5, 6, 7)  # of surfaces
JUDGED = 96  # samples whose class is asked for


def held_out(pipeline: Any) -> Any:
    changes = {"split": "val", "num_points": 4096, "num_distances": 0, "num_kept": 0}
    return make("data", dict(pipeline.run_config["data"]) | changes)


def counters(pipeline: Any) -> dict[str, Any]:
    """Samples and seconds of a run, as its checkpoint counts them."""
    state = json.loads((pipeline.folder.parent / "state" / "state.json").read_text())["counters"]
    return {"samples": state["samples"], "seconds": state["seconds"]}


@torch.no_grad()
def by_depth(runs: Path) -> dict[str, Any]:
    """Reconstructions of held-out shapes from the function of each depth, what the grid alone loses, and classes by themselves."""
    pipeline = open_run(runs / TOKENIZER)
    tokenizer, dataset = pipeline.tokenizer, held_out(pipeline)
    rows: dict[str, list[dict[str, float]]] = {}
    of_class: dict[str, list[dict[str, float]]] = {}
    tokens = 0
    pairs: list[list[Mesh]] = [[], []]
    for i in range(SHAPES):
        batch, solid = dataset.__getitems__([i]), dataset.solid(i)
        coded = tokenizer.encode(batch["points"], batch["normals"])
        tokens += len(coded.splits) + len(coded.codes)
        decoded = tokenizer.field(coded)
        places = (2 * Rng.at(1, i, 1).uniform(20_000, 3)[0] - 1) * 0.85
        truth = solid.distance(places) < 0
        for d in range(tokenizer.code_depth, tokenizer.depth + 1):
            mesh = marching_cubes(decoded.grid(0, CELLS, d), level=LEVEL, bounds=(-BOX, BOX))
            found = {"empty": float(not len(mesh.faces))}
            if len(mesh.faces):
                points, normals, _ = sample_surface(mesh, 4096, Rng([i]))
                found |= surface_agreement(batch["points"][0], batch["normals"][0], points, normals)
                found |= {
                    "iou": iou(truth, decoded(places, 0, d) < LEVEL),
                    "watertight": float(inspect(mesh).is_watertight),
                }
            rows.setdefault(f"depth {d}", []).append(found)
        name = dataset.info.class_names[i % len(dataset.info.class_names)]
        of_class.setdefault(f"depth {tokenizer.depth}, {name}", []).append(found)
        pairs[0].append(mesh)
        mesh = dataset.mesh(i, CELLS)
        pairs[1].append(mesh)
        points, normals, _ = sample_surface(mesh, 4096, Rng([i]))
        found = {"empty": 0.0, "iou": 1.0, "watertight": 1.0}
        found |= surface_agreement(batch["points"][0], batch["normals"][0], points, normals)
        rows.setdefault(f"the shape itself on a grid of {CELLS}", []).append(found)
    sheet = contact_sheet([m for side in pairs for m in side[:6]], columns=6, size=160, row_names=["decoded", "true"])
    write_png(runs / "shapes-decoded.png", sheet)
    means = {
        name: {key: mean([row[key] for row in some if key in row]) for key in some[-1]}
        for name, some in (rows | of_class).items()
    }
    return {"rows": means, "tokens": tokens / SHAPES, **counters(pipeline)}


def draw(pipeline: Any, count: int, seed: int = 0, **how: Any) -> tuple[list[Mesh], Tensor]:
    """Samples, class i mod (number of classes), and their labels."""
    labels, seeds = torch.arange(count) % pipeline.num_classes, sample_seeds(seed, 0, count)
    meshes: list[Mesh] = []
    for first in range(0, count, 8):
        part = slice(first, first + 8)
        meshes += pipeline.generate(labels[part], seeds[part], **how)
    return meshes, labels


def class_accuracy(meshes: list[Mesh], labels: Tensor, names: list[str]) -> float:
    """Share whose class the point net of genkit.metrics.shape_nets names; a sample without faces is wrong."""
    judge = shape_nets.load(shape_nets.PointNet)
    truth = torch.tensor([shape_nets.CLASS_NAMES.index(names[int(label)]) for label in labels])
    right = 0
    for i, mesh in enumerate(meshes):
        if len(mesh.faces):
            points = sample_surface(normalised(mesh, size=SIZE), shape_nets.POINTS, Rng([i]))[0]
            right += int(judge(points[None]).argmax(1) == truth[i])
    return right / len(meshes)


@torch.no_grad()
def classes(runs: Path) -> dict[str, Any]:
    """What a classifier that has seen none of it takes samples for, by guidance; held-out shapes, and their reconstructions, as the measure of the judge."""
    pipeline = open_run(runs / GENERATOR)
    dataset, names = held_out(pipeline), list(pipeline.class_names)
    labels = torch.arange(60) % len(names)
    real = [dataset.mesh(i, CELLS) for i in range(60)]
    rebuilt = []
    for first in range(0, 60, 12):
        batch = dataset.__getitems__(list(range(first, first + 12)))
        rebuilt += pipeline.tokenizer.meshes(pipeline.tokenizer.encode(batch["points"], batch["normals"]))
    rows = {
        "held-out shapes": {"accuracy": class_accuracy(real, labels, names)},
        "their reconstructions": {"accuracy": class_accuracy(rebuilt, labels, names)},
    }
    for guidance in GUIDANCE:
        meshes, labels = draw(pipeline, JUDGED, seed=1, guidance=guidance)
        found = [inspect(mesh) for mesh in meshes]
        rows[f"samples, guidance {guidance:g}"] = {
            "accuracy": class_accuracy(meshes, labels, names),
            "one piece": mean([float(f.num_components == 1) for f in found]),
            "watertight": mean([float(f.is_watertight) for f in found]),
        }
    return {"rows": rows, "count": JUDGED}


@torch.no_grad()
def longer(runs: Path) -> dict[str, Any]:
    """The same generator trained longer, in the recipe's steps and in a quarter of them; and what it draws."""
    pipeline = open_run(runs / LONGER)
    real = held_out(pipeline).__getitems__(list(range(SHAPES)))["points"][:, :POINTS]
    rows = {}
    for steps, count in (([12, 24], 48), ([3, 6], SHAPES)):
        meshes, labels = draw(pipeline, count, seed=1, sampler=[f"num_steps={steps}"])
        found = [inspect(mesh) for mesh in meshes]
        rows[" + ".join(map(str, steps))] = {
            "count": count,
            "accuracy": class_accuracy(meshes, labels, list(pipeline.class_names)),
            "one piece": mean([float(f.num_components == 1) for f in found]),
            "watertight": mean([float(f.is_watertight) for f in found]),
            **distances(real, meshes[:SHAPES]),
        }
        if count == 48:
            shown = sorted(range(36), key=lambda i: (int(labels[i]), i))
            sheet = contact_sheet([meshes[i] for i in shown], columns=6, size=160, row_names=pipeline.class_names)
            write_png(runs / "shapes-long.png", sheet)
    return {"rows": rows, **counters(pipeline)}


def distances(real: Tensor, meshes: list[Mesh], points: int = POINTS) -> dict[str, float]:
    """MMD, COV and 1-NNA by Chamfer; nothing where a sample has no surface."""
    if not all(len(mesh.faces) for mesh in meshes):
        return {}
    fake = torch.stack([sample_surface(mesh, points, Rng([i]))[0] for i, mesh in enumerate(meshes)])
    cross = pairwise_chamfer(real, fake)
    near = mmd_coverage(cross)
    accuracy = nearest_neighbour_accuracy(pairwise_chamfer(real, real), cross, pairwise_chamfer(fake, fake))["acc"]
    return {"mmd": near["lgan_mmd"], "cov": near["lgan_cov"], "nna": accuracy}


@torch.no_grad()
def by_steps(runs: Path) -> dict[str, Any]:
    """The same labels and seeds drawn in few and in many steps."""
    pipeline = open_run(runs / GENERATOR)
    dataset, names = held_out(pipeline), list(pipeline.class_names)
    real = dataset.__getitems__(list(range(SHAPES)))["points"][:, :POINTS]
    rows = {}
    for steps in STEPS:
        started = time.process_time()
        meshes, labels = draw(pipeline, SHAPES, sampler=[f"num_steps={steps}"])
        name = "token by token" if steps == STEPS[-1] else " + ".join(map(str, steps))
        rows[name] = {
            "cpu_seconds": (time.process_time() - started) / SHAPES,
            "pieces": mean([float(inspect(mesh).num_components) for mesh in meshes if len(mesh.faces)]),
            "accuracy": class_accuracy(meshes, labels, names),
            **distances(real, meshes),
        }
        if steps == [12, 24]:
            shown = sorted(range(SHAPES), key=lambda i: (int(labels[i]), i))
            width = SHAPES // pipeline.num_classes
            write_png(
                runs / "shapes.png",
                contact_sheet([meshes[i] for i in shown], columns=width, size=160, row_names=pipeline.class_names),
            )
    parameters = sum(p.numel() for p in pipeline.backbone.parameters())
    return {"rows": rows, "parameters": parameters, **counters(pipeline)}


class Whole(Grow):
    """Nothing kept: every step runs the whole sequence, as the official loop does."""

    def logits(self, values: Tensor, known: Tensor) -> Tensor:
        octree, model = self.octree, self.model
        low, d = octree.full_depth, octree.depth
        before = splits_of(octree, d) if d > low else known.new_zeros(0, dtype=torch.int64)
        own = model.embed_codes(values) if self.bits else model.embed_splits(values)
        x = torch.cat([model.embed_splits(before), own])
        places = model.places(octree, range(low, d + 1))
        y = model.decode_all(x, places, torch.cat([torch.ones(len(before), dtype=torch.bool), known]), self.cond)
        y = y[len(before) :]
        return model.code_logits(y) if self.bits else model.split_logits(y)


def forced(kind: type[Grow], shape: Octree) -> type[Grow]:
    """Draws as ever, and then takes the split bits of a given shape, so that untrained weights grow an octree of a real size."""

    class Forced(kind):  # type: ignore[valid-type,misc]
        def finish(self, values: Tensor) -> None:
            d = self.octree.depth
            super().finish(values if self.bits else shape.is_occupied(d).long())

    return Forced


@torch.no_grad()
def by_size(runs: Path) -> dict[str, Any]:
    """Seconds to draw the tokens of one shape whose surface lies at depth 5, 6 and 7, with finished depths kept and without."""
    pipeline = open_run(runs / GENERATOR)
    data = dict(pipeline.run_config["data"]) | {"num_points": 60_000, "num_distances": 0}
    points = make("data", data).__getitems__([0])["points"][0]
    own = dict(pipeline.backbone.config)
    rows = {}
    for depth in DEPTHS:
        torch.manual_seed(0)
        sizes = {"code_depth": depth - 2, "max_depth": None, "num_scales": None}
        model = OctGPT(**{key: value for key, value in own.items() if key[0] != "_"} | sizes).eval()
        octree = build.from_points(points, depth=depth, full_depth=model.full_depth)
        sampler = Sampler(num_steps=[12] * (depth - 1 - model.full_depth - 1) + [24])
        seconds = {}
        for name, kind in (("kept", Grow), ("computed again", Whole)):
            predict = forced(kind, octree)(model, {"label": torch.zeros(1, dtype=torch.int64)})
            started = time.process_time()
            tokens = sampler(predict, build.complete(model.full_depth), Rng([0]))
            seconds[name] = time.process_time() - started
        rows[str(depth)] = {"tokens": len(tokens.splits) + len(tokens.codes), **seconds}
    return rows


def prepared(runs: Path) -> dict[str, Any]:
    """Meshes a minute that one core turns into points and signed distances, files of procedural shapes."""
    shapes = Shapes(num_shapes=12, num_points=16, num_distances=0)
    folder = runs / "results-shapes-meshes"
    faces = 0
    for i in range(12):
        mesh = shapes.mesh(i, CELLS)
        faces += len(mesh.faces)
        storage.save(mesh, folder / f"{i:02d}.ply")
    data = Meshes(path=str(folder), cache=str(folder / f"cache-{time.time_ns()}"))
    started = time.process_time()
    for i in range(12):
        data.prepare(i)
    return {"a minute": 60 * 12 / (time.process_time() - started), "faces": faces / 12}


def mean(values: list[float]) -> float:
    return sum(values) / max(1, len(values))
