"""DiMSUM of VinAIResearch/DiMSUM (the released models, of blocks that combine space and wavelets)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from genkit.backbones.dimsum import DiMSUM
from genkit.errors import UsageError
from genkit.importers.dit import has_null_class, has_sigma, laid_out, num_classes, square_side
from genkit.importers.names import Rules, count, fill, has, shape

WHAT = "a DiMSUM"
IGNORED = {
    r"blocks\.\d+\.(spatial|freq)_mamba\.mixer\.cond_proj\.\w+": "overwritten by the released kernel before it is read",
    r"blocks\.\d+\.freq_mamba\.i?dwt\.\w+": "the fixed filters of the wavelet",
}
_UNREACHED = {r"attn_block\..*": "a block that would come after more layers than there are"}
# Option of the original -> the only value that was released.
_FIXED = {
    "block_type": "combined",
    "scan_type": "none",
    "pe_type": "ape",
    "use_final_norm": False,
    "use_gated_mlp": True,
    "use_independent_attn": False,
    "is_moe": False,
    "scanning_continuity": False,
    "enable_fourier_layers": False,
    "rms_norm": True,
}


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> DiMSUM:
    """State dict -> backbone in evaluation mode. Sizes are read from the weights.

    Args:
        config: of the original's options, `use_attn_every_k_layers` (4) and `label_dropout` (0: no row for no class); all others must be those of the release.

    Raises: GenkitError for weights that do not fit, naming the keys; UsageError for an option that was never released.
    """
    options = config or {}
    for name, value in _FIXED.items():
        if options.get(name, value) != value:
            raise UsageError(f"{name}={options[name]} of {WHAT} is not supported, only {value}")
    dim, channels, side, *_ = shape(state, "x_embedder.proj.weight", WHAT)
    tokens = square_side(shape(state, "pos_embed", WHAT)[1], WHAT)
    depth = count(state, "blocks.{}.")
    shape(state, "blocks.0.spatial_mamba.mixer.in_proj.weight", WHAT)  # a DiT would be told apart by this
    every = int(options.get("use_attn_every_k_layers", 4)) if has(state, "attn_block.") else 0
    ignored = IGNORED if every <= depth else {**IGNORED, **_UNREACHED}
    dropped = {"class_dropout_prob": options.get("label_dropout", 0.1)}
    network = DiMSUM(
        channels=channels,
        num_classes=num_classes(state, "y_embedder.embedding_table.weight", dropped, WHAT),
        null_class=has_null_class(dropped),
        grid=(side * tokens,) * 2,
        dim=dim,
        depth=depth,
        patch_size=side,
        attention_every=every,
        mlp_ratio=shape(state, "blocks.0.mlp.w3.weight", WHAT)[1] / dim,
        learn_sigma=has_sigma(state, "final_layer.linear.weight", channels * side**2, WHAT),
    )
    fill(network, laid_out(state, "x_embedder.proj.weight", "final_layer.linear", side), _RULES, ignored, WHAT)
    return network.eval()


def sampling(network: DiMSUM, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The velocity towards data on the path of constant variance, by 249 calls of the model, all channels guided."""
    return {
        "objective": {"type": "flow", "path": "trigonometric", "towards": "data"},
        "sampler": {"type": "heun", "num_steps": 125, "guidance": 1.4},
    }


_BRANCH = {"spatial": "spatial_mamba", "frequency": "freq_mamba"}
_MLP = {"up": "w12", "down": "w3"}
_RULES: Rules = [
    (r"embed\.(\w+)", "x_embedder.proj.{0}"),
    (r"position\.table", "pos_embed"),
    (
        r"condition\.time\.(up|down)\.(\w+)",
        lambda part, kind: f"t_embedder.mlp.{0 if part == 'up' else 2}.{kind}",
    ),
    (r"condition\.label\.table\.weight", "y_embedder.embedding_table.weight"),
    (r"blocks\.(\d+)\.norm\.weight", "blocks.{0}.norm.weight"),
    (r"blocks\.(\d+)\.norm_mlp\.weight", "blocks.{0}.norm_2.weight"),
    (
        r"blocks\.(\d+)\.(spatial|frequency)\.mixer\.(in_proj|out_proj)\.weight",
        lambda i, branch, part: f"blocks.{i}.{_BRANCH[branch]}.mixer.{part}.weight",
    ),
    (
        r"blocks\.(\d+)\.(spatial|frequency)\.mixer\.scans\.0\.([\w.]+)",
        lambda i, branch, rest: f"blocks.{i}.{_BRANCH[branch]}.mixer.{rest}",
    ),
    (
        r"blocks\.(\d+)\.(spatial|frequency)\.modulation\.(\w+)",
        lambda i, branch, kind: f"blocks.{i}.{_BRANCH[branch]}.adaLN_modulation.1.{kind}",
    ),
    (r"blocks\.(\d+)\.fusion\.(\w+)\.(\w+)", "blocks.{0}.proj.{1}.{2}"),
    (r"blocks\.(\d+)\.mlp\.(up|down)\.(\w+)", lambda i, part, kind: f"blocks.{i}.mlp.{_MLP[part]}.{kind}"),
    (r"blocks\.(\d+)\.modulation\.(\w+)", "blocks.{0}.adaLN_modulation.1.{1}"),
    (r"shared\.mixer\.(qkv|proj)\.(\w+)", "attn_block.attn.{0}.{1}"),
    (r"shared\.mlp\.(up|down)\.(\w+)", lambda part, kind: f"attn_block.mlp.{_MLP[part]}.{kind}"),
    (r"shared\.modulation\.(\w+)", "attn_block.adaLN_modulation.1.{0}"),
    (r"head\.modulation\.(\w+)", "final_layer.adaLN_modulation.1.{0}"),
    (r"head\.linear\.(\w+)", "final_layer.linear.{0}"),
]
