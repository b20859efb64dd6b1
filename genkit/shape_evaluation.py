"""From generated or reconstructed meshes to numbers that say how they were made: `genkit eval` of shapes.

Whatever is measured, shapes are scaled to a longest side of 1.6 around the origin first, both sides alike. Distances between sets of points follow
PointFlow; see docs/metrics.md for what else goes by these names.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genkit import images, registry
from genkit.console import Progress
from genkit.errors import GenkitError, UsageError
from genkit.meshes import storage
from genkit.meshes.hierarchy import Winding
from genkit.meshes.mesh import Findings, Mesh, inspect, normalised
from genkit.meshes.pictures import contact_sheet
from genkit.meshes.sampling import sample_surface
from genkit.meshes.shading import VIEWS, shaded, view
from genkit.metrics import point_sets, shape_nets
from genkit.metrics.shape_agreement import iou, surface_agreement
from genkit.metrics.statistics import FeatureSums, frechet_distance
from genkit.report import Report
from genkit.rng import Rng, sample_seeds

SIZE = 1.6  # longest side of what is measured
CHAMFER_POINTS, EMD_POINTS, EMD_SHAPES = 512, 128, 40
SURFACE_POINTS = 16_384  # for reconstructions: closer together than the tolerance of the F-score
QUICK_VIEWS = (0, 3, 6, 9, 12, 15)
RESOLUTION = 64  # cells per axis of meshes made from procedural solids
DATA = ("shapes", "meshes")  # words of datasets of shapes
DEFAULT_COUNT = 120
_PAIRS_SHOWN = 8


@dataclass
class ShapeSet:
    """Numbered shapes.

    Attributes:
        count: how many there are.
        mesh: number -> mesh, perhaps without faces. May raise GenkitError naming a file that cannot be used.
        label: number -> name of its class, "" = none.
        about: where they come from, for the report.
        solid: number -> exact points and normals, (number, count, rng) -> two [count, 3]; None = points are drawn from meshes.
        inside: (number, places [N, 3]) -> [N] bool; None = asked of the mesh.
    """

    count: int
    mesh: Callable[[int], Mesh]
    label: Callable[[int], str]
    about: str
    solid: Callable[[int, int, Rng], tuple[Tensor, Tensor]] | None = None
    inside: Callable[[int, Tensor], Tensor] | None = None
    missing: list[str] = field(default_factory=list)

    def points(self, number: int, mesh: Mesh, count: int) -> tuple[Tensor, Tensor]:
        """Points and normals of shape `number`, whose mesh is known: two [count, 3]."""
        rng = Rng.at(0, number, 1).fork("points")
        if self.solid is not None:
            return self.solid(number, count, rng)
        return sample_surface(mesh, count, rng)[:2]


def is_of_shapes(target: Any) -> bool:
    """Whether a target of `genkit eval` is about shapes: a folder of meshes and no images, a mesh, or a run or pipeline of shapes."""
    if not isinstance(target, str | Path):
        return ((getattr(target, "run_config", None) or {}).get("data") or {}).get("type") in DATA
    path = Path(target)
    if path.suffix.lower() in storage.SUFFIXES:
        return True
    if not path.is_dir():
        return False
    for name in ("config.resolved.yaml", "../config.resolved.yaml", "../../config.resolved.yaml"):
        if (path / name).is_file():
            import yaml

            data = (yaml.safe_load((path / name).read_text(encoding="utf-8")) or {}).get("data") or {}
            return data.get("type") in DATA
    if (path / "model_index.json").exists():
        return False
    from genkit.data.check_meshes import has_only_meshes

    return has_only_meshes(str(path)) or (
        (path / "samples.json").exists() and any(p.suffix.lower() in storage.SUFFIXES for p in path.iterdir())
    )


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
        out: file for the report; by default beside the folder, or RUN/eval/STEP.json.

    Raises: UsageError or GenkitError, one line each.
    """
    started = time.perf_counter()
    if count is not None and count < 1:
        raise UsageError(f"count={count}: at least one shape is needed")
    pipe, place = None, _beside(target)
    if not isinstance(target, str | Path) or _is_run(Path(target)):
        pipe, place = _opened(target, ema, device)
        if not hasattr(pipe, "generate"):
            return _reconstruct(pipe, place, count, seed, out, started)
    data = (pipe.run_config or {}).get("data") if pipe is not None else None
    if pipe is not None:
        drawing: dict[str, Any] = {"steps": steps, "guidance": guidance}
        drawing |= {"sampler": tuple(sampler)} if sampler else {}
        samples = _generated(pipe, count or DEFAULT_COUNT, seed, batch_size, drawing)
        reference = reference or _default_reference(data)
    else:
        samples = _from_path(Path(target))
    total = min(samples.count, count or samples.count)
    against = _reference(reference, data) if reference else None
    report = Report([])
    row = _Rows(report, samples.about)
    meshes, numbers = _read(samples, total, report)
    _validity(row, [inspect(mesh) for mesh in meshes], len(samples.missing))
    usable = [
        (number, normalised(mesh, size=SIZE)) for number, mesh in zip(numbers, meshes, strict=True) if len(mesh.faces)
    ]
    if against is not None and len(usable) >= 2:
        _compare(row, samples, usable, against, weights, out or place)
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


