"""The GPT of FoundationVision/LlamaGen that is told a class (GPT-B to 3B) or a text (GPT-XL)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from genkit.backbones.gpt import GPT, hidden_of
from genkit.errors import UsageError
from genkit.importers.dit import has_null_class, num_classes
from genkit.importers.names import Rules, count, fill, has, shape

WHAT = "a LlamaGen GPT"
MULTIPLE_OF = 256  # of the published networks' perceptrons; others have a width of their own
IGNORED = {
    r"layers\.\d+\.attention\.kv_cache\.\w+": "keys and values of an earlier sampling",
    r"freqs_cis": "rotations, which are computed from positions",
    r"causal_mask": "a mask, which is computed",
}
HEADS = {
    768: 12,
    1024: 16,
    1280: 20,
    1536: 24,
    2048: 32,
    2560: 40,
    3200: 32,
    4096: 32,
}  # width -> attention heads of the published sizes


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> GPT:
    """State dict -> backbone in evaluation mode. Sizes are read from the weights.

    Rows of queries and keys are put in another order: the original turns neighbouring channels as a pair, genkit.nn.rope the first and second half.

    Args:
        config: of the original's options, `n_head` (by default that of the published size of this width), `block_size` (ids per image, 256),
            `norm_eps` (1e-5), `rope_base` (10000), `class_dropout_prob` (0: no row for no class), `cls_token_num` (tokens of a text, 120), and of
            dropout those that fine-tuning needs: `token_dropout_p`, `resid_dropout_p`, `drop_path_rate`.

    Raises: GenkitError for weights that do not fit, naming the keys; UsageError where the number of heads has to be told.
    """
    options = config or {}
    reads = has(state, "cls_embedding.cap_proj.")
    if (kind := options.get("model_type")) not in (None, "t2i" if reads else "c2i"):
        raise UsageError(
            f"model_type={kind} of {WHAT}: these weights are told {'a text (t2i)' if reads else 'a class (c2i)'}"
        )
    if not reads and int(options.get("cls_token_num", 1)) != 1:
        raise UsageError(
            f"cls_token_num={options['cls_token_num']} of {WHAT} is not supported, only 1: a class is one token"
        )
    codebook_size, dim = shape(state, "tok_embeddings.weight", WHAT)
    num_heads = _num_heads(dim, options)
    head_dim = dim // num_heads
    rows = shape(state, "layers.0.attention.wqkv.weight", WHAT)[0]
    num_kv_heads = (rows // head_dim - num_heads) // 2
    block_size = int(options.get("block_size", 256))
    side = math.isqrt(block_size)
    if side**2 != block_size:
        raise UsageError(f"block_size={block_size} is no square grid")
    hidden = shape(state, "layers.0.feed_forward.w1.weight", WHAT)[0]
    told: dict[str, Any] = _of_text(state, options) if reads else _of_class(state, options)
    network = GPT(
        codebook_size=codebook_size,
        num_levels=1,
        grid=(side, side),
        dim=dim,
        depth=count(state, "layers.{}."),
        mixer={
            "type": "attention",
            "num_heads": num_heads,
            "num_kv_heads": None if num_kv_heads == num_heads else num_kv_heads,
            "qk_norm": False,
            "rope_base": float(options.get("rope_base", 10000.0)),
            "bias": False,
            "is_causal": True,
        },
        hidden=None if hidden_of(dim, MULTIPLE_OF) == hidden else hidden,
        multiple_of=MULTIPLE_OF,
        norm_eps=float(options.get("norm_eps", 1e-5)),
        token_dropout=float(options.get("token_dropout_p", 0.1)),
        dropout=float(options.get("resid_dropout_p", 0.1)),
        drop_path=float(options.get("drop_path_rate", 0.0)),
        **told,
    )
    own = _halved(state, num_heads, num_kv_heads, head_dim)
    if reads:
        own[NOTHING] = own[NOTHING][: told["context_length"]]
    fill(network, own, RULES, IGNORED, WHAT)
    return network.eval()


def _of_class(state: Mapping[str, Tensor], options: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_classes": num_classes(state, "cls_embedding.embedding_table.weight", options, WHAT),
        "null_class": has_null_class(options),
    }


def _of_text(state: Mapping[str, Tensor], options: Mapping[str, Any]) -> dict[str, Any]:
    rows, width = shape(state, NOTHING, WHAT)
    length = int(options.get("cls_token_num", rows))
    if not 1 <= length <= rows:
        raise UsageError(f"cls_token_num={length} of {WHAT} must be between 1 and the {rows} that the weights have")
    return {"num_classes": 0, "context": "concat", "context_dim": width, "context_length": length}


def sampling(network: Any, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """How the authors draw. Of a class, for the paper's figures of FID: everything may be drawn, guided by 2 (1.65 to 2 are best). Of a text, in their
    demonstration: guided by 7.5, from the 1,000 likeliest ids.

    Args:
        config: of the original's options, of a text, `t5_path` and `t5_model_type`: the folder of the text encoder and its name there.
    """
    options = config or {}
    if network.config["context"] == "concat":
        encoder = str(options.get("t5_model_type", "flan-t5-xl"))
        encoder = f"{options['t5_path']}/{encoder}" if "t5_path" in options else f"google/{encoder}"
        return {
            "objective": {"type": "next_token"},
            "sampler": {"type": "autoregressive", "guidance": 7.5, "top_k": min(1000, network.config["codebook_size"])},
            "condition": {"type": "captions", "encoder": encoder, "length": network.config["context_length"]},
        }
    return {
        "objective": {"type": "next_token"},
        "sampler": {"type": "autoregressive", "guidance": 2.0},
    }


def _num_heads(dim: int, options: Mapping[str, Any]) -> int:
    if "n_head" in options:
        num_heads = int(options["n_head"])
        if num_heads < 1 or dim % num_heads:
            raise UsageError(f"n_head={num_heads} does not divide the width {dim}")
        return num_heads
    if dim not in HEADS:
        raise UsageError(f"no published network has a width of {dim}; give a --config with n_head")
    return HEADS[dim]


def _halved(state: Mapping[str, Tensor], num_heads: int, num_kv_heads: int, head_dim: int) -> dict[str, Tensor]:
    """The state with even channels of every query and key before odd ones."""
    found = dict(state)
    turned = (num_heads + num_kv_heads) * head_dim
    for key in state:
        if key.endswith(".attention.wqkv.weight"):
            pairs = state[key][:turned].unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2)
            found[key] = state[key].clone()
            found[key][:turned] = pairs.flatten(0, 2)
    return found


NOTHING = "cls_embedding.uncond_embedding"
RULES: Rules = [
    (r"front\.up\.weight", "cls_embedding.cap_proj.fc1.weight"),
    (r"front\.down\.weight", "cls_embedding.cap_proj.fc2.weight"),
    (r"front\.nothing", NOTHING),
    (r"embed\.table\.weight", "tok_embeddings.weight"),
    (r"label\.table\.weight", "cls_embedding.embedding_table.weight"),
    (r"blocks\.(\d+)\.mix_norm\.weight", "layers.{0}.attention_norm.weight"),
    (r"blocks\.(\d+)\.mixer\.qkv\.weight", "layers.{0}.attention.wqkv.weight"),
    (r"blocks\.(\d+)\.mixer\.proj\.weight", "layers.{0}.attention.wo.weight"),
    (r"blocks\.(\d+)\.mlp_norm\.weight", "layers.{0}.ffn_norm.weight"),
    (r"blocks\.(\d+)\.mlp\.up\.weight", ("layers.{0}.feed_forward.w1.weight", "layers.{0}.feed_forward.w3.weight")),
    (r"blocks\.(\d+)\.mlp\.down\.weight", "layers.{0}.feed_forward.w2.weight"),
    (r"norm\.weight", "norm.weight"),
    (r"head\.weight", "output.weight"),
]
