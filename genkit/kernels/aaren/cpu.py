"""The compiled path of aaren; see cpu.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genkit import memory, native

_WIDENED = (torch.bfloat16, torch.float16)


def refuses(scores: Tensor, v: Tensor, log_denominator: Tensor, mean: Tensor, reverse: bool) -> str | None:
    """Why these arguments need another path."""
    return None if v.dtype in (torch.float32, *_WIDENED) else f"it computes in float32, these are {v.dtype}"


def aaren(scores: Tensor, v: Tensor, log_denominator: Tensor, mean: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """As `reference.aaren`."""
    o, _, _, last = _forward(scores.float(), v.float(), log_denominator, mean.float(), reverse)
    return o.to(v.dtype), last


@torch.library.custom_op("genkit::aaren_cpu", mutates_args=(), device_types="cpu")
def _forward(
    scores: Tensor, v: Tensor, log_denominator: Tensor, mean: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scores, v, log_denominator, mean = (x.contiguous() for x in (scores, v, log_denominator, mean))
    o, last = memory.empty_like(v), memory.empty_like(log_denominator)
    keep, share = memory.empty_like(scores), memory.empty_like(scores)
    native.function("aaren", "aaren_forward", "ppppppppiiiii")(
        scores, v, log_denominator, mean, o, keep, share, last, *v.shape, reverse
    )
    return o, keep, share, last


@_forward.register_fake
def _(
    scores: Tensor, v: Tensor, log_denominator: Tensor, mean: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    o, keep, share, last = (x.new_empty(x.shape) for x in (v, scores, scores, log_denominator))
    return o, keep, share, last


@torch.library.custom_op("genkit::aaren_cpu_backward", mutates_args=(), device_types="cpu")
def _backward(
    v: Tensor, mean: Tensor, o: Tensor, keep: Tensor, share: Tensor, do: Tensor, dlast: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    v, mean, do, dlast = (x.contiguous() for x in (v, mean, do, dlast))
    ds, dv, dlog, dmean = (memory.empty_like(x) for x in (keep, v, dlast, mean))
    native.function("aaren", "aaren_backward", "pppppppppppiiiii")(
        v, mean, o, keep, share, do, dlast, ds, dv, dlog, dmean, *v.shape, reverse
    )
    return ds, dv, dlog, dmean


@_backward.register_fake
def _(
    v: Tensor, mean: Tensor, o: Tensor, keep: Tensor, share: Tensor, do: Tensor, dlast: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ds, dv, dlog, dmean = (x.new_empty(x.shape) for x in (keep, v, dlast, mean))
    return ds, dv, dlog, dmean


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, v, _, mean, ctx.reverse = inputs
    o, keep, share, _ = output
    ctx.mark_non_differentiable(keep, share)
    ctx.save_for_backward(v, mean, o, keep, share)


def _gradients(ctx: Any, do: Tensor, _keep: Tensor, _share: Tensor, dlast: Tensor) -> tuple[Any, ...]:
    return (*_backward(*ctx.saved_tensors, do, dlast, ctx.reverse), None)


_forward.register_autograd(_gradients, setup_context=_save)
