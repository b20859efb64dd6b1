"""diffusers AutoencoderKL: a folder with config.json and weights, or the weights with --config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from genkit.errors import UsageError
from genkit.importers import taming
from genkit.importers.diffusers_vq import checked, set_scaling, vocabulary
from genkit.importers.names import fill, shape, spread
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


@torch.no_grad()
def export(tokenizer: Any) -> Any:
    """The inverse of `convert`: tokenizer -> a diffusers AutoencoderKL whose latents, times its scaling_factor of 1, are our z.

    The scaling of z, channel by channel, becomes part of the 1x1 convolutions beside it.

    Raises: UsageError for a tokenizer that theirs cannot be.
    """
    from diffusers import AutoencoderKL

    options = tokenizer.config
    levels, channels = range(len(options["widths"])), options["channels"]
    for name, allowed in (
        ("stem", (None, options["widths"][0])),
        ("decoder_attention", (None, options["attention"])),
        ("neck", (None, channels)),
    ):
        if options[name] not in allowed:
            raise UsageError(
                f"{WHAT} cannot hold this tokenizer: tokenizer.{name}={options[name]}, and there it is always {allowed[-1]}"
            )
    own = set(options["attention"])
    theirs: Any = AutoencoderKL(
        in_channels=options["image_channels"],
        out_channels=options["image_channels"],
        down_block_types=tuple(f"{'Attn' if i in own else ''}DownEncoderBlock2D" for i in levels),
        up_block_types=tuple(f"{'Attn' if i in own else ''}UpDecoderBlock2D" for i in reversed(levels)),
        block_out_channels=tuple(options["widths"]),
        layers_per_block=options["num_blocks"],
        latent_channels=channels,
        norm_num_groups=options["norm_groups"],
        mid_block_add_attention=options["mid_attention"],
        scaling_factor=1.0,
    )
    words = vocabulary({})
    foreign = dict(theirs.state_dict())
    beside = {key: foreign.pop(key) for key in list(foreign) if "quant_conv" in key} if options["neck"] is None else {}
    found = spread(tokenizer, foreign, taming.rules(words, len(levels)), WHAT)
    for key in beside:  # no such convolutions here: ones that change nothing
        found[key] = (
            torch.eye(len(beside[key])).view_as(beside[key])
            if key.endswith("weight")
            else torch.zeros_like(beside[key])
        )
    mean, std = tokenizer.latent_mean, tokenizer.latent_std
    # Decoding: W (std z + mean) + b. Encoding: (means - mean) / std; of logarithms of variances, -2 ln std.
    weight = found["post_quant_conv.weight"]
    found["post_quant_conv.bias"] = found["post_quant_conv.bias"] + weight.flatten(1) @ mean
    found["post_quant_conv.weight"] = weight * std.view(1, -1, 1, 1)
    scale = torch.cat([1 / std, torch.ones_like(std)])
    found["quant_conv.weight"] = found["quant_conv.weight"] * scale.view(-1, 1, 1, 1)
    found["quant_conv.bias"] = found["quant_conv.bias"] * scale - torch.cat([mean / std, 2 * std.log()])
    theirs.load_state_dict(found)
    return theirs.eval()
