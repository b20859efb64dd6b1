"""FiT and FiTv2 of whlzy/FiT: which of the two is read from the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from genkit.backbones.fit import FiT
from genkit.errors import UsageError
from genkit.importers import dit, sit
from genkit.importers.dit import has_sigma, num_classes
from genkit.importers.names import Rules, count, fill, has, shape
from genkit.nn.extrapolation import Method

WHAT = "a FiT"
IGNORED: dict[str, str] = {}
_HEADS = {768: 12, 1152: 16, 2304: 24}
_ROPE: dict[str, Method] = {
    "normal": "plain",
    "linear": "interpolate",
    "ntk-aware": "ntk",
    "ntk-aware-pro2": "ntk",
    "ntk-by-parts": "ntk_by_parts",
    "yarn": "yarn",
}


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> FiT:
    """State dict -> backbone in evaluation mode. Sizes are read from the weights.

    The original turns adjacent channels of a head; here those half a head apart turn, and the rows of queries and keys are put in that order.

    Args:
        config: of the original's options, `num_heads` (by default that of the published size of this width), `patch_size` (2), `in_channels` (4),
            `context_size` (tokens of a training image, 256), `class_dropout_prob`, and of rotary positions `custom_freqs`, `decouple` and
            `ori_max_pe_len`.

    Raises: GenkitError for weights that do not fit, naming the keys; UsageError for an option that is not supported.
    """
    options = config or {}
    rope = options.get("custom_freqs", "normal").lower()
    if rope not in _ROPE:
        raise UsageError(f"custom_freqs={rope} of {WHAT} is not supported; supported: {', '.join(_ROPE)}")
    if options.get("qk_norm_weight") or options.get("add_rel_pe_to_v"):
        raise UsageError(f"qk_norm_weight and add_rel_pe_to_v of {WHAT} are not supported")
    dim, width = shape(state, "x_embedder.proj.weight", WHAT)
    side = int(options.get("patch_size", 2))
    channels = int(options.get("in_channels", width // side**2))
    heads = int(options.get("num_heads", _HEADS.get(dim, 0)))
    if heads < 1 or dim % heads:
        raise UsageError(
            f"no published {WHAT[2:]} has a width of {dim} and {heads} heads; give a --config with num_heads"
        )
    is_second = has(state, "global_adaLN_modulation.")
    length = max(1, int(options.get("context_size", 256) ** 0.5))
    network = FiT(
        channels=channels,
        num_classes=num_classes(
            state, "y_embedder.embedding_table.weight", options.get("class_dropout_prob", 0.1), WHAT
        ),
        grid=(side * length,) * 2,
        dim=dim,
        depth=count(state, "blocks.{}."),
        num_heads=heads,
        patch_size=side,
        mlp_dim=shape(state, "blocks.0.mlp.fc2.weight", WHAT)[1],
        shared_adaln=is_second,
        adaln_rank=shape(state, "blocks.0.adaLN_modulation.1.weight", WHAT)[0] if is_second else None,
        qk_norm=options.get("q_norm", "layernorm" if is_second else None) is not None,
        rope=_ROPE[rope],
        rope_per_axis=bool(options.get("decouple", False)),
        rope_gain="release" if rope == "ntk-aware-pro2" else "none",
        rope_trained=options.get("ori_max_pe_len"),
        learn_sigma=has_sigma(state, "final_layer.linear.weight", width, WHAT),
    )
    fill(network, _half_apart(state, heads), _RULES, IGNORED, WHAT)
    return network.eval()


def sampling(network: FiT) -> dict[str, Any]:
    """FiT as DiT, FiTv2 as SiT, with times drawn around the middle of the path."""
    if network.config["learn_sigma"]:
        return dit.sampling(network)
    found = sit.sampling(network)
    return {**found, "objective": {**found["objective"], "time": "logit_normal"}}


def _half_apart(state: Mapping[str, Tensor], num_heads: int) -> dict[str, Tensor]:
    """The state with the rows of queries and keys such that pairs (2 j, 2 j + 1) of a head become (j, j + K / 2)."""
    found = dict(state)
    for key, value in state.items():
        if ".attn.qkv." in key:
            q, k, v = value.chunk(3)
            turned = [y.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2) for y in (q, k)]
            found[key] = v.new_empty(value.shape)
            for part, rows in zip(found[key].chunk(3), (*turned, v), strict=True):
                part.copy_(rows)
    return found


_TIME = {"up": "0", "down": "2"}
_RULES: Rules = [
    (r"embed\.(\w+)", "x_embedder.proj.{0}"),
    (r"condition\.time\.(up|down)\.(\w+)", lambda part, kind: f"t_embedder.mlp.{_TIME[part]}.{kind}"),
    (r"condition\.label\.table\.weight", "y_embedder.embedding_table.weight"),
    (r"modulation\.(\w+)", "global_adaLN_modulation.1.{0}"),
    (r"blocks\.(\d+)\.mixer\.(qkv|proj)\.(\w+)", "blocks.{0}.attn.{1}.{2}"),
    (r"blocks\.(\d+)\.mlp\.up\.(\w+)", ("blocks.{0}.mlp.fc1_g.{1}", "blocks.{0}.mlp.fc1_x.{1}")),
    (r"blocks\.(\d+)\.mlp\.down\.(\w+)", "blocks.{0}.mlp.fc2.{1}"),
    (
        r"blocks\.(\d+)\.modulation\.([01])\.(\w+)",
        lambda i, part, kind: f"blocks.{i}.adaLN_modulation.{int(part) + 1}.{kind}",
    ),
    (r"blocks\.(\d+)\.modulation\.(\w+)", "blocks.{0}.adaLN_modulation.1.{1}"),
    (r"head\.modulation\.(\w+)", "final_layer.adaLN_modulation.1.{0}"),
    (r"head\.linear\.(\w+)", "final_layer.linear.{0}"),
]
