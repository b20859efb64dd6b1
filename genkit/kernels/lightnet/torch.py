"""LightNet by gated linear attention (causal) or by two matrix products (over all tokens).

With d_t = g_t - z_{t-1} the key is k_t sigmoid(d_t) and the log decay -softplus(d_t): gla with both is the recurrence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from genkit.kernels.gla.op import gla
from genkit.kernels.linrec.op import linrec

_NEVER = -1e30  # stands for -inf, whose differences would be NaN
_FORGOTTEN = -80.0  # a log decay below it leaves nothing in float32, and -inf is no number for a kernel


def lightnet(
    q: Tensor,
    g: Tensor,
    v: Tensor,
    k: Tensor | None,
    mask: Tensor | None,
    z: Tensor,
    S: Tensor,
    scale: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.lightnet`. Autocast is switched off: sums over all tokens need float32."""
    with torch.autocast(v.device.type, enabled=False):
        return _lightnet(q, g, v, k, mask, z, S, scale, is_causal)


def _lightnet(
    q: Tensor,
    g: Tensor,
    v: Tensor,
    k: Tensor | None,
    mask: Tensor | None,
    z: Tensor,
    S: Tensor,
    scale: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = S.dtype
    logits = g.to(wide)
    is_padding = None if mask is None else ~mask[:, :, None, None]
    if is_padding is not None:
        logits = logits.masked_fill(is_padding, _NEVER)
    if not is_causal:
        weights = _keys(logits.softmax(1), k, is_padding)  # [B, N, H, K]
        S = torch.einsum("bnhk,bnhv->bhkv", weights, v.to(wide))
        return torch.einsum("bnhk,bhkv->bnhv", (scale * q).to(wide), S).to(v.dtype), z, S
    z = z.clamp_min(_NEVER)
    # A shift of all logits changes nothing, and near 0 sums of exponentials are exact to more digits.
    shift = torch.maximum(logits.detach().amax(1), z.detach())  # [B, H, K]
    share, decay, last = _Weights.apply(logits - shift[:, None], z - shift)
    key = _keys(share, k, is_padding).to(v.dtype)
    o, S = gla(q, key, v, decay.clamp_min(_FORGOTTEN), scale=scale, initial_state=S, return_state=True)
    last = last + shift
    return o, last.masked_fill(last < _NEVER / 2, -torch.inf), S


def _keys(weights: Tensor, k: Tensor | None, is_padding: Tensor | None) -> Tensor:
    weights = weights if k is None else weights * k
    return weights if is_padding is None else weights.masked_fill(is_padding, 0)


class _Weights(torch.autograd.Function):
    """(g [B, N, ...], z_0 [B, ...]) -> sigmoid(d), -softplus(d), both like g, and the last z, where d_t = g_t - z_{t-1}.

    Its own gradient, for that of a cumulative log-sum-exp takes two more of them: with zeta_s = sum_{t>=s} exp(z_s - z_t) dz_t, a recurrence from the
    last token, dg_s gains sigmoid(d_s) zeta_s.
    """

    @staticmethod
    def forward(g: Tensor, z0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = torch.cat([z0[:, None], g], 1).logcumsumexp(1)  # [B, N + 1, ...]
        d = g - z[:, :-1]
        return d.sigmoid(), -softplus(d), z[:, -1].clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*output[:2])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        dshare, ddecay, dlast = gradients
        share, decay = ctx.saved_tensors
        dd = dshare * share * (1 - share) - ddecay * share
        dz = torch.cat([-dd[:, 1:], dlast[:, None]], 1)  # of z_1 ... z_N
        keep = torch.cat([decay[:, 1:].exp(), torch.zeros_like(dlast)[:, None]], 1)  # exp(z_t - z_{t+1})
        zeta = linrec(keep.flatten(2), dz.flatten(2), reverse=True).view_as(dz)
        return dd + share * zeta, decay[:, 0].exp() * zeta[:, 0] - dd[:, 0]
