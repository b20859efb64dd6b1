"""Tensors in [-1, 1] <-> pictures on disk."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from genkit import files

if TYPE_CHECKING:
    from PIL import Image


def to_uint8(x: Tensor) -> Tensor:
    """[B, C, Y, X] in [-1, 1] -> [B, Y, X, C] uint8 on the CPU, rounded and clamped."""
    return (
        ((x.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().contiguous()
    )


def to_pil(x: Tensor) -> list[Image.Image]:
    """[B, C, Y, X] in [-1, 1], one or three channels -> PIL images of mode L or RGB."""
    from PIL import Image

    arrays = to_uint8(x).numpy()
    return [Image.fromarray(a[..., 0] if a.shape[-1] == 1 else a) for a in arrays]


def grid(x: Tensor, columns: int, row_names: Sequence[str] = (), scale: int | None = None) -> Image.Image:
    """Images side by side, row-major, with an optional name at the left of each row.

    Args:
        x: [B, C, Y, X] in [-1, 1].
        columns: images per row.
        row_names: one text per row.
        scale: nearest-neighbour enlargement; None enlarges small images so that a tile is at least 56 pixels high.
    """
    from PIL import Image, ImageDraw, ImageFont

    tiles = to_pil(x)
    height, width = x.shape[-2:]
    scale = scale or max(1, round(56 / height))
    height, width, gap = height * scale, width * scale, 2
    rows = -(-len(tiles) // columns)
    font = ImageFont.load_default(size=max(10, min(16, height // 4)))
    margin = max((int(font.getlength(name)) for name in row_names), default=-10) + 10
    sheet = Image.new(
        tiles[0].mode, (margin + columns * (width + gap) + gap, rows * (height + gap) + gap), color="white"
    )
    draw = ImageDraw.Draw(sheet)
    for row, name in enumerate(row_names[:rows]):
        draw.text((4, gap + row * (height + gap) + height / 2), name, fill="black", font=font, anchor="lm")
    for i, tile in enumerate(tiles):
        at = (margin + gap + (i % columns) * (width + gap), gap + (i // columns) * (height + gap))
        sheet.paste(tile.resize((width, height), Image.Resampling.NEAREST), at)
    return sheet


def write_png(path: Path, image: Image.Image) -> None:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    files.write_bytes(path, buffer.getvalue())
