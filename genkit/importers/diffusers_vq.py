"""diffusers VQModel: a folder with config.json and weights, or the weights with --config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from genkit.errors import UsageError
from genkit.importers import taming
from genkit.importers.names import fill, shape
from genkit.tokenizers.vqgan import VQGAN

WHAT = "a diffusers VQModel"
IGNORED: dict[str, str] = {}
SCALING = 0.18215  # what a config without scaling_factor means: diffusers' own default


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> VQGAN:
    """State dict and config.json -> tokenizer in evaluation mode; sizes are read from the weights. Their scaling_factor scales z.

    Raises: UsageError for a config that is missing or asks for what is not supported; GenkitError for weights that do not fit.
    """
    options = checked(config, WHAT)
    words = vocabulary(state)
    found = taming.sizes(state, words, WHAT)
    codebook_size, channels = shape(state, "quantize.embedding.weight", WHAT)
    tokenizer = VQGAN(
        **found,
        channels=channels,
        neck=shape(state, "encoder.conv_out.weight", WHAT)[0],
        codebook_size=codebook_size,
        norm_groups=options.get("norm_num_groups", 32),
    )
    fill(tokenizer, state, taming.rules(words, len(found["widths"])), IGNORED, WHAT)
    taming.set_codes(tokenizer)
    set_scaling(tokenizer, options)
    return tokenizer.eval()


def checked(config: Mapping[str, Any] | None, what: str) -> Mapping[str, Any]:
    """The config, if it describes networks that can be imported. Raises UsageError that names the option that does not."""
    if config is None:
        raise UsageError(f"the config of {what} is missing; give the folder that holds config.json, or --config FILE")
    for name, only in (("act_fn", "silu"), ("norm_type", "group")):
        if config.get(name, only) != only:
            raise UsageError(f"{name}={config[name]}: only {what} with {only} can be imported")
    known = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
    for name, block in known.items():
        for kind in config.get(name, ()):
            if kind not in (block, f"Attn{block}"):
                raise UsageError(f"{name} holds {kind}; only {block} and Attn{block} can be imported")
    return config


def vocabulary(state: Mapping[str, Tensor]) -> taming.Vocabulary:
    """Their words; attention was renamed in diffusers 0.15, and most published weights are older."""
    is_old = any(key.endswith(".proj_attn.weight") for key in state)
    return taming.Vocabulary(
        down="encoder.down_blocks.{}",
        up="decoder.up_blocks.{}",
        up_is_finest_first=False,
        block="resnets.{}",
        attention="attentions.{}",
        halve="downsamplers.0.conv",
        double="upsamplers.0.conv",
        middle=("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
        shortcut="conv_shortcut",
        norm="group_norm",
        qkv=("query", "key", "value") if is_old else ("to_q", "to_k", "to_v"),
        out="proj_attn" if is_old else "to_out.0",
        norm_out="conv_norm_out",
    )


def set_scaling(tokenizer: Any, options: Mapping[str, Any]) -> None:
    """Their z is (latent - mean) / std * scaling_factor; mean is also called shift_factor."""
    channels = tokenizer.channels
    mean = options.get("latents_mean") or options.get("shift_factor") or 0.0
    std = options.get("latents_std") or 1.0
    mean, std = (torch.as_tensor(value, dtype=torch.float32).expand(channels) for value in (mean, std))
    tokenizer.set_latent_stats(mean, std / options.get("scaling_factor", SCALING))
