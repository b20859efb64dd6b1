"""FiT and FiTv2 of whlzy/FiT: which of the two is read from the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from genkit.backbones.fit import FiT
from genkit.errors import UsageError
from genkit.importers import dit, sit
from genkit.importers.dit import has_null_class, has_sigma, num_classes
from genkit.importers.names import Rules, count, fill, has, shape
from genkit.nn.extrapolation import Gain, Method
from genkit.nn.norm import Norm

WHAT = "a FiT"
IGNORED: dict[str, str] = {}
_HEADS = {768: 12, 1152: 16, 2304: 24}
_ROPE: dict[str, Method] = {
    "normal": "plain",
    "linear": "interpolate",
    "ntk-aware": "ntk",
    "ntk-aware-pro1": "ntk",
    "ntk-aware-pro2": "ntk",
    "ntk-by-parts": "ntk_by_parts",
    "yarn": "yarn",
}
_GAIN: dict[str, Gain] = {"ntk-aware-pro1": "release_longest", "ntk-aware-pro2": "release"}
_NORMS: dict[str, Norm] = {
    "": "none",
    "none": "none",
    "layernorm": "layer",
    "w_layernorm": "scaled_layer",
    "rmsnorm": "rms",
    "w_rmsnorm": "scaled_rms",
}


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> FiT:
    """State dict -> backbone in evaluation mode. Sizes are read from the weights.

    The original turns adjacent channels of a head; here those half a head apart turn, and the rows of queries and keys are put in that order.

    Args:
        config: of the original's options, `num_heads` (by default that of the published size of this width), `patch_size` (2), `in_channels` (4),
            `context_size` (tokens of a training image, 256), `class_dropout_prob`, `norm_type`, `q_norm`, `k_norm`, `qk_norm_weight`, `time_shifting`, and of
            rotary positions `rel_pos_embed`, `add_rel_pe_to_v`, `rope_theta`, `custom_freqs`, `decouple`, `ori_max_pe_len`, `online_rope`, `max_pe_len_h` and `max_pe_len_w`.

    Raises: GenkitError for weights that do not fit, naming the keys; UsageError for an option that is not supported.
    """
    options = config or {}
    dim, width = shape(state, "x_embedder.proj.weight", WHAT)
    side = int(options.get("patch_size", 2))
    channels = int(options.get("in_channels", width // side**2))
    heads = int(options.get("num_heads", _HEADS.get(dim, 0)))
    if heads < 1 or dim % heads:
        raise UsageError(
            f"no published {WHAT[2:]} has a width of {dim} and {heads} heads; give a --config with num_heads"
        )
    is_second = has(state, "global_adaLN_modulation.")
    is_gated = has(state, "blocks.0.mlp.fc1_g.")
    adaln = "swiglu" if has(state, "blocks.0.adaLN_modulation.fc1_g.") else "linear"
    length = max(1, int(options.get("context_size", 256) ** 0.5))
    network = FiT(
        channels=channels,
        num_classes=num_classes(state, "y_embedder.embedding_table.weight", options, WHAT),
        grid=(side * length,) * 2,
        dim=dim,
        depth=count(state, "blocks.{}."),
        num_heads=heads,
        patch_size=side,
        mlp_dim=shape(state, "blocks.0.mlp.fc2.weight", WHAT)[1],
        shared_adaln=is_second,
        adaln_rank=shape(state, "blocks.0.adaLN_modulation.1.weight", WHAT)[0] if is_second else None,
        **_qk_norms(options, is_second),
        norm=_norm(options, "norm_type", "layernorm"),
        mlp="swiglu" if is_gated else "gelu",
        adaln=adaln,
        qkv_bias=any(key.endswith(".attn.qkv.bias") for key in state),
        mlp_bias=any(key.startswith("blocks.") and ".mlp." in key and key.endswith(".bias") for key in state),
        time_shift=float(options.get("time_shifting", 1)),
        null_class=has_null_class(options),
        **_rotations(options),
        learn_sigma=has_sigma(state, "final_layer.linear.weight", width, WHAT),
    )
    fill(
        network,
        _half_apart(state, heads, network.config["rope_values"]),
        [*(_GATED if is_gated else _PLAIN), *_RULES],
        IGNORED,
        WHAT,
    )
    return network.eval()


def sampling(network: FiT, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """FiT as DiT, FiTv2 as SiT, with times drawn around the middle of the path."""
    if network.config["learn_sigma"]:
        return dit.sampling(network)
    found = sit.sampling(network)
    return {**found, "objective": {**found["objective"], "time": "logit_normal"}}


def _norm(options: Mapping[str, Any], name: str, default: str) -> Norm:
    """The norm that an option of theirs names."""
    found = str(options.get(name, default) or "").lower()
    if found not in _NORMS:
        raise UsageError(f"{name}={found} of {WHAT} is not supported; supported: {', '.join(filter(None, _NORMS))}")
    return _NORMS[found]


def _qk_norms(options: Mapping[str, Any], is_second: bool) -> dict[str, Norm]:
    """Those of queries and keys, by default of the published model."""
    default = "layernorm" if is_second and "adaln_type" not in options else ""  # theirs is none where a config is whole
    found = {"qk_norm": _norm(options, "q_norm", default), "k_norm": _norm(options, "k_norm", default)}
    if options.get("qk_norm_weight"):
        return {name: "scaled_layer" if norm == "layer" else norm for name, norm in found.items()}
    return found


def _rotations(options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the backbone that say how queries and keys are turned."""
    word = str(options.get("custom_freqs", "normal")).lower()
    if word not in _ROPE:
        raise UsageError(f"custom_freqs={word} of {WHAT} is not supported; supported: {', '.join(_ROPE)}")
    is_turned = str(options.get("rel_pos_embed", "rope")).lower() in ("rope", "xpos")  # theirs are the same
    lengths = tuple(options.get(f"max_pe_len_{axis}") for axis in "hw")
    is_fixed = word != "normal" and not options.get("online_rope") and None not in lengths
    return {
        "rope": _ROPE[word] if is_turned else "none",
        "rope_base": float(options.get("rope_theta", 10_000.0)),
        "rope_per_axis": bool(options.get("decouple", False)),
        "rope_gain": _GAIN.get(word, "none"),
        "rope_values": is_turned and bool(options.get("add_rel_pe_to_v")),
        "rope_trained": options.get("ori_max_pe_len"),
        "rope_lengths": lengths if is_fixed else None,
    }


