"""Any mixer plus a depthwise 3x3 convolution: the neighbourhood that global linear mixers blur."""

from __future__ import annotations

from torch import Tensor, nn

from genkit.errors import UsageError
from genkit.interfaces import Cache, Layout
from genkit.mixers.grids import dense_grid, depthwise, spatially
from genkit.registry import MixerSpec, maker

LIGHTNET: MixerSpec = {"type": "lightnet"}


class LocalPlus(nn.Module):
    """mixer(x) + depthwise(x), on two-dimensional grids; 9 D multiplications per token more.

    Args:
        kernel_size: odd.
    """

    is_causal = False
    needs_grid = True

    def __init__(self, *, dim: int, layer: int, mixer: MixerSpec = LIGHTNET, kernel_size: int = 3):
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise UsageError(f"mixer.kernel_size={kernel_size} must be odd")
        self.mixer = maker("mixer", mixer)(dim=dim, layer=layer)
        self.conv = depthwise(dim, kernel_size)
        self.is_resolution_free = bool(self.mixer.is_resolution_free)

    def forward(self, x: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor:
        grid = dense_grid(layout, "local_plus", (2,))
        return self.mixer(x, layout) + spatially(self.conv, x, grid)
