"""DQ-VAE of CrossmodalGroup/DynamicVectorQuantization: two or three grains, entropy or feature router."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from genkit.errors import GenkitError, UsageError
from genkit.importers import taming
from genkit.importers.names import Rules, count, fill, flat, has, shape
from genkit.tokenizers.dqvae import DQVAE

WHAT = "a DQ-VAE"
IGNORED = {
    r"loss\..*": "discriminator and perceptual network, which serve training alone",
    r"decoder\.position_bias\.(row|col)_embed\.weight": "learned positions of a kind that the original makes and never adds",
}
_GRAINS = {2: ("coarse", "fine"), 3: ("coarse", "median", "fine")}
# Share of fine regions -> entropy in nats that this share of ImageNet's 16-pixel patches exceeds, as shipped with the original.
_THRESHOLDS = {0.1: 2.8719, 0.25: 2.4626, 0.5: 1.6778, 0.75: 0.0107}
_RATIO = ("fine_grain_ratio", "fine_grain_ratito")  # the original's spelling


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> DQVAE:
    """State dict -> tokenizer in evaluation mode. Sizes are read from the weights.

    Args:
        config: of the original's options, flat or nested as in its files, those that weights do not tell: `threshold` of the entropy router, in nats
            (default the shipped one for `fine_grain_ratito`, 0.5); `normalization_type` ("group-32") and `gate_type` ("2layer-fc-SiLu") of the feature
            router; `latent_size`, the side of the fine grid, where the weights hold no table of positions (32).

    Raises: GenkitError for weights that do not fit, naming the keys; UsageError for an option that is not supported.
    """
    options = flat(config or {})
    for name, value in (("resamp_with_conv", True), ("give_pre_end", False)):
        if options.get(name, value) != value:
            raise UsageError(f"{name}={options[name]} of {WHAT} is not supported, only {value}")
    num_grains = 3 if has(state, "encoder.mid_median.") else 2
    names = _GRAINS[num_grains]
    levels = max(1, count(state, "encoder.down.{}.block."))
    up = max(1, count(state, "decoder.up.{}.block."))
    block = ".block.0.conv1.weight"
    stem, image_channels, *_ = shape(state, "encoder.conv_in.weight", WHAT)
    widths = [shape(state, f"encoder.down.{i}{block}", WHAT)[0] for i in range(levels)]
    if up != levels - num_grains + 1:
        raise GenkitError(
            f"these weights are of {WHAT} with {levels} levels down and {up} up, which {num_grains} grains do not join"
        )
    channels, inner, *_ = shape(state, "quant_conv.weight", WHAT)
    stride = 2 ** (up - 1)
    waves = "decoder.position_bias_fourier" if has(state, "decoder.position_bias_fourier.") else "decoder.position_bias"
    has_waves, has_tables = has(state, f"{waves}.lff."), has(state, "decoder.position_bias_learned.")
    side = (
        shape(state, "decoder.position_bias_learned.row_embed.weight", WHAT)[0]
        if has_tables
        else int(options.get("latent_size", 32))
    )
    tokenizer = DQVAE(
        image_channels=image_channels,
        image_size=side * stride,
        stride=stride,
        num_grains=num_grains,
        num_blocks=count(state, "encoder.down.0.block.{}."),
        widths=widths,
        stem=None if stem == widths[0] else stem,
        attention=[i for i in range(levels) if has(state, f"encoder.down.{i}.attn.")],
        decoder_widths=[shape(state, f"decoder.up.{i}{block}", WHAT)[0] for i in range(up)],
        decoder_attention=[i for i in range(up) if has(state, f"decoder.up.{i}.attn.")],
        feature_channels=inner,
        channels=channels,
        codebook_size=shape(state, "quantize.codebook.weight", WHAT)[0] - 1,  # the last row pads and is never chosen
        positions={(True, True): "waves+tables", (True, False): "waves", (False, True): "tables"}.get(
            (has_waves, has_tables), "none"
        ),
        **_router(state, options, num_grains),
    )
    table = dict(state)
    if "quantize.codebook.weight" in table:
        table["quantize.codebook.weight"] = table["quantize.codebook.weight"][:-1]
    fill(tokenizer, table, rules(up, names, waves, "encoder.router.gate.0.weight" in state), IGNORED, WHAT)
    tokenizer.quantizer.codebook.initialised.fill_(True)
    return tokenizer.eval()


def _router(state: Mapping[str, Tensor], options: Mapping[str, Any], num_grains: int) -> dict[str, Any]:
    """The router's options: from its weights where it has any, else it goes by entropy."""
    if not has(state, "encoder.router."):
        ratio = next((options[name] for name in _RATIO if name in options), 0.5)
        threshold = options.get("threshold", _THRESHOLDS.get(ratio))
        if threshold is None:
            raise UsageError(f"the original ships no threshold for a fine ratio of {ratio}; give `threshold` in nats")
        return {"router": "entropy", "thresholds": [threshold]}
    is_normed = has(state, "encoder.router.feature_norm_fine.")
    stated = [value for value in options.values() if isinstance(value, str) and re.fullmatch(r"group-\d+", value)]
    kind = str(options.get("normalization_type", stated[0] if stated else "group-32" if is_normed else "none"))
    groups = int(kind.split("-")[-1]) if kind.startswith("group") else 0
    if bool(groups) != is_normed:
        raise UsageError(
            f"normalization_type={kind}, but the weights of the router {'have' if is_normed else 'lack'} a norm"
        )
    return {
        "router": "feature",
        "router_groups": groups,
        "router_is_deep": "encoder.router.gate.0.weight" in state,
        "router_activation": "relu" if options.get("gate_type") == "2layer-fc-ReLu" else "silu",
        "targets": [1 / num_grains] * (num_grains - 1),
    }


