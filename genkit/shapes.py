"""The straight line of shapes: what is drawn while they train, and from a trained run to mesh files."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genkit import images
from genkit.console import Progress
from genkit.errors import UsageError, nearest
from genkit.requests import Request
from genkit.rng import Rng, sample_seeds

_SHOWN = 96  # shapes in a contact sheet
_TILE = 192  # pixels
LEAST_CELLS = 4  # along a side, that a surface is looked for in


def picture(job: Any, held_out: Any, count: int) -> Any:
    """Where training is: reconstructions of held-out shapes, or samples from the same seeds every time, shaded."""
    from genkit.meshes.pictures import contact_sheet

    count = min(count, 12)
    if job.tokenizer is None:
        batch = held_out.__getitems__(list(range(min(count, len(held_out)))))
        device = job.accelerator.device
        tokens = job.model.encode(batch["points"].to(device), batch["normals"].to(device))
        return contact_sheet(job.model.meshes(tokens), columns=min(count, 6))
    from genkit.snapshots import pipeline_of

    labels = torch.arange(count) % len(job.class_names) if job.class_names else torch.full((count,), -1)
    seeds = sample_seeds(job.config["train"]["seed"], 0, count)
    found: Any = pipeline_of(job).generate(labels, seeds)
    if hasattr(job.condition, "chosen"):
        return picture_sheet(found, job.condition.chosen(labels, Rng(seeds)))
    return contact_sheet(found, columns=min(count, 6))


def write_samples(
    pipeline: Any,
    state: Any,
    folder: Path,
    settings: dict[str, Any],
    asked: Request,
    *,
    format: str,
    batch_size: int,
    resolution: int | None,
    turntable: bool,
    **drawing: Any,
) -> dict[str, Any]:
    """Write a mesh per sample, a contact sheet with one row per class, and samples.json: `genkit sample` of a generator of shapes.

    Of a generator that is told pictures the sheet has a row per picture, and the picture in front as the generator sees it.

    Sample i is the same for any batch size and number of processes; an interrupted call continues when it is repeated. A sample whose function has no
    surface is reported and not written.

    Args:
        folder: claimed for exactly these samples.
        settings: what samples.json says beside the samples.
        format: end of the files' names, of genkit.meshes.storage.FORMATS.
        resolution: cells along a side, see OctreeVQ.meshes.
        turntable: also a GIF of each shape.
        drawing: steps, guidance and sampler, for GeneratorPipeline.generate.

    Returns: shapes, out, grid, json (paths), empty (files that were not written), seconds.
    """
    from genkit.meshes import pictures, storage
    from genkit.meshes.mesh import Mesh
    from genkit.sampling import claim, unclaimed_if_nothing_comes

    if format not in storage.FORMATS:
        raise UsageError(f"--format {format} is not known; {nearest(format, list(storage.FORMATS))}")
    names = [f"{i:06d}.{format}" for i in range(len(asked))]
    if resolution is not None and resolution < LEAST_CELLS:
        raise UsageError(f"--resolution {resolution} is too coarse for a surface; use at least {LEAST_CELLS}")
    settings |= {"resolution": resolution} if resolution is not None else {}
    claimed = claim(folder, {**settings, "samples": asked.rows(names)}) if state.is_main_process else False
    state.wait_for_everyone()
    started = time.perf_counter()
    todo = [i for i, name in enumerate(names) if not (folder / name).exists()]
    todo = todo[state.process_index :: state.num_processes]
    with (
        unclaimed_if_nothing_comes(folder, names if claimed else None),
        Progress(total=len(todo), unit="shapes", title="sample") as progress,
    ):
        for first in range(0, len(todo), batch_size):
            part = todo[first : first + batch_size]
            found = pipeline.generate(
                **asked.told(part),
                resolution=resolution,
                **drawing,
            )
            for i, mesh in zip(part, found, strict=True):
                if not len(mesh.faces):
                    progress.line(
                        f"{names[i]} is not written: the decoded function has no surface (seed {asked.seeds[i]})"
                    )
                    continue
                storage.save(mesh, folder / names[i])
                if turntable:
                    pictures.write_turntable(folder / f"{i:06d}.gif", mesh)
            progress.advance(len(part))
    state.wait_for_everyone()
    seconds = time.perf_counter() - started
    empty = [name for name in names if not (folder / name).exists()]
    if state.is_main_process:
        nothing = Mesh(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int64))
        shown = range(min(len(names), _SHOWN))
        meshes = [nothing if names[i] in empty else storage.load(folder / names[i]) for i in shown]
        labels = asked.labels[: len(shown)]
        if hasattr(getattr(pipeline, "told", None), "chosen"):
            ink = (
                pipeline.told.chosen(torch.tensor(labels), Rng(asked.seeds[: len(shown)]))
                if asked.pictures is None
                else torch.stack([pipeline.told.read(path) for path in asked.pictures[: len(shown)]])
            )
            sheet = picture_sheet(meshes, ink)
        else:
            sheet = class_sheet(meshes, labels, asked.class_names)
        images.write_png(folder / "grid.png", sheet)
    return {
        "shapes": len(names) - len(empty),
        "out": str(folder),
        "grid": str(folder / "grid.png"),
        "json": str(folder / "samples.json"),
        "empty": empty,
        "seconds": seconds,
    }


def class_sheet(meshes: list[Any], labels: list[int], class_names: Sequence[str], columns: int = 8) -> Any:
    """A contact sheet with one named row per class, at most `columns` of each; about square without classes."""
    from genkit.meshes.mesh import Mesh
    from genkit.meshes.pictures import contact_sheet

    distinct = list(dict.fromkeys(labels))
    if distinct == [-1]:
        return contact_sheet(meshes)
    rows = [[m for m, label in zip(meshes, labels, strict=True) if label == row][:columns] for row in distinct]
    width = max(map(len, rows))
    nothing = Mesh(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int64))
    filled = [mesh for row in rows for mesh in [*row, *[nothing] * (width - len(row))]]
    return contact_sheet(filled, columns=width, row_names=[class_names[i] if i >= 0 else "any" for i in distinct])


def picture_sheet(meshes: list[Any], ink: Tensor, columns: int = 8) -> Any:
    """Pictures and what was drawn of them: a row per picture, itself in front; where every sample has a picture of its own, four pairs in a row.

    Args:
        ink: [B, 1, Y, X] in [0, 1], the picture of each mesh.
        columns: at most so many samples of one picture.
    """
    from genkit.meshes.pictures import picture

    of_picture: dict[bytes, list[int]] = {}
    for i, one in enumerate(ink):
        of_picture.setdefault(one.numpy().tobytes(), []).append(i)
    rows = [own[:columns] for own in of_picture.values()]
    width = max(map(len, rows))
    pictures = torch.nn.functional.interpolate(1 - 2 * ink, size=(_TILE, _TILE)).expand(-1, 3, -1, -1)
    blank = torch.ones(3, _TILE, _TILE)
    tiles = [
        tile
        for own in rows
        for tile in [pictures[own[0]], *(picture(meshes[i], _TILE) for i in own), *[blank] * (width - len(own))]
    ]
    return images.grid(torch.stack(tiles), (1 + width) * (4 if width == 1 else 1), scale=1)
