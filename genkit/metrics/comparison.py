"""What metrics of two sets of images have in common: a feature net, a collection of features per set, a reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genkit.errors import GenkitError
from genkit.metrics import features as nets
from genkit.metrics.references import Reference
from genkit.metrics.rows import FeatureRows
from genkit.metrics.statistics import FeatureSums


class SetMetric:
    """`fake` images against `real` ones, both seen by one net. A subclass says what it collects and gives the result.

    Attributes:
        layer: of the net: "pool", "spatial", "logits".
        collects: a collection of vectors (FeatureRows) or their sums (FeatureSums).
    """

    layer = "pool"
    collects: type[FeatureRows] | type[FeatureSums] = FeatureRows

    def __init__(self, *, features: str, reference: str, count: int, weights: str | None):
        self.net = nets.load(features, weights)
        if self.layer not in self.net.dims:
            raise GenkitError(f"{features} has no {self.layer} features; {type(self).__name__} needs a net that has")
        self.reference = reference
        self.count = count
        dim = self.net.dims[self.layer]
        self.real: Any = self.collects(dim)
        self.fake: Any = self.collects(dim)

    @property
    def protocol(self) -> str:
        return f"{self.net.protocol} sha {self.net.sha256[:8]}"

    def use(self, reference: Reference) -> bool:
        """Take the real side from a file of statistics; False when it does not hold what this metric needs.

        Raises: GenkitError when another net made it.
        """
        if not isinstance(self.real, FeatureRows) or self.layer != "pool" or reference.features is None:
            return False
        reference.check_net(self.net)
        if reference.features.shape[1] != self.net.dim:
            raise GenkitError(
                f"{reference.name} holds {reference.features.shape[1]}-dimensional features; {self.net.protocol} makes {self.net.dim}"
            )
        self.real.update(reference.features, torch.arange(len(reference.features)), len(reference.features))
        return True

    def update(
        self,
        *,
        fake: nets.ImageBatch | Tensor | None = None,
        real: nets.ImageBatch | Tensor | None = None,
        number: Tensor | None = None,
        total: int | None = None,
        **_: Any,
    ) -> None:
        """Images [B, C, Y, X] in [-1, 1] of either side or both; `number` and `total` say which of how many (see FeatureRows)."""
        for images, collection in ((fake, self.fake), (real, self.real)):
            if images is not None:
                collection.update(nets.as_batch(images).features(self.net, self.layer), number, total)

    def state(self) -> dict[str, Tensor]:
        return {
            f"{side}.{name}": value for side in ("real", "fake") for name, value in getattr(self, side).state().items()
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a saved state."""
        for side in ("real", "fake"):
            getattr(self, side).restore(
                {name.removeprefix(f"{side}."): value for name, value in state.items() if name.startswith(f"{side}.")}
            )