def _half_apart(state: Mapping[str, Tensor], num_heads: int, turns_values: bool) -> dict[str, Tensor]:
    """The state with the rows of queries and keys, and of values that are turned, such that pairs (2 j, 2 j + 1) of a head become (j, j + K / 2)."""
    found = dict(state)
    for key, value in state.items():
        if ".attn.qkv." in key:
            parts = value.chunk(3)
            turned = [y.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2) for y in parts]
            found[key] = torch.cat([*turned[:2], turned[2] if turns_values else parts[2]])
        if turns_values and key.endswith(".attn.proj.weight"):
            found[key] = value.unflatten(1, (num_heads, -1, 2)).transpose(2, 3).flatten(1)
        if ".attn.q_norm." in key or ".attn.k_norm." in key:
            found[key] = value.unflatten(0, (-1, 2)).T.flatten()
    return found


def _place(ours: str) -> str:
    return "final_layer" if ours == "head" else ours


def _gates(ours: str, kind: str) -> tuple[str, ...]:
    return tuple(f"{_place(ours)}.adaLN_modulation.fc1_{part}.{kind}" for part in "gx")


_GATED: Rules = [(r"blocks\.(\d+)\.mlp\.up\.(\w+)", ("blocks.{0}.mlp.fc1_g.{1}", "blocks.{0}.mlp.fc1_x.{1}"))]
_PLAIN: Rules = [(r"blocks\.(\d+)\.mlp\.up\.(\w+)", "blocks.{0}.mlp.fc1.{1}")]
_TIME = {"up": "0", "down": "2"}
_RULES: Rules = [
    (r"embed\.(\w+)", "x_embedder.proj.{0}"),
    (r"condition\.time\.(up|down)\.(\w+)", lambda part, kind: f"t_embedder.mlp.{_TIME[part]}.{kind}"),
    (r"condition\.label\.table\.weight", "y_embedder.embedding_table.weight"),
    (r"modulation\.(\w+)", "global_adaLN_modulation.1.{0}"),
    (r"blocks\.(\d+)\.mixer\.(qkv|proj)\.(\w+)", "blocks.{0}.attn.{1}.{2}"),
    (r"blocks\.(\d+)\.mixer\.([qk])_norm\.weight", "blocks.{0}.attn.{1}_norm.weight"),
    (r"blocks\.(\d+)\.norms\.([01])\.weight", lambda i, part: f"blocks.{i}.norm{int(part) + 1}.weight"),
    (r"blocks\.(\d+)\.mlp\.down\.(\w+)", "blocks.{0}.mlp.fc2.{1}"),
    (
        r"blocks\.(\d+)\.modulation\.([01])\.(\w+)",
        lambda i, part, kind: f"blocks.{i}.adaLN_modulation.{int(part) + 1}.{kind}",
    ),
    (r"blocks\.(\d+)\.modulation\.(\w+)", "blocks.{0}.adaLN_modulation.1.{1}"),
    (r"(blocks\.\d+|head)\.modulation\.up\.(\w+)", lambda at, kind: _gates(at, kind)),
    (r"(blocks\.\d+|head)\.modulation\.down\.(\w+)", lambda at, kind: f"{_place(at)}.adaLN_modulation.fc2.{kind}"),
    (r"head\.norm\.weight", "final_layer.norm_final.weight"),
    (r"head\.modulation\.(\w+)", "final_layer.adaLN_modulation.1.{0}"),
    (r"head\.linear\.(\w+)", "final_layer.linear.{0}"),
]
