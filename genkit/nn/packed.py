"""Linear layers by weights that are laid out for the processor, as long as nothing changes them.

On a CPU torch hands a linear layer to MKL, with the bias, and after it a GELU, as further passes over what came out. oneDNN does all of it in one pass, and
faster by weights in blocks of its own: it is the path that torch.compile takes for frozen weights. Results differ by rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from genkit.nn.mlp import MLP

_ROWS = 64  # with fewer the weights are only read once, and their layout does not matter


@contextmanager
def packed(*networks: Any) -> Iterator[None]:
    """Inside the block, linear layers and perceptrons of these networks (modules, or None) take the fast path; their weights must not change meanwhile.

    They do wherever it is open: without gradients, in float32 on a CPU with oneDNN. Elsewhere everything is as always. Takes as much memory again as the
    weights that are used.
    """
    changed: list[nn.Module] = []
    try:
        if is_available():
            for module in (module for network in networks if network is not None for module in network.modules()):
                if "forward" in vars(module):  # somebody's own, or within another such block
                    continue
                if type(module) is nn.Linear:
                    vars(module)["forward"] = Packed(module)
                elif type(module) is MLP:
                    vars(module)["forward"] = PackedMLP(module)
                else:
                    continue
                changed.append(module)
        yield
    finally:
        for module in changed:
            del vars(module)["forward"]


class Packed:
    """A linear layer, and after it a GELU where there is one. Its weights are laid out when first used."""

    def __init__(self, layer: nn.Linear, act: nn.GELU | None = None):
        self.layer, self.act = layer, act
        self.weight: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        layer, act = self.layer, self.act
        if not _is_open(x, layer.weight):
            out = nn.Linear.forward(layer, x)
            return out if act is None else act(out)
        if self.weight is None:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), 2 * _ROWS)
        after, algorithm = ("none", "") if act is None else ("gelu", act.approximate)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, layer.bias, after, [], algorithm)


class PackedMLP:
    """nn.mlp.MLP with its GELU in the first product."""

    def __init__(self, mlp: MLP):
        self.down, self.up = mlp.down, Packed(mlp.up, mlp.act)

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


def _is_open(x: Tensor, weight: Tensor) -> bool:
    return (
        not torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() >= _ROWS * x.shape[-1]
        and not torch.is_autocast_enabled("cpu")
    )


@cache
def is_available() -> bool:
    """Whether this build of torch has the two operations, which are not public, and they do what is expected of them."""
    if not torch.backends.mkldnn.is_available():
        return False
    with torch.random.fork_rng(
        devices=[]
    ):  # asked for while a model trains, it must not draw from that model's random numbers
        layer = nn.Linear(8, 16)
    x = torch.linspace(-1, 1, 8 * _ROWS).view(_ROWS, 8)
    with torch.inference_mode(False), torch.no_grad():
        expected = nn.functional.gelu(layer(x), approximate="tanh")
        try:
            return torch.allclose(Packed(layer, nn.GELU("tanh"))(x), expected, atol=1e-5)
        except (AttributeError, RuntimeError):  # NotImplementedError is one
            return False
