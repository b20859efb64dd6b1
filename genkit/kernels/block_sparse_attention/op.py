"""Softmax attention over chosen blocks of keys, with its log-sum-exp: the one primitive under windows, tiles, packed sequences and reused attention.

The log-sum-exp is an output like any other, with a gradient: Re-ttention reshapes by exp(lse_sparse - lse_full), and attention over two sets of keys is
merged by it.
"""

from __future__ import annotations

from torch import Tensor

from genkit.dispatch import Operation
from genkit.kernels.block_sparse_attention.pattern import Pattern

_attend = Operation("block_sparse_attention")


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    scale: float | None = None,
    valid: Tensor | None = None,
    path: str | None = None,
) -> tuple[Tensor, Tensor]:
    """o_i = sum_j p_ij v_j with p_ij = exp(s_ij - lse_i), lse_i = log sum_j exp(s_ij), s_ij = scale q_i . k_j, over the keys j that query i sees.

    Blockwise with a running maximum, after FlashAttention-2 (Dao 2023, algorithms 1 and 2); the gradient of lse enters as its delta_i = do_i . o_i - dlse_i.

    Args:
        q: [B, H, N, K], heads before tokens as in torch's attention: the rows that a block multiplies are then adjacent. Differentiable, as k and v.
        k: [B, H, L, K], same dtype and device.
        v: [B, H, L, V], same dtype and device.
        pattern: who sees whom, made once (`pattern.build`), on the same device.
        scale: of the scores; None = K^-1/2.
        valid: [B, L] bool, False = padding that no query sees.
        path: see genkit.dispatch.

    Returns: o [B, H, N, V] in the dtype of q, and lse [B, H, N] in float32 (float64 for float64). A query that sees no key has o = 0 and lse = -inf,
        and passes no gradient.

    Raises: ValueError for shapes, dtypes or devices that do not fit, naming the argument; UsageError for a path that cannot run.
    """
    if q.ndim != 4 or q.shape[-1] < 1:
        raise ValueError(f"block_sparse_attention: q must be [B, H, N, K], got {list(q.shape)}")
    B, H, _, K = q.shape
    N, L = pattern.num_queries, pattern.num_keys
    V = v.shape[-1] if v.ndim == 4 else 0
    for name, given, shape in (
        ("q", q, (B, H, N, K)),
        ("k", k, (B, H, L, K)),
        ("v", v, (B, H, L, max(V, 1))),
    ):
        if given.shape != shape:
            raise ValueError(
                f"block_sparse_attention: {name} must be {list(shape)} to go with q and the pattern, got {list(given.shape)}"
            )
        if given.dtype != q.dtype or given.device != q.device:
            raise ValueError(
                f"block_sparse_attention: {name} is {given.dtype} on {given.device}, q is {q.dtype} on {q.device}; they must agree"
            )
    if pattern.num_maps[0] not in (1, B) or pattern.num_maps[1] not in (1, H):
        raise ValueError(
            f"block_sparse_attention: the pattern has maps for {pattern.num_maps[0]} samples and {pattern.num_maps[1]} heads, q has {B} and {H}; it needs as many or 1"
        )
    if pattern.device != q.device:
        raise ValueError(
            f"block_sparse_attention: the pattern is on {pattern.device}, q on {q.device}; use pattern.to({str(q.device)!r})"
        )
    if valid is not None and (valid.shape != (B, L) or str(valid.dtype) != "torch.bool" or valid.device != q.device):
        raise ValueError(
            f"block_sparse_attention: valid must be bool [{B}, {L}] on {q.device}, got {valid.dtype} {list(valid.shape)} on {valid.device}"
        )
    return _attend(path, q, k, v, pattern, K**-0.5 if scale is None else float(scale), valid)


def path_of(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> str:
    """The path that a call with these arguments takes where none is asked for."""
    return _attend.choose(None, q, k, v, pattern, 1.0, None)
