"""DiT of facebookresearch/DiT (DiT-XL/2 at 256 and 512 pixels, and what its trainer saves)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from genkit.backbones.dit import DiT
from genkit.errors import GenkitError, UsageError
from genkit.importers.names import Rules, count, fill, shape
from genkit.nn.grid_positions import grid_waves

WHAT = "a DiT"
WAVES = {r"pos_embed": "the waves that positions are computed from"}
IGNORED = WAVES
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # width -> attention heads of the published sizes


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> DiT:
    """State dict -> backbone in evaluation mode. Sizes are read from the weights; positions that are not the usual waves become a table.

    Args:
        config: of the original's options, `num_heads` (by default that of the published size of this width) and `class_dropout_prob` (0: the table of
            classes has no row for "none", and the network wants a label for every sample).

    Raises: GenkitError for weights that do not fit, naming the keys; UsageError where the number of heads has to be told.
    """
    options = config or {}
    dim, channels, side, *_ = shape(state, "x_embedder.proj.weight", WHAT)
    side_of_grid = square_side(shape(state, "pos_embed", WHAT)[1], WHAT)
    waves = grid_waves((side_of_grid, side_of_grid), dim)
    is_waves = state["pos_embed"].shape == waves.shape and torch.allclose(state["pos_embed"].float(), waves, atol=1e-4)
    network = DiT(
        channels=channels,
        num_classes=num_classes(state, "y_embedder.embedding_table.weight", options, WHAT),
        null_class=has_null_class(options),
        grid=(side * side_of_grid,) * 2,
        dim=dim,
        depth=count(state, "blocks.{}."),
        patch_size=side,
        mixer={"type": "attention", "num_heads": num_heads(dim, options), "qk_norm": False, "rope": False},
        mlp_ratio=shape(state, "blocks.0.mlp.fc1.weight", WHAT)[0] / dim,
        positions="sincos" if is_waves else "table",
        learn_sigma=has_sigma(state, "final_layer.linear.weight", channels * side**2, WHAT),
    )
    fill(
        network,
        laid_out(state, "x_embedder.proj.weight", "final_layer.linear", side),
        RULES,
        WAVES if is_waves else {},
        WHAT,
    )
    return network.eval()


def sampling(network: Any, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """How the paper draws images: DDPM in 250 steps, with variances where there are some, three channels guided."""
    variance = "learned" if network.config["learn_sigma"] else "small"
    return {
        "objective": {"type": "diffusion"},
        "sampler": {
            "type": "ancestral",
            "num_steps": 250,
            "variance": variance,
            "guidance": 1.5,
            "guidance_channels": 3,
        },
    }


def square_side(count: int, what: str) -> int:
    """Of a square of `count` places."""
    side = math.isqrt(count)
    if side**2 != count:
        raise GenkitError(f"these weights are not those of {what}: {count} positions are no square")
    return side


def num_heads(dim: int, config: Mapping[str, Any]) -> int:
    """As the config says, or as in the published network of this width; weights alone do not tell."""
    if "num_heads" in config:
        return int(config["num_heads"])
    if dim not in HEADS:
        raise UsageError(f"no published network has a width of {dim}; give a --config with num_heads")
    return HEADS[dim]


def has_null_class(config: Mapping[str, Any]) -> bool:
    """Whether labels were dropped in training: then the last row of the table of classes stands for none."""
    return float(config.get("class_dropout_prob", 0.1)) > 0


def num_classes(state: Mapping[str, Tensor], key: str, config: Mapping[str, Any], what: str) -> int:
    """Of a table of classes, the row for none left out."""
    return shape(state, key, what)[0] - int(has_null_class(config))


def has_sigma(state: Mapping[str, Tensor], key: str, cells: int, what: str) -> bool:
    """Whether the head gives two numbers per cell. Raises GenkitError when neither one nor two."""
    rows = shape(state, key, what)[0]
    if rows not in (cells, 2 * cells):
        raise GenkitError(
            f"these weights are not those of {what}: {key} has {rows} rows, expected {cells} or {2 * cells}"
        )
    return rows == 2 * cells


def laid_out(state: Mapping[str, Tensor], patch: str, head: str, side: int) -> dict[str, Tensor]:
    """The state with patches as here: the convolution as a matrix, and the channel slowest in the rows of the head, where theirs is fastest."""
    found = dict(state)
    found[patch] = found[patch].flatten(1)
    for kind in ("weight", "bias"):
        if (name := f"{head}.{kind}") in found:
            found[name] = found[name].unflatten(0, (side**2, -1)).transpose(0, 1).flatten(0, 1)
    return found


RULES: Rules = [
    (r"embed\.(\w+)", "x_embedder.proj.{0}"),
    (r"position\.table", "pos_embed"),
    (r"conditions\.0\.time\.(up|down)\.(\w+)", lambda part, kind: f"t_embedder.mlp.{0 if part == 'up' else 2}.{kind}"),
    (r"conditions\.0\.label\.table\.weight", "y_embedder.embedding_table.weight"),
    (r"blocks\.(\d+)\.mixer\.(qkv|proj)\.(\w+)", "blocks.{0}.attn.{1}.{2}"),
    (
        r"blocks\.(\d+)\.mlp\.(up|down)\.(\w+)",
        lambda i, part, kind: f"blocks.{i}.mlp.{'fc1' if part == 'up' else 'fc2'}.{kind}",
    ),
    (r"blocks\.(\d+)\.modulation\.(\w+)", "blocks.{0}.adaLN_modulation.1.{1}"),
    (r"head\.modulation\.(\w+)", "final_layer.adaLN_modulation.1.{0}"),
    (r"head\.linear\.(\w+)", "final_layer.linear.{0}"),
]
