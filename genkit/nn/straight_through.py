"""Ways past a step without a gradient: forward a code, bit for bit; backward a gradient for the vector it stands for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Gradient = Literal["straight_through", "rotation"]


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, codes: Tensor) -> Tensor:
        return codes.view_as(codes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, codes: Tensor) -> Tensor:
        ctx.save_for_backward(z, codes)
        return codes.view_as(codes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        z, codes = ctx.saved_tensors
        start, end = _unit(z), _unit(codes)
        middle = _unit(start + end)
        # The transpose of R = I - 2 middle middle^T + 2 end start^T, applied to the gradient.
        turned = grad - 2 * _dot(grad, middle) * middle + 2 * _dot(grad, end) * start
        return turned * (codes.norm(dim=-1, keepdim=True) / z.norm(dim=-1, keepdim=True).clamp_min(1e-6)), None


def straight_through(z: Tensor, codes: Tensor) -> Tensor:
    """`codes`; its gradient goes to z unchanged (van den Oord et al., "Neural Discrete Representation Learning", 2017)."""
    return _StraightThrough.apply(z, codes)


def rotation(z: Tensor, codes: Tensor) -> Tensor:
    """`codes` [..., d] as z turned and stretched onto them by a fixed matrix, |codes| / |z| R with R z / |z| = codes / |codes|.

    The gradient goes back through that matrix: its angle to the code becomes its angle to z (Fifty et al., "Restructuring Vector
    Quantization with the Rotation Trick", 2024, section 4.2).
    """
    return _Rotation.apply(z, codes)


WAYS: dict[Gradient, Callable[[Tensor, Tensor], Tensor]] = {"straight_through": straight_through, "rotation": rotation}


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1, eps=1e-6)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)
