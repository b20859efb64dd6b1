"""What docs/results/shapes.md reports of pictures, captions and light steps: trains the toy generators that are told them, measures, fills the page.

    python scripts/results_shapes_conditions.py --runs DIR     # after scripts/results_shapes.py, or with the runs it makes

Training and what is measured are kept in the folder of runs: a part that is finished is not done again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import results_shapes_parts as parts  # beside this file
import torch
from pages import RESULTS, fill, run_parts, table
from torch import Tensor

from genkit import files
from genkit.backbones.octgpt import OctGPT
from genkit.images import grid, write_png
from genkit.meshes.hierarchy import Winding
from genkit.meshes.mesh import Mesh, inspect
from genkit.meshes.pictures import picture
from genkit.meshes.sampling import sample_surface
from genkit.metrics.point_sets import pairwise_chamfer
from genkit.metrics.shape_agreement import iou
from genkit.objectives.octree_masked import Grow, OctreeMasked
from genkit.octree import build
from genkit.pipeline import open_run
from genkit.registry import build as make
from genkit.reuse.recap import Recap
from genkit.rng import Rng, sample_seeds
from genkit.samplers.octree_masked import OctreeMasked as Sampler

PICTURES, CAPTIONS = "octgpt-pictures-shapes", "octgpt-captions-shapes"
PAGE = RESULTS / "shapes.md"
GUIDANCE = (1.0, 2.0)
SHOWN = 36  # held-out shapes whose pictures are shown
ASKED = 36  # captions of held-out shapes
LIT = 24  # samples of every schedule of light steps
BATCH = 8
POINTS = 2048
PLACES = 8000  # where two solids are compared
PICTURE_STEPS = "num_steps=[6, 12]"
MASKS = 4  # draws of masked tokens that a likelihood is the mean of
# Schedules of light steps, (steps of the two depths, steps that are full by themselves, light ones per full one); the first is plain, the last two are plain
# sampling with as many full steps.
LIGHT = {
    "12 + 24 full": ([12, 24], None, None),
    "every second one light": ([12, 24], 0, 1),
    "the same, first six full": ([12, 24], 6, 1),
    "three of four light": ([12, 24], 0, 3),
    "6 + 12 full": ([6, 12], None, None),
    "3 + 6 full": ([3, 6], None, None),
}


def drawn(pipeline: Any, count: int, **how: Any) -> list[Mesh]:
    """Samples without labels, in batches; lists among the options are shared out."""
    meshes: list[Mesh] = []
    for first in range(0, count, BATCH):
        part = slice(first, min(first + BATCH, count))
        own = {name: value[part] if isinstance(value, list) else value for name, value in how.items()}
        labels = torch.full((part.stop - first,), -1)
        meshes += pipeline.generate(labels, sample_seeds(2, first, part.stop - first), **own)
    return meshes


def points_of(mesh: Mesh, number: int) -> Tensor:
    return sample_surface(mesh, POINTS, Rng([number]))[0]


@torch.no_grad()
def by_picture(runs: Path) -> dict[str, Any]:
    """Samples of held-out pictures: the class that a classifier names, and how near they are to the shape on the picture, to others of its class, and to both
    when the class alone is told; and how often the picture of a shape makes it likelier than those of others of its class."""
    pipeline = open_run(runs / PICTURES)
    told, names = pipeline.told, list(pipeline.class_names)
    classes = torch.arange(SHOWN) % len(names)
    real = Real(told.held_out, classes)
    views = [told.pictures("held out", i) for i in range(SHOWN)]
    # Views come by turns: shaded ones have even numbers, line drawings odd ones.
    shown = {"shaded": [v[0] * -2 + 1 for v in views], "lines": [v[1] * -2 + 1 for v in views]}
    rows, found = {}, {}
    for kind, pictures in shown.items():
        for guidance in GUIDANCE:
            name = f"{kind}, guidance {guidance:g}"
            found[name] = drawn(pipeline, SHOWN, images=pictures, guidance=guidance, sampler=[PICTURE_STEPS])
            rows[name] = nearness(found[name], real, names)
    by_label = open_run(runs / parts.LONGER)
    meshes = []
    for first in range(0, SHOWN, BATCH):
        part = classes[first : first + BATCH]
        meshes += by_label.generate(part, sample_seeds(2, first, len(part)), sampler=[PICTURE_STEPS])
    rows["told the class alone"] = nearness(meshes, real, names)
    tiles = []
    for i in range(2 * len(names)):
        column = [real.meshes[i], found["shaded, guidance 1"][i], found["lines, guidance 1"][i], meshes[i]]
        drawings = [
            torch.nn.functional.interpolate(shown[kind][i][None], size=(160, 160))[0].expand(3, -1, -1)
            for kind in ("shaded", "lines")
        ]
        looks = [picture(mesh, 160) for mesh in column]
        tiles.append([looks[0], drawings[0], looks[1], drawings[1], looks[2], looks[3]])
    rows_of_sheet = [[tile[row] for tile in tiles] for row in range(6)]
    sheet = grid(
        torch.stack([tile for row in rows_of_sheet for tile in row]),
        len(tiles),
        ["shape", "shaded", "drawn of it", "lines", "drawn of them", "of the class"],
        scale=1,
    )
    write_png(runs / "shapes-pictures.png", sheet)
    likely = {kind: likeliest(pipeline, [(1 - p) / 2 for p in pictures]) for kind, pictures in shown.items()}
    return {
        "rows": rows,
        "count": SHOWN,
        "likeliest": likely,
        "among": SHOWN // len(names),
        "shapes": len(told.shapes),
        **parts.counters(pipeline),
    }


class Real:
    """Held-out shapes of classes [n] as meshes, points, and which of a few places lie inside."""

    def __init__(self, dataset: Any, classes: Tensor):
        self.classes = classes
        self.meshes = [dataset.mesh(i, parts.CELLS) for i in range(len(classes))]
        self.points = torch.stack([points_of(mesh, i) for i, mesh in enumerate(self.meshes)])
        self.places = (2 * Rng([0]).uniform(PLACES, 3)[0] - 1) * 0.85
        self.inside = torch.stack([dataset.solid(i).distance(self.places) < 0 for i in range(len(classes))])


def nearness(meshes: list[Mesh], real: Real, names: list[str]) -> dict[str, float]:
    """Samples [n] of shapes [n]: how often the class is right; Chamfer distances to the own shape and, on average, to others of the class, the common volume
    with both; and how often the own shape is the nearest of its class."""
    usable = [i for i, mesh in enumerate(meshes) if len(mesh.faces)]
    fake = torch.stack([points_of(meshes[i], i) for i in usable])
    cross = pairwise_chamfer(fake, real.points)  # [n, shapes]
    own, others, nearest, common, common_others = [], [], [], [], []
    for row, i in zip(cross, usable, strict=True):
        of_class = (real.classes == real.classes[i]).nonzero()[:, 0]
        rest = of_class[of_class != i]
        inside = Winding(meshes[i])(real.places) != 0
        own.append(float(row[i]))
        others.append(float(row[rest].mean()))
        nearest.append(float(of_class[row[of_class].argmin()] == i))
        common.append(iou(real.inside[i], inside))
        common_others.append(parts.mean([iou(real.inside[j], inside) for j in rest.tolist()]))
    return {
        "accuracy": parts.class_accuracy(meshes, real.classes, names),
        "own": parts.mean(own),
        "others": parts.mean(others),
        "nearest": parts.mean(nearest),
        "iou": parts.mean(common),
        "iou of others": parts.mean(common_others),
    }


@torch.no_grad()
def likeliest(pipeline: Any, ink: list[Tensor]) -> float:
    """Share of held-out shapes whose masked tokens are likelier under their own picture than under that of any other of their class; the same masks for all."""
    batch = parts.held_out(pipeline).__getitems__(list(range(SHOWN)))
    target = pipeline.tokenizer.encode(batch["points"], batch["normals"])
    pictures, classes = torch.stack(ink), len(pipeline.class_names)
    losses = []
    for turn in range(SHOWN // classes):
        cond = {"picture": pictures.roll(turn * classes, 0)}
        found = torch.zeros(SHOWN)
        for seed in range(MASKS):
            values = OctreeMasked(flip=0.0)(pipeline.backbone, target, cond, None, Rng.at(seed, 0, SHOWN))
            found += values["split"] + values["code"]
        losses.append(found)
    return float((torch.stack(losses).argmin(0) == 0).float().mean())


@torch.no_grad()
def by_caption(runs: Path) -> dict[str, Any]:
    """How often the classifier names the class that was asked for in words: captions of held-out shapes, and a noun alone, which training has not seen."""
    pipeline = open_run(runs / CAPTIONS)
    dataset, names = parts.held_out(pipeline), list(pipeline.class_names)
    classes = torch.arange(ASKED) % len(names)
    asked = {
        "captions of held-out shapes": [dataset.design(i).caption for i in range(ASKED)],
        "an article and the name of the class": [f"a {names[i % len(names)]}" for i in range(ASKED)],
    }
    rows: dict[str, dict[str, Any]] = {}
    for name, texts in asked.items():
        for guidance in (1.0, 2.0):
            meshes = drawn(pipeline, ASKED, texts=texts, guidance=guidance)
            of_class = {
                word: parts.class_accuracy(meshes[k :: len(names)], classes[k :: len(names)], names)
                for k, word in enumerate(names)
            }
            rows[f"{name}, guidance {guidance:g}"] = {
                "accuracy": parts.class_accuracy(meshes, classes, names),
                "pieces": parts.mean([float(inspect(mesh).num_components) for mesh in meshes if len(mesh.faces)]),
                "of class": of_class,
            }
    seen = {make("data", dict(pipeline.run_config["data"])).design(i).caption for i in range(600)}
    new = sum(text not in seen for text in asked["captions of held-out shapes"])
    return {"rows": rows, "count": ASKED, "new": new, **parts.counters(pipeline)}


@torch.no_grad()
def light_steps(runs: Path) -> dict[str, Any]:
    """The same labels and seeds with light steps and without: CPU seconds to draw the tokens of a shape, in batches and alone, and how good they are."""
    pipeline = open_run(runs / parts.GENERATOR)
    dataset, names = parts.held_out(pipeline), list(pipeline.class_names)
    real = dataset.__getitems__(list(range(LIT)))["points"][:, : parts.POINTS]
    labels, seeds = torch.arange(LIT) % len(names), sample_seeds(3, 0, LIT)
    temperature = pipeline.sampler["temperature"]
    rows: dict[str, dict[str, float]] = {name: {} for name in LIGHT}
    tokens: dict[str, list[Any]] = {name: [] for name in LIGHT}

    def draw(name: str, part: slice) -> tuple[Any, float]:
        steps, alone, light = LIGHT[name]
        reuse = None if light is None else Recap(full_steps=alone or 0, light=light)
        sampler = Sampler(num_steps=steps, temperature=temperature, reuse=reuse)
        predict = Grow(pipeline.backbone, {"label": labels[part]})
        started = time.process_time()
        found = sampler(predict, predict.start(), Rng(seeds[part]))
        return found, time.process_time() - started

    for name in LIGHT:
        draw(name, slice(0, 2))
    # By turns, so that whatever else the machine does falls on all alike.
    for first in range(0, LIT, BATCH):
        for name in LIGHT:
            found, seconds = draw(name, slice(first, first + BATCH))
            tokens[name].append(found)
            rows[name]["together"] = rows[name].get("together", 0.0) + seconds / LIT
    for i in range(BATCH):
        for name in LIGHT:
            rows[name]["alone"] = rows[name].get("alone", 0.0) + draw(name, slice(i, i + 1))[1] / BATCH
    for name, batches in tokens.items():
        meshes = [mesh for batch in batches for mesh in pipeline.tokenizer.meshes(batch)]
        rows[name] |= {
            "accuracy": parts.class_accuracy(meshes, labels, names),
            "pieces": parts.mean([float(inspect(mesh).num_components) for mesh in meshes if len(mesh.faces)]),
            **parts.distances(real, meshes),
        }
    return {"rows": rows, "count": LIT, "larger": larger(pipeline)}


def larger(pipeline: Any) -> dict[str, dict[str, float]]:
    """CPU seconds of one shape at depths 5 to 7, as in `parts.by_size`, with every second step light and without."""
    data = dict(pipeline.run_config["data"]) | {"num_points": 60_000, "num_distances": 0}
    points = make("data", data).__getitems__([0])["points"][0]
    own = {key: value for key, value in dict(pipeline.backbone.config).items() if key[0] != "_"}
    rows: dict[str, dict[str, float]] = {}
    for depth in parts.DEPTHS:
        torch.manual_seed(0)
        sizes = {"code_depth": depth - 2, "max_depth": None, "num_scales": None}
        model = OctGPT(**own | sizes).eval()
        octree = build.from_points(points, depth=depth, full_depth=model.full_depth)
        steps = [12] * (depth - 1 - model.full_depth - 1) + [24]
        seconds = {"full": 0.0, "light": 0.0}
        for name, reuse in (("full", None), ("light", Recap()), ("full", None), ("light", Recap())):
            predict = parts.forced(Grow, octree)(model, {"label": torch.zeros(1, dtype=torch.int64)})
            sampler = Sampler(num_steps=steps, reuse=reuse)
            started = time.process_time()
            tokens = sampler(predict, build.complete(model.full_depth), Rng([0]))
            seconds[name] += (time.process_time() - started) / 2
        rows[str(depth)] = {"tokens": len(tokens.splits) + len(tokens.codes), **seconds}
    return rows


MEASURED: dict[str, Callable[[Path], Any]] = {
    "pictures": by_picture,
    "captions": by_caption,
    "light steps": light_steps,
}


def train(runs: Path) -> None:
    from genkit.training import train as run

    from_it = f"tokenizer.from={runs / parts.TOKENIZER}"
    # What is told apart from the class begins anew; the rest with what classes taught.
    new = '["label.*", "mask", "context_*", "picture.*", "*.cross.*", "*.cross_norm.*"]'
    run(f"toy/{PICTURES}", [from_it, f"train.init={runs / parts.LONGER}", f"train.init_new={new}"], out=runs)
    run(f"toy/{CAPTIONS}", [from_it], out=runs)


def of_pictures(own: Mapping[str, Any]) -> str:
    rows = [
        (
            name,
            f"{100 * row['accuracy']:.0f} %",
            f"{1000 * row['own']:.1f}",
            f"{1000 * row['others']:.1f}",
            f"{row['iou']:.3f}",
            f"{row['iou of others']:.3f}",
            f"{100 * row['nearest']:.0f} %",
        )
        for name, row in own["rows"].items()
    ]
    head = (
        "shown",
        "named rightly",
        "Chamfer x 1000 to it",
        "to others of its class",
        "IoU with it",
        "with others",
        f"nearest to it of {own['among']}",
    )
    told = (
        f"This generator saw {own['samples']:,} shapes, {own['shapes']:,} with repetition, in {own['seconds'] / 60:.0f} minutes; {own['count']} held-out shapes. Of "
        f"{own['among']} pictures of a class, that of the shape makes its tokens likeliest for "
        + " and ".join(f"{100 * share:.0f} % ({kind})" for kind, share in own["likeliest"].items())
        + f" of them; by chance it would be {100 / own['among']:.0f} %."
    )
    return f"{told}\n\n{table(head, rows)}\n\n![Held-out shapes, pictures of them, what was drawn of these, and what of the class alone](shapes-pictures.png)"


def of_captions(own: Mapping[str, Any]) -> str:
    names = list(next(iter(own["rows"].values()))["of class"])
    rows = [
        (
            name,
            f"{100 * row['accuracy']:.0f} %",
            f"{row['pieces']:.1f}",
            *(f"{100 * row['of class'][word]:.0f} %" for word in names),
        )
        for name, row in own["rows"].items()
    ]
    told = (
        f"This generator saw {own['samples']:,} shapes with repetition in {own['seconds'] / 60:.0f} minutes. {own['count']} samples in each row; "
        f"{own['new']} of the {own['count']} captions occur in no training shape."
    )
    return f"{told}\n\n" + table(("asked for by", "named rightly", "pieces", *names), rows)


def of_light(own: Mapping[str, Any]) -> str:
    plain = own["rows"]["12 + 24 full"]
    rows = []
    for name, row in own["rows"].items():
        far = [f"{x:.3g}" for x in (1000 * row["mmd"], row["cov"], row["nna"])] if "mmd" in row else ["-"] * 3
        seconds = [f"{row[key]:.3f} ({plain[key] / row[key]:.2f}x)" for key in ("together", "alone")]
        rows.append((name, *seconds, f"{100 * row['accuracy']:.0f} %", f"{row['pieces']:.1f}", *far))
    head = ("steps", f"CPU s, {BATCH} at once", "alone", "named rightly", "pieces", "MMD-CD x 1000", "COV", "1-NNA")
    larger = [
        (depth, f"{row['tokens']:,}", f"{row['full']:.2f}", f"{row['light']:.2f}", f"{row['full'] / row['light']:.2f}")
        for depth, row in own["larger"].items()
    ]
    sizes = table(("surface at depth", "tokens", "CPU seconds, all full", "every second light", "times"), larger)
    return f"{own['count']} samples against as many held-out shapes.\n\n{table(head, rows)}\n\n{sizes}"


def page(found: Mapping[str, Any], runs: Path) -> None:
    """Fill in what has been measured; what has not keeps what the page says."""
    render = {"pictures": of_pictures, "captions": of_captions, "light steps": of_light}
    fill(PAGE, {name: render[name](own) for name, own in found.items()})
    if (runs / "shapes-pictures.png").exists():
        files.write_bytes(RESULTS / "shapes-pictures.png", (runs / "shapes-pictures.png").read_bytes())


def main() -> None:
    run_parts(__doc__, MEASURED, train, page, "results-shapes-conditions.json")


if __name__ == "__main__":
    main()