class _Rows:
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


def _validity(row: _Rows, findings: list[Findings], missing: int = 0) -> None:
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


def _compare(
    row: _Rows, samples: ShapeSet, usable: list[tuple[int, Mesh]], against: ShapeSet, weights: str | None, out: Any
) -> None:
    n = min(len(usable), against.count)
    if n < 2:
        raise UsageError(f"{against.about} has {against.count} shapes; at least 2 are needed")
    usable = usable[:n]
    real_meshes, real_numbers = _read(against, n, row.report, normalise=True)
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


def _distances(row: _Rows, name: str, pairwise: Callable, real: Tensor, fake: Tensor, what: str, how: str) -> Tensor:
    """MMD, COV and 1-NNA by one distance; returns the distances of samples to references [n, n], references in rows."""
    between = pairwise(real, fake)
    found = point_sets.mmd_coverage(between)
    found |= point_sets.nearest_neighbour_accuracy(pairwise(real, real), between, pairwise(fake, fake))
    row.add(f"1-NNA-{name}", found["acc"], "", "0.5 is ideal", how, what)
    row.add(f"COV-{name}", found["lgan_cov"], "higher", how, what)
    row.add(f"MMD-{name}", found["lgan_mmd"], "lower", how, what)
    return between


def _by_points(row: _Rows, samples: ShapeSet, numbers: list[int], real: Tensor, fake: Tensor, what: str) -> None:
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


def _by_pictures(row: _Rows, fake: list[Mesh], real: list[Mesh], weights: str | None, what: str) -> None:
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


def _novelty(row: _Rows, chamfer: Tensor, fake: list[Mesh], real: list[Mesh], what: str, out: Any) -> None:
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


def _read(shapes: ShapeSet, count: int, report: Report, normalise: bool = False) -> tuple[list[Mesh], list[int]]:
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


def _from_path(path: Path) -> ShapeSet:
    """A folder of meshes, or one mesh."""
    if not path.is_dir():
        return ShapeSet(1, lambda number: storage.load(path), lambda number: "", path.name)
    keys = storage.scan(path)
    labels = {key: key.partition("/")[0] if "/" in key else "" for key in keys}
    missing: list[str] = []
    try:
        for sample in json.loads((path / "samples.json").read_text(encoding="utf-8"))["samples"]:
            if sample["file"] in labels:
                labels[sample["file"]] = sample.get("class") or ""
            else:
                missing.append(f"{path / sample['file']}: not written, it had no surface")
    except (OSError, ValueError, KeyError, TypeError):
        missing = []
    digest = hashlib.sha256(repr([(key, (path / key).stat().st_size) for key in keys]).encode()).hexdigest()
    return ShapeSet(
        len(keys),
        lambda number: storage.load(path / keys[number]),
        lambda number: labels[keys[number]],
        f"{path.name or path} sha {digest[:8]}",
        missing=missing,
    )


def _of_dataset(data: Any, about: str) -> ShapeSet:
    """Shapes of a dataset `shapes` or `meshes`."""
    names = data.info.class_names
    if hasattr(data, "solid"):
        return ShapeSet(
            len(data),
            lambda number: data.mesh(number, RESOLUTION),
            lambda number: names[number % len(names)],
            about,
            lambda number, count, rng: data.solid(number).sample_surface(count, rng),
            lambda number, places: data.solid(number).distance(places) < 0,
        )
    return ShapeSet(
        len(data), data.mesh, lambda number: names[data.labels[number]] if data.labels[number] >= 0 else "", about
    )


