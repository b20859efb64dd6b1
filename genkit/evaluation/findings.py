"""What an evaluation found, in rows and notes: results with the words that make them comparable, and what a reader would otherwise not see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from genkit import images
from genkit.evaluation.against import Opened
from genkit.evaluation.report import Report
from genkit.evaluation.subjects import Subject
from genkit.metrics import sources
from genkit.metrics.protocols import Protocol

_PAIRS_SHOWN = 16  # most suspicious samples in the picture of nearest training images


def report_of(
    subject: Subject, plan: Protocol | None, measured: list[Any], compared: dict[str, str], total: int
) -> Report:
    """Results with the words that make them comparable, and those that say what was evaluated."""
    report = Report([], notes=subject.notes())
    few = plan is not None and total < plan.count
    for metric in measured:
        same = [plan.name if plan else "", getattr(metric, "protocol", ""), f"N={total}"]
        if subject.labels:
            same.append(f"labels {subject.labels}")
        if hasattr(metric, "reference"):
            same.append(f"reference {compared[metric.reference]}")
        comparable = ", ".join(word for word in same if word)
        better = getattr(metric, "better", "")
        for name, value in metric.result().items():
            if ": " in name:
                report.details[name] = value
                continue
            is_fid = name.partition(" (")[0] in ("FID", "sFID", "clean-FID", "FID-infinity")
            shown = name.replace("FID", "FID-quick", 1) if few and is_fid else name
            protocol = ", ".join([comparable, *subject.about()])
            row = {"metric": shown, "value": value, "better": better, "comparable": comparable, "protocol": protocol}
            report.rows.append(row)
            better = ""  # what follows the first result is its spread, or another quantity
        report.notes += [note for note in getattr(metric, "notes", list)() if note not in report.notes]
    if few and plan is not None:
        report.notes.append(
            f"protocol {plan.name} needs {plan.count:,} images, these are {total:,}: not to be quoted as its numbers"
        )
    return report


def pictures(subject: Subject, measured: list[Any], out: Path) -> list[str]:
    """A picture for every metric that points at pairs of images: the sample above, its nearest real image below."""
    notes = []
    for metric in measured:
        if not hasattr(metric, "pairs") or Path(metric.reference).suffix.lower() == ".npz":
            continue
        pairs = metric.pairs(_PAIRS_SHOWN)
        real = sources.find(metric.reference, subject.data)
        fakes = torch.cat([subject.batch(fake, fake + 1)["fake"].cpu() for fake, _, _ in pairs])
        nearest = torch.cat([real.read(number, number + 1)[0] for _, number, _ in pairs])
        path = out.with_suffix(".nearest.png")
        rows = torch.cat([fakes, nearest])
        images.write_png(path, images.grid(rows, columns=len(pairs), row_names=("sample", "nearest real")))
        notes.append(f"the {len(pairs)} samples most like a real image, each above it: {path}")
    return notes


def notes_of_shapes(subject: Subject, measured: list[Any], opened: dict[str, Opened]) -> list[str]:
    """What nets make of grey images and of sides of different sizes, which a reader would otherwise not see."""
    notes = []
    shapes = {"evaluated": subject.shape}
    shapes |= {
        f"reference {word}": side.images.shape
        for word, side in opened.items()
        if side.images is not None and side.images.shape != subject.shape
    }
    nets = sorted({m.net.name for m in measured if getattr(m, "net", None) is not None and m.net.name != "fashion-cnn"})
    for whose, (channels, height, width) in shapes.items():
        if channels == 1 and nets:
            notes.append(f"{whose} images are grey: repeated three times for {', '.join(nets)}")
        if (height, width) != subject.shape[1:]:
            mine = "x".join(map(str, subject.shape[1:]))
            notes.append(
                f"{whose} images are {height}x{width}, evaluated ones {mine}: the net resizes each from its own size"
            )
    return notes
