"""diffusers DiTTransformer2DModel: a folder with config.json and weights, or the weights with --config."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from genkit.backbones.dit import DiT
from genkit.errors import UsageError
from genkit.importers import dit
from genkit.importers.dit import has_sigma, laid_out
from genkit.importers.names import Rules, count, fill, shape, spread

WHAT = "a diffusers DiTTransformer2DModel"
COPIES = r"transformer_blocks\.(?!0\.)\d+\.norm1\.emb\..*"
IGNORED = {
    r"pos_embed(\.pos_embed)?": "the waves that positions are computed from",
    COPIES: "copies of the embeddings of time and class of the first block; where they differ, every block keeps its own",
}
_FIXED = {
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
}
_GELU: dict[str, Literal["tanh", "none"]] = {"gelu-approximate": "tanh", "gelu": "none"}


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> DiT:
    """State dict and config.json -> backbone in evaluation mode.

    It is not numerically DiT: its slowest time wave is exactly 1/10000 and the second norm of a block has an epsilon of its own. Every block has a
    copy of the embeddings of time and class; one is kept, unless they have become different.

    Raises: UsageError for a config that is missing or asks for what is not supported; GenkitError for weights that do not fit.
    """
    if config is None:
        raise UsageError(f"{WHAT} needs its config.json: beside the weights, or --config")
    for name, value in _FIXED.items():
        if config.get(name, value) != value:
            raise UsageError(f"{name}={config[name]} of {WHAT} is not supported, only {value}")
    act = config.get("activation_fn", "gelu-approximate")
    if act not in _GELU:
        raise UsageError(f"activation_fn={act} of {WHAT} is not supported, only {' and '.join(_GELU)}")
    first = "transformer_blocks.0.norm1.emb"
    dim, channels, side, *_ = shape(state, "pos_embed.proj.weight", WHAT)
    depth = count(state, "transformer_blocks.{}.")
    firsts = [key for key in state if key.startswith(f"{first}.")]
    others = [(key, key.replace(".0.", f".{i}.", 1)) for key in firsts for i in range(1, depth)]
    own = any(other in state and not torch.equal(state[key], state[other]) for key, other in others)
    network = DiT(
        channels=channels,
        num_classes=shape(state, f"{first}.class_embedder.embedding_table.weight", WHAT)[0] - 1,
        grid=(_option(config, "sample_size"),) * 2,
        dim=dim,
        depth=depth,
        patch_size=side,
        mixer={
            "type": "attention",
            "num_heads": _option(config, "num_attention_heads"),
            "qk_norm": False,
            "rope": False,
        },
        gelu=_GELU[act],
        mlp_ratio=shape(state, "transformer_blocks.0.ff.net.0.proj.weight", WHAT)[0] / dim,
        learn_sigma=has_sigma(state, "proj_out_2.weight", channels * side**2, WHAT),
        freq_shift=1,
        mlp_norm_eps=config.get("norm_eps", 1e-5),
        own_conditions=own,
    )
    if not config.get("attention_bias", True):
        state = {**_no_biases(depth, dim), **state}
    ignored = {pattern: why for pattern, why in IGNORED.items() if pattern != COPIES or not own}
    fill(network, laid_out(state, "pos_embed.proj.weight", "proj_out_2", side), _RULES, ignored, WHAT)
    return network.eval()


def export(network: Any, guided_null: int = 1000) -> Any:
    """The inverse of `convert`: backbone -> a diffusers DiTTransformer2DModel that computes the same.

    Args:
        guided_null: the row of the table of classes that DiTPipeline takes for "no class", whatever the model; rows between the classes and it are
            copies of that.

    Raises: UsageError for a network that theirs cannot be; it says what of it, and what to train instead.
    """
    from diffusers import DiTTransformer2DModel

    options, mixer = network.config, network.config["mixer"]
    side = network.sides[0]
    # Checked specs hold every option; where a network was made in Python, what is left out has the default of the mixer.
    plain = isinstance(mixer, Mapping) and mixer.get("type") == "attention" and not mixer.get("is_causal", False)
    plain = plain and not mixer.get("qk_norm", True) and not mixer.get("rope", True)
    needed = [
        ("mixer", mixer, "plain attention, {type: attention, qk_norm: false, rope: false}", plain),
        ("freq_shift", options["freq_shift"], "1: its waves of time are others", options["freq_shift"] == 1),
        ("time_scale", options["time_scale"], "1", options["time_scale"] == 1),
        ("gelu", options["gelu"], "tanh", options["gelu"] == "tanh"),
        ("positions", options["positions"], "sincos", options["positions"] == "sincos"),
        ("mlp_ratio", options["mlp_ratio"], "4", options["mlp_ratio"] == 4),
        ("patch_size", options["patch_size"], "the same along both axes", len(set(network.sides)) == 1 and len(network.sides) == 2),
        ("grid", tuple(options["grid"]), "square", len(set(options["grid"])) == 1),
        ("null_class", options["null_class"], "true", options["null_class"]),
        ("context_dim", network.told.width, "null", network.told.width is None),
        ("num_classes", options["num_classes"], f"1 .. {guided_null}", 0 < options["num_classes"] <= guided_null),
    ]  # fmt: skip
    for name, value, wanted, holds in needed:
        if not holds:
            raise UsageError(
                f"{WHAT} cannot hold this network: backbone.{name}={value}, and there it is always {wanted}. Any run is a diffusers pipeline as it is: "
                "--to pipeline"
            )
    heads = mixer.get("num_heads", 4)
    theirs: Any = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=options["dim"] // heads,
        in_channels=options["channels"],
        out_channels=network.out_channels,
        num_layers=options["depth"],
        sample_size=options["grid"][0],
        patch_size=side,
        num_embeds_ada_norm=guided_null,
        norm_eps=options["mlp_norm_eps"],
    )
    first = "transformer_blocks.0.norm1.emb."
    foreign = {
        key: value
        for key, value in theirs.state_dict().items()
        if not key.startswith("pos_embed.pos_embed") and (options["own_conditions"] or not re.fullmatch(COPIES, key))
    }
    tables = [key for key in foreign if key.endswith("class_embedder.embedding_table.weight")]
    rows = options["num_classes"] + 1
    found = spread(network, foreign | {key: foreign[key][:rows] for key in tables}, _RULES, WHAT)
    for key in tables:
        found[key] = torch.cat([found[key], found[key][-1:].expand(guided_null + 1 - rows, -1)])
    for kind in ("weight", "bias"):
        name = f"proj_out_2.{kind}"
        found[name] = found[name].unflatten(0, (-1, side**2)).transpose(0, 1).flatten(0, 1)
    if not options["own_conditions"]:
        for key in [key for key in found if key.startswith(first)]:
            found |= {key.replace(".0.", f".{i}.", 1): found[key] for i in range(1, options["depth"])}
    theirs.load_state_dict(found, strict=False)  # without the positions, which are computed
    return theirs.eval()


def sampling(network: DiT, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """As DiT, but for guidance, which is on all channels there."""
    found = dit.sampling(network)
    return {**found, "sampler": {**found["sampler"], "guidance_channels": None}}


def _option(config: Mapping[str, Any], name: str) -> int:
    if not isinstance(config.get(name), int):
        raise UsageError(f"the config of {WHAT} must say {name}, a whole number")
    return config[name]


def _no_biases(depth: int, dim: int) -> dict[str, Tensor]:
    """Biases of queries, keys and values that change nothing, by their keys."""
    return {key: torch.zeros(dim) for i in range(depth) for key in _qkv(str(i), "bias")}


def _qkv(i: str, kind: str) -> tuple[str, ...]:
    return tuple(f"transformer_blocks.{i}.attn1.to_{part}.{kind}" for part in "qkv")


_EMB = "transformer_blocks.{}.norm1.emb"
_RULES: Rules = [
    (r"embed\.(\w+)", "pos_embed.proj.{0}"),
    (
        r"conditions\.(\d+)\.time\.(up|down)\.(\w+)",
        lambda i, part, kind: f"{_EMB.format(i)}.timestep_embedder.linear_{1 if part == 'up' else 2}.{kind}",
    ),
    (r"conditions\.(\d+)\.label\.table\.weight", f"{_EMB.format('{0}')}.class_embedder.embedding_table.weight"),
    (r"blocks\.(\d+)\.mixer\.qkv\.(\w+)", _qkv),
    (r"blocks\.(\d+)\.mixer\.proj\.(\w+)", "transformer_blocks.{0}.attn1.to_out.0.{1}"),
    (r"blocks\.(\d+)\.mlp\.up\.(\w+)", "transformer_blocks.{0}.ff.net.0.proj.{1}"),
    (r"blocks\.(\d+)\.mlp\.down\.(\w+)", "transformer_blocks.{0}.ff.net.2.{1}"),
    (r"blocks\.(\d+)\.modulation\.(\w+)", "transformer_blocks.{0}.norm1.linear.{1}"),
    (r"head\.modulation\.(\w+)", "proj_out_1.{0}"),
    (r"head\.linear\.(\w+)", "proj_out_2.{0}"),
]
