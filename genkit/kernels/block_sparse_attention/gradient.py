"""What the custom operations of every path share: shapes without computing, and how backward follows forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def connect(forward: Any, backward: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> None:
    """Give forward(q, k, v, *rest) -> (o, lse) its gradient backward(q, k, v, o, lse, do, dlse, *rest) -> (dq, dk, dv), and both their fakes.

    rest = (lists, num_maps, block_size, scale, valid), lists as `Pattern.tensors`.
    """

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, lists, *ctx.numbers, valid = inputs
        ctx.save_for_backward(q, k, v, *output, valid, *lists)
        ctx.set_materialize_grads(False)

    def gradients(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        q, k, v, o, lse, valid, *lists = ctx.saved_tensors
        do = torch.zeros_like(o) if do is None else do
        found = backward(q, k, v, o, lse, do, dlse, lists, *ctx.numbers, valid)
        return (*found, [None] * len(lists), *[None] * len(ctx.numbers), None)

    def fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        return q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[:3], dtype=dtype)

    def fake_backward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    forward.register_fake(fake)
    forward.register_autograd(gradients, setup_context=save)
    backward.register_fake(fake_backward)  # type: ignore[attr-defined]
