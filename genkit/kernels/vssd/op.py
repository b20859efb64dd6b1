"""Non-causal state-space duality: every token writes into one state and every token reads it, in no order.

There is no compiled path, for there is nothing to fuse: the sum over all tokens and its reading are two matrix products of full size, each at the speed
limit of whatever library torch calls.
"""

from __future__ import annotations

import torch
from torch import Tensor

from genkit.dispatch import Operation

_vssd = Operation("vssd")


def vssd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    *,
    skip: Tensor | None = None,
    valid: Tensor | None = None,
    path: str | None = None,
) -> Tensor:
    """o [B, N, H, V] with S = sum_t k_t (weight_t v_t)^T and o_t = S^T q_t + skip v_t (Shi et al. 2024, "VSSD: Vision Mamba with Non-Causal State Space Duality", eq. 9).

    Its C, B, x, dt, A and D are `vssd(C, B, x, -dt * A, skip=D)`: only the step's size weighs a token. The state grows with the number of tokens; a norm
    has to follow.

    Args:
        q, k: [B, N, G, K], one dtype and device with v, any floating one; head h uses group h mod G. Differentiable, as all tensors here but valid.
        v: [B, N, H, V].
        weight: [B, N, H], in v's dtype or float32. The state is summed in float32 at least.
        skip: [H], as weight in dtype; None = 0.
        valid: [B, N] bool, False = padding: it writes nothing, whatever its values, and reads 0. None = all are valid.
        path: see genkit.dispatch.

    Raises: ValueError for shapes, dtypes or devices that do not fit, naming the argument; UsageError for a path that cannot run.
    """

    if v.ndim != 4 or min(v.shape) < 1 or not v.is_floating_point():
        raise ValueError(f"vssd: v must be [B, N, H, V], floating, none of them 0, got {list(v.shape)} {v.dtype}")
    B, N, H, _ = v.shape
    if q.ndim != 4 or q.shape[:2] != (B, N) or min(q.shape) < 1 or H % q.shape[2]:
        raise ValueError(
            f"vssd: q must be {[B, N, 'G', 'K']}, G a divisor of {H}, to go with v {list(v.shape)}, got {list(q.shape)}"
        )
    numbers = (v.dtype, torch.promote_types(v.dtype, torch.float32))
    for name, given, shape, dtypes in (
        ("q", q, q.shape, (v.dtype,)),
        ("k", k, q.shape, (v.dtype,)),
        ("weight", weight, (B, N, H), numbers),
        ("skip", skip, (H,), numbers),
        ("valid", valid, (B, N), (torch.bool,)),
    ):
        if given is None:
            continue
        if given.shape != shape:
            raise ValueError(f"vssd: {name} must be {list(shape)} to go with q and v, got {list(given.shape)}")
        if given.dtype not in dtypes or given.device != v.device:
            raise ValueError(
                f"vssd: {name} must be {' or '.join(map(str, dict.fromkeys(dtypes)))} on {v.device} to go with v, got {given.dtype} on {given.device}"
            )
    if valid is not None:  # gone before the sum, so that not even NaN comes through
        q, k, v = (x.masked_fill(~valid[:, :, None, None], 0) for x in (q, k, v))
        weight = weight.masked_fill(~valid[:, :, None], 0)
    o = _vssd(path, q, k, v, weight)
    return o if skip is None else (o + skip[:, None] * v).to(v)
