"""Gated linear attention: a matrix state per head that every token decays per key channel, writes to and reads from."""

from __future__ import annotations

import torch
from torch import Tensor

from genkit.dispatch import Operation

_gla = Operation("gla")


def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    reverse: bool = False,
    return_state: bool = False,
    path: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """o [B, N, H, V] with S_t = diag(exp g_t) S_{t-1} + k_t v_t^T and o_t = scale S_t^T q_t (Yang et al. 2024, "Gated Linear Attention Transformers", eq. 3).

    Generation calls it with N = 1 and the state of the step before.

    Args:
        q, k: [B, N, H, K], one dtype with v, any floating one. Differentiable, as all tensors here.
        v: [B, N, H, V].
        g: [B, N, H, K], log decay <= 0 (not checked; what grows overflows), in v's dtype or the state's.
        scale: None = K^-1/2.
        initial_state: [B, H, K, V], float64 for float64 inputs, else float32; None = 0.
        reverse: time runs from the last token to the first.
        return_state: also return the last state, [B, H, K, V].
        path: see genkit.dispatch.

    Raises: ValueError for shapes, dtypes or devices that do not fit, naming the argument; UsageError for a path that cannot run.
    """
    if v.ndim != 4 or min(v.shape) < 1 or not v.is_floating_point():
        raise ValueError(f"gla: v must be [B, N, H, V], floating, none of them 0, got {list(v.shape)} {v.dtype}")
    B, N, H, V = v.shape
    if q.ndim != 4 or q.shape[:3] != (B, N, H) or q.shape[3] < 1:
        raise ValueError(f"gla: q must be {[B, N, H, 'K']} to go with v {list(v.shape)}, got {list(q.shape)}")
    K = q.shape[3]
    wide = torch.promote_types(v.dtype, torch.float32)
    if initial_state is None:
        initial_state = v.new_zeros(B, H, K, V, dtype=wide)
    for name, given, shape, dtypes in (
        ("q", q, (B, N, H, K), (v.dtype,)),
        ("k", k, (B, N, H, K), (v.dtype,)),
        ("g", g, (B, N, H, K), (v.dtype, wide)),
        ("initial_state", initial_state, (B, H, K, V), (wide,)),
    ):
        if given.shape != shape:
            raise ValueError(f"gla: {name} must be {list(shape)} to go with q and v, got {list(given.shape)}")
        if given.dtype not in dtypes or given.device != v.device:
            raise ValueError(
                f"gla: {name} must be {' or '.join(map(str, dict.fromkeys(dtypes)))} on {v.device} to go with v, got {given.dtype} on {given.device}"
            )
    o, state = _gla(path, q, k, v, g, initial_state, K**-0.5 if scale is None else float(scale), reverse)
    return (o, state) if return_state else o
