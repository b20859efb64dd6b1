"""Full attention, or what a cache puts in its place."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from genkit.interfaces import ATTEND, Cache
from genkit.kernels.block_sparse_attention.op import block_sparse_attention, path_of
from genkit.kernels.block_sparse_attention.pattern import Pattern, build

LONG = 1024  # tokens from which on the compiled kernel is faster over all blocks than torch's attention on a CPU: 1.2 times at 1,024, 1.4 times at 4,096


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
    if valid is None and group == 1 and _is_long(q):
        pattern = everything(q.shape[2], q.device)
        if path_of(q, k, v, pattern) == "cpu":
            return block_sparse_attention(q, k, v, pattern)[0]
    mask = None if valid is None else valid[:, None, None, :]
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=group > 1)


def _is_long(q: Tensor) -> bool:
    is_here = q.device.type == "cpu" and q.dtype == torch.float32
    return (
        q.shape[2] >= LONG and is_here and not torch.compiler.is_compiling()
    )  # which would trace how the pattern is made


def block_size(num_tokens: int) -> int:
    """Larger blocks compute faster, smaller ones follow short bands more closely."""
    return 64 if num_tokens >= LONG else 16


@lru_cache(maxsize=16)
def everything(num_tokens: int, device: torch.device) -> Pattern:
    """Everybody sees everybody."""
    with torch.inference_mode(False):
        return build(num_tokens, block_size(num_tokens)).to(device)
