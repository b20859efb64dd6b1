"""Full attention, or what a cache puts in its place."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from genkit.interfaces import ATTEND, Cache


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, grid: tuple[int, ...] | None, valid: Tensor | None, cache: Cache | None
) -> Tensor:
    """Softmax attention of q [B, H, N, K], k and v [B, H or a divisor of it, N, K] -> [B, H, N, K].

    Args:
        grid: of the tokens where they fill one, row-major.
        valid: [B, N] bool, False = padding that nobody sees.
        cache: under ATTEND may stand a function that is asked instead.
    """
    instead = None if cache is None else cache.get(ATTEND)
    group = q.shape[1] // k.shape[1]
    if instead is not None:
        return instead(q, *(y if group == 1 else y.repeat_interleave(group, dim=1) for y in (k, v)), grid, valid)
    mask = None if valid is None else valid[:, None, None, :]
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=group > 1)
