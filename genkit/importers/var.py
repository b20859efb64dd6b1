"""The transformer of FoundationVision/VAR (var_d16 to d30, d36-s)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from genkit.backbones.var import VAR
from genkit.errors import GenkitError
from genkit.importers.names import Rules, count, fill, has, shape

WHAT = "a VAR transformer"
IGNORED = {
    r"lvl_1L": "numbers of the scales, which follow from their sizes",
    r"attn_bias_for_masking": "a mask, which follows from the sizes of the scales",
    r"blocks\.\d+\.attn\.zero_k_bias": "zeros",
}
_PATCH_SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)  # of the released weights at 256 pixels
_GATE, _SCALE, _SHIFT = (0, 1), (2, 3), (4, 5)  # of both branches, in the rows of the original


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> VAR:
    """State dict -> backbone in evaluation mode. Sizes are read from the weights.

    Args:
        config: of the original's options those that weights do not tell: `patch_nums` (default those of the released weights at 256 pixels),
            `num_heads` (by default one per 64 channels), `attn_l2_norm` (as the weights), `norm_eps` (1e-6), `drop_rate`, `drop_path_rate` (0.1 depth / 24).

    Raises: GenkitError for weights that do not fit, naming the keys.
    """
    options = config or {}
    patch_sizes = tuple(options.get("patch_nums", _PATCH_SIZES))
    length, dim = shape(state, "pos_1LC", WHAT)[1:]
    if sum(p * p for p in patch_sizes) != length:
        raise GenkitError(
            f"these weights are of {WHAT} of {length} tokens, but patch_nums={list(patch_sizes)} make {sum(p * p for p in patch_sizes)}"
        )
    depth = count(state, "blocks.{}.")
    is_shared = has(state, "shared_ada_lin.")
    network = VAR(
        channels=shape(state, "word_embed.weight", WHAT)[1],
        codebook_size=shape(state, "head.weight", WHAT)[0],
        num_classes=shape(state, "class_emb.weight", WHAT)[0] - 1,
        patch_sizes=patch_sizes,
        dim=dim,
        depth=depth,
        mixer={
            "type": "scale_attention",
            "num_heads": int(options.get("num_heads", max(1, dim // 64))),
            "cosine": "blocks.0.attn.scale_mul_1H11" in state,
        },
        mlp_ratio=shape(state, "blocks.0.ffn.fc1.weight", WHAT)[0] / dim,
        shared_modulation=is_shared,
        norm_eps=float(options.get("norm_eps", 1e-6)),
        dropout=float(options.get("drop_rate", 0.0)),
        drop_path=float(options.get("drop_path_rate", 0.1 * depth / 24)),
    )
    fill(network, _reordered(state), rules(is_shared), IGNORED, WHAT)
    return network.eval()


def sampling(network: Any, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """As the paper for its figures of FID: guidance that grows from 1 to 2.5 (their 1.5 counts from 0), 900 most likely ids, 96 % of the probability."""
    return {
        "objective": {"type": "next_scale"},
        "sampler": {
            "type": "autoregressive",
            "top_k": 900,
            "top_p": 0.96,
            "guidance": 2.5,
            "guidance_schedule": "linear",
        },
    }


def _reordered(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Vectors of the modulations as here: of each branch shift, scale, gate; of the head shift, scale."""
    order = [part[branch] for branch in (0, 1) for part in (_SHIFT, _SCALE, _GATE)]
    found = dict(state)
    for key, value in state.items():
        if key.startswith("head_nm.ada_lin.1."):
            scale, shift = value.chunk(2)
            found[key] = torch.cat([shift, scale])
        elif ".ada_lin.1." in key or key.startswith("shared_ada_lin.1."):
            found[key] = value.unflatten(0, (6, -1))[order].flatten(0, 1)
        elif key.endswith(".ada_gss"):
            found[key] = value.reshape(6, -1)[order].flatten()
        elif key.endswith(".scale_mul_1H11"):
            found[key] = value.reshape(-1, 1, 1)
    return found


def rules(is_shared: bool) -> Rules:
    """Where every weight comes from."""
    modulation: Rules = (
        [(r"shared\.(\w+)", "shared_ada_lin.1.{0}"), (r"blocks\.(\d+)\.modulation\.table", "blocks.{0}.ada_gss")]
        if is_shared
        else [(r"blocks\.(\d+)\.modulation\.(\w+)", "blocks.{0}.ada_lin.1.{1}")]
    )
    return [
        (r"embed\.(\w+)", "word_embed.{0}"),
        (r"label\.table\.weight", "class_emb.weight"),
        (r"start", "pos_start"),
        (r"position", "pos_1LC"),
        (r"level\.weight", "lvl_embed.weight"),
        *modulation,
        (r"blocks\.(\d+)\.mixer\.qkv\.weight", "blocks.{0}.attn.mat_qkv.weight"),
        (r"blocks\.(\d+)\.mixer\.(q|v)_bias", "blocks.{0}.attn.{1}_bias"),
        (r"blocks\.(\d+)\.mixer\.log_scale", "blocks.{0}.attn.scale_mul_1H11"),
        (r"blocks\.(\d+)\.mixer\.proj\.(\w+)", "blocks.{0}.attn.proj.{1}"),
        (r"blocks\.(\d+)\.mlp\.up\.(\w+)", "blocks.{0}.ffn.fc1.{1}"),
        (r"blocks\.(\d+)\.mlp\.down\.(\w+)", "blocks.{0}.ffn.fc2.{1}"),
        (r"head\.modulation\.(\w+)", "head_nm.ada_lin.1.{0}"),
        (r"head\.linear\.(\w+)", "head.{0}"),
    ]
