"""How much of a codebook is used: usage, perplexity, dead codes."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from genkit.errors import UsageError
from genkit.nn.usage import usage


def codebook_statistics(histogram: Tensor) -> dict[str, float]:
    """Statistics of how often each code was chosen.

    Args:
        histogram: [Q, S] counts, one row per quantiser level.

    Returns: "codebook usage", the share of codes chosen at least once, in [0, 1]; "codebook perplexity", exp(entropy in nats), 1 to S, the mean
        over levels; "dead codes", the number never chosen, all levels together. Usage of few ids is low for that reason alone.
    """
    use = usage(histogram)
    return {"codebook usage": use["usage"], "codebook perplexity": use["perplexity"], "dead codes": use["dead"]}


class Codebook:
    """Statistics of the `ids` a tokenizer chose."""

    better: Literal["lower", "higher"] = "higher"

    def __init__(self) -> None:
        self.histogram: Tensor | None = None  # [Q, S]; its size is known with the first batch

    @property
    def protocol(self) -> str:
        return "ids chosen at least once"

    def update(self, *, ids: Tensor | None = None, codebook_size: int = 0, **_: Any) -> None:
        """Ids [B, Q, *grid] int64 in [0, codebook_size). Raises UsageError for a tokenizer without ids, or ids out of range."""
        if ids is None:
            raise UsageError("codebook needs ids; this tokenizer is continuous")
        levels, flat = ids.shape[1], ids.transpose(0, 1).flatten(1).cpu()  # [Q, B * grid]
        if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < codebook_size:
            raise UsageError(
                f"ids lie in {int(flat.min())}..{int(flat.max())}, but the codebook has {codebook_size} entries"
            )
        if self.histogram is None:
            self.histogram = torch.zeros(levels, codebook_size, dtype=torch.float64)
        numbered = flat + torch.arange(levels)[:, None] * codebook_size
        self.histogram += torch.bincount(numbered.flatten(), minlength=levels * codebook_size).reshape(
            levels, codebook_size
        )

    def state(self) -> dict[str, Tensor]:
        return {} if self.histogram is None else {"histogram": self.histogram}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a saved state."""
        self.histogram = state["histogram"].clone() if "histogram" in state else None

    def result(self) -> dict[str, float]:
        if self.histogram is None:
            raise UsageError("codebook has seen no ids")
        return codebook_statistics(self.histogram)

    def notes(self) -> list[str]:
        """A codebook cannot be used by fewer ids than it has entries."""
        if self.histogram is None or self.histogram[0].sum() >= 10 * self.histogram.shape[1]:
            return []
        per_code = float(self.histogram[0].sum()) / self.histogram.shape[1]
        return [
            f"codebook usage: only {per_code:.1f} ids per code were seen; codes may count as dead for want of images"
        ]
