"""ImageBert of bytedance/1d-tokenizer: the MaskGIT-style generators of TiTok."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from genkit.backbones.bert import Bert
from genkit.errors import GenkitError, UsageError
from genkit.importers.names import Rules, count, fill, flat, shape

WHAT = "an ImageBert"
IGNORED = {
    r"model\.embeddings\.token_type_embeddings\.weight": "its first row is added to the positions, the second was never used",
    r"model\.embeddings\.position_ids": "the numbers 0, 1, 2, ...",
}
HEADS = {768: 16}  # width -> attention heads of the published sizes
WORDS, POSITIONS = "model.embeddings.word_embeddings.weight", "model.embeddings.position_embeddings.weight"


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> Bert:
    """State dict -> backbone in evaluation mode. Sizes are read from the weights.

    Args:
        config: of the original's options, flat or nested as in its files, `num_attention_heads` (by default that of the published size of this width),
            `dropout` (0.1) for fine-tuning, and `image_grid`, tokens per axis where they are not a row as TiTok's.

    Raises: GenkitError for weights that do not fit, naming the keys; UsageError where the number of heads has to be told.
    """
    options = flat(config or {})
    dim = shape(state, "model.embeddings.LayerNorm.weight", WHAT)[0]
    codebook_size = shape(state, "model.lm_head.weight", WHAT)[0]
    network = Bert(
        codebook_size=codebook_size,
        num_levels=1,
        num_classes=num_classes(state, WORDS, codebook_size, WHAT),
        grid=token_grid(shape(state, POSITIONS, WHAT)[0] - 1, options),
        dim=dim,
        depth=count(state, "model.encoder.layer.{}."),
        num_heads=num_heads(dim, options, HEADS),
        mlp_ratio=shape(state, "model.encoder.layer.0.intermediate.dense.weight", WHAT)[0] / dim,
        head="linear",
        dropout=float(options.get("dropout", 0.1)),
    )
    types = "model.embeddings.token_type_embeddings.weight"
    shape(state, types, WHAT)
    own = split_vocabulary(state, WORDS, codebook_size) | {POSITIONS: state[POSITIONS] + state[types][0]}
    fill(network, own, RULES, IGNORED, WHAT)
    return network.eval()


# Tokens per image -> noise, scale and schedule of guidance, steps, of the released generators of TiTok.
RELEASED: dict[int, tuple[float, float, str, int]] = {
    32: (9.5, 4.5, "linear", 8),
    64: (11.0, 3.0, "linear", 8),
    128: (2.8, 6.9, "power-cosine", 64),
}


def sampling(network: Any, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """How TiTok draws: ids from softmax(logits / u), the most confident by their logits with Gumbel noise of strength u, u falling from nearly `noise` to
    0; guidance that grows step by step.

    Its scale s is l + s (l - null), here 1 + s; with "power-cosine" it is null + s (l - null), as here.

    Args:
        config: of the original's options, `randomize_temperature`, `guidance_scale`, `guidance_decay` (constant, linear, power-cosine), `guidance_scale_pow`
            and `num_steps`; by default those of the released generator for so many tokens, of other lengths those of 32.

    Raises: UsageError for another schedule of guidance.
    """
    options, num_tokens = flat(config or {}), math.prod(network.config["grid"])
    noise, scale, schedule, num_steps = RELEASED.get(num_tokens, RELEASED[32])
    noise, scale = (
        float(options.get(name, usual)) for name, usual in (("randomize_temperature", noise), ("guidance_scale", scale))
    )
    schedule = options.get("guidance_decay", schedule)
    if schedule not in ("constant", "linear", "power-cosine"):
        raise UsageError(f"guidance_decay={schedule} of {WHAT} is not known, only constant, linear and power-cosine")
    num_steps = int(options.get("num_steps", min(num_steps, num_tokens)))
    cosine = schedule == "power-cosine"
    return {
        "objective": {"type": "masked", "schedule": "arccos"},
        "sampler": {
            "type": "masked",
            "num_steps": num_steps,
            "schedule": "arccos",
            "temperature": noise,
            "confidence": "logit",
            "softmax_temperature": noise * (1 - 1 / num_steps),
            "softmax_end": 0.0,
            "guidance": scale if cosine else 1 + scale,
            "guidance_schedule": "cosine" if cosine else schedule,
            "guidance_power": float(options.get("guidance_scale_pow", 3.0)) if cosine else 1.0,
            "guidance_over": "steps",
        },
    }


def num_heads(
    dim: int, options: Mapping[str, Any], published: Mapping[int, int], name: str = "num_attention_heads"
) -> int:
    """As the config says, or as in the published network of this width; weights alone do not tell."""
    if name in options:
        return int(options[name])
    if dim not in published:
        raise UsageError(f"no published network has a width of {dim}; give a --config with {name}")
    return published[dim]


def token_grid(num_tokens: int, options: Mapping[str, Any]) -> tuple[int, ...]:
    """As the config says, else a row. Raises UsageError where the config's has another number of tokens."""
    grid = options.get("image_grid", [num_tokens])
    if math.prod(grid) != num_tokens:
        raise UsageError(
            f"--config image_grid={list(grid)} has {math.prod(grid)} tokens, the weights have positions for {num_tokens}"
        )
    return tuple(grid)


def num_classes(state: Mapping[str, Tensor], key: str, codebook_size: int, what: str) -> int:
    """Of one vocabulary: ids, the mask, classes, the null class."""
    rows = shape(state, key, what)[0] - codebook_size - 2
    if rows < 0:
        raise GenkitError(f"these weights are not those of {what}: {key} has fewer rows than ids, mask and null class")
    return rows


def split_vocabulary(state: Mapping[str, Tensor], key: str, codebook_size: int) -> dict[str, Tensor]:
    """The state with the one table in two: ids and mask under "ids", classes and null class under "classes"."""
    table = state[key]
    others = {name: value for name, value in state.items() if name != key}
    return {**others, "ids": table[: codebook_size + 1], "classes": table[codebook_size + 1 :]}


_PARTS = {
    "mixer.proj": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "mlp.up": "intermediate.dense",
    "mlp.down": "output.dense",
    "norm2": "output.LayerNorm",
}
RULES: Rules = [
    (r"sequence\.embed\.table\.weight", "ids"),
    (r"sequence\.label\.table\.weight", "classes"),
    (r"sequence\.positions", POSITIONS),
    (r"sequence\.norm\.(\w+)", "model.embeddings.LayerNorm.{0}"),
    (
        r"blocks\.(\d+)\.mixer\.qkv\.(\w+)",
        lambda i, kind: tuple(
            f"model.encoder.layer.{i}.attention.self.{part}.{kind}" for part in ("query", "key", "value")
        ),
    ),
    (
        r"blocks\.(\d+)\.(mixer\.proj|norm1|mlp\.up|mlp\.down|norm2)\.(\w+)",
        lambda i, part, kind: f"model.encoder.layer.{i}.{_PARTS[part]}.{kind}",
    ),
    (r"to_logits\.linear\.(\w+)", "model.lm_head.{0}"),
]
