"""From a trained run, or from images, to numbers that say how they were made.

A line for each step: what is evaluated (genkit.evaluation.subjects), with what it is compared, batches through every metric, sums over processes, report.
Samples are streamed from the sampler and never saved. Sample i has the label and the seed that belong to i, whatever the batch size and the
number of processes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genkit import registry
from genkit.console import Progress
from genkit.errors import UsageError
from genkit.evaluation import shape_subjects, shapes
from genkit.evaluation.against import Opened, feed_references, open_reference, share
from genkit.evaluation.findings import notes_of_shapes, pictures, report_of
from genkit.evaluation.partial import Partial
from genkit.evaluation.report import Report
from genkit.evaluation.subjects import Sampling, Subject, open_subject, suitable_net
from genkit.metrics import protocols
from genkit.metrics.features import ImageBatch
from genkit.metrics.frechet import FID_COUNT
from genkit.metrics.protocols import Labels, Protocol
from genkit.processes import own_device, rank_and_world, sum_over_processes

DEFAULT_COUNT = 5000  # samples of a generator where no metric says how many


def evaluate(
    target: Any,
    *,
    reference: str | None = None,
    metrics: Sequence[dict[str, Any] | str] | None = None,
    protocol: str | None = None,
    count: int | None = None,
    labels: Labels | None = None,
    weights: str | None = None,
    batch_size: int = 256,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    size: str | Sequence[int] | None = None,
    rope: Mapping[str, Any] | None = None,
    sampler: Sequence[str] = (),
    ema: bool = True,
    device: str | torch.device | None = None,
    out: str | Path | None = None,
) -> Report:
    """Measure a run, a pipeline, a folder, zip or npz of images, or a folder of meshes (see genkit.evaluation.shapes).

    A generator is sampled with its classes in turn and compared with its training data; a tokenizer reconstructs its validation split; images are
    compared with `reference`. Under torch.distributed every process takes its share of the samples, the sums are added up, and all
    return the same report; the first one writes `out`. Where there is an `out`, an interrupted evaluation goes on when it is repeated.

    Args:
        target: path of a run, a pipeline, a folder or zip of images, an npz with arr_0 (uint8 [N, Y, X, C] or [N, C, Y, X]), or a pipeline object.
        reference: instead of the metrics' own: "train" or "val" of the run, a dataset word ("fashion", "fashion:val"), a folder, a zip, an
            npz of images or of statistics.
        metrics: specs as in the config section `metrics`, or just their words; by default the run's own, else what suits the target.
        protocol: a name of genkit.metrics.protocols; says which metrics, how many samples and which labels.
        count: samples to generate, or images to take from the front; by default what the protocol or the metrics say, or all images.
        labels: of a generator's samples: "balanced", each class in turn, or "random"; by default the protocol's, else balanced.
        weights: of the feature net inception-2015: a file, or a folder that holds it.
        seed: sample i is generated from the seed `seed * 2^32 + i`.
        steps, guidance: instead of the sampler's own.
        size, rope: of a generator's images, see GeneratorPipeline.generate; its data are then brought to this size too.
        sampler: changes of a generator's section `sampler`: "type=euler", "rtol=0.01".
        ema: averaged weights where the target is a path and has some.
        device: by default a path is evaluated on the GPU where there is one, a pipeline object where it is.
        out: file for the report as JSON. By default, of a run directory eval/STEP.json in it, or eval/STEP-PROTOCOL-COUNT.json where protocol,
            metrics, reference or count are not the run's own; of images NAME.eval-... beside them. A pipeline object has no such place.

    Raises: UsageError or GenkitError, one line each, for a target, reference or metric that cannot be used.
    """
    if count is not None and count < 1:
        raise UsageError(f"count={count}: at least one image is needed")
    if batch_size < 1:
        raise UsageError(f"batch_size={batch_size} must be at least 1")
    if protocol is not None and metrics is not None:
        raise UsageError(f"protocol {protocol} says which metrics; name either a protocol or metrics")
    started = time.perf_counter()
    place = _device(target, device)
    if shape_subjects.is_of_shapes(target):
        for name, given in (
            ("protocol", protocol),
            ("metrics", metrics),
            ("labels", labels),
            ("size", size),
            ("rope", rope),
        ):
            if given:
                raise UsageError(f"{name}={given} is for images; shapes are measured in one way, see docs/metrics.md")
        return shapes.evaluate(
            target,
            reference=reference,
            count=count,
            weights=weights,
            seed=seed,
            steps=steps,
            guidance=guidance,
            sampler=sampler,
            batch_size=min(batch_size, 16),
            ema=ema,
            device=place,
            out=out,
        )
    plan = protocols.find(protocol) if protocol is not None else None
    labels = labels or (plan.labels if plan else "balanced")
    sampling = Sampling(seed, steps, guidance, labels, size, rope, tuple(sampler))
    subject = open_subject(target, sampling, ema=ema, device=place, weights=weights)
    specs = _specs(subject, plan, metrics, reference, weights)
    total = _how_many(subject, plan, count, specs)
    rank, world = rank_and_world()
    if total < world:
        raise UsageError(f"{total} images cannot be shared out over {world} processes; use fewer processes")
    opened = {
        word: open_reference(word, subject.data)
        for word in dict.fromkeys(s["reference"] for s in specs if "reference" in s)
    }
    specs, unasked = _with_kid(specs, plan, total, opened)
    measured = [registry.build("metrics", spec) for spec in specs]
    share(measured)

    compared, missed, notes = feed_references(measured, unasked, opened, rank, world, batch_size, place)
    specs, measured = ([x for i, x in enumerate(xs) if i not in missed] for xs in (specs, measured))
    settings = {
        "target": str(target) if isinstance(target, str | Path) else type(target).__name__,
        "kind": subject.kind,
        "protocol": protocol,
        "metrics": specs,
        "references": compared,
        "feature_nets": {m.net.protocol: m.net.sha256 for m in measured if getattr(m, "net", None) is not None},
        "count": total,
        "labels": subject.labels,
        "seed": seed,
        "steps": steps,
        "guidance": guidance,
        "ema": ema,
        **subject.identity,
    }
    # What is not the run's own evaluation has a name of its own, and leaves that one alone.
    is_own = protocol is None and metrics is None and reference is None and count is None
    asked = "" if is_own else protocol or _shortened("-".join(spec["type"] for spec in specs))
    out, unsaved = _record(out, subject, asked, total, reference)
    partial = Partial(out, settings, rank, world)
    first, last = total * rank // world, total * (rank + 1) // world
    done = partial.restore(measured)
    measuring = time.perf_counter()
    title = f"evaluate {settings.get('run') or Path(str(settings['target'])).name}"
    with (
        _evaluating(subject.modules),
        Progress(total=last - first, unit="images", title=title, initial=done) as progress,
    ):
        for start in range(first + done, last, batch_size):
            stop = min(start + batch_size, last)
            _feed(measured, subject.batch(start, stop), torch.arange(start, stop), total, place)
            progress.advance(stop - start)
            partial.save(measured, stop - first)
        seconds = time.perf_counter() - measuring
        sum_over_processes(measured, world, place)
        if world > 1:
            subject.gather()
        report = report_of(subject, plan, measured, compared, total)
        report.notes += [f"reference: {note}" for note in notes] + notes_of_shapes(subject, measured, opened) + unsaved
        if rank == 0 and out is not None:
            report.notes += pictures(subject, measured, out)
    report.settings = settings | {
        "batch_size": batch_size,
        "processes": world,
        "device": str(place),
        "images_per_second": (total - done * world) / seconds,
        "seconds": time.perf_counter() - started,
        "versions": _versions(),
    }
    if out is not None and rank == 0:
        report.save(out)
    partial.remove()
    return report


def _specs(
    subject: Subject,
    plan: Protocol | None,
    metrics: Sequence[dict[str, Any] | str] | None,
    reference: str | None,
    weights: str | None,
) -> list[dict[str, Any]]:
    """What is measured, as checked specs with the arguments of the call put in where a metric has such an option."""
    net = suitable_net(subject.shape, weights, (subject.data or {}).get("type"))
    wanted: Sequence[dict[str, Any] | str] = subject.metrics if metrics is None else metrics
    if plan is not None:
        wanted = plan.metrics
    if not wanted:
        raise UsageError(f"nothing to measure on {subject.kind}; name metrics: {', '.join(registry.words('metrics'))}")
    checked = []
    for number, spec in enumerate(wanted):
        chosen = {"type": spec} if isinstance(spec, str) else dict(spec)
        named = registry.options(registry.find("metrics", str(chosen.get("type"))))
        if "reference" in named and (reference or "reference" not in chosen):
            chosen["reference"] = reference or subject.reference
        is_open = "features" in named and "features" not in chosen and (weights is None or isinstance(spec, str))
        if is_open or chosen.get("features") == "auto":
            chosen["features"] = net
        if weights is not None and "weights" in named and str(chosen.get("features")).startswith("inception-2015"):
            chosen["weights"] = weights
        checked.append(registry.check("metrics", chosen, f"metrics[{number}]"))
    return checked


def _how_many(subject: Subject, plan: Protocol | None, count: int | None, specs: list[dict[str, Any]]) -> int:
    if subject.count is None:
        if plan is not None:
            return count or plan.count
        return count or max((spec["count"] for spec in specs if spec.get("count")), default=DEFAULT_COUNT)
    if count is not None and count > subject.count:
        raise UsageError(f"count={count}, but there are only {subject.count} images ({', '.join(subject.about())})")
    # A recipe's count is a limit: it is written before anybody knows how many images there are.
    limits = [s["count"] for s in specs if s.get("count")] if subject.kind == "tokenizer" and plan is None else []
    return count or min([subject.count, *limits])


def _with_kid(
    specs: list[dict[str, Any]], plan: Protocol | None, total: int, opened: dict[str, Opened]
) -> tuple[list[dict[str, Any]], set[int]]:
    """The specs, and the numbers of those nobody asked for: a KID beside every Fréchet distance of too few images to be called FID."""
    added: list[dict[str, Any]] = []
    for spec in specs:
        if spec["type"] != "frechet" or not spec["features"].startswith("inception-2015"):
            continue
        against = opened[spec["reference"]].count or FID_COUNT
        if total >= max(FID_COUNT, plan.count if plan else 0) and against >= FID_COUNT:
            continue
        shared = {name: spec[name] for name in ("features", "reference", "weights")}
        if not any(s["type"] == "kid" and s.items() >= shared.items() for s in [*specs, *added]):
            subsets = 100 if min(total, against) >= 1000 else None
            added.append(registry.check("metrics", {"type": "kid", "subsets": subsets, **shared}, "metrics"))
    return [*specs, *added], set(range(len(specs), len(specs) + len(added)))


def _feed(measured: list[Any], batch: dict[str, Any], number: Tensor, total: int, place: torch.device) -> None:
    """One batch through every metric. One with a reference of its own has its real images from there."""
    wrapped = {
        name: ImageBatch(value.to(place)) if name in ("fake", "real") else value for name, value in batch.items()
    }
    without = {name: value for name, value in wrapped.items() if name != "real"}
    for metric in measured:
        metric.update(**(without if hasattr(metric, "reference") else wrapped), number=number, total=total)


def _record(
    out: str | Path | None, subject: Subject, asked: str, total: int, reference: str | None
) -> tuple[Path | None, list[str]]:
    """The file of the report, STEP.json or of another evaluation than the usual one STEP-ASKED-COUNT-REFERENCE.json, and a note where it cannot be written."""
    if out is not None or subject.record is None:
        return (None if out is None else Path(out)), []
    found = subject.record
    if asked:
        against = (
            "" if reference is None else "-" + _shortened(re.sub(r"[^\w.]+", "-", Path(reference).stem).strip("-"))
        )
        found = found.with_stem(f"{found.stem}-{asked}-{total}{against}")
    if not _is_writable(found.parent):
        return None, [f"the report is not kept: {found.parent} cannot be written to; name a file with -o"]
    return found, []


def _shortened(words: str) -> str:
    """At most 60 characters, for a file name; what is cut off is still told apart."""
    return words if len(words) <= 60 else f"{words[:50]}-{hashlib.sha256(words.encode()).hexdigest()[:8]}"


def _is_writable(folder: Path) -> bool:
    """Whether a file may be put there, after making the folder where it is missing."""
    while not folder.exists():
        folder = folder.parent
    return os.access(folder, os.W_OK)


def _device(target: Any, device: str | torch.device | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    if not isinstance(target, str | Path):
        return torch.device(getattr(target, "device", "cpu"))
    return own_device()


@contextlib.contextmanager
def _evaluating(modules: list[torch.nn.Module]) -> Iterator[None]:
    """Modules in eval mode inside the block: no dropout, and no codebook that learns from what it encodes."""
    training = [module for module in modules if module.training]
    for module in training:
        module.eval()
    try:
        yield
    finally:
        for module in training:
            module.train()


def _versions() -> dict[str, str]:
    from genkit import __version__

    return {
        "genkit": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
