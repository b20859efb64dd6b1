"""State-space duality, the core of Mamba-2 and of retention: linear attention whose state decays by one factor per head and token."""

from __future__ import annotations

import torch
from torch import Tensor

from genkit.dispatch import Operation

_ssd = Operation("ssd")


def ssd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    dt: Tensor | None = None,
    skip: Tensor | None = None,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    reverse: bool = False,
    return_state: bool = False,
    path: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """o [B, N, H, V] with S_t = exp(g_t) S_{t-1} + k_t (dt_t v_t)^T and o_t = scale S_t^T q_t + skip v_t (Dao and Gu 2024, "Transformers are SSMs", eq. 16 and listing 1).

    Mamba-2's C, B, x, A, dt and D are `ssd(C, B, x, dt * A, dt=dt, skip=D)`. The state is the transpose of the one it stores.
    Generation calls it with N = 1 and the state of the step before.

    Args:
        q, k: [B, N, G, K], one dtype with v, any floating one; H / G heads next to each other share a group. Differentiable, as all tensors here.
        v: [B, N, H, V].
        g: [B, N, H], log decay <= 0 (not checked; what grows overflows), in v's dtype or the state's.
        dt: [B, N, H], step sizes that weigh the values, as g in dtype; None = 1.
        skip: [H], what passes by the state, as g in dtype; None = 0.
        initial_state: [B, H, K, V], float64 for float64 inputs, else float32; None = 0.
        reverse: time runs from the last token to the first.
        return_state: also return the last state, [B, H, K, V].
        path: see genkit.dispatch.

    Raises: ValueError for shapes, dtypes or devices that do not fit, naming the argument; UsageError for a path that cannot run.
    """
    if v.ndim != 4 or min(v.shape) < 1 or not v.is_floating_point():
        raise ValueError(f"ssd: v must be [B, N, H, V], floating, none of them 0, got {list(v.shape)} {v.dtype}")
    B, N, H, V = v.shape
    if q.ndim != 4 or q.shape[:2] != (B, N) or min(q.shape) < 1 or H % q.shape[2]:
        raise ValueError(
            f"ssd: q must be {[B, N, 'G', 'K']}, G a divisor of {H}, to go with v {list(v.shape)}, got {list(q.shape)}"
        )
    G, K = q.shape[2:]
    wide = torch.promote_types(v.dtype, torch.float32)
    if initial_state is None:
        initial_state = v.new_zeros(B, H, K, V, dtype=wide)
    for name, given, shape, dtypes in (
        ("q", q, (B, N, G, K), (v.dtype,)),
        ("k", k, (B, N, G, K), (v.dtype,)),
        ("g", g, (B, N, H), (v.dtype, wide)),
        ("dt", dt, (B, N, H), (v.dtype, wide)),
        ("skip", skip, (H,), (v.dtype, wide)),
        ("initial_state", initial_state, (B, H, K, V), (wide,)),
    ):
        if given is None:
            continue
        if given.shape != shape:
            raise ValueError(f"ssd: {name} must be {list(shape)} to go with q and v, got {list(given.shape)}")
        if given.dtype not in dtypes or given.device != v.device:
            raise ValueError(
                f"ssd: {name} must be {' or '.join(map(str, dict.fromkeys(dtypes)))} on {v.device} to go with v, got {given.dtype} on {given.device}"
            )
    weighed = v if dt is None else (v * dt[..., None]).to(v)
    o, state = _ssd(path, q, k, weighed, g, initial_state, float(scale), reverse)
    if skip is not None:
        o = (o + skip[:, None] * v).to(v)
    return (o, state) if return_state else o