def rules(up: int, names: tuple[str, ...], waves: str, router_is_deep: bool) -> Rules:
    """The encoder's levels and the whole decoder are taming's; its ways out and the router are not."""
    parts = {"0": "block_1", "1": "attn_1", "2": "block_2"}

    def middle(end: str, i: str, part: str, kind: str) -> str | tuple[str, ...]:
        place = f"encoder.mid_{names[int(end)]}.{parts[i]}"
        if part == "qkv":
            return tuple(f"{place}.{name}.{kind}" for name in "qkv")
        return f"{place}.{'proj_out' if part == 'out' else part}.{kind}"

    def gate(layer: str, kind: str) -> str:
        return f"encoder.router.gate.{layer}.{kind}" if router_is_deep else f"encoder.router.gate.{kind}"

    return [
        (r"encoder\.halves\.(\d+)\.(\w+)", "encoder.down.{0}.downsample.conv.{1}"),
        (r"encoder\.ends\.(\d+)\.0\.(\d)\.(\w+)\.(\w+)", middle),
        (r"encoder\.ends\.(\d+)\.1\.(\w+)", lambda end, kind: f"encoder.norm_out_{names[int(end)]}.{kind}"),
        (r"encoder\.ends\.(\d+)\.3\.(\w+)", lambda end, kind: f"encoder.conv_out_{names[int(end)]}.{kind}"),
        (r"choose\.norms\.(\d+)\.(\w+)", lambda end, kind: f"encoder.router.feature_norm_{names[int(end)]}.{kind}"),
        (r"choose\.gate\.(\d+)\.(\w+)", gate),
        (r"place\.waves\.(\w+)", waves + ".lff.ffm.conv.{0}"),
        (r"place\.rows", "decoder.position_bias_learned.row_embed.weight"),
        (r"place\.columns", "decoder.position_bias_learned.col_embed.weight"),
        (r"enter\.(\w+)", "quant_conv.{0}"),
        (r"leave\.(\w+)", "post_quant_conv.{0}"),
        (r"quantizer\.codebook\.embed", "quantize.codebook.weight"),
        (r"quantizer\.codebook\.embed_sum", "quantize.codebook.embed_ema"),
        (r"quantizer\.codebook\.cluster_size", "quantize.codebook.cluster_size_ema"),
        (r"quantizer\.codebook\..*", None),
        *taming.rules(taming.Vocabulary(), up),
    ]
