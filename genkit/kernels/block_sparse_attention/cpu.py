"""The compiled path of block_sparse_attention; see cpu.cpp."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from genkit import memory, native
from genkit.kernels.block_sparse_attention.gradient import connect
from genkit.kernels.block_sparse_attention.pattern import Pattern

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refuses(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, scale: float, valid: Tensor | None) -> str | None:
    """Why these arguments need another path."""
    return None if q.dtype in _DTYPES else f"it computes in float32, these are {q.dtype}"


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, scale: float, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `reference.block_sparse_attention`."""
    return _forward(q, k, v, pattern.tensors, list(pattern.num_maps), pattern.block_size, scale, valid)


@torch.library.custom_op("genkit::block_sparse_attention_cpu", mutates_args=(), device_types="cpu")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: list[Tensor],
    num_maps: list[int],
    block_size: int,
    scale: float,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    B, H, N, _ = q.shape
    L, V = v.shape[2:]
    wide_q, wide_k, wide_v = _widened(q), _widened(k), _widened(v)
    o = memory.empty(B, H, N, wide_v.shape[-1])
    lse = memory.empty(B, H, N)
    sizes = (B, H, N, L, wide_q.shape[-1], wide_v.shape[-1], block_size, *num_maps)
    call = native.function("block_sparse_attention", "attend_forward", "p" * 11 + "i" * 9 + "f")
    call(wide_q, wide_k, wide_v, *lists[:4], _transposed(lists[8]), _contiguous(valid), o, lse, *sizes, scale)
    return o[..., :V].to(q.dtype, copy=False).contiguous(), lse


@torch.library.custom_op("genkit::block_sparse_attention_cpu_backward", mutates_args=(), device_types="cpu")
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    dlse: Tensor | None,
    lists: list[Tensor],
    num_maps: list[int],
    block_size: int,
    scale: float,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    B, H, N, K = q.shape
    L, V = v.shape[2:]
    delta = (do.float() * o.float()).sum(-1)
    delta = delta if dlse is None else delta - dlse
    # 2^(score - inf) = 0: a query that sees nothing has no part in any gradient.
    norm = (lse / math.log(2)).masked_fill(lse == -torch.inf, torch.inf)
    wide = [_widened(x) for x in (q, k, v)]
    wide_do, valid = _widened(do), _contiguous(valid)
    dq, dk, dv = (memory.empty_like(x) for x in wide)
    sizes = (B, H, N, L, wide[0].shape[-1], wide[2].shape[-1], block_size, *num_maps)
    function = native.function
    by_queries = function("block_sparse_attention", "attend_backward_q", "p" * 13 + "i" * 9 + "f")
    by_keys = function("block_sparse_attention", "attend_backward_k", "p" * 15 + "i" * 9 + "f")
    given = (*wide, norm, wide_do, delta.contiguous())
    threads = torch.get_num_threads()
    # By whole heads five products per block, else seven; but heads may be fewer than threads, or not divide among them.
    if 5 * math.ceil(B * H / threads) <= 7 * B * H / threads:
        by_keys(*given, *lists[4:], valid, dk, dv, dq, *sizes, scale)
    else:
        by_queries(*given, *lists[:4], _transposed(lists[8]), valid, dq, *sizes, scale)
        by_keys(*given, *lists[4:], valid, dk, dv, None, *sizes, scale)
    found = (dq[..., :K], dk[..., :K], dv[..., :V])
    return tuple(d.to(q.dtype, copy=False).contiguous() for d in found)  # type: ignore[return-value]


connect(_forward, _backward)


def _widened(x: Tensor) -> Tensor:
    """Contiguous float32, the last axis filled with zeros to a multiple of 16: whole vectors of every instruction set. Zeros change no product."""
    missing = -x.shape[-1] % 16
    return (pad(x, (0, missing)) if missing else x).float().contiguous()


def _transposed(masks: Tensor) -> Tensor:
    """[P, queries, keys] -> [P, keys, queries]."""
    return masks.transpose(1, 2).contiguous()


def _contiguous(valid: Tensor | None) -> Tensor | None:
    return None if valid is None else valid.contiguous()
