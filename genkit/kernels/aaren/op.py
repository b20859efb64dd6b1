"""Attention as an RNN: softmax attention of one query over every prefix of the tokens, in linear time and with a state of constant size."""

from __future__ import annotations

import torch
from torch import Tensor

from genkit.dispatch import Operation

_aaren = Operation("aaren")
State = tuple[Tensor, Tensor]


def aaren(
    scores: Tensor,
    v: Tensor,
    *,
    state: State | None = None,
    return_state: bool = False,
    reverse: bool = False,
    path: str | None = None,
) -> Tensor | tuple[Tensor, State]:
    """o [B, N, H, V] with o_t = sum_{j<=t} softmax_{j<=t}(scores)_j v_j.

    With L_t = log sum_{j<=t} exp(scores_j) it is o_t = exp(L_{t-1} - L_t) o_{t-1} + exp(scores_t - L_t) v_t; both factors are at most 1, and scores of any
    size do no harm. (Feng et al. 2024, "Attention as an RNN", section 3; the scores are q.k_j / sqrt(K) of one learned query per head.)

    Args:
        scores: [B, N, H]; -inf takes a token out. A prefix without any token gives 0.
        v: [B, N, H, V], same dtype and device. bfloat16 and float16 are computed in float32.
        state: what an earlier call returned; None = no tokens yet.
        return_state: also return (L [B, H] float32, o [B, H, V]) behind the last token. Differentiable, as everything else.
        reverse: prefixes become suffixes: the recurrence runs from the last token to the first.
        path: see genkit.dispatch.

    Raises: ValueError for shapes, dtypes or devices that do not fit, naming the argument; UsageError for a path that cannot run.
    """
    if v.ndim != 4 or 0 in v.shape:
        raise ValueError(f"aaren: v must be [B, N, H, V] with no size 0, got {list(v.shape)}")
    if not v.is_floating_point():
        raise ValueError(f"aaren: v is {v.dtype}; it must be a floating-point type")
    B, N, H, V = v.shape
    wide = torch.promote_types(v.dtype, torch.float32)
    if state is None:
        state = v.new_full((B, H), -torch.inf, dtype=wide), v.new_zeros(B, H, V)
    expected = (
        ("scores", scores, (B, N, H), v.dtype),
        ("state[0]", state[0], (B, H), wide),
        ("state[1]", state[1], (B, H, V), v.dtype),
    )
    for name, given, shape, dtype in expected:
        if given.shape != shape:
            raise ValueError(
                f"aaren: {name} must be {list(shape)} to go with v {list(v.shape)}, got {list(given.shape)}"
            )
        if given.dtype != dtype or given.device != v.device:
            raise ValueError(
                f"aaren: {name} is {given.dtype} on {given.device}; to go with v it must be {dtype} on {v.device}"
            )
    o, log_denominator = _aaren(path, scores, v, *state, reverse)
    return (o, (log_denominator, o[:, 0 if reverse else -1])) if return_state else o
