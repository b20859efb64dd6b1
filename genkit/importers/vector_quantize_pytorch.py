"""A quantiser of lucidrains/vector-quantize-pytorch, its state dict alone -> a tokenizer without networks.

Which class a state is of, and its sizes, are read from the weights; what they do not show is told by the config, its constructor's arguments by
name and, if wanted, `class`. The options are those of vector_quantize_pytorch_tables.py and vector_quantize_pytorch_fixed.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from genkit import optional
from genkit.errors import GenkitError, UsageError, nearest
from genkit.importers.vector_quantize_pytorch_fixed import (
    import_fsq,
    import_grouped_residual_fsq,
    import_grouped_residual_lfq,
    import_lfq,
    import_residual_fsq,
    import_residual_lfq,
)
from genkit.importers.vector_quantize_pytorch_tables import (
    Imported,
    import_grouped_residual_vq,
    import_residual_vq,
    import_vector_quantize,
)
from genkit.tokenizers.bare import KINDS, Bare, word_of

IGNORED = {
    r"(.*\.)?mask": "the values of the bits, which the number of them says",
}
SIZE = 16  # vectors per side that a check draws
Weights = Mapping[str, Tensor]
Options = Mapping[str, Any]

CLASSES: dict[str, Callable[[Options, Weights], Imported]] = {
    "VectorQuantize": import_vector_quantize,
    "ResidualVQ": import_residual_vq,
    "GroupedResidualVQ": import_grouped_residual_vq,
    "FSQ": import_fsq,
    "ResidualFSQ": import_residual_fsq,
    "GroupedResidualFSQ": import_grouped_residual_fsq,
    "LFQ": import_lfq,
    "ResidualLFQ": import_residual_lfq,
    "GroupedResidualLFQ": import_grouped_residual_lfq,
}


def convert(state: Weights, config: Options | None = None) -> Bare:
    """State dict -> tokenizer in evaluation mode. Ids of a place are level by level, group (or head) by group within.

    Args:
        config: arguments of the original's constructor that its weights do not show, such as use_cosine_sim, spherical, or the levels of an FSQ.

    Raises: UsageError for options that are unknown, not supported, or missing; GenkitError for weights that do not fit them, naming the keys.
    """
    word, options = told(state, config)
    imported = CLASSES[word](options, state)
    quantizer, made_with = imported.quantizer, imported.made_with
    fresh = type(quantizer)(**made_with)  # a layer of another form than its own was made by the importer
    layers = {
        name: word_of(getattr(quantizer, name), _form(getattr(quantizer, name)) == _form(getattr(fresh, name)))
        for name in ("project_in", "project_out")
    }
    tokenizer = Bare(
        image_channels=made_with["dim"],
        kind=next(kind for kind, cls in KINDS.items() if cls is type(quantizer)),
        options={name: value for name, value in made_with.items() if name != "dim"},
        **layers,
    )
    tokenizer.quantizer.load_state_dict(quantizer.state_dict())
    return tokenizer.eval()


def told(state: Weights, config: Options | None) -> tuple[str, dict[str, Any]]:
    """(class, its constructor's arguments): the config's, and what the weights show."""
    options = dict(config or {})
    word = str(options.pop("class", None) or _class_of(state, options))
    if word not in CLASSES:
        raise UsageError(f"class: {word} of vector-quantize-pytorch is not known; {nearest(word, list(CLASSES))}")
    shown = _of_tables(state, options) if word.endswith(("VectorQuantize", "VQ")) else _of_fixed(state, word)
    return word, shown | options


def compare(state: Weights, config: Options | None, tokenizer: Bare) -> dict[str, Any]:
    """The tokenizer beside the original, where that is installed, on drawn vectors.

    Returns: peer, its name and version; same_ids, a share; largest_difference of codes. Raises GenkitError where they differ.
    """
    name = "vector_quantize_pytorch"
    if not optional.is_installed(name):
        return {"peer": "vector-quantize-pytorch is not installed; the original was not asked"}
    word, options = told(state, config)
    original = getattr(optional.require(name), word)(**options)
    original.load_state_dict(dict(state))
    x = torch.randn(4, SIZE**2, tokenizer.channels, generator=torch.Generator().manual_seed(0))
    for switch in ("accept_image_fmap", "accept_3d_fmap", "channel_first", "is_channel_first"):
        if options.get(switch):
            raise UsageError(f"--check: leave {switch} out of --config; ids and codes do not depend on it")
    with torch.inference_mode():
        codes, ids, *_ = original.eval()(x)
        encoded = tokenizer.encode(x.mT.unflatten(2, (SIZE, SIZE)))
    ours = encoded.ids.flatten(2).mT if encoded.ids is not None else torch.empty(0)  # [B, N, Q]
    theirs = ids.movedim(0, -1).flatten(-2) if word.startswith("Grouped") else ids.reshape(*ids.shape[:2], -1)
    same = float((ours == theirs).double().mean())
    difference = float((encoded.z.flatten(2).mT - codes).abs().max())
    if same < 0.999:  # a vector may lie between two codes
        raise GenkitError(
            f"{100 * (1 - same):.1f} % of the ids differ from those of {word}; does --config say all its options?"
        )
    return {"peer": f"vector-quantize-pytorch {version('vector-quantize-pytorch')}", "same_ids": same} | {
        "largest_difference": difference
    }


def _class_of(state: Weights, options: Options) -> str:
    """The class by its keys, or by its options where it has no weights of its own."""
    keys = "\n".join(state)
    is_grouped, prefix = "rvqs." in keys or "groups" in options, "GroupedResidual" if "rvqs." in keys else "Residual"
    if "_codebook.embed" in keys:
        return "VectorQuantize" if keys.find("layers.") < 0 else f"{prefix}VQ"
    if "mask" in state or "layers.0.mask" in keys:
        return "LFQ" if "mask" in state else f"{prefix}LFQ"
    strange = [key for key in state if not re.fullmatch(r"(rvqs\.\d+\.)?project_(in|out)\.\w+|orthogonal_rot", key)]
    if strange:
        few = ", ".join(strange[:6]) + (", ..." if len(strange) > 6 else "")
        raise GenkitError(
            f"these weights are of no quantiser of vector-quantize-pytorch: {few}; looked for _codebook.embed (VQ), mask (LFQ), or project_in and "
            "project_out alone (FSQ). Of a whole network, save the state dict of its quantiser alone"
        )
    if "levels" not in options:
        raise UsageError("the weights of an FSQ do not show its levels; --config FILE with levels: [8, 5, 5, 5]")
    if is_grouped:
        return "GroupedResidualFSQ"
    return "ResidualFSQ" if "num_quantizers" in options else "FSQ"


def _of_tables(state: Weights, options: Options) -> dict[str, Any]:
    tables = {key: value for key, value in state.items() if key.endswith("_codebook.embed") and value.ndim == 3}
    if not tables:
        return {}
    if "use_cosine_sim" not in options and all(_are_directions(table) for table in tables.values()):
        raise UsageError(
            "all codes have length 1, as with use_cosine_sim: true; say in --config FILE whether it was that or false"
        )
    heads, size, width = next(iter(tables.values())).shape
    found: dict[str, Any] = {"codebook_size": size}
    levels = {match[1] for key in tables if (match := re.search(r"layers\.(\d+)\.", key))}
    groups = _groups(state)
    outer, inner = _widths(state)
    count = max(1, groups)
    if levels:
        found |= {"num_quantizers": len(levels), "dim": (outer or width) * count}
        found |= {"codebook_dim": width} if outer else {}
        first = [value for key, value in tables.items() if key.startswith(("layers.", "rvqs.0."))]
        is_set = all(bool(value.all()) for key, value in state.items() if key.endswith("initted"))
        found |= {"shared_codebook": True} if len(first) > 1 and is_set and all(map(first[0].equal, first)) else {}
        found |= {"groups": groups} if groups else {}
    else:
        heads = options.get("heads", max(heads, (inner or width) // width))
        found |= {"dim": outer or width * heads, "codebook_dim": width, "heads": heads}
        found["separate_codebook_per_head"] = heads > 1 and len(next(iter(tables.values()))) > 1
        found |= {"layernorm_after_project_in": True} if "project_in.1.weight" in state else {}
    return found


def _of_fixed(state: Weights, word: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    groups = _groups(state)
    outer, inner = _widths(state)
    if outer:
        found["dim"] = outer * max(1, groups)
    if groups:
        found["groups"] = groups
    masks = [value for key, value in state.items() if key.rpartition(".")[2] == "mask"]
    if word.endswith("LFQ") and masks:
        bits = len(masks[0])
        found["codebook_size"] = 2**bits
        if "layers.0.mask" in state or groups:
            found["num_quantizers"] = len(masks) // max(1, groups)
            found.setdefault("dim", bits * max(1, groups))
        elif inner:
            found |= {"num_codebooks": inner // bits, "has_projections": True}
    return found


def _are_directions(table: Tensor) -> bool:
    return bool((table.norm(dim=-1) - 1).abs().max() < 1e-4)


def _groups(state: Weights) -> int:
    return len({match[1] for key in state if (match := re.match(r"rvqs\.(\d+)\.", key))})


def _widths(state: Weights) -> tuple[int, int]:
    """(width of vectors, width within) of the layer that leads back, of the first group; 0 where there is none."""
    for prefix in ("", "rvqs.0."):
        if (weight := state.get(f"{prefix}project_out.weight")) is not None and weight.ndim == 2:
            return weight.shape[0], weight.shape[1]
    return 0, 0


def _form(layer: torch.nn.Module) -> tuple[Any, ...]:
    """What tells layers of other forms apart."""
    return tuple(sorted((name, *value.shape) for name, value in layer.state_dict().items()))
