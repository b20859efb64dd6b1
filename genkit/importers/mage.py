"""MAGE of LTH14/mage (MAGE-B/L; the tokenizer in the same file is imported by itself)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from genkit.backbones.mage import MAGE
from genkit.errors import GenkitError
from genkit.importers.dit import square_side
from genkit.importers.image_bert import num_heads
from genkit.importers.names import Rules, count, fill, flat, shape

WHAT = "a MAGE"
IGNORED = {
    r"vqgan\..*": "the tokenizer, a VQGAN of its own",
    r"(cls_token|mask_token|pos_embed|decoder_pos_embed|patch_embed\..*|decoder_pred\..*)": "made and never used",
    r"token_emb\.position_ids": "the numbers 0, 1, 2, ...",
}
HEADS = {768: 12, 1024: 16}  # width -> attention heads of the published sizes, of the encoder
DECODER_HEADS = {512: 16, 768: 16, 1024: 16}
CLASS_ROWS = 1000  # rows of the vocabulary between the ids and the mask; one of them stands for no class
NO_CLASS = 1100 - 1024


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> MAGE:
    """State dict -> backbone in evaluation mode. Sizes are read from the weights; tokens form a square.

    Args:
        config: of the original's options, `num_heads` and `decoder_num_heads` (by default those of the published size of this width).

    Raises: GenkitError for weights that do not fit, naming the keys; UsageError where a number of heads has to be told.
    """
    options = flat(config or {})
    words, dim = shape(state, "token_emb.word_embeddings.weight", WHAT)
    codebook_size = words - CLASS_ROWS - 1
    if codebook_size < 1:
        raise GenkitError(
            f"these weights are not those of {WHAT}: a vocabulary of {words} has no room for {CLASS_ROWS} classes and a mask"
        )
    out_dim = shape(state, "decoder_embed.weight", WHAT)[0]
    side = square_side(shape(state, "decoder_pos_embed_learned", WHAT)[1] - 1, WHAT)
    network = MAGE(
        codebook_size=codebook_size,
        num_levels=1,
        num_classes=0,
        grid=(side, side),
        dim=dim,
        depth=count(state, "blocks.{}."),
        num_heads=num_heads(dim, options, HEADS, "num_heads"),
        decoder_dim=out_dim,
        decoder_depth=count(state, "decoder_blocks.{}."),
        decoder_heads=num_heads(out_dim, options, DECODER_HEADS, "decoder_num_heads"),
        mlp_ratio=shape(state, "blocks.0.mlp.fc1.weight", WHAT)[0] / dim,
    )
    fill(network, laid_out(state, codebook_size), RULES, IGNORED, WHAT)
    return network.eval()


def laid_out(state: Mapping[str, Tensor], codebook_size: int) -> dict[str, Tensor]:
    """The state with the rows of the vocabulary that are used: ids and mask, and that of no class; and the biases of ids."""
    found = dict(state)
    words = found.pop("token_emb.word_embeddings.weight")
    row = codebook_size + NO_CLASS
    shape(state, "mlm_layer.bias", WHAT)
    return {
        **found,
        "ids": torch.cat([words[:codebook_size], words[-1:]]),
        "no class": words[row : row + 1],
        "mlm_layer.bias": state["mlm_layer.bias"].flatten()[:codebook_size],
    }


def sampling(network: Any, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """20 steps, as the paper's images are drawn."""
    return {
        "objective": {
            "type": "masked",
            "schedule": "normal",
            "mean": 0.55,
            "std": 0.25,
            "min_masked": 0.5,
            "dropped": 0.5,
        },
        "sampler": {"type": "masked", "num_steps": 20, "temperature": 6.0},
    }


def _block(half: str, i: str, part: str, kind: str) -> str:
    names = {"mixer.qkv": "attn.qkv", "mixer.proj": "attn.proj", "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"}
    return f"{'blocks' if half == 'encoder' else 'decoder_blocks'}.{i}.{names.get(part, part)}.{kind}"


RULES: Rules = [
    (r"sequence\.embed\.table\.weight", "ids"),
    (r"sequence\.label\.table\.weight", "no class"),
    (r"sequence\.positions", "token_emb.position_embeddings.weight"),
    (r"sequence\.norm\.(\w+)", "token_emb.LayerNorm.{0}"),
    (r"(encoder|decoder)\.(\d+)\.(mixer\.qkv|mixer\.proj|mlp\.up|mlp\.down|norm1|norm2)\.(\w+)", _block),
    (r"encoder_norm\.(\w+)", "norm.{0}"),
    (r"decoder_norm\.(\w+)", "decoder_norm.{0}"),
    (r"project\.(\w+)", "decoder_embed.{0}"),
    (r"decoder_positions", "decoder_pos_embed_learned"),
    (r"to_logits\.dense\.(\w+)", "mlm_layer.fc.{0}"),
    (r"to_logits\.norm\.(\w+)", "mlm_layer.ln.{0}"),
    (r"to_logits\.bias", "mlm_layer.bias"),
]
