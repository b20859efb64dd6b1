"""From a set of images to a file of statistics that evaluations are compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from genkit.console import Progress
from genkit.errors import UsageError
from genkit.evaluation.subjects import suitable_net
from genkit.metrics import features as nets
from genkit.metrics import references, sources
from genkit.metrics.image_set import Images
from genkit.metrics.rows import FeatureRows
from genkit.metrics.statistics import FeatureSums
from genkit.processes import own_device, rank_and_world, sum_over_processes
from genkit.weights import file_sha256


def stats(
    path: str | Path,
    out: str | Path,
    *,
    format: str = "genkit",
    features: str | None = None,
    weights: str | None = None,
    count: int | None = None,
    batch_size: int = 64,
    device: str | torch.device | None = None,
) -> dict[str, Any]:
    """Pass a set of images through a feature net and save what comparisons with it need.

    Under torch.distributed every process takes its share of the images, and the first one writes the file.

    Args:
        path: a folder, a zip or an npz of images, a dataset word ("fashion:val"), or a run: its training data.
        out: file to write, .npz; it appears whole or not at all.
        format: "genkit": for every metric, features included; "adm", "fid", "edm": what those tools read (see references.write).
        features: feature net; by default inception-2015, for "genkit" the net that comes with the package where it can take the images.
        weights: of the net: a file, or a folder that holds it.
        count: images to take from the front; by default all.
        batch_size: images at a time; the result stays the same but for rounding.
        device: by default the GPU where there is one.

    Returns: "out", "images" (how many), "format", "net", "notes" (what had to be converted or left out), "sha" (of the file).

    Raises: UsageError or GenkitError, one line, for images, a net or a format that cannot be used.
    """
    target = Path(out)
    if format not in references.FORMATS:
        raise UsageError(f"format={format} is not one of {', '.join(references.FORMATS)}")
    if target.suffix != ".npz":
        raise UsageError(f"out={out} must end in .npz")
    if batch_size < 1:
        raise UsageError(f"batch_size={batch_size} must be at least 1")
    images = _open(str(path))
    total = images.count if count is None else count
    if not 2 <= total <= images.count:
        raise UsageError(
            f"statistics of {total} images of {images.name}, which has {images.count}; at least 2 are needed"
        )
    place = torch.device(device) if device is not None else own_device()
    name = features or (suitable_net(images.shape, weights) if format == "genkit" else "inception-2015")
    net = nets.load(name, weights, place)
    if format == "adm" and "spatial" not in net.dims:
        raise UsageError(f"format=adm needs spatial features, which {name} does not have; use format=genkit")

    layers = ["pool", "spatial"] if "spatial" in net.dims and format in ("genkit", "adm") else ["pool"]
    sums = {layer: FeatureSums(net.dims[layer]) for layer in layers}
    rows = FeatureRows(net.dim)
    rank, world = rank_and_world()
    first, last = total * rank // world, total * (rank + 1) // world
    with Progress(total=last - first, unit="images", title=f"statistics of {images.name}") as progress:
        for start in range(first, last, batch_size):
            stop = min(start + batch_size, last)
            batch = nets.ImageBatch(images.read(start, stop)[0].to(place))
            for layer, collection in sums.items():
                collection.update(batch.features(net, layer))
            if format == "genkit":
                rows.update(batch.features(net), torch.arange(start, start + len(batch)), total)
            progress.advance(stop - start)
    if format == "genkit":
        rows.update(torch.zeros(0, net.dim), torch.zeros(0, dtype=torch.int64), total)  # room for the others' rows
    sum_over_processes([*sums.values(), rows], world, place)
    if world > 1:
        images.gather()

    source = f"{images.name} sha {images.sha[:8]}"
    if total < images.count:
        source += f" (the first {total} of {images.count})"
    found: dict[str, Any] = {
        "out": str(target),
        "images": int(sums["pool"].count),
        "format": format,
        "net": net.protocol,
        "notes": list(images.notes),
    }
    if rank == 0:
        moments = {layer: collection.moments(net.sha256, net.protocol, source) for layer, collection in sums.items()}
        references.write(target, format, moments, features=rows.rows() if format == "genkit" else None, images=images)
        found["sha"] = file_sha256(target)
    if world > 1:
        shared = [found]
        torch.distributed.broadcast_object_list(shared, device=place if place.type == "cuda" else None)
        found = shared[0]
    return found


def _open(path: str) -> Images:
    """A run's training data, or what `sources.find` finds."""
    if (Path(path) / "config.resolved.yaml").is_file():
        from genkit.checkpoint import find_run

        data = find_run(path).config.get("data")
        if not data:
            raise UsageError(f"{path} has no data section in its config.resolved.yaml; name the data themselves")
        return sources.find("train", data)
    return sources.find(path, option="path")
