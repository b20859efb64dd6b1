"""The GPU path of block_sparse_attention: FlashAttention-2 (Dao 2023) over lists of blocks, without atomics.

Three kernels: forward and dq walk over the keys of a block of queries, dk/dv over the queries of a block of keys by the transposed lists. A block of the
pattern is cut into tiles of at most BM queries and BN keys, so that what fits the registers does not depend on the pattern.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from genkit.dispatch import is_interpreting
from genkit.kernels.block_sparse_attention.gradient import connect
from genkit.kernels.block_sparse_attention.pattern import Pattern

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_WIDEST = 128  # of a head; beyond it the tiles do not fit the registers


def refuses(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, scale: float, valid: Tensor | None) -> str | None:
    """Why these arguments need another path."""
    if q.dtype not in _DTYPES:
        return f"it computes in float32, these are {q.dtype}"
    widest = max(q.shape[-1], v.shape[-1])
    return None if widest <= _WIDEST else f"its tiles hold {_WIDEST} values per head, these have {widest}"


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, scale: float, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `reference.block_sparse_attention`."""
    return _forward(q, k, v, pattern.tensors, list(pattern.num_maps), pattern.block_size, scale, valid)


@triton.jit
def _tile(X, start, count, WIDTH, BLOCK: tl.constexpr, BW: tl.constexpr, UPCAST: tl.constexpr):
    """Rows start.. of X [count, WIDTH], zeros beyond: [BLOCK, BW]."""
    row = start + tl.arange(0, BLOCK)
    column = tl.arange(0, BW)
    inside = (row < count)[:, None] & (column < WIDTH)[None, :]
    x = tl.load(X + row.to(tl.int64)[:, None] * WIDTH + column[None, :], mask=inside, other=0.0)
    return x.to(tl.float32) if UPCAST else x


@triton.jit
def _is_seen(
    masks, mask_ids, valid, e, i, j, at_i, at_j, N, L,
    SIZE: tl.constexpr, PARTIAL: tl.constexpr, VALID: tl.constexpr,
):  # fmt: skip
    """Whether queries i see keys j; at_i, at_j are their places within the block. One of each pair stands as a row, the other as a column."""
    seen = (i < N) & (j < L)
    if VALID:
        seen = seen & (tl.load(valid + j, mask=j < L, other=0) != 0)
    if PARTIAL:
        number = tl.load(mask_ids + e).to(tl.int64)
        shown = tl.load(masks + number * SIZE * SIZE + at_i * SIZE + at_j)
        seen = seen & (shown != 0)
    return seen


