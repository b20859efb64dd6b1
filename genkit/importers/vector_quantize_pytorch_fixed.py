"""Quantisers of lucidrains/vector-quantize-pytorch without tables (checked with release 1.32.0): options and state dict -> ours.

FSQ, ResidualFSQ, GroupedResidualFSQ, LFQ, ResidualLFQ, GroupedResidualLFQ.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genkit.errors import GenkitError, UsageError
from genkit.importers.vector_quantize_pytorch_tables import Imported, Sources, check_options, load
from genkit.nn.binary import BinaryQuantizer
from genkit.nn.scalar import ScalarQuantizer

Fixed = ScalarQuantizer | BinaryQuantizer

_FSQ_USED = {
    "levels",
    "dim",
    "num_codebooks",
    "keep_num_codebooks_dim",
    "channel_first",
    "projection_has_bias",
    "preserve_symmetry",
    "bound_hard_clamp",
    "orthogonal_rotation",
}
_LFQ_USED = {
    "codebook_size",
    "dim",
    "num_codebooks",
    "keep_num_codebooks_dim",
    "channel_first",
    "projection_has_bias",
    "has_projections",
    "codebook_scale",
    "spherical",
    "cosine_sim_project_in",
    "orthogonal_rotation",
}
_RESIDUAL_USED = {"num_quantizers"}
# Options that leave the result of evaluation as it is, and why.
_WITHOUT_EFFECT = {
    "scale": "is not read",
    "allowed_dtypes": "rounding is in float32 here",
    "force_quantization_f32": "rounding is in float32 here",
    "return_indices": "ids are always returned here",
    "noise_dropout": "acts in training alone",
    "entropy_loss_weight": "losses are set with entropy=",
    "commitment_loss_weight": "losses belong to the objective",
    "diversity_gamma": "losses are set with diversity=",
    "straight_through_activation": "acts on gradients alone",
    "frac_per_sample_entropy": "the entropy of all vectors is exact and cheap here",
    "experimental_softplus_entropy_loss": "acts in training alone",
    "entropy_loss_offset": "acts in training alone",
    "cosine_sim_project_in_scale": "does not change a sign",
    "quantize_dropout": "acts in training alone; ids of -1 are understood",
    "quantize_dropout_cutoff_index": "acts in training alone",
    "quantize_dropout_multiple_of": "acts in training alone",
}
_REFUSED_IN_RESIDUALS = {
    "orthogonal_rotation": "every step turns what it sees by a matrix of its own",
    "num_codebooks": "its steps have one code each",
    "keep_num_codebooks_dim": "its steps have one code each",
    "spherical": "the codes that the original looks up for ids are not those its encoder returned",
    "cosine_sim_project_in": "its steps have no projection",
    "has_projections": "its steps have no projection",
}


def import_fsq(options: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Imported:
    """An `FSQ` as ours, in evaluation mode.

    Args:
        options: its constructor arguments by name.
        weights: its state dict.

    Raises:
        UsageError: an option that does not exist or is not supported, named.
        GenkitError: weights that are missing, left over or of another shape, each named.
    """
    check_options("FSQ", options, _FSQ_USED | {*_WITHOUT_EFFECT}, {}, ("levels",))
    groups = options.get("num_codebooks", 1)
    made_with: dict[str, Any] = {
        "dim": options.get("dim") or len(options["levels"]) * groups,
        "levels": options["levels"],
        "num_groups": groups,
        "is_symmetric": options.get("preserve_symmetry", False),
        "is_clamped": options.get("bound_hard_clamp", False),
        "has_bias": options.get("projection_has_bias", True),
    }
    quantizer = ScalarQuantizer(**made_with)
    is_turned = options.get("orthogonal_rotation")
    sources = _turned(quantizer, groups, len(options["levels"])) if is_turned else _linear(quantizer)
    load(quantizer, weights, sources, {}, "FSQ")
    # More than one axis of grid always comes channels first.
    return Imported(quantizer.eval(), made_with, True if options.get("channel_first") else None, _keeps_axis(options))


def import_residual_fsq(options: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Imported:
    """A `ResidualFSQ` as ours, in evaluation mode; ids [B, *grid, num_quantizers]. Arguments and errors as import_fsq."""
    return _import_residual_fsq("ResidualFSQ", options, weights, None)


def import_grouped_residual_fsq(options: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Imported:
    """A `GroupedResidualFSQ` as ours; ids [groups, B, *grid, num_quantizers]. Arguments and errors as import_fsq."""
    own = {name: value for name, value in options.items() if name != "groups"}
    return _import_residual_fsq("GroupedResidualFSQ", own, weights, options.get("groups", 1))


def _import_residual_fsq(
    what: str, options: Mapping[str, Any], weights: Mapping[str, Tensor], groups: int | None
) -> Imported:
    more = {"is_channel_first", "accept_image_fmap", "soft_clamp_input_value"}
    known = (_FSQ_USED | _RESIDUAL_USED | more | {*_WITHOUT_EFFECT}) - {"channel_first"}
    needed = ("levels", "num_quantizers") if groups is None else ("levels", "num_quantizers", "dim")
    check_options(what, options, known, _REFUSED_IN_RESIDUALS, needed)
    levels = list(options["levels"])
    is_clamped = options.get("bound_hard_clamp", True)
    limit = options.get("soft_clamp_input_value")
    if is_clamped:
        limit = [1 + 1 / (n - 1) for n in levels]
    elif isinstance(limit, int | float):
        limit = [limit] * len(levels)
    made_with: dict[str, Any] = {
        "dim": _divided(what, options.get("dim") or len(levels), groups),
        "levels": levels,
        "num_groups": groups or 1,
        "depth": options["num_quantizers"],
        "is_symmetric": True,
        "is_clamped": is_clamped,
        "soft_clamp": None if limit is None else [float(value) for value in limit],
    }
    quantizer = ScalarQuantizer(**made_with)
    load(quantizer, weights, _linear(quantizer, groups), {}, what)
    is_channels_first = options.get("is_channel_first") or options.get("accept_image_fmap")
    return Imported(quantizer.eval(), made_with, bool(is_channels_first), True, groups)


def import_lfq(options: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Imported:
    """An `LFQ` as ours, in evaluation mode. Arguments and errors as import_fsq."""
    check_options("LFQ", options, _LFQ_USED | {*_WITHOUT_EFFECT, "soft_clamp_input_value"}, {}, ())
    size, dim, groups = options.get("codebook_size"), options.get("dim"), options.get("num_codebooks", 1)
    if size is None and dim is None:
        raise UsageError(f"the options of an LFQ lack codebook_size or dim, found {', '.join(options) or 'none'}")
    size = 2 ** int(dim or 0) if size is None else size
    width = (size.bit_length() - 1) * groups
    has_bias = options.get("projection_has_bias", True)
    made_with: dict[str, Any] = {
        "dim": dim or width,
        "codebook_size": size,
        "num_groups": groups,
        "is_spherical": options.get("spherical", False),
        "scale": options.get("codebook_scale", 1.0),
        "has_bias": has_bias,
    }
    quantizer = BinaryQuantizer(**made_with)
    if options.get("has_projections") and dim in (None, width):
        quantizer.project_in, quantizer.project_out = (nn.Linear(width, width, bias=has_bias) for _ in range(2))
    if options.get("cosine_sim_project_in") and isinstance(quantizer.project_in, nn.Linear):
        # It divides the vector by its length, which no sign depends on, and each column by its own.
        quantizer.project_in = nn.Linear(quantizer.project_in.in_features, width, bias=False)
    is_turned = options.get("orthogonal_rotation")
    sources = _turned(quantizer, groups, quantizer.bits) if is_turned else _linear(quantizer)
    if options.get("cosine_sim_project_in") and "project_in.weight" in sources:
        keys, combine = sources["project_in.weight"]
        sources["project_in.weight"] = (keys, lambda found: combine([F.normalize(found[0], dim=0).T, *found[1:]]))
    load(quantizer, weights, sources, _bit_values(weights, [""], quantizer.bits, "LFQ"), "LFQ")
    return Imported(quantizer.eval(), made_with, options.get("channel_first"), _keeps_axis(options))


def import_residual_lfq(options: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Imported:
    """A `ResidualLFQ` as ours, in evaluation mode; ids [B, *grid, num_quantizers]. Arguments and errors as import_fsq."""
    return _import_residual_lfq("ResidualLFQ", options, weights, None)


def import_grouped_residual_lfq(options: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Imported:
    """A `GroupedResidualLFQ` as ours; ids [groups, B, *grid, num_quantizers]. Arguments and errors as import_fsq."""
    own = {name: value for name, value in options.items() if name != "groups"}
    return _import_residual_lfq("GroupedResidualLFQ", own, weights, options.get("groups", 1))


def _import_residual_lfq(
    what: str, options: Mapping[str, Any], weights: Mapping[str, Tensor], groups: int | None
) -> Imported:
    known = (_LFQ_USED | _RESIDUAL_USED | {*_WITHOUT_EFFECT, "soft_clamp_input_value", "accept_image_fmap"}) - {
        "channel_first",
        "codebook_scale",
    }
    check_options(what, options, known, _REFUSED_IN_RESIDUALS, ("dim", "codebook_size", "num_quantizers"))
    made_with: dict[str, Any] = {
        "dim": _divided(what, options["dim"], groups),
        "codebook_size": options["codebook_size"],
        "num_groups": groups or 1,
        "depth": options["num_quantizers"],
    }
    quantizer = BinaryQuantizer(**made_with)
    prefixes = [f"{group}layers.{step}." for group in _prefixes(groups) for step in range(options["num_quantizers"])]
    load(quantizer, weights, _linear(quantizer, groups), _bit_values(weights, prefixes, quantizer.bits, what), what)
    return Imported(quantizer.eval(), made_with, bool(options.get("accept_image_fmap")), True, groups)


def _keeps_axis(options: Mapping[str, Any]) -> bool:
    kept = options.get("keep_num_codebooks_dim")
    return options.get("num_codebooks", 1) > 1 if kept is None else kept


def _divided(what: str, dim: int, groups: int | None) -> int:
    if dim % (groups or 1):
        raise UsageError(f"{what}(dim={dim}) is no multiple of groups={groups}")
    return dim


def _prefixes(groups: int | None) -> list[str]:
    return [""] if groups is None else [f"rvqs.{g}." for g in range(groups)]


def _linear(quantizer: Fixed, groups: int | None = None) -> Sources:
    """Their linear layers, one per group, as the blocks of ours."""
    return {
        name: (
            [prefix + name for prefix in _prefixes(groups)],
            torch.cat if name.endswith("bias") else lambda blocks: torch.block_diag(*blocks),
        )
        for name in quantizer.state_dict()
        if name.startswith("project_")
    }


def _turned(quantizer: Fixed, groups: int, width: int) -> Sources:
    """Their rotation [d, d] of every group before rounding, and back after it, as part of the linear layers; where there are none, two are made."""
    key, full = "orthogonal_rot", groups * width

    def blocks(rotation: Tensor) -> Tensor:
        return torch.block_diag(*[rotation] * groups)

    if isinstance(quantizer.project_in, nn.Identity):
        quantizer.project_in, quantizer.project_out = (nn.Linear(full, full, bias=False) for _ in range(2))
        return {
            "project_in.weight": ([key], lambda found: blocks(found[0]).T),
            "project_out.weight": ([key], lambda found: blocks(found[0])),
        }
    sources: Sources = {
        "project_in.weight": (["project_in.weight", key], lambda found: blocks(found[1]).T @ found[0]),
        "project_out.weight": (["project_out.weight", key], lambda found: found[0] @ blocks(found[1])),
    }
    if "project_in.bias" in quantizer.state_dict():
        sources["project_in.bias"] = (["project_in.bias", key], lambda found: blocks(found[1]).T @ found[0])
    if "project_out.bias" in quantizer.state_dict():
        sources["project_out.bias"] = (["project_out.bias"], lambda found: found[0])
    return sources


def _bit_values(weights: Mapping[str, Tensor], prefixes: list[str], bits: int, what: str) -> dict[str, str]:
    """The keys that hold the values of the bits -> why they are not read. Raises GenkitError where one lacks or holds anything else."""
    expected = 2 ** torch.arange(bits - 1, -1, -1)
    for key in (f"{prefix}mask" for prefix in prefixes):
        if key not in weights:
            raise GenkitError(f"weights of this {what} do not fit its options: missing: {key}")
        if not torch.equal(weights[key].cpu().long(), expected):
            raise GenkitError(f"weights of this {what} do not fit its options: {key} is not 2^{bits - 1} .. 1")
    return {f"{prefix}mask": "the values of the bits, highest first" for prefix in prefixes}
