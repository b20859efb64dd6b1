"""Depthwise causal convolution over tokens: the short filter in front of a state space, which sees only what came before."""

from __future__ import annotations

import torch
from torch import Tensor

from genkit.dispatch import Operation

_causal_conv1d = Operation("causal_conv1d")
_FEWEST, _MOST = 2, 8


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    initial_state: Tensor | None = None,
    reverse: bool = False,
    return_state: bool = False,
    path: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """y [B, N, D] with y_t = activation(bias + sum over k < K of weight_k x_{t-K+1+k}), in the dtype of x; the last tap is on the token itself.

    One token at a time, as generation needs it: `y, state = causal_conv1d(x, ..., initial_state=state, return_state=True)` with N = 1.

    Args:
        x: [B, N, D].
        weight: [D, K] with K of 2 to 8; float32 or the dtype of x. torch's Conv1d(D, D, K, groups=D) holds it as [D, 1, K].
        bias: [D], float32 or the dtype of x; None = 0.
        activation: None or "silu".
        initial_state: [B, K - 1, D], the tokens before the first, in their order; dtype of x; None = 0.
        reverse: token t sees those after it instead: y_t = activation(bias + sum over k of weight_k x_{t+K-1-k}), and initial_state holds the tokens
            that follow the last one, in their order.
        return_state: also return the initial_state with which the next tokens (reverse: those in front) are to be convolved, [B, K - 1, D].
        path: see genkit.dispatch.

    Everything is differentiable. Sums are in float32, or float64 where x is. As Dao-AILab/causal-conv1d causal_conv1d_fn, which keeps channels before
    tokens: its x is moveaxis(-1, 1) of this one.

    Raises: ValueError for shapes, dtypes or devices that do not fit, naming the argument; UsageError for a path that cannot run.
    """
    if x.ndim != 3 or 0 in x.shape:
        raise ValueError(f"causal_conv1d: x must be [B, N, D], none of them 0, got {list(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"causal_conv1d: x must hold floating-point numbers, got {x.dtype}")
    B, N, D = x.shape
    if weight.ndim != 2 or weight.shape[0] != D or not _FEWEST <= weight.shape[1] <= _MOST:
        raise ValueError(
            f"causal_conv1d: weight must be [{D}, K] to go with x, with K of {_FEWEST} to {_MOST}, got {list(weight.shape)}"
        )
    if activation not in (None, "silu"):
        raise ValueError(f"causal_conv1d: activation must be None or 'silu', got {activation!r}")
    before = weight.shape[1] - 1
    wide = torch.promote_types(x.dtype, torch.float32)
    for name, given, shape, allowed in (
        ("weight", weight, weight.shape, {x.dtype, wide}),
        ("bias", bias, (D,), {x.dtype, wide}),
        ("initial_state", initial_state, (B, before, D), {x.dtype}),
    ):
        if given is None:
            continue
        if given.shape != shape:
            raise ValueError(f"causal_conv1d: {name} must be {list(shape)} to go with x, got {list(given.shape)}")
        if given.device != x.device:
            raise ValueError(f"causal_conv1d: {name} is on {given.device}, x on {x.device}; they must agree")
        if given.dtype not in allowed:
            expected = " or ".join(sorted(map(str, allowed)))
            raise ValueError(f"causal_conv1d: {name} must be {expected} beside x of {x.dtype}, got {given.dtype}")
    if initial_state is None:
        initial_state = x.new_zeros(B, before, D)
    y = _causal_conv1d(path, x, weight, bias, initial_state, activation == "silu", bool(reverse))
    if not return_state:
        return y
    if reverse:
        return y, torch.cat([x[:, :before], initial_state], 1)[:, :before]
    return y, torch.cat([initial_state, x[:, max(N - before, 0) :]], 1)[:, -before:]
