"""Sets of meshes in numbers, as rows of a report: validity, distances between sets, Fréchet distances, classes, novelty.

Distances between sets of points follow PointFlow; see docs/metrics.md for what else goes by these names.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genkit import images
from genkit.console import Progress
from genkit.errors import GenkitError, UsageError
from genkit.evaluation.report import Report
from genkit.evaluation.shape_subjects import ShapeSet
from genkit.meshes.mesh import Findings, Mesh, normalised
from genkit.meshes.pictures import contact_sheet
from genkit.meshes.shading import VIEWS, shaded, view
from genkit.metrics import point_sets, shape_nets
from genkit.metrics.statistics import FeatureSums, frechet_distance

SIZE = 1.6  # longest side of what is measured
CHAMFER_POINTS, EMD_POINTS, EMD_SHAPES = 512, 128, 40
QUICK_VIEWS = (0, 3, 6, 9, 12, 15)
_PAIRS_SHOWN = 8


class Rows:
    """Adds rows that say how they were measured."""

    def __init__(self, report: Report, about: str) -> None:
        self.report, self.about = report, about

    def add(self, metric: str, value: float, better: str, *how: str) -> None:
        comparable = ", ".join(how)
        self.report.rows.append(
            {
                "metric": metric,
                "value": float(value),
                "better": better,
                "comparable": comparable,
                "protocol": f"{comparable}, {self.about}",
            }
        )


def validity(row: Rows, findings: list[Findings], missing: int = 0) -> None:
    """Shares of all shapes, those that could not be read or were not written included."""
    whole = len(findings) + missing
    n = f"n={whole}"
    watertight, whole_pieces, filled = (
        sum(found)
        for found in zip(*((f.is_watertight, f.num_components == 1, f.num_faces > 0) for f in findings), strict=True)
    )
    row.add("watertight", watertight / whole, "higher", "share with every edge between two faces", n)
    row.add("one piece", whole_pieces / whole, "higher", "share with a single component", n)
    row.add("empty", (whole - filled) / whole, "lower", "share without faces or unreadable", n)
    if filled:
        row.report.details["components, mean"] = sum(f.num_components for f in findings if f.num_faces) / filled
        row.report.details["faces, mean"] = sum(f.num_faces for f in findings) / len(findings)


def compare(
    row: Rows, samples: ShapeSet, usable: list[tuple[int, Mesh]], against: ShapeSet, weights: str | None, out: Any
) -> None:
    n = min(len(usable), against.count)
    if n < 2:
        raise UsageError(f"{against.about} has {against.count} shapes; at least 2 are needed")
    usable = usable[:n]
    real_meshes, real_numbers = read(against, n, row.report, normalise=True)
    n = min(n, len(real_meshes))
    usable, real_meshes, real_numbers = usable[:n], real_meshes[:n], real_numbers[:n]
    fake = torch.stack([samples.points(number, mesh, CHAMFER_POINTS)[0] for number, mesh in usable])
    real = torch.stack(
        [against.points(i, mesh, CHAMFER_POINTS)[0] for i, mesh in zip(real_numbers, real_meshes, strict=True)]
    )
    what = f"reference {against.about}, n={n}, box {SIZE}"
    chamfer = _distances(
        row,
        "CD",
        point_sets.pairwise_chamfer,
        real,
        fake,
        what,
        f"mean squared both ways summed, {CHAMFER_POINTS} points",
    )
    few = min(n, EMD_SHAPES)
    try:
        _distances(
            row,
            "EMD",
            point_sets.pairwise_earth_mover,
            real[:few, :EMD_POINTS],
            fake[:few, :EMD_POINTS],
            f"reference {against.about}, n={few}, box {SIZE}",
            f"exact, mean unsquared, {EMD_POINTS} points",
        )
    except GenkitError as error:
        row.report.notes.append(f"no EMD: {error}")
    _by_points(row, samples, [number for number, _ in usable], real, fake, what)
    _by_pictures(row, [mesh for _, mesh in usable], real_meshes, weights, what)
    _novelty(row, chamfer, [mesh for _, mesh in usable], real_meshes, what, out)


def _distances(row: Rows, name: str, pairwise: Callable, real: Tensor, fake: Tensor, what: str, how: str) -> Tensor:
    """MMD, COV and 1-NNA by one distance; returns the distances of samples to references [n, n], references in rows."""
    between = pairwise(real, fake)
    found = point_sets.mmd_coverage(between)
    found |= point_sets.nearest_neighbour_accuracy(pairwise(real, real), between, pairwise(fake, fake))
    row.add(f"1-NNA-{name}", found["acc"], "", "0.5 is ideal", how, what)
    row.add(f"COV-{name}", found["lgan_cov"], "higher", how, what)
    row.add(f"MMD-{name}", found["lgan_mmd"], "lower", how, what)
    return between


def _by_points(row: Rows, samples: ShapeSet, numbers: list[int], real: Tensor, fake: Tensor, what: str) -> None:
    judge = shape_nets.load(shape_nets.PointNet)
    (real_features, _), (features, logits) = (
        shape_nets.features_and_logits(judge, x[:, : shape_nets.POINTS]) for x in (real, fake)
    )
    name = f"FD ({judge.protocol})"
    row.add(name, _frechet(real_features, features), "lower", f"{shape_nets.POINTS} points", what)
    half = len(real_features) // 2
    if half >= 2:
        halves = _frechet(real_features[:half], real_features[half : 2 * half])
        row.report.details[f"{name} between halves of the reference"] = halves
    known = {name: i for i, name in enumerate(shape_nets.CLASS_NAMES)}
    truth = torch.tensor([known.get(samples.label(number), -1) for number in numbers])
    judged = truth >= 0
    if judged.any():
        right = (logits.argmax(1) == truth)[judged].float()
        row.add(f"class accuracy ({judge.protocol})", float(right.mean()), "higher", f"n={int(judged.sum())}")
        for label in truth[judged].unique().tolist():
            own = truth[judged] == label
            row.report.details[f"class accuracy: {shape_nets.CLASS_NAMES[label]}"] = float(right[own].mean())


def _by_pictures(row: Rows, fake: list[Mesh], real: list[Mesh], weights: str | None, what: str) -> None:
    """Fréchet distance of shaded pictures, view by view, then the mean over views."""
    views = QUICK_VIEWS if weights is None else tuple(range(len(VIEWS)))
    if weights is None:
        judge = shape_nets.load(shape_nets.ViewNet)
        side, name = shape_nets.SIDE * 2, f"shading-FD ({judge.protocol})"

        def features(pictures: Tensor) -> Tensor:
            return shape_nets.features_and_logits(judge, pictures)[0]

    else:
        from genkit.metrics import features as nets

        net = nets.load("inception-2015", weights)
        side, name = 299, "shading-FID"

        def features(pictures: Tensor) -> Tensor:
            return net(pictures[:, None].expand(-1, 3, -1, -1) * 2 - 1)

    sides = [[normalised(mesh, to="sphere", size=1.0) for mesh in meshes] for meshes in (real, fake)]
    values = []
    with Progress(total=len(views) * 2 * len(fake), unit="pictures", title="shade") as progress:
        for number in views:
            found = []
            for meshes in sides:
                # As 8 bits, as files would hold them.
                pictures = torch.stack([(shaded(mesh, view(number), side) * 255).round() / 255 for mesh in meshes])
                found.append(features(pictures))
                progress.advance(len(meshes))
            values.append(_frechet(*found))
    row.add(name, sum(values) / len(values), "lower", f"mean of {len(views)} views of {side} pixels, unit sphere", what)
    dims = found[0].shape[1]
    if len(fake) < 2 * dims:
        row.report.notes.append(
            f"{name}: {len(fake)} shapes are fewer than twice the {dims} feature dimensions; the distance is biased upwards"
        )


def _novelty(row: Rows, chamfer: Tensor, fake: list[Mesh], real: list[Mesh], what: str, out: Any) -> None:
    nearest, which = chamfer.min(0)
    row.add("nearest CD", float(nearest.median()), "", "median distance of a sample to its nearest reference", what)
    row.report.details["nearest CD, least"] = float(nearest.min())
    if out is None:
        return
    shown = nearest.argsort()[:_PAIRS_SHOWN].tolist()
    picture = contact_sheet(
        [fake[i] for i in shown] + [real[int(which[i])] for i in shown], len(shown), 128, ("sample", "nearest")
    )
    path = Path(out).with_suffix(".nearest.png")
    images.write_png(path, picture)
    row.report.notes.append(f"samples closest to references, beside them: {path}")


def _frechet(real: Tensor, fake: Tensor) -> float:
    moments = []
    for features in (real, fake):
        sums = FeatureSums(features.shape[1])
        sums.update(features)
        moments.append(sums.moments())
    return frechet_distance(moments[0].mu, moments[0].sigma, moments[1].mu, moments[1].sigma)


def read(shapes: ShapeSet, count: int, report: Report, normalise: bool = False) -> tuple[list[Mesh], list[int]]:
    """The first `count` meshes that can be read, and their numbers."""
    meshes: list[Mesh] = []
    numbers: list[int] = []
    with Progress(total=count, unit="shapes", title="read") as progress:
        for number in range(shapes.count):
            if len(meshes) == count:
                break
            try:
                mesh = shapes.mesh(number)
            except GenkitError as error:
                shapes.missing.append(str(error))
                report.notes.append(f"left out {error}")
                progress.advance(1)
                continue
            meshes.append(normalised(mesh, size=SIZE) if normalise else mesh)
            numbers.append(number)
            progress.advance(1)
    if not meshes:
        raise GenkitError(f"none of the {shapes.count} shapes of {shapes.about} can be used: {shapes.missing[0]}")
    return meshes, numbers
