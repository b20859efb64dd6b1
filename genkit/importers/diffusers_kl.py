"""diffusers AutoencoderKL: a folder with config.json and weights, or the weights with --config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from genkit.importers import taming
from genkit.importers.diffusers_vq import checked, set_scaling, vocabulary
from genkit.importers.names import fill, shape
from genkit.tokenizers.klgan import KLGAN

WHAT = "a diffusers AutoencoderKL"
IGNORED: dict[str, str] = {}


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> KLGAN:
    """State dict and config.json -> tokenizer in evaluation mode; sizes are read from the weights.

    Their scaling_factor, shift_factor, latents_mean and latents_std become the scaling of z: it is what their diffusion models see.

    Raises: UsageError for a config that is missing or asks for what is not supported; GenkitError for weights that do not fit.
    """
    options = checked(config, WHAT)
    words = vocabulary(state)
    found = taming.sizes(state, words, WHAT)
    found.pop("decoder_widths")  # there the decoder always mirrors the encoder; a difference is told by `fill`
    channels = shape(state, "decoder.conv_in.weight", WHAT)[1]
    tokenizer = KLGAN(
        **found,
        channels=channels,
        neck=channels if "quant_conv.weight" in state else None,
        norm_groups=options.get("norm_num_groups", 32),
    )
    fill(tokenizer, state, taming.rules(words, len(found["widths"])), IGNORED, WHAT)
    set_scaling(tokenizer, options)
    return tokenizer.eval()
