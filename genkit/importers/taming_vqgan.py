"""VQGAN of CompVis/taming-transformers and of latent diffusion (VQModel)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from genkit.errors import GenkitError, UsageError
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

    Args:
        config: of the original's options, flat or nested as in its files, its `ddconfig` is looked at for what cannot be imported.

    Raises: GenkitError for weights that do not fit, naming the keys; UsageError for an option that is not supported.
    """
    _check(_ddconfig(config or {}))
    if has(state, "quantize.embed.") and has(state, "quantize.proj."):
        raise GenkitError(
            "these are weights of a VQGAN with Gumbel quantisation, whose ids are no nearest codes; it cannot be imported"
        )
    words = taming.Vocabulary()
    found = taming.sizes(state, words, WHAT)
    codebook_size, channels = shape(state, "quantize.embedding.weight", WHAT)
    if has(state, "quantize.used"):
        raise GenkitError(
            "these are weights of a VQGAN whose ids are mapped to those in use (remap); it cannot be imported"
        )
    neck = shape(state, "encoder.conv_out.weight", WHAT)[0]
    tokenizer = VQGAN(**found, channels=channels, neck=neck, codebook_size=codebook_size)
    fill(tokenizer, state, taming.rules(words, len(found["widths"])), IGNORED, WHAT)
    taming.set_codes(tokenizer)
    return tokenizer.eval()


def _ddconfig(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The options of both networks, wherever they stand: in model.params of the original's files."""
    if isinstance(config.get("ddconfig"), Mapping):
        return config["ddconfig"]
    sections = (value for value in config.values() if isinstance(value, Mapping))
    return next((found for section in sections if (found := _ddconfig(section))), {})


def _check(options: Mapping[str, Any]) -> None:
    """UsageError for an option of both networks that weights alone would not tell, or not clearly."""
    for name, value in (("double_z", False), ("resamp_with_conv", True), ("give_pre_end", False)):
        if options.get(name, value) != value:
            raise UsageError(f"{name}={options[name]} of {WHAT} is not supported, only {value}")
    channels, out = (options.get(name, 3) for name in ("in_channels", "out_ch"))
    if channels != out:
        raise UsageError(f"in_channels={channels} beside out_ch={out} of {WHAT} is not supported, only equal numbers")
