"""The elementwise linear recurrence by blocks, in plain torch, for machines without the compiled path.

The tokens are cut into blocks of K. All blocks advance side by side from a state of zero, K steps of [B, blocks, D]; what the true state at a block's
start adds is the running product of the decays times that state; and the states at the starts are a recurrence over blocks, again this function.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_K = 32  # at [2, 1024, 384] on two cores 16 and 64 are slower; nothing changes within a factor of two


def linrec(a: Tensor, b: Tensor, h0: Tensor, reverse: bool) -> Tensor:
    """As `reference.linrec`."""
    if b.dtype in (torch.bfloat16, torch.float16):
        return _Recurrence.apply(a.float(), b.float(), h0.float(), reverse).to(b.dtype)
    return _Recurrence.apply(a, b, h0, reverse)


class _Recurrence(torch.autograd.Function):
    """The gradient is the same recurrence from the other end, written with itself, so that it can be differentiated again."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, h0: Tensor, reverse: bool) -> Tensor:
        return _scan(a, b, h0, reverse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        a, _, h0, ctx.reverse = inputs
        ctx.save_for_backward(a, h0, output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (dh,) = gradients
        a, h0, h = ctx.saved_tensors
        reverse = ctx.reverse
        decay = a.conj()
        following = decay if a.shape[1] == 1 else _shift(decay, torch.zeros_like(h0), not reverse)  # a_{t+1}
        lam = _Recurrence.apply(
            following, dh, torch.zeros_like(h0), not reverse
        )  # lambda_t = dh_t + a_{t+1} lambda_{t+1}
        da = (lam * _shift(h, h0, reverse).conj()).sum_to_size(a.shape)
        first = -1 if reverse else 0
        return da, lam, decay[:, first] * lam[:, first], None


def _shift(x: Tensor, filling: Tensor, reverse: bool) -> Tensor:
    """x [B, N, D] one step later in the order of the recurrence, [B, D] in front."""
    if reverse:
        return torch.cat([x[:, 1:], filling[:, None]], 1)
    return torch.cat([filling[:, None], x[:, :-1]], 1)


def _scan(a: Tensor, b: Tensor, h0: Tensor, reverse: bool) -> Tensor:
    B, N, D = b.shape
    is_constant = a.shape[1] == 1
    blocks = -(-N // _K)
    K = _K if blocks > 1 else N
    h = _padded(b, blocks * K, 0, reverse).view(B, blocks, K, D)
    decay = a[:, :, None] if is_constant else _padded(a, blocks * K, 1, reverse).view(B, blocks, K, D)
    product = decay.new_empty(a.shape[0], a.shape[1] if is_constant else blocks, K, D)  # of the decays so far
    order = range(K - 1, -1, -1) if reverse else range(K)
    before = None
    for k in order:
        step = decay[:, :, 0 if is_constant else k]  # [B, blocks, D]
        if before is None:
            product[:, :, k] = step
        else:
            h[:, :, k].addcmul_(step, h[:, :, before])
            product[:, :, k] = product[:, :, before] * step
        before = k
    starts = h0[:, None]
    if blocks > 1:
        starts = _shift(_scan(product[:, :, before], h[:, :, before], h0, reverse), h0, reverse)
    h.addcmul_(product, starts[:, :, None])
    return h.view(B, blocks * K, D)[:, blocks * K - N :] if reverse else h.view(B, blocks * K, D)[:, :N]


def _padded(x: Tensor, length: int, value: float, reverse: bool) -> Tensor:
    """A copy of x [B, N, D] filled up to a length, behind the last step of the recurrence."""
    padded = x.new_full((x.shape[0], length, x.shape[2]), value)
    padded[:, length - x.shape[1] :].copy_(x) if reverse else padded[:, : x.shape[1]].copy_(x)
    return padded
