"""KL autoencoder of CompVis/latent-diffusion (AutoencoderKL), also MAR's KL-16."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from genkit.importers import taming
from genkit.importers.names import fill, shape
from genkit.importers.taming_vqgan import IGNORED
from genkit.tokenizers.klgan import KLGAN

WHAT = "a KL autoencoder of latent diffusion"


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> KLGAN:
    """State dict -> tokenizer in evaluation mode. Every size is read from the weights; z is left unscaled.

    Raises: GenkitError for weights that do not fit, naming the keys.
    """
    words = taming.Vocabulary()
    found = taming.sizes(state, words, WHAT)
    found.pop("decoder_widths")  # there the decoder always mirrors the encoder; a difference is told by `fill`
    neck, channels = shape(state, "post_quant_conv.weight", WHAT)[:2]
    tokenizer = KLGAN(**found, channels=channels, neck=neck)
    fill(tokenizer, state, taming.rules(words, len(found["widths"])), IGNORED, WHAT)
    return tokenizer.eval()
