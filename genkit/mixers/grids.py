"""What mixers share: the errors for layouts and widths that do not fit, and depthwise convolutions over tokens."""

from __future__ import annotations

from torch import Tensor, nn

from genkit.errors import UsageError
from genkit.interfaces import Layout

_OTHERS = "attention, lightnet and gla"


def dense_grid(layout: Layout, word: str, num_axes: tuple[int, ...] = (1, 2, 3)) -> tuple[int, ...]:
    """layout.grid of a full grid without padding.

    Args:
        word: the mixer, for messages.
        num_axes: how many axes it can work on.

    Raises: UsageError when tokens are padded or packed, or the grid has another number of axes.
    """
    refuse_padding(layout, word)
    return grid_of(layout, word, num_axes)


def grid_of(layout: Layout, word: str, num_axes: tuple[int, ...] = (1, 2, 3)) -> tuple[int, ...]:
    """layout.grid, padded or not. Raises UsageError as dense_grid."""
    if layout.grid is None:
        raise UsageError(
            f"mixer.type={word} works on tokens in a full row-major grid; these have none. {_OTHERS} do without"
        )
    if len(layout.grid) not in num_axes:
        allowed = " or ".join(map(str, num_axes))
        raise UsageError(
            f"mixer.type={word} works on grids with {allowed} axes (here, with these options), found {list(layout.grid)}"
        )
    return layout.grid


def refuse_padding(layout: Layout, word: str) -> None:
    """Raises UsageError when the layout has padding."""
    if layout.valid is not None:
        raise UsageError(
            f"mixer.type={word} would carry what is at padding into other tokens; these samples have sizes of their own. "
            f"{_OTHERS} take padding"
        )


def width_per_head(dim: int, num_heads: int) -> int:
    """dim / num_heads. Raises UsageError when it is no whole number."""
    if num_heads < 1 or dim % num_heads:
        raise UsageError(f"mixer.num_heads={num_heads} does not divide the width dim={dim}")
    return dim // num_heads


def depthwise(channels: int, kernel_size: int, bias: bool = True) -> nn.Conv2d:
    """A convolution of every channel with a kernel of its own, the grid's size kept by zeros around it. kernel_size is odd."""
    return nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, bias=bias)


def spatially(conv: nn.Module, x: Tensor, grid: tuple[int, ...]) -> Tensor:
    """A network of images, applied to tokens [B, N, C] in a grid (Y, X) -> [B, N, C']."""
    # The view has the strides of channels-last memory, in which oneDNN convolves without a copy.
    return conv(x.unflatten(1, grid).permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
