"""From generated or reconstructed meshes to numbers that say how they were made: `genkit eval` of shapes.

Whatever is measured, shapes are scaled to a longest side of 1.6 around the origin first, both sides alike.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from genkit import registry
from genkit.console import Progress
from genkit.errors import GenkitError, UsageError
from genkit.evaluation.report import Report
from genkit.evaluation.shape_figures import CHAMFER_POINTS, EMD_POINTS, SIZE, Rows, compare, read, validity
from genkit.evaluation.shape_subjects import (
    beside,
    default_reference,
    from_path,
    generated,
    is_run,
    of_dataset,
    opened,
    reference_of,
)
from genkit.evaluation.subjects import Sampling
from genkit.meshes.hierarchy import Winding
from genkit.meshes.mesh import inspect, normalised
from genkit.meshes.sampling import sample_surface
from genkit.metrics import shape_nets
from genkit.metrics.shape_agreement import iou, surface_agreement
from genkit.rng import Rng

SURFACE_POINTS = 16_384  # for reconstructions: closer together than the tolerance of the F-score
DEFAULT_COUNT = 120


def evaluate(
    target: Any,
    *,
    reference: str | None = None,
    count: int | None = None,
    weights: str | None = None,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    sampler: Sequence[str] = (),
    batch_size: int = 16,
    ema: bool = True,
    device: Any = None,
    out: str | Path | None = None,
) -> Report:
    """Measure meshes, or a run that makes some.

    Always: how many are watertight, of one piece, empty. With a reference: MMD, COV and 1-NNA by Chamfer and earth mover's distances, Fréchet distances of
    points and of shaded pictures on the nets that come with genkit, the share that the point net takes for the class they should be, and how far the
    nearest reference is. A tokenizer's run is measured by reconstructions of held-out shapes.

    Args:
        target: a folder of meshes (with samples.json of `genkit sample`, or subfolders, as classes), one mesh, a run, or a pipeline.
        reference: "shapes", "shapes:val", "shapes:test" (procedural), "train" or "val" of a run, or a folder of meshes. A run's default is "val"
            where there is one, else "train"; a folder's is none.
        count: shapes from the front, or to generate (120).
        weights: of Inception-2015, a file: shading-image FID over 20 views of 299 pixels instead of the net that comes with genkit.
        out: file for the report; by default beside the folder, or RUN/eval/STEP.json, where STEP also says what was asked of the sampler.

    Raises: UsageError or GenkitError, one line each.
    """
    started = time.perf_counter()
    if count is not None and count < 1:
        raise UsageError(f"count={count}: at least one shape is needed")
    pipe, place = None, beside(target)
    if not isinstance(target, str | Path) or is_run(Path(target)):
        pipe, place = opened(target, ema, device)
        if not hasattr(pipe, "generate"):
            return _reconstruct(pipe, place, count, out, started)
        # Reports of one checkpoint drawn in several ways lie side by side, as those of images.
        suffix = Sampling(seed, steps, guidance, "balanced", sampler=tuple(sampler)).suffix
        place = place and place.with_name(f"{place.stem}{suffix}.json")
    data = (pipe.run_config or {}).get("data") if pipe is not None else None
    if pipe is not None:
        drawing: dict[str, Any] = {"steps": steps, "guidance": guidance}
        drawing |= {"sampler": tuple(sampler)} if sampler else {}
        samples = generated(pipe, count or DEFAULT_COUNT, seed, batch_size, drawing)
        reference = reference or default_reference(data)
    else:
        samples = from_path(Path(target))
    total = min(samples.count, count or samples.count)
    against = reference_of(reference, data) if reference else None
    report = Report([])
    row = Rows(report, samples.about)
    meshes, numbers = read(samples, total, report)
    validity(row, [inspect(mesh) for mesh in meshes], len(samples.missing))
    usable = [
        (number, normalised(mesh, size=SIZE)) for number, mesh in zip(numbers, meshes, strict=True) if len(mesh.faces)
    ]
    if against is not None and len(usable) >= 2:
        compare(row, samples, usable, against, weights, out or place)
    elif against is None:
        report.notes.append(
            "no reference: name one with --ref (shapes:test, or a folder of meshes) for distances between sets"
        )
    report.settings = {
        "target": str(target) if isinstance(target, str | Path) else type(target).__name__,
        "kind": "shapes",
        "reference": against.about if against else None,
        "count": total,
        "seed": seed,
        "steps": steps,
        "guidance": guidance,
        "sampler": list(sampler),
        "chamfer_points": CHAMFER_POINTS,
        "emd_points": EMD_POINTS,
        "size": SIZE,
        "nets": dict(shape_nets.SHA256),
        "seconds": time.perf_counter() - started,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }
    where = Path(out) if out is not None else place
    if where is not None:
        report.save(where)
    return report


def _reconstruct(pipe: Any, place: Path | None, count: int | None, out: Any, started: float) -> Report:
    """A tokenizer by its reconstructions of held-out shapes."""
    data = pipe.run_config["data"]
    try:
        dataset, split = registry.build("data", {**data, "split": "val"}), "val"
    except UsageError:
        dataset, split = registry.build("data", data), "train"
    shapes = of_dataset(dataset, f"{split} of {data['type']}")
    total = min(len(dataset), count or 24)
    device = next(pipe.tokenizer.parameters()).device
    found: list[dict[str, float]] = []
    findings = []
    with Progress(total=total, unit="shapes", title="reconstruct") as progress:
        for number in range(total):
            batch = dataset.__getitems__([number])
            progress.advance(1)
            if not len(batch["label"]):
                continue
            with torch.no_grad():
                mesh = pipe.tokenizer.meshes(
                    pipe.tokenizer.encode(batch["points"].to(device), batch["normals"].to(device))
                )[0]
            findings.append(inspect(mesh))
            if not len(mesh.faces):
                found.append({"chamfer": float("nan"), "normal_consistency": 0.0, "f_score": 0.0, "iou": 0.0})
                continue
            truth = None if shapes.solid is not None else shapes.mesh(number)
            true_points, true_normals = shapes.points(number, truth, SURFACE_POINTS)  # type: ignore[arg-type]
            points, normals, _ = sample_surface(mesh, SURFACE_POINTS, Rng.at(0, number, 1).fork("points"))
            agreement = surface_agreement(true_points, true_normals, points, normals)
            places = (2 * Rng.at(1, number, 1).uniform(20_000, 3)[0] - 1) * 0.85
            inside = shapes.inside(number, places) if shapes.inside is not None else Winding(truth)(places) != 0  # type: ignore[arg-type]
            found.append({**agreement, "iou": iou(inside, Winding(mesh)(places) != 0)})
    if not found:
        raise GenkitError(f"none of the {total} shapes of {shapes.about} can be used")
    report = Report([])
    row = Rows(report, f"{getattr(pipe, 'weights_variant', 'given')} weights")
    for key, name, better, how in (
        ("chamfer", "chamfer", "lower", f"mean squared both ways summed, {SURFACE_POINTS:,} points, box {SIZE}"),
        ("normal_consistency", "normal consistency", "higher", "mean |cos| both ways"),
        ("f_score", "F-score", "higher", f"within 0.02, {SURFACE_POINTS:,} points"),
        ("iou", "IoU", "higher", "20,000 places"),
    ):
        values = torch.tensor([item[key] for item in found])
        values = values[~values.isnan()]  # no distance to a shape without a surface
        row.add(name, float(values.mean()), better, how, f"{split} of {data['type']}, n={len(values)}")
    validity(row, findings)
    report.settings = {"kind": "shape tokenizer", "count": len(found), "seconds": time.perf_counter() - started}
    where = Path(out) if out is not None else place
    if where is not None:
        report.save(where)
    return report
