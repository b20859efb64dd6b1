"""Residual steps around a fixed set of codes: what one step leaves over, the next one looks at through a finer scale.

Lee et al., "Autoregressive Image Generation using Residual Quantization", 2022, section 3.1, with codes that are not learned, so that a step
differs from the first only in its scale. Residuals of learned tables are in genkit.nn.quantize.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def quantise(
    rows: Tensor,
    scales: Sequence[Tensor | float],
    nearest: Callable[[Tensor], Tensor],
    codes: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Replace rows [N, G, d] by sums of codes.

    Args:
        scales: of each step, a number or [d]: it codes what is left divided by its scale.
        nearest: rows -> ids [N, G] int64.
        codes: ids -> codes [N, G, d].

    Returns: the sums [N, G, d] and ids [N, steps, G], without gradients; what each step saw before scaling, [N, G, d] each.
    """
    total, left, ids, seen = torch.zeros(()), rows, [], []
    for step, scale in enumerate(scales):
        seen.append(left)
        found = nearest(left.detach() / scale)
        added = codes(found) * scale
        total = added if step == 0 else total + added
        left = left - added
        ids.append(found)
    return total, torch.stack(ids, dim=1), seen


def look_up(ids: Tensor, scales: Sequence[Tensor | float], codes: Callable[[Tensor], Tensor]) -> Tensor:
    """ids [N, steps, G] -> the same sums [N, G, d]; an id of -1 adds nothing."""
    total = torch.zeros(())
    for step, scale in enumerate(scales):
        own = ids[:, step]
        added = (codes(own.clamp_min(0)) * scale).masked_fill((own < 0)[..., None], 0)
        total = added if step == 0 else total + added
    return total
