"""UViTBert of bytedance/1d-tokenizer: TiTok's larger generators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from genkit.backbones.uvit import UViT
from genkit.errors import GenkitError
from genkit.importers import image_bert
from genkit.importers.image_bert import num_classes, num_heads, split_vocabulary, token_grid
from genkit.importers.names import Rules, count, fill, flat, shape

WHAT = "a UViTBert"
HEADS = {1024: 16}  # width -> attention heads of the published sizes


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> UViT:
    """As importers.image_bert.

    Raises: GenkitError for weights that do not fit, naming the keys; UsageError where the number of heads has to be told.
    """
    options = flat(config or {})
    _, positions, dim = shape(state, "pos_embed", WHAT)
    codebook_size = shape(state, "lm_head.weight", WHAT)[0]
    network = UViT(
        codebook_size=codebook_size,
        num_levels=1,
        num_classes=num_classes(state, "embeddings.weight", codebook_size, WHAT),
        grid=token_grid(positions - 1, options),
        dim=dim,
        depth=even_depth(state, WHAT),
        num_heads=num_heads(dim, options, HEADS),
        mlp_ratio=shape(state, "mid_block.mlp.fc1.weight", WHAT)[0] / dim,
        head="linear",
        embed_norm="none",
    )
    half = network.config["depth"] // 2
    own = split_vocabulary(state, "embeddings.weight", codebook_size)
    fill(network, own, [*ENDS, *block_rules(half)], {}, WHAT)
    return network.eval()


def sampling(network: Any, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """As ImageBert."""
    return image_bert.sampling(network, config)


def even_depth(state: Mapping[str, Tensor], what: str) -> int:
    """Blocks in both halves. Raises GenkitError where they differ."""
    before, behind = count(state, "in_blocks.{}."), count(state, "out_blocks.{}.")
    if before != behind:
        raise GenkitError(
            f"these weights are not those of {what}: {before} blocks before the middle and {behind} behind it"
        )
    return before + behind


def block_rules(half: int) -> Rules:
    """Blocks of the original: in_blocks, mid_block, out_blocks; here in one row."""

    def place(i: str) -> str:
        n = int(i)
        return f"in_blocks.{n}" if n < half else "mid_block" if n == half else f"out_blocks.{n - half - 1}"

    names = {
        "mixer.qkv": "attn.qkv",
        "mixer.proj": "attn.proj",
        "mlp.up": "mlp.fc1",
        "mlp.down": "mlp.fc2",
        "skip": "skip_linear",
    }
    return [
        (
            r"blocks\.(\d+)\.(mixer\.qkv|mixer\.proj|mlp\.up|mlp\.down|skip|norm1|norm2)\.(\w+)",
            lambda i, part, kind: f"{place(i)}.{names.get(part, part)}.{kind}",
        )
    ]


ENDS: Rules = [
    (r"sequence\.embed\.table\.weight", "ids"),
    (r"sequence\.label\.table\.weight", "classes"),
    (r"sequence\.positions", "pos_embed"),
    (r"norm\.(\w+)", "norm.{0}"),
    (r"to_logits\.linear\.(\w+)", "lm_head.{0}"),
]
