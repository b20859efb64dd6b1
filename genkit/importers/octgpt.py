"""OctGPT of octree-nn/octgpt (ShapeNet, Objaverse with text, rooms), and what its trainer saves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from genkit.backbones.octgpt import OctGPT
from genkit.errors import UsageError
from genkit.importers.names import Rules, count, fill, flat, has, shape

WHAT = "an OctGPT"
IGNORED: dict[str, str] = {r"vqvae\..*": "the tokenizer's, which is imported by itself"}
# Their code counts positions for these depths, whatever depth the codes are at.
FULL_DEPTH, MAX_DEPTH = 3, 6
CODE_DEPTH = 6
# Published sizes: (width, whether it has more than one class) -> window, dilation.
WINDOWS = {(768, False): (2048, 2), (768, True): (1024, 16), (1152, False): (1024, 8)}
STEPS = (64, 128, 128, 256)
TEMPERATURES = (1.0, 1.2, 0.5, 0.5)

_BLOCK = r"(encoder|decoder)\.blocks\.(\d+)\."
_THEIRS = "{0}.layers.blocks.{1}."
RULES: Rules = (
    (r"split\.weight", "split_emb.weight"),
    (r"label\.weight", "class_emb.weight"),
    (r"code\.(.+)", "vq_proj.{0}"),
    (r"mask", "mask_token"),
    (r"context_norm\.(.+)", "ln_cond.{0}"),
    (r"context_proj\.(.+)", "cond_proj.{0}"),
    (r"split_head\.(.+)", "split_head.{0}"),
    (r"code_head\.(.+)", "vq_head.{0}"),
    (r"(encoder|decoder)\.norm\.(.+)", "{0}_ln.{1}"),
    (_BLOCK + r"positions\.table", _THEIRS + "pos_emb.absolute_emb"),
    (_BLOCK + r"positions\.depth\.weight", _THEIRS + "pos_emb.depth_emb.weight"),
    (_BLOCK + r"rotary\.freqs", _THEIRS + "attention.rope.freqs"),
    (_BLOCK + r"(qkv|proj)\.(.+)", _THEIRS + "attention.{2}.{3}"),
    (_BLOCK + r"mlp\.0\.(.+)", _THEIRS + "mlp.fc1.{2}"),
    (_BLOCK + r"mlp\.3\.(.+)", _THEIRS + "mlp.fc2.{2}"),
    (_BLOCK + r"cross\.(.+)", _THEIRS + "cross_attn.{2}"),
    (_BLOCK + r"(norm1|norm2|cross_norm)\.(.+)", _THEIRS + "{2}.{3}"),
)


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> OctGPT:
    """State dict -> backbone in evaluation mode. Sizes are read from the weights.

    Args:
        config: of the original's options, by their names, flat or nested as in its files: patch_size, dilation and num_heads (by default those of the published model of this width, 8
            heads), buffer_size (64), use_swin (true), depth_low (3), depth_high or depth_stop, the depth of the codes (6), drop_rate (0.1), condition_type ("none" leaves classes there are unread). Windows run on
            through a batch, as theirs do, where is_aligned is false; by default they begin anew with every sample, which is the same for one shape.

    Raises: GenkitError for weights that do not fit, naming the keys; UsageError where the size of the windows has to be told.
    """
    options = flat(config or {})
    dim, bits = shape(state, "vq_proj.weight", WHAT)
    rows = shape(state, "class_emb.weight", WHAT)[0]
    block = "encoder.layers.blocks.0."
    context_dim = shape(state, "cond_proj.weight", WHAT)[1] if has(state, "cond_proj.") else None
    has_classes = rows > 1 and context_dim is None and options.get("condition_type") != "none"
    window, dilation = WINDOWS.get((dim, rows > 1), (None, None))
    window, dilation = options.get("patch_size", window), options.get("dilation", dilation)
    if window is None or dilation is None:
        raise UsageError(
            f"no published OctGPT has width {dim} and {rows} classes; give patch_size and dilation with --config"
        )
    full_depth = options.get("depth_low", FULL_DEPTH)
    table = f"{block}pos_emb.absolute_emb"
    network = OctGPT(
        bits=bits,
        full_depth=full_depth,
        code_depth=options.get("depth_high", options.get("depth_stop", CODE_DEPTH)),
        max_depth=shape(state, table, WHAT)[0].bit_length() - 2 if table in state else MAX_DEPTH,
        num_scales=shape(state, f"{block}pos_emb.depth_emb.weight", WHAT)[0],
        num_classes=rows if has_classes else 0,
        dim=dim,
        depth=2 * count(state, "encoder.layers.blocks.{}."),
        num_heads=options.get("num_heads", 8),
        window=window,
        dilation=dilation,
        buffer=options.get("buffer_size", 64),
        norm="layer" if has(state, f"{block}norm1.bias") else "rms",
        positions="table" if table in state else "waves",
        dropout=options.get("drop_rate", 0.1),
        has_shift=options.get("use_swin", True),
        has_null=False,
        is_aligned=options.get("is_aligned", True),
        context_dim=context_dim,
        context="cross" if has(state, f"{block}cross_attn.") else "concat",
    )
    if not has_classes:  # theirs reads the first row where there are no classes, and none beside a text or an image
        state = {**state, "class_emb.weight": state["class_emb.weight"][:1]}
    fill(network, state, RULES, IGNORED, WHAT)
    return network.eval()


def sampling(network: OctGPT, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """How its authors draw: steps and temperatures per depth, no guidance.

    Args:
        config: of the original's options, `num_iters` and `start_temperature` (one number, or one per depth) and `remask_stage`; by default those of its
            files, the last of them where there are fewer depths.
    """
    options = flat(config or {})
    depths = network.code_depth - network.full_depth + 1
    # Never more than there can be tokens.
    steps = [min(most, 8 ** (network.full_depth + i)) for i, most in enumerate(STEPS[-depths:])]

    def of_depths(name: str, usual: Sequence[float]) -> Any:
        found = options.get(name, list(usual))
        return found[-depths:] if isinstance(found, list) else found

    return {
        "objective": {"type": "octree_masked"},
        "sampler": {
            "type": "octree_masked",
            "num_steps": of_depths("num_iters", steps),
            "temperature": of_depths("start_temperature", TEMPERATURES),
            "remask_from": float(options.get("remask_stage", 0.7)),
            "guidance": 1.0,
        },
    }
