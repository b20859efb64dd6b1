"""LightNet's linear attention: the decay is a ratio of running sums, so that every token reads a softmax over the tokens of each key channel."""

from __future__ import annotations

import torch
from torch import Tensor

from genkit.dispatch import Operation

_lightnet = Operation("lightnet")
State = tuple[Tensor, Tensor]


def lightnet(
    q: Tensor,
    g: Tensor,
    v: Tensor,
    k: Tensor | None = None,
    *,
    is_causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
    state: State | None = None,
    return_state: bool = False,
    path: str | None = None,
) -> Tensor | tuple[Tensor, State]:
    """o [B, N, H, V] with o_t = scale S_t^T q_t and S_t = sum_s softmax_s(g)_s k_s v_s^T per key channel (Qin et al. 2024, "You Only Scan Once").

    Causal, the softmax runs over s <= t: with z_t = log sum_{s<=t} exp g_s it is S_t = exp(z_{t-1} - z_t) S_{t-1} + exp(g_t - z_t) k_t v_t^T. Otherwise it
    runs over all tokens, one S serves them all, and their order does not matter. z_0 is -inf: there is no token before the first.

    Args:
        q, g: [B, N, H, K]; g are the logits, in the paper the key projection itself.
        v: [B, N, H, V]. All of one floating dtype and device; z and S are kept in float32 at least.
        k: [B, N, H, K], a separate key; None = 1, as in the paper.
        is_causal: whether token t sees only tokens up to t.
        mask: [B, N] bool, False = padding, which no token reads. A token with nothing to read gets 0.
        scale: None = K^-1/2.
        state: (z [B, H, K], S [B, H, K, V]) of an earlier causal call, in float32 (float64 for float64); None = no tokens yet.
        return_state: also return that state behind the last token.
        path: see genkit.dispatch. The causal recurrence runs by `gla`, which chooses its own path.

    Raises: ValueError for what does not fit, naming the argument; UsageError for a path that cannot run.
    """
    if v.ndim != 4 or 0 in v.shape or not v.is_floating_point():
        raise ValueError(f"lightnet: v must be [B, N, H, V], floating, no size 0, got {list(v.shape)} {v.dtype}")
    B, N, H, V = v.shape
    K = q.shape[-1]
    wide = torch.promote_types(v.dtype, torch.float32)
    if not is_causal and (state is not None or return_state):
        raise ValueError("lightnet: only the causal form has a state; set is_causal=True")
    if state is None:
        state = v.new_full((B, H, K), -torch.inf, dtype=wide), v.new_zeros(B, H, K, V, dtype=wide)
    expected = [
        ("q", q, (B, N, H, K), v.dtype),
        ("g", g, (B, N, H, K), v.dtype),
        ("state[0]", state[0], (B, H, K), wide),
        ("state[1]", state[1], (B, H, K, V), wide),
    ]
    if k is not None:
        expected.append(("k", k, (B, N, H, K), v.dtype))
    if mask is not None:
        expected.append(("mask", mask, (B, N), torch.bool))
    for name, given, shape, dtype in expected:
        if given.shape != shape:
            raise ValueError(
                f"lightnet: {name} must be {list(shape)} to go with q {list(q.shape)} and v {list(v.shape)}, got {list(given.shape)}"
            )
        if given.dtype != dtype or given.device != v.device:
            raise ValueError(
                f"lightnet: {name} is {given.dtype} on {given.device}; to go with v it must be {dtype} on {v.device}"
            )
    o, *last = _lightnet(path, q, g, v, k, mask, *state, K**-0.5 if scale is None else float(scale), is_causal)
    return (o, (last[0], last[1])) if return_state else o
