"""Prefix softmax by blocks, in plain torch, for machines without the compiled path.

Inside a block it is masked softmax. A block as a whole is one token with the block's weight and the block's mean as its value, so that what the blocks
before add is a prefix softmax over blocks: this function again. A state is one more token in front.
"""

from __future__ import annotations

import torch
from torch import Tensor

_T = 32  # tokens per block; the scores [T, T] of all blocks exist at once
_NEVER = -1e30  # stands for -inf, whose differences would be NaN


def aaren(scores: Tensor, v: Tensor, log_denominator: Tensor, mean: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """As `reference.aaren`."""
    if v.dtype in (torch.bfloat16, torch.float16):
        o, log_denominator = aaren(scores.float(), v.float(), log_denominator, mean.float(), reverse)
        return o.to(v.dtype), log_denominator
    if reverse:
        scores, v = scores.flip(1), v.flip(1)
    scores = torch.cat([log_denominator[:, None], scores], 1)
    v = torch.cat([mean[:, None], v], 1)
    is_out = scores == -torch.inf
    scores, v = scores.masked_fill(is_out, _NEVER), v.masked_fill(is_out[..., None], 0)
    with torch.autocast(v.device.type, enabled=False):
        o, largest, total = _prefixes(scores, torch.ones_like(scores), v)
    o, last = o[:, 1:], largest[:, -1] + total[:, -1].log()
    return o.flip(1) if reverse else o, last.masked_fill(last < _NEVER / 2, -torch.inf)


def _prefixes(scores: Tensor, counts: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of weight counts exp(scores), [B, N, H] -> o [B, N, H, V], the largest score of every prefix and its sum of weights over exp of that.

    The two are kept apart: their L = largest + log sum would be rounded at the size of the scores.
    """
    B, N, H, V = v.shape
    blocks = -(-N // _T)
    T = _T if blocks > 1 else N
    pad, rest = torch.nn.functional.pad, blocks * T - N
    s = pad(scores, (0, 0, 0, rest), value=_NEVER).view(B, blocks, T, H).movedim(3, 2)  # [B, blocks, H, T]
    w = pad(counts, (0, 0, 0, rest)).view(B, blocks, T, H).movedim(3, 2)
    x = pad(v, (0, 0, 0, 0, 0, rest)).view(B, blocks, T, H, V).movedim(3, 2)  # [B, blocks, H, T, V]
    is_later = torch.ones(T, T, dtype=torch.bool, device=v.device).triu(1)
    largest = s.detach().cummax(-1).values  # whatever is subtracted cancels, so it needs no gradient
    pairs = (s[..., None, :] - largest[..., None]).masked_fill(is_later, -torch.inf).exp() * w[..., None, :]
    total = pairs.sum(-1)
    o = (pairs / total[..., None]) @ x
    if blocks > 1:
        means, tops, sums = _prefixes(largest[..., -1], total[..., -1], o[..., -1, :])
        mean, top, sums = _from_before(means, 0), _from_before(tops, _NEVER), _from_before(sums, 0)
        together = torch.maximum(largest, top[..., None])
        inside, before = (largest - together).exp() * total, (top[..., None] - together).exp() * sums[..., None]
        total, largest = inside + before, together
        o = (inside / total)[..., None] * o + (before / total)[..., None] * mean[..., None, :]
    o = o.movedim(2, 3).reshape(B, blocks * T, H, V)[:, :N]
    largest, total = (y.movedim(2, 3).reshape(B, blocks * T, H)[:, :N] for y in (largest, total))
    return o, largest, total


def _from_before(x: Tensor, filling: float) -> Tensor:
    """x [B, blocks, ...] one block later."""
    return torch.cat([torch.full_like(x[:, :1], filling), x[:, :-1]], 1)
