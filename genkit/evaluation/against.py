"""What metrics compare with: references opened, and each read once for all metrics that ask for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from genkit.console import Progress
from genkit.errors import GenkitError
from genkit.metrics import known, references, sources
from genkit.metrics.comparison import SetMetric
from genkit.metrics.features import ImageBatch
from genkit.metrics.image_set import Images
from genkit.metrics.rows import FeatureRows


@dataclass(frozen=True)
class Opened:
    """A reference: a file of statistics, or images, or a file that holds both."""

    file: references.Reference | None
    images: Images | None

    @property
    def count(self) -> int | None:
        """Number of images; None = the file does not say."""
        if self.file is not None:
            return self.file.count or None
        return self.images.count if self.images is not None else None


def open_reference(word: str, data: dict[str, Any] | None) -> Opened:
    """A file of statistics, a folder or zip of images, or a word of the data that a run was trained on (`data`, its config section)."""
    if Path(word).suffix.lower() != ".npz":
        return Opened(None, sources.find(word, data))
    file = references.read(word)
    return Opened(file, file.images)


def share(measured: list[Any]) -> None:
    """Metrics that look at the same vectors keep them once: 50,000 of Inception's take 400 MB."""
    collections: dict[Any, FeatureRows] = {}
    for metric in measured:
        for side in ("real", "fake"):
            if isinstance(getattr(metric, side, None), FeatureRows):
                reference = getattr(metric, "reference", None) if side == "real" else None
                key = (side, metric.net.name, metric.net.sha256, getattr(metric, "layer", "logits"), reference)
                setattr(metric, side, collections.setdefault(key, getattr(metric, side)))


def feed_references(
    measured: list[Any],
    unasked: set[int],
    opened: dict[str, Opened],
    rank: int,
    world: int,
    batch_size: int,
    place: torch.device,
) -> tuple[dict[str, str], set[int], list[str]]:
    """Give every metric that has a reference its real side, each set of images read at most once.

    Returns: word -> what it was, with count and hash; the numbers of unasked metrics that the reference has nothing for; and what had to
        be converted or left out.
    """
    compared: dict[str, str] = {}
    missed: set[int] = set()
    notes: list[str] = []
    for word in dict.fromkeys(metric.reference for metric in measured if hasattr(metric, "reference")):
        left = {i: metric for i, metric in enumerate(measured) if getattr(metric, "reference", None) == word}
        file, real = opened[word].file, opened[word].images
        if file is not None:
            left = {i: metric for i, metric in left.items() if not _take(metric, file, rank)}
            compared[word] = f"{file.source}, n={file.count or 'unknown'}, sha {file.sha[:8]}"
            if not file.net_sha256 and file.moments and len(left) < len(measured):
                notes.append(
                    f"{file.name} does not say which net made its statistics; taken for those of Inception-2015"
                )
            if left and real is None:
                asked = [type(metric).__name__ for i, metric in left.items() if i not in unasked]
                if asked:
                    raise GenkitError(
                        f"{word} holds neither images nor features, which {', '.join(asked)} would need; compare with images, "
                        "or make the file with `genkit stats --format genkit`"
                    )
                missed |= left.keys()
                continue
        elif real is not None:
            compared[word] = real.about
        if left and real is not None:
            _feed_real(list(left.values()), real, rank, world, batch_size, place)
            notes += real.notes
    return compared, missed, notes


def _take(metric: Any, file: references.Reference, rank: int) -> bool:
    """Whether a metric finds its real side in a file. Every process has the file; the rows of one are enough when all are added up."""
    found = metric.use(file)
    if found and rank > 0:
        for value in metric.real.state().values():
            value.zero_()
    return found


def _feed_real(metrics: list[Any], real: Images, rank: int, world: int, batch_size: int, place: torch.device) -> None:
    """Pass real images through the nets, except where an earlier evaluation has kept what they gave."""
    may_keep = world == 1 and real.is_exact
    todo = []
    for metric in metrics:
        kept = known.load(**_key(metric, real, place)) if may_keep else None
        if kept is not None:
            metric.real.restore(kept)
        else:
            todo.append(metric)
    if not todo:
        return
    first, last = real.count * rank // world, real.count * (rank + 1) // world
    with Progress(total=last - first, unit="images", title=f"reference {real.name}") as progress:
        for start in range(first, last, batch_size):
            stop = min(start + batch_size, last)
            batch = ImageBatch(real.read(start, stop)[0].to(place))
            for metric in todo:
                metric.update(real=batch, number=torch.arange(start, stop), total=real.count)
            progress.advance(stop - start)
    if world > 1:
        real.gather()
    if may_keep:
        for metric in todo:
            known.save(metric.real.state(), **_key(metric, real, place))


def _key(metric: Any, real: Images, place: torch.device) -> dict[str, Any]:
    return {
        "images_sha": real.sha,
        "net_sha": metric.net.sha256,
        "net_name": metric.net.name,
        "layer": metric.layer,
        # One that takes features in in its own way has sums of its own.
        "kind": type(metric.real if type(metric).update is SetMetric.update else metric).__name__,
        "count": real.count,
        "device": place.type,
    }