@triton.jit
def _forward_tiles(
    q, K_head, V_head, masks, mask_ids, ids, valid, first, last, i, at_i, top, total, out, N, L, WK, WV,
    SIZE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PARTIAL: tl.constexpr, VALID: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The running maximum [BM], sum [BM] and output [BM, BV] after the entries first..last."""
    TILES: tl.constexpr = SIZE // BN
    for t in range(first * TILES, last * TILES):
        e = t // TILES
        at_j = t % TILES * BN + tl.arange(0, BN)
        start = tl.load(ids + e) * SIZE + t % TILES * BN
        k = _tile(K_head, start, L, WK, BN, BK, UPCAST)  # [BN, BK]
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BM, BN], in units of log 2
        j = start + tl.arange(0, BN)
        seen = _is_seen(
            masks, mask_ids, valid, e, i[:, None], j[None, :], at_i[:, None], at_j[None, :], N, L, SIZE, PARTIAL, VALID
        )  # fmt: skip
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen so far: all powers become 0
        p = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        v = _tile(V_head, start, L, WV, BN, BV, UPCAST)  # [BN, BV]
        total = total * shrink + tl.sum(p, 1)
        out = out * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = higher
    return top, total, out


@triton.jit
def attend_forward(
    Q, K, V, starts, partial_from, ids, mask_ids, masks, valid, OUT, LSE, H, N, L, WK, WV, rows, sample_maps, head_maps, scale,
    SIZE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    VALID: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """OUT [B H, N, WV] and LSE [B H, N]; grid (query tiles, B H). `scale` is in units of log 2."""
    TILES: tl.constexpr = SIZE // BM
    block, sub = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    head = tl.program_id(1).to(tl.int64)
    sample = head // H
    row = ((sample % sample_maps) * head_maps + head % H % head_maps) * rows + block
    at_i = sub * BM + tl.arange(0, BM)
    i = block * SIZE + at_i
    q = _tile(Q + head * N * WK, block * SIZE + sub * BM, N, WK, BM, BK, UPCAST)  # [BM, BK]
    q = (q.to(tl.float32) * scale).to(q.dtype)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    out = tl.zeros([BM, BV], tl.float32)
    first, middle, last = tl.load(starts + row), tl.load(partial_from + row), tl.load(starts + row + 1)
    K_head, V_head, valid_sample = K + head * L * WK, V + head * L * WV, valid + sample * L
    top, total, out = _forward_tiles(
        q, K_head, V_head, masks, mask_ids, ids, valid_sample, first, middle, i, at_i, top, total, out, N, L, WK, WV,
        SIZE, BN, BK, BV, False, VALID, UPCAST,
    )  # fmt: skip
    top, total, out = _forward_tiles(
        q, K_head, V_head, masks, mask_ids, ids, valid_sample, middle, last, i, at_i, top, total, out, N, L, WK, WV,
        SIZE, BN, BK, BV, True, VALID, UPCAST,
    )  # fmt: skip
    out = out / tl.where(total == 0, 1.0, total)[:, None]
    column = tl.arange(0, BV)
    inside = (i < N)[:, None] & (column < WV)[None, :]
    tl.store(
        OUT + head * N * WV + i.to(tl.int64)[:, None] * WV + column[None, :], out.to(OUT.dtype.element_ty), mask=inside
    )
    lse = top + tl.log2(tl.where(total == 0, 1.0, total))  # -inf + 0 where nothing is seen
    tl.store(LSE + head * N + i, lse * 0.6931471805599453, mask=i < N)


@triton.jit
def _dq_tiles(
    q, do, norm, delta, K_head, V_head, masks, mask_ids, ids, valid, first, last, i, at_i, dq, N, L, WK, WV,
    SIZE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PARTIAL: tl.constexpr, VALID: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = SIZE // BN
    for t in range(first * TILES, last * TILES):
        e = t // TILES
        at_j = t % TILES * BN + tl.arange(0, BN)
        start = tl.load(ids + e) * SIZE + t % TILES * BN
        j = start + tl.arange(0, BN)
        k = _tile(K_head, start, L, WK, BN, BK, UPCAST)  # [BN, BK]
        v = _tile(V_head, start, L, WV, BN, BV, UPCAST)  # [BN, BV]
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BM, BN]
        seen = _is_seen(
            masks, mask_ids, valid, e, i[:, None], j[None, :], at_i[:, None], at_j[None, :], N, L, SIZE, PARTIAL, VALID
        )  # fmt: skip
        p = tl.exp2(tl.where(seen, scores, float("-inf")) - norm[:, None])
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        ds = p * (dp - delta[:, None])
        dq += tl.dot(ds.to(k.dtype), k, input_precision="ieee")
    return dq


@triton.jit
def attend_backward_q(
    Q, K, V, NORM, DO, DELTA, starts, partial_from, ids, mask_ids, masks, valid, DQ,
    H, N, L, WK, WV, rows, sample_maps, head_maps, scale,
    SIZE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    VALID: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """DQ [B H, N, WK]; grid (query tiles, B H). NORM is lse in units of log 2, +inf where nothing is seen; `scale` in units of log 2."""
    TILES: tl.constexpr = SIZE // BM
    block, sub = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    head = tl.program_id(1).to(tl.int64)
    sample = head // H
    row = ((sample % sample_maps) * head_maps + head % H % head_maps) * rows + block
    at_i = sub * BM + tl.arange(0, BM)
    i = block * SIZE + at_i
    q = _tile(Q + head * N * WK, block * SIZE + sub * BM, N, WK, BM, BK, UPCAST)
    q = (q.to(tl.float32) * scale).to(q.dtype)
    do = _tile(DO + head * N * WV, block * SIZE + sub * BM, N, WV, BM, BV, UPCAST)  # [BM, BV]
    norm = tl.load(NORM + head * N + i, mask=i < N, other=float("inf"))
    delta = tl.load(DELTA + head * N + i, mask=i < N, other=0.0)
    dq = tl.zeros([BM, BK], tl.float32)
    first, middle, last = tl.load(starts + row), tl.load(partial_from + row), tl.load(starts + row + 1)
    K_head, V_head, valid_sample = K + head * L * WK, V + head * L * WV, valid + sample * L
    dq = _dq_tiles(
        q, do, norm, delta, K_head, V_head, masks, mask_ids, ids, valid_sample, first, middle, i, at_i, dq, N, L, WK, WV,
        SIZE, BN, BK, BV, False, VALID, UPCAST,
    )  # fmt: skip
    dq = _dq_tiles(
        q, do, norm, delta, K_head, V_head, masks, mask_ids, ids, valid_sample, middle, last, i, at_i, dq, N, L, WK, WV,
        SIZE, BN, BK, BV, True, VALID, UPCAST,
    )  # fmt: skip
    dq *= scale * 0.6931471805599453
    column = tl.arange(0, BK)
    inside = (i < N)[:, None] & (column < WK)[None, :]
    tl.store(
        DQ + head * N * WK + i.to(tl.int64)[:, None] * WK + column[None, :], dq.to(DQ.dtype.element_ty), mask=inside
    )


@triton.jit
def _dkv_tiles(
    k, v, Q_head, DO_head, NORM_head, DELTA_head, masks, mask_ids, ids, valid, first, last, j, at_j, dk, dv, N, L, WK, WV,
    SIZE: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PARTIAL: tl.constexpr, VALID: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = SIZE // BM
    for t in range(first * TILES, last * TILES):
        e = t // TILES
        at_i = t % TILES * BM + tl.arange(0, BM)
        start = tl.load(ids + e) * SIZE + t % TILES * BM
        i = start + tl.arange(0, BM)
        q = _tile(Q_head, start, N, WK, BM, BK, UPCAST)  # [BM, BK]
        do = _tile(DO_head, start, N, WV, BM, BV, UPCAST)  # [BM, BV]
        norm = tl.load(NORM_head + i, mask=i < N, other=float("inf"))
        delta = tl.load(DELTA_head + i, mask=i < N, other=0.0)
        # Keys are the rows: p and ds are then left factors as they are.
        scores = tl.dot(k, tl.trans(q), input_precision="ieee")  # [BN, BM]
        seen = _is_seen(
            masks, mask_ids, valid, e, i[None, :], j[:, None], at_i[None, :], at_j[:, None], N, L, SIZE, PARTIAL, VALID
        )  # fmt: skip
        p = tl.exp2(tl.where(seen, scores, float("-inf")) - norm[None, :])
        dv += tl.dot(p.to(do.dtype), do, input_precision="ieee")
        dp = tl.dot(v, tl.trans(do), input_precision="ieee")
        ds = p * (dp - delta[None, :])
        dk += tl.dot(ds.to(q.dtype), q, input_precision="ieee")
    return dk, dv


@triton.jit
def attend_backward_k(
    Q, K, V, NORM, DO, DELTA, starts, partial_from, ids, mask_ids, masks, valid, DK, DV,
    H, N, L, WK, WV, columns, sample_maps, head_maps, scale,
    SIZE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    VALID: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """DK [B H, L, WK], DV [B H, L, WV]; grid (key tiles, B H); lists by key block. The rest as in attend_backward_q."""
    TILES: tl.constexpr = SIZE // BN
    block, sub = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    head = tl.program_id(1).to(tl.int64)
    sample = head // H
    row = ((sample % sample_maps) * head_maps + head % H % head_maps) * columns + block
    at_j = sub * BN + tl.arange(0, BN)
    j = block * SIZE + at_j
    k = _tile(K + head * L * WK, block * SIZE + sub * BN, L, WK, BN, BK, UPCAST)
    k = (k.to(tl.float32) * scale).to(k.dtype)
    v = _tile(V + head * L * WV, block * SIZE + sub * BN, L, WV, BN, BV, UPCAST)
    dk = tl.zeros([BN, BK], tl.float32)
    dv = tl.zeros([BN, BV], tl.float32)
    first, middle, last = tl.load(starts + row), tl.load(partial_from + row), tl.load(starts + row + 1)
    Q_head, DO_head, valid_sample = Q + head * N * WK, DO + head * N * WV, valid + sample * L
    NORM_head, DELTA_head = NORM + head * N, DELTA + head * N
    dk, dv = _dkv_tiles(
        k, v, Q_head, DO_head, NORM_head, DELTA_head, masks, mask_ids, ids, valid_sample, first, middle, j, at_j, dk, dv, N, L, WK, WV,
        SIZE, BM, BK, BV, False, VALID, UPCAST,
    )  # fmt: skip
    dk, dv = _dkv_tiles(
        k, v, Q_head, DO_head, NORM_head, DELTA_head, masks, mask_ids, ids, valid_sample, middle, last, j, at_j, dk, dv, N, L, WK, WV,
        SIZE, BM, BK, BV, True, VALID, UPCAST,
    )  # fmt: skip
    dk *= scale * 0.6931471805599453
    at = j.to(tl.int64)[:, None]
    column = tl.arange(0, BK)
    inside = (j < L)[:, None] & (column < WK)[None, :]
    tl.store(DK + head * L * WK + at * WK + column[None, :], dk.to(DK.dtype.element_ty), mask=inside)
    column = tl.arange(0, BV)
    inside = (j < L)[:, None] & (column < WV)[None, :]
    tl.store(DV + head * L * WV + at * WV + column[None, :], dv.to(DV.dtype.element_ty), mask=inside)


# (kernel, whether float32, whether wider than 64) -> queries and keys of a tile, warps: the largest that spill no registers on sm_80 and sm_90, to which
# scripts/compile_kernels.py holds them. Products in float32 are plain multiplications, unrolled, and need small tiles.
_SHAPES = {
    ("forward", False, False): (64, 64, 4),
    ("forward", False, True): (64, 32, 8),
    ("forward", True, False): (32, 16, 4),
    ("forward", True, True): (32, 16, 8),
    ("backward_q", False, False): (64, 64, 4),
    ("backward_q", False, True): (32, 64, 8),
    ("backward_q", True, False): (32, 16, 4),
    ("backward_q", True, True): (32, 16, 8),
    ("backward_k", False, False): (32, 32, 4),
    ("backward_k", False, True): (32, 32, 8),
    ("backward_k", True, False): (16, 16, 4),
    ("backward_k", True, True): (16, 16, 8),
}


def _tiles(kernel: str, dtype: torch.dtype, block_size: int, width_k: int, width_v: int) -> dict[str, int]:
    """The constants of a launch."""
    BK, BV = (max(16, triton.next_power_of_2(w)) for w in (width_k, width_v))
    BM, BN, num_warps = _SHAPES[kernel, dtype == torch.float32, max(BK, BV) > 64]
    BM, BN = min(BM, block_size), min(BN, block_size)
    return {"SIZE": block_size, "BM": BM, "BN": BN, "BK": BK, "BV": BV, "num_warps": num_warps, "num_stages": 2}


@torch.library.custom_op("genkit::block_sparse_attention_triton", mutates_args=())
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
    B, H, N, K = q.shape
    L, V = v.shape[2:]
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    o = q.new_empty(B, H, N, V)
    lse = q.new_empty(B, H, N, dtype=torch.float32)
    tiles = _tiles("forward", q.dtype, block_size, K, V)
    rows = triton.cdiv(N, block_size)
    attend_forward[(rows * block_size // tiles["BM"], B * H)](
        q, k, v, *lists[:4], *_flags(lists[8], valid), o, lse, H, N, L, K, V, rows, *num_maps, scale / math.log(2),
        VALID=valid is not None, UPCAST=is_interpreting(), **tiles,
    )  # fmt: skip
    return o, lse


@torch.library.custom_op("genkit::block_sparse_attention_triton_backward", mutates_args=())
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
    q, k, v, do = q.contiguous(), k.contiguous(), v.contiguous(), do.contiguous()
    delta = (do.float() * o.float()).sum(-1)
    delta = delta if dlse is None else delta - dlse
    # 2^(score - inf) = 0: a query that sees nothing has no part in any gradient.
    norm = (lse / math.log(2)).masked_fill(lse == -torch.inf, torch.inf)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    given = (q, k, v, norm, do, delta)
    rows, columns = triton.cdiv(N, block_size), triton.cdiv(L, block_size)
    flags = _flags(lists[8], valid)
    common: dict[str, Any] = {"VALID": valid is not None, "UPCAST": is_interpreting()}
    tiles = _tiles("backward_q", q.dtype, block_size, K, V)
    attend_backward_q[(rows * block_size // tiles["BM"], B * H)](
        *given, *lists[:4], *flags, dq, H, N, L, K, V, rows, *num_maps, scale / math.log(2), **common, **tiles
    )
    tiles = _tiles("backward_k", q.dtype, block_size, K, V)
    attend_backward_k[(columns * block_size // tiles["BN"], B * H)](
        *given, *lists[4:8], *flags, dk, dv, H, N, L, K, V, columns, *num_maps, scale / math.log(2), **common, **tiles
    )
    return dq, dk, dv


connect(_forward, _backward)


def _flags(masks: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Masks and padding as bytes; what stands for missing padding is never read."""
    seen = masks.view(torch.uint8)
    return seen, seen if valid is None else valid.contiguous().view(torch.uint8)


def variants() -> list[dict[str, Any]]:
    """What is compiled ahead of time: every kernel for the dtypes, head widths and block sizes in use."""
    int32, uint8, float32 = "*i32", "*u8", "*fp32"
    lists = {"starts": int32, "partial_from": int32, "ids": int32, "mask_ids": int32, "masks": uint8, "valid": uint8}
    sizes = dict.fromkeys(("H", "N", "L", "WK", "WV"), "i32")
    maps = {"sample_maps": "i32", "head_maps": "i32", "scale": "fp32"}
    found = []
    for dtype, pointer in ((torch.bfloat16, "*bf16"), (torch.float32, "*fp32")):
        qkv = dict.fromkeys(("Q", "K", "V"), pointer)
        backward = qkv | {"NORM": float32, "DO": pointer, "DELTA": float32} | lists
        kernels = {
            "forward": (
                attend_forward,
                qkv | lists | {"OUT": pointer, "LSE": float32} | sizes | {"rows": "i32"} | maps,
            ),
            "backward_q": (attend_backward_q, backward | {"DQ": pointer} | sizes | {"rows": "i32"} | maps),
            "backward_k": (
                attend_backward_k,
                backward | {"DK": pointer, "DV": pointer} | sizes | {"columns": "i32"} | maps,
            ),
        }
        for width, block_size in (
            ((64, 64), (128, 64), (64, 128), (32, 16)) if pointer == "*bf16" else ((64, 64), (128, 64))
        ):
            for kind, (kernel, signature) in kernels.items():
                constexprs: dict[str, Any] = _tiles(kind, dtype, block_size, width, width)
                options = {name: constexprs.pop(name) for name in ("num_warps", "num_stages")}
                constexprs |= {"VALID": True, "UPCAST": False}
                found.append(
                    {
                        "kernel": kernel,
                        "name": f"{kind} {pointer[1:]}, {width} wide, blocks of {block_size}",
                        "signature": signature | dict.fromkeys(constexprs, "constexpr"),
                        "constexprs": constexprs,
                        **options,
                    }
                )
    return found