def _reference(word: str, data: dict[str, Any] | None) -> ShapeSet:
    if word in ("train", "val"):
        if data is None:
            raise UsageError(
                f"--ref {word} is a split of a run's data, and a folder has none; name shapes:test or a folder of meshes"
            )
        return _of_dataset(registry.build("data", {**data, "split": word}), f"{word} of {data['type']}")
    name, _, split = word.partition(":")
    if name == "shapes" and not Path(word).exists():
        if split not in ("", "train", "val", "test"):
            raise UsageError(f"--ref {word}: shapes has the splits train, val and test")
        spec = registry.check("data", {"type": "shapes", "split": split or "train", "num_distances": 0}, "data")
        return _of_dataset(registry.build("data", spec), f"shapes:{split or 'train'}")
    return _from_path(Path(word))


def _default_reference(data: dict[str, Any] | None) -> str:
    if data and data["type"] == "meshes" and not data.get("val_fraction"):
        return "train"
    return "val"


def _is_run(path: Path) -> bool:
    return any(
        (path / name).exists() for name in ("config.resolved.yaml", "model_index.json", "pipeline/model_index.json")
    )


def _opened(target: Any, ema: bool, device: Any) -> tuple[Any, Path | None]:
    if not isinstance(target, str | Path):
        return target, None
    from genkit.pipeline import open_run

    pipe = open_run(Path(target), ema=ema, device=torch.device(device or "cpu"))
    checkpoint = Path(getattr(pipe, "folder", ".")).parent
    place = checkpoint.parent.parent / "eval" / f"{checkpoint.name}{'' if ema else '-raw'}.json"
    return pipe, place if (checkpoint.parent.parent / "config.resolved.yaml").is_file() else None


def _generated(pipe: Any, count: int, seed: int, batch_size: int, drawing: dict[str, Any]) -> ShapeSet:
    """Sample i has the class i mod (number of classes)."""
    classes = len(pipe.class_names)
    labels = torch.arange(count) % classes if classes else torch.full((count,), -1)
    meshes: list[Mesh] = []
    with Progress(total=count, unit="shapes", title="sample") as progress:
        for first in range(0, count, batch_size):
            part = labels[first : first + batch_size]
            meshes += pipe.generate(part, sample_seeds(seed, first, len(part)), **drawing)
            progress.advance(len(part))
    how = ", ".join(f"{name}={value}" for name, value in drawing.items())
    about = f"{getattr(pipe, 'weights_variant', 'given')} weights, seed {seed}, {how}"
    return ShapeSet(
        count, meshes.__getitem__, lambda number: pipe.class_names[number % classes] if classes else "", about
    )


def _reconstruct(pipe: Any, place: Path | None, count: int | None, seed: int, out: Any, started: float) -> Report:
    """A tokenizer by its reconstructions of held-out shapes."""
    data = pipe.run_config["data"]
    try:
        dataset, split = registry.build("data", {**data, "split": "val"}), "val"
    except UsageError:
        dataset, split = registry.build("data", data), "train"
    shapes = _of_dataset(dataset, f"{split} of {data['type']}")
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
    row = _Rows(report, f"{getattr(pipe, 'weights_variant', 'given')} weights")
    for key, name, better, how in (
        ("chamfer", "chamfer", "lower", f"mean squared both ways summed, {SURFACE_POINTS:,} points, box {SIZE}"),
        ("normal_consistency", "normal consistency", "higher", "mean |cos| both ways"),
        ("f_score", "F-score", "higher", f"within 0.02, {SURFACE_POINTS:,} points"),
        ("iou", "IoU", "higher", "20,000 places"),
    ):
        values = torch.tensor([item[key] for item in found])
        values = values[~values.isnan()]  # no distance to a shape without a surface
        row.add(name, float(values.mean()), better, how, f"{split} of {data['type']}, n={len(values)}")
    _validity(row, findings)
    report.settings = {"kind": "shape tokenizer", "count": len(found), "seconds": time.perf_counter() - started}
    where = Path(out) if out is not None else place
    if where is not None:
        report.save(where)
    return report


def _beside(target: Any) -> Path | None:
    """NAME.eval.json beside a folder or a mesh."""
    if not isinstance(target, str | Path):
        return None
    path = Path(target)
    named = path if path.name not in ("", "..") else path.resolve()
    return named.with_name(f"{named.name if named.is_dir() else named.stem}.eval.json")
