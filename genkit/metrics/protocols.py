"""Named ways to evaluate: which metrics, on which net, of how many images, with which labels (docs/metrics.md says where they differ)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from genkit.errors import UsageError, nearest

Labels = Literal["balanced", "random"]


@dataclass(frozen=True)
class Protocol:
    """Everything about an evaluation that is not the model and not the reference.

    Attributes:
        name: the word of `genkit eval --protocol`, printed first in every line.
        about: for people, one line.
        metrics: specs; features "auto" stands for the net that comes with the package where it can take the images, else Inception-2015.
        count: samples a generator makes; a number measured on fewer images is called quick.
        labels: of the samples: each class equally often, or drawn independently.
    """

    name: str
    about: str
    metrics: tuple[dict[str, Any], ...]
    count: int
    labels: Labels = "balanced"


_CLASSIC = {"features": "inception-2015"}

PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "adm",
            "what ImageNet papers report: FID, sFID, IS, precision and recall as OpenAI's evaluator computes them",
            (
                {"type": "frechet", **_CLASSIC},
                {"type": "frechet", "layer": "spatial", **_CLASSIC},
                {"type": "inception_score", "split_size": 5000, **_CLASSIC},
                {"type": "precision_recall", "k": 3, "max_reference": 10_000, **_CLASSIC},
            ),
            50_000,
        ),
        Protocol(
            "edm", "FID as in the EDM papers: random labels", ({"type": "frechet", **_CLASSIC},), 50_000, "random"
        ),
        Protocol(
            "clean",
            "clean-fid: images shrunk with antialiasing before the same net",
            (
                {"type": "frechet", "features": "inception-2015-clean"},
                {"type": "kid", "features": "inception-2015-clean"},
            ),
            50_000,
        ),
        Protocol(
            "torch-fidelity",
            "torch-fidelity's defaults: FID, IS over 10 shuffled splits, KID, precision and recall on VGG16",
            (
                {"type": "frechet", **_CLASSIC},
                {"type": "inception_score", "splits": 10, "shuffle_seed": 2020, **_CLASSIC},
                {"type": "kid", "subsets": 100, "subset_size": 1000, "seed": 2020, **_CLASSIC},
                {"type": "precision_recall", "k": 3, "features": "vgg16"},
            ),
            50_000,
        ),
        Protocol(
            "pytorch-fid",
            "pytorch-fid: bilinear resize with half-pixel centres",
            ({"type": "frechet", "features": "inception-2015-bilinear"},),
            50_000,
        ),
        Protocol(
            "quick",
            "minutes instead of hours: everything that is steady with few images, on whichever net fits",
            (
                {"type": "frechet", "features": "auto"},
                {"type": "kid", "subsets": None, "features": "auto"},
                {"type": "precision_recall", "features": "auto"},
                {"type": "density_coverage", "features": "auto"},
                {"type": "vendi", "features": "auto"},
                {"type": "memorisation", "features": "auto"},
            ),
            5000,
        ),
    )
}


def find(name: str) -> Protocol:
    """Raises UsageError with the nearest known name."""
    if name not in PROTOCOLS:
        raise UsageError(f"no protocol is called {name}; {nearest(name, list(PROTOCOLS))}")
    return PROTOCOLS[name]
