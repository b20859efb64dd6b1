"""VQGAN of CompVis/taming-transformers and of latent diffusion (VQModel)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from genkit.errors import GenkitError
from genkit.importers import taming
from genkit.importers.names import fill, has, shape
from genkit.tokenizers.vqgan import VQGAN

WHAT = "a taming VQGAN"
IGNORED = {
    r"loss\..*": "discriminator and perceptual network, which serve training alone",
    r"model_ema\..*": "moving averages kept beside the weights under other names",
    r"colorize": "draws segmentation maps for people to see",
}


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> VQGAN:
    """State dict -> tokenizer in evaluation mode. Every size is read from the weights; the config is not needed.

    Raises: GenkitError for weights that do not fit, naming the keys.
    """
    if has(state, "quantize.embed.") and has(state, "quantize.proj."):
        raise GenkitError(
            "these are weights of a VQGAN with Gumbel quantisation, whose ids are no nearest codes; it cannot be imported"
        )
    words = taming.Vocabulary()
    found = taming.sizes(state, words, WHAT)
    codebook_size, channels = shape(state, "quantize.embedding.weight", WHAT)
    neck = shape(state, "encoder.conv_out.weight", WHAT)[0]
    tokenizer = VQGAN(**found, channels=channels, neck=neck, codebook_size=codebook_size)
    fill(tokenizer, state, taming.rules(words, len(found["widths"])), IGNORED, WHAT)
    taming.set_codes(tokenizer)
    return tokenizer.eval()
