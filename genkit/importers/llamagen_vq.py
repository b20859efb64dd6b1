"""Tokenizers of FoundationVision/LlamaGen (VQ-8, VQ-16)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from genkit.errors import UsageError
from genkit.importers import taming
from genkit.importers.names import fill, shape
from genkit.tokenizers.vqgan import VQGAN

WHAT = "a LlamaGen tokenizer"
IGNORED = {r"quantize\.codebook_used": "the last ids of training, kept to count how many codes are in use"}


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> VQGAN:
    """State dict -> tokenizer in evaluation mode. Every size is read from the weights.

    Args:
        config: `codebook_l2_norm` of the original's options: whether codes have length 1; true without a config, as in all that were released.

    Raises: GenkitError for weights that do not fit, naming the keys; UsageError for an option that is not supported.
    """
    options = config or {}
    if options.get("norm_type", "group") != "group":
        raise UsageError(f"norm_type={options['norm_type']}: only tokenizers with group norms can be imported")
    words = taming.Vocabulary(
        down="encoder.conv_blocks.{}",
        up="decoder.conv_blocks.{}",
        up_is_finest_first=False,
        block="res.{}",
        middle=("mid.0", "mid.1", "mid.2"),
    )
    found = taming.sizes(state, words, WHAT)
    codebook_size, channels = shape(state, "quantize.embedding.weight", WHAT)
    tokenizer = VQGAN(
        **found,
        channels=channels,
        neck=shape(state, "encoder.conv_out.weight", WHAT)[0],
        codebook_size=codebook_size,
        cosine=options.get("codebook_l2_norm", True),
    )
    fill(tokenizer, state, taming.rules(words, len(found["widths"])), IGNORED, WHAT)
    taming.set_codes(tokenizer)
    return tokenizer.eval()
