"""MaskGIT's VQGAN as ported by bytedance/1d-tokenizer (maskgit-vqgan-imagenet-f16-256)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from genkit.importers import taming
from genkit.importers.names import count, fill, shape
from genkit.tokenizers.maskgit_vqgan import MaskgitVQGAN

WHAT = "a MaskGIT VQGAN"
IGNORED: dict[str, str] = {}


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> MaskgitVQGAN:
    """State dict -> tokenizer in evaluation mode. Every size is read from the weights; the config is not needed.

    The original takes and gives images in [0, 1]; here they are in [-1, 1] as everywhere.

    Raises: GenkitError for weights that do not fit, naming the keys.
    """
    levels = max(1, count(state, "encoder.down.{}.block."))
    stem, image_channels, *_ = shape(state, "encoder.conv_in.weight", WHAT)
    widths = [shape(state, f"encoder.down.{i}.block.0.conv1.weight", WHAT)[0] for i in range(levels)]
    codebook_size, channels = shape(state, "quantize.embedding.weight", WHAT)
    tokenizer = MaskgitVQGAN(
        image_channels=image_channels,
        widths=widths,
        num_blocks=max(count(state, "encoder.mid.{}."), count(state, "encoder.down.0.block.{}.")),
        channels=channels,
        codebook_size=codebook_size,
        stem=None if stem == widths[0] else stem,
    )
    fill(tokenizer, state, _rules(levels), IGNORED, WHAT)
    taming.set_codes(tokenizer)
    return tokenizer.eval()


def _rules(levels: int) -> list[Any]:
    """Theirs number the decoder's levels from the finest, ours from the coarsest; the way up to a finer grid belongs to the level before."""

    def block(net: str, level: str, i: str, part: str, kind: str) -> str:
        number = f"down.{level}" if net == "encoder" else f"up.{levels - 1 - int(level)}"
        return f"{net}.{number}.block.{i}.{'nin_shortcut' if part == 'shortcut' else part}.{kind}"

    return [
        (r"(encoder|decoder)\.levels\.(\d+)\.(\d+)\.(\w+)\.(\w+)", block),
        (r"decoder\.doubles\.(\d+)\.(\w+)", lambda i, kind: f"decoder.up.{levels - 1 - int(i)}.upsample_conv.{kind}"),
        (r"(encoder|decoder)\.middle\.(\d+)\.(\w+)\.(\w+)", "{0}.mid.{1}.{2}.{3}"),
        (r"(encoder|decoder)\.(conv_in|norm_out|conv_out)\.(\w+)", "{0}.{1}.{2}"),
        *taming.CODEBOOK,
        (r"latent_(mean|std)", None),
    ]
