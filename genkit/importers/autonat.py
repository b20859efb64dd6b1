"""The U-ViT of LeapLabTHU/ImprovedNAT (AutoNAT-S/L), which liebenxj/ReCAP reuses context in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from genkit.backbones.uvit import UViT
from genkit.importers.image_bert import num_heads
from genkit.importers.names import Rules, fill, flat, shape
from genkit.importers.uvit_bert import block_rules, even_depth

WHAT = "an AutoNAT generator"
IGNORED = {r"context_embed\.position_embeddings\.weight": "its one row is added to those of the classes"}
HEADS = {512: 8, 768: 8}  # width -> attention heads of the published sizes


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> UViT:
    """State dict -> backbone in evaluation mode. Sizes are read from the weights; the last class is the null class.

    Args:
        config: of the original's options, `num_heads` (by default that of the published size of this width) and `img_size`, tokens along each side (by
            default of a square), and `qk_scale` (by default one over the root of the width of a head), which queries are multiplied by here.

    Raises: GenkitError for weights that do not fit, naming the keys; UsageError where the number of heads has to be told.
    """
    from genkit.importers.dit import square_side

    options = flat(config or {})
    rows, dim = shape(state, "token_emb.word_embeddings.weight", WHAT)
    positions = shape(state, "token_emb.position_embeddings.weight", WHAT)[0]
    side = options.get("img_size") or square_side(positions, WHAT)
    depth = even_depth(state, WHAT)
    heads = num_heads(dim, options, HEADS, "num_heads")
    network = UViT(
        codebook_size=rows - 1,
        num_levels=1,
        num_classes=shape(state, "context_embed.word_embeddings.weight", WHAT)[0] - 1,
        grid=(side, positions // side),
        dim=dim,
        depth=depth,
        num_heads=heads,
        mlp_ratio=shape(state, "mid_block.mlp.fc1.weight", WHAT)[0] / dim,
        qkv_bias="mid_block.attn.qkv.bias" in state,
        has_skips="out_blocks.0.skip_linear.weight" in state,
    )
    if options.get("qk_scale"):
        state = _scaled(state, float(options["qk_scale"]) * math.sqrt(dim // heads))
    fill(network, laid_out(state), [*ENDS, *block_rules(depth // 2)], IGNORED, WHAT)
    return network.eval()


def _scaled(state: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    """The state with the rows that make queries times a factor."""
    found = dict(state)
    for key, value in state.items():
        if ".attn.qkv." in key:
            q, *others = value.chunk(3)
            found[key] = torch.cat([factor * q, *others])
    return found


def laid_out(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state with positions in one table behind the class token's 0 (its own is added to the classes), and a bias for ids alone."""
    found = dict(state)
    shape(state, "context_embed.position_embeddings.weight", WHAT)
    found["context_embed.word_embeddings.weight"] = (
        state["context_embed.word_embeddings.weight"] + state["context_embed.position_embeddings.weight"]
    )
    positions = state["token_emb.position_embeddings.weight"]
    found["token_emb.position_embeddings.weight"] = torch.cat([torch.zeros_like(positions[:1]), positions])
    shape(state, "mlm_layer.bias", WHAT)
    found["mlm_layer.bias"] = state["mlm_layer.bias"].flatten()[:-1]  # the last is the mask's, which is never drawn
    return found


def sampling(network: Any, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """ReCAP's setting of 32 steps without reuse, with the guidance it is released with: l + w (l - null), w = 0.05 growing to 0.1."""
    return {
        "objective": {"type": "masked", "schedule": "cosine", "cond_drop": 0.15},
        "sampler": {
            "type": "masked",
            "num_steps": 32,
            "schedule": "pow2.5",
            "temperature": 5.5,
            "softmax_temperature": 1.0,
            "softmax_end": 0.75,
            "softmax_power": 0.5,
            "guidance": 1.1,
            "guidance_schedule": "linear",
        },
    }


ENDS: Rules = [
    (r"sequence\.embed\.table\.weight", "token_emb.word_embeddings.weight"),
    (r"sequence\.positions", "token_emb.position_embeddings.weight"),
    (r"sequence\.norm\.(\w+)", "token_emb.LayerNorm.{0}"),
    (r"sequence\.label\.table\.weight", "context_embed.word_embeddings.weight"),
    (r"sequence\.label_norm\.(\w+)", "context_embed.LayerNorm.{0}"),
    (r"norm\.(\w+)", "norm.{0}"),
    (r"to_logits\.dense\.(\w+)", "mlm_layer.fc.{0}"),
    (r"to_logits\.norm\.(\w+)", "mlm_layer.ln.{0}"),
    (r"to_logits\.bias", "mlm_layer.bias"),
]
