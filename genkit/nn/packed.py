"""Linear layers by oneDNN, as it multiplies best: while sampling by weights that are laid out for the processor, while training as they are.

On a CPU torch hands a linear layer to MKL, with the bias, and after it a GELU, as further passes over what came out. oneDNN does all of it in one pass, and
faster by weights in blocks of its own: it is the path that torch.compile takes for frozen weights. Results differ by rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from genkit.nn.linear_map import Projection
from genkit.nn.mlp import MLP

_ROWS = 64  # of training: with fewer the copy of the weights for the gradient costs more than is gained


@contextmanager
def packed(*networks: Any) -> Iterator[None]:
    """Inside the block, linear layers and perceptrons of these networks (modules, or None) take the fast path; their weights must not change meanwhile.

    They do wherever it is open: without gradients, in float32 on a CPU with oneDNN. Elsewhere everything is as always. Takes as much memory again as the
    weights that are used.
    """
    with _replaced(networks, {nn.Linear: Packed, Projection: Packed, MLP: PackedMLP}):
        yield


@contextmanager
def multiplied(*networks: Any) -> Iterator[None]:
    """The same while weights change and gradients flow: products forward, and those backward that oneDNN is faster at. Takes no memory."""
    with _replaced(networks, {nn.Linear: Multiplied}):
        yield


@contextmanager
def _replaced(networks: tuple[Any, ...], makers: dict[type, Callable[[Any], Any]]) -> Iterator[None]:
    changed: list[nn.Module] = []
    try:
        if is_available():
            for module in (module for network in networks if network is not None for module in network.modules()):
                make = makers.get(type(module))
                if make is None or "forward" in vars(module):  # somebody's own, or within another such block
                    continue
                vars(module)["forward"] = make(module)
                changed.append(module)
        yield
    finally:
        for module in changed:
            del vars(module)["forward"]


class Packed:
    """A linear layer, and after it a GELU where there is one. Its weights are laid out when first used."""

    def __init__(self, layer: nn.Linear | Projection, act: nn.GELU | None = None):
        self.layer, self.bias, self.act = layer, layer.bias, act
        self.weight: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        weight, act = self.layer.weight, self.act
        if torch.is_grad_enabled() or not _is_open(x, weight):
            out = linear(x, weight, self.bias)
            return out if act is None else act(out)
        if self.weight is None:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS)
        after, algorithm = ("none", "") if act is None else ("gelu", act.approximate)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, after, [], algorithm)


class PackedMLP:
    """nn.mlp.MLP with its GELU in the first product."""

    def __init__(self, mlp: MLP):
        self.down, self.up = mlp.down, Packed(mlp.up, mlp.act)

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


class Multiplied:
    """A linear layer with gradients."""

    def __init__(self, layer: nn.Linear):
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        if x.numel() < _ROWS * x.shape[-1] or not _is_open(x, self.layer.weight):
            return nn.Linear.forward(self.layer, x)
        return Product.apply(x, self.layer.weight, self.layer.bias)


class Product(torch.autograd.Function):
    """x [..., I], weight [O, I], bias [O] or None -> [..., O]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = d_out.flatten(0, -2)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        dx = (
            torch.ops.mkldnn._linear_pointwise(d_out, weight.t().contiguous(), None, "none", [], "")
            if needs_x
            else None
        )
        # For the third product oneDNN would copy what it is given, which costs more than it gains.
        dw = rows.t() @ x.flatten(0, -2) if needs_weight else None
        return dx, dw, rows.sum(0) if needs_bias else None


def _is_open(x: Tensor, weight: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


@cache
def is_available() -> bool:
    """Whether this build of torch has the two operations, which are not public, and they do what is expected of them."""
    if not torch.backends.mkldnn.is_available():
        return False
    with torch.inference_mode(False), torch.no_grad():
        x = torch.linspace(-1, 1, 8 * _ROWS).view(_ROWS, 8)
        layer = nn.utils.skip_init(nn.Linear, 8, 16)  # without a draw: whoever asks keeps his random state
        nn.init.ones_(layer.bias)
        layer.weight.copy_(torch.linspace(1, -1, 128).view(16, 8))
        expected = nn.functional.gelu(layer(x), approximate="tanh")
        try:
            return torch.allclose(Packed(layer, nn.GELU("tanh"))(x), expected, atol=1e-5)
        except (AttributeError, RuntimeError):  # NotImplementedError is one
            return False
