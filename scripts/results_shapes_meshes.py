"""Real meshes on docs/results/shapes.md: a tokenizer of procedural shapes, measured on furniture before and after it is trained on with some;
scripts/results_shapes.py calls it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import results_shapes_parts as parts  # beside this file
import torch

from genkit import config as configs
from genkit import recipes, registry
from genkit.images import write_png
from genkit.meshes.marching_cubes import marching_cubes
from genkit.meshes.mesh import Mesh, inspect
from genkit.meshes.pictures import contact_sheet
from genkit.meshes.sampling import sample_surface
from genkit.metrics.shape_agreement import iou, surface_agreement
from genkit.pipeline import open_run
from genkit.rng import Rng
from genkit.tokenizers.octree_vq import BOX, LEVEL

TUNED = "octree-furniture"
FETCHED = Path("data/sweethome3d")  # by `genkit data fetch sweethome3d`
KINDS = ("bed", "chair", "sofa", "table", "vase")
CELLS = 96
SHOWN = 8


def train(runs: Path) -> None:
    """On furniture that is fetched; nothing where there is none."""
    from genkit.training import train as run

    folder = runs / "furniture"
    if not folder.exists():
        if not FETCHED.exists():
            print(f"no {FETCHED}: real meshes are left out; `genkit data fetch sweethome3d` brings them", flush=True)
            return
        for kind in KINDS:
            shutil.copytree(FETCHED / kind, folder / kind)
    run(f"toy/{TUNED}", [f"data.path={folder}", f"train.init={runs / parts.TOKENIZER}"], out=runs)


def tokenizers(runs: Path) -> dict[str, Any]:
    """What is compared: the same weights at both depths, and those that were trained on."""
    first = open_run(runs / parts.TOKENIZER).tokenizer
    finer = registry.build("tokenizer", dict(configs.load(recipes.resolve(f"toy/{TUNED}"))["tokenizer"]))
    finer.load_state_dict(first.state_dict())
    return {
        "depth 5, procedural shapes alone": first,
        "depth 6, the same weights": finer.eval(),
        "depth 6, trained on": open_run(runs / TUNED).tokenizer,
    }


@torch.no_grad()
def real_meshes(runs: Path) -> dict[str, Any]:
    """Furniture that was held out, given back by tokenizers."""
    tuned = open_run(runs / TUNED)
    data = dict(tuned.run_config["data"])
    held_out = registry.build("data", data | {"split": "val", "num_points": 16_384, "num_distances": 20_000})
    compared = tokenizers(runs)
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in compared}
    shown = {int(i) for i in torch.linspace(0, len(held_out) - 1, SHOWN)}
    tiles: dict[str, list[Mesh]] = {"as prepared": [], **{name: [] for name in compared}}
    for i in range(len(held_out)):
        batch = held_out.__getitems__([i])
        if not len(batch["label"]):  # cannot be used, and is named
            continue
        if i in shown:
            tiles["as prepared"].append(held_out.mesh(i))
        for name, tokenizer in compared.items():
            tokens = tokenizer.encode(batch["points"], batch["normals"])
            decoded = tokenizer.field(tokens)
            inside = decoded(batch["sdf_points"][0], 0, tokenizer.depth) < LEVEL
            mesh = marching_cubes(decoded.grid(0, CELLS, tokenizer.depth), level=LEVEL, bounds=(-BOX, BOX))
            found = {
                "iou": iou(batch["sdf"][0] < 0, inside),
                "tokens": float(len(tokens.splits) + len(tokens.codes)),
                "watertight": float(inspect(mesh).is_watertight),
            }
            if len(mesh.faces):
                points, normals, _ = sample_surface(mesh, 4096, Rng([i]))
                found |= surface_agreement(batch["points"][0, :4096], batch["normals"][0, :4096], points, normals)
            rows[name].append(found)
            if i in shown:
                tiles[name].append(mesh)
    sheet = [mesh for row in tiles.values() for mesh in row]
    columns = len(tiles["as prepared"])
    names = ["as prepared", "depth 5", "depth 6, before", "depth 6, after"]
    write_png(runs / "shapes-furniture.png", contact_sheet(sheet, columns=columns, size=160, row_names=names))
    means = {
        name: {key: parts.mean([row[key] for row in some if key in row]) for key in some[0]}
        for name, some in rows.items()
    }
    return {
        "rows": means,
        "count": len(rows["depth 6, trained on"]),
        "classes": len(held_out.info.class_names),
        **parts.counters(tuned),
    }
