"""Quantisers of lucidrains/vector-quantize-pytorch with learned tables (checked with release 1.32.0): options and state dict -> ours.

VectorQuantize, ResidualVQ, GroupedResidualVQ. Those without tables are in vector_quantize_pytorch_fixed.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from genkit.errors import GenkitError, UsageError, nearest
from genkit.nn.quantize import Quantizer

# Our key -> their keys, and what is made of the values under them.
Sources = dict[str, tuple[Sequence[str], Callable[[list[Tensor]], Tensor]]]

# Options that decide what is computed from given weights.
_USED = {
    "dim",
    "codebook_size",
    "codebook_dim",
    "heads",
    "separate_codebook_per_head",
    "use_cosine_sim",
    "layernorm_after_project_in",
    "channel_last",
    "accept_image_fmap",
    "accept_3d_fmap",
    "decay",
}
# Options that leave the result of trained weights as it is, and where their matter is decided here.
_TRAINING_ONLY = {
    **dict.fromkeys(
        ("kmeans_init", "kmeans_iters", "sync_kmeans"),
        "an uninitialised codebook is clustered, 10 steps, over all processes",
    ),
    **dict.fromkeys(("threshold_ema_dead_code",), "restarts are set with restart=, a fraction of the mean count"),
    **dict.fromkeys(
        ("eps", "ema_update", "manual_ema_update", "freeze_codebook", "sync_codebook"), "see genkit.nn.codebook"
    ),
    **dict.fromkeys(("commitment_weight", "commitment_use_cross_entropy_loss"), "losses belong to the objective"),
    **dict.fromkeys(
        ("orthogonal_reg_weight", "orthogonal_reg_active_codes_only", "orthogonal_reg_max_codes"),
        "losses belong to the objective",
    ),
    **dict.fromkeys(
        ("codebook_diversity_loss_weight", "codebook_diversity_temperature"), "losses belong to the objective"
    ),
    **dict.fromkeys(("stochastic_sample_codes", "sample_codebook_temp"), "codes are drawn at random in training alone"),
    **dict.fromkeys(
        (
            "straight_through",
            "rotation_trick",
            "directional_reparam",
            "directional_reparam_variance",
            "route_gradients_to_input",
        ),
        "how gradients pass is set with gradient=",
    ),
    **dict.fromkeys(
        ("learnable_codebook", "in_place_codebook_optimizer", "manual_in_place_optimizer_update", "sync_update_v"),
        "the codebook follows its assignments here, not a gradient",
    ),
    **dict.fromkeys(
        ("sync_affine_param", "affine_param_batch_decay", "affine_param_codebook_decay"),
        "act with affine_param, which is refused",
    ),
    "return_zeros_for_masked_padding": "acts with a padding mask, which is not part of the weights",
}
_REFUSED = {
    "affine_param": "it quantises relative to statistics of the input that change in every call, even in evaluation",
    "vq_bridge": "it is a network of its own that a state dict does not describe",
}

_RESIDUAL_USED = {"num_quantizers", "shared_codebook", "quantize_dropout", "quantize_dropout_cutoff_index"}
_RESIDUAL_TRAINING_ONLY = {
    "quantize_dropout_multiple_of": "levels are left out one by one here",
    "quant_grad_frac": "one gradient passes by the sum of all levels here",
    "diveq": "how gradients pass is set with gradient=",
    "mlp_kwargs": "acts with implicit_neural_codebook, which is refused",
    "beam_score_quantizer_weights": "acts with beam_size, which is refused",
}
_RESIDUAL_REFUSED = {
    "implicit_neural_codebook": "its codes are made by a network for every vector",
    "beam_size": "it searches several residuals at once; here every level takes its nearest code",
    "eval_beam_size": "it searches several residuals at once; here every level takes its nearest code",
}


@dataclass(frozen=True)
class Imported:
    """A quantiser with the layout of inputs and outputs that the original was built for."""

    quantizer: Any  # with the interface of genkit.nn.quantize.Quantizer
    made_with: dict[str, Any]  # its constructor's arguments
    is_channels_first: bool | None  # [B, D, *grid] in and out, not [B, *grid, D]; None = if there are two axes of grid
    has_level_axis: bool  # ids [B, *grid, Q], else [B, *grid] for the one level
    num_groups: int | None = None  # ids [groups, B, *grid, Q / groups]; None = no axis of groups

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x, [B, *grid, D] or [B, D, *grid] -> (codes like x, ids)."""
        is_first = x.ndim >= 4 if self.is_channels_first is None else self.is_channels_first
        found = self.quantizer(x.movedim(1, -1) if is_first else x)
        ids = found.ids if self.has_level_axis else found.ids.squeeze(-1)
        if self.num_groups is not None:  # ours lie level by level, group by group within
            ids = ids.unflatten(-1, (-1, self.num_groups)).movedim(-1, 0)
        return found.codes.movedim(-1, 1) if is_first else found.codes, ids

    def decode(self, ids: Tensor) -> Tensor:
        """ids as `quantize` returns them -> codes like its input."""
        if self.num_groups is not None:
            ids = ids.movedim(0, -1).flatten(-2)
        ids = ids if self.has_level_axis else ids.unsqueeze(-1)
        is_first = ids.ndim >= 4 if self.is_channels_first is None else self.is_channels_first
        codes = self.quantizer.codes(ids)
        return codes.movedim(-1, 1) if is_first else codes

    def from_rows(self, rows: Tensor) -> Tensor:
        """[B, *grid, k] -> [B, k, *grid] where the original has its channels there."""
        return rows.movedim(-1, 1) if self.is_channels_first else rows


def import_vector_quantize(options: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Imported:
    """A `VectorQuantize` as ours, in evaluation mode.

    Args:
        options: its constructor arguments by name.
        weights: its state dict.

    Raises:
        UsageError: an option that does not exist or is not supported, named.
        GenkitError: weights that are missing, left over or of another shape, each named.
    """
    check_options("VectorQuantize", options, {*_USED, *_TRAINING_ONLY}, _REFUSED, ("dim", "codebook_size"))
    heads = options.get("heads", 1)
    made_with: dict[str, Any] = {
        "dim": options["dim"],
        "codebook_size": options["codebook_size"],
        "codebook_dim": options.get("codebook_dim"),
        "num_heads": heads,
        "is_shared": heads > 1 and not options.get("separate_codebook_per_head", False),
        "cosine": options.get("use_cosine_sim", False),
        "decay": options.get("decay", 0.8),
    }
    quantizer = Quantizer(**made_with)
    if options.get("layernorm_after_project_in") and isinstance(quantizer.project_in, nn.Linear):
        quantizer.project_in = nn.Sequential(quantizer.project_in, nn.LayerNorm(quantizer.project_in.out_features))
    load(quantizer, weights, {**_projections(quantizer), **_tables([""])}, {}, "VectorQuantize")
    is_channels_first = (
        options.get("accept_image_fmap") or options.get("accept_3d_fmap") or not options.get("channel_last", True)
    )
    return Imported(quantizer.eval(), made_with, bool(is_channels_first), has_level_axis=heads > 1)


def import_residual_vq(options: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Imported:
    """A `ResidualVQ` as ours, in evaluation mode; ids [B, *grid, num_quantizers], -1 = nothing. Arguments and errors as import_vector_quantize."""
    return _import_residual("ResidualVQ", options, weights, groups=None)


def import_grouped_residual_vq(options: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Imported:
    """A `GroupedResidualVQ` as ours, in evaluation mode; ids [groups, B, *grid, num_quantizers]. Arguments and errors as import_vector_quantize.

    Its projections, one per group, are the blocks of one linear layer here.
    """
    groups = options.get("groups", 1)
    own = {name: value for name, value in options.items() if name != "groups"}
    return _import_residual("GroupedResidualVQ", own, weights, groups)


def _import_residual(
    what: str, options: Mapping[str, Any], weights: Mapping[str, Tensor], groups: int | None
) -> Imported:
    # Their levels have one head and no projection, so that the options of those do nothing.
    known = _USED | _RESIDUAL_USED | {*_TRAINING_ONLY, *_RESIDUAL_TRAINING_ONLY}
    refused = _REFUSED | _RESIDUAL_REFUSED
    check_options(what, options, known, refused, ("dim", "codebook_size"))
    sizes = options["codebook_size"]
    depth = options.get("num_quantizers") or (len(sizes) if isinstance(sizes, list | tuple) else None)
    if depth is None:
        raise UsageError(f"the options of a {what} lack num_quantizers, found {', '.join(options)}")
    if isinstance(sizes, list | tuple):
        if len(set(sizes)) > 1:
            raise UsageError(f"{what}(codebook_size={list(sizes)}) cannot be imported: all levels have one size here")
        sizes = sizes[0]
    for name, only in (("heads", 1), ("channel_last", True)):
        if options.get(name, only) != only:
            raise UsageError(f"{what}({name}={options[name]}) cannot be imported: it works with {only} alone")
    count = groups or 1
    if options["dim"] % count:
        raise UsageError(f"{what}(dim={options['dim']}) is no multiple of groups={count}")
    is_shared = options.get("shared_codebook", False)
    has_dropout = options.get("quantize_dropout", False) and depth > 1
    made_with: dict[str, Any] = {
        "dim": options["dim"],
        "codebook_size": sizes,
        "codebook_dim": options.get("codebook_dim") or options["dim"] // count,
        "num_heads": count,
        "depth": depth,
        "is_shared_by_levels": is_shared,
        "min_depth": options.get("quantize_dropout_cutoff_index", 0) + 1 if has_dropout else None,
        "cosine": options.get("use_cosine_sim", False),
        "decay": options.get("decay", 0.8),
    }
    quantizer = Quantizer(**made_with)
    prefixes = [""] if groups is None else [f"rvqs.{g}." for g in range(groups)]
    levels = [[f"{prefix}layers.{level}." for prefix in prefixes] for level in range(depth)]
    ignored = {}
    if is_shared:
        ignored = _repeated_tables(levels, weights, what)
        levels = levels[:1]
    sources = _projections(quantizer, prefixes) | _tables([prefix for level in levels for prefix in level])
    load(quantizer, weights, sources, ignored, what)
    is_channels_first = options.get("accept_image_fmap") or options.get("accept_3d_fmap")
    return Imported(quantizer.eval(), made_with, bool(is_channels_first), has_level_axis=True, num_groups=groups)


def _repeated_tables(levels: list[list[str]], weights: Mapping[str, Tensor], what: str) -> dict[str, str]:
    """The keys of a shared table under all levels but the first -> why they are not read. Raises GenkitError where they say something else."""
    ignored = {}
    for level in levels[1:]:
        for prefix, first in zip(level, levels[0], strict=True):
            for name in ("embed", "embed_avg", "cluster_size", "initted"):
                key, same = f"{prefix}_codebook.{name}", f"{first}_codebook.{name}"
                if key in weights and same in weights and not torch.equal(weights[key], weights[same]):
                    raise GenkitError(f"weights of this {what} do not fit its options: {key} differs from {same}")
                ignored[key] = f"the shared table is read from {same}"
    return ignored


def _tables(prefixes: Sequence[str]) -> Sources:
    """Their codebooks, [heads, S, d] each, as ours one after another."""

    def under(name: str) -> list[str]:
        return [f"{prefix}_codebook.{name}" for prefix in prefixes]

    return {
        "codebook.embed": (under("embed"), torch.cat),
        "codebook.embed_sum": (under("embed_avg"), torch.cat),
        "codebook.cluster_size": (under("cluster_size"), torch.cat),
        "codebook.initialised": (under("initted"), lambda flags: torch.stack(flags).all()),
    }


def _projections(module: nn.Module, prefixes: Sequence[str] = ("",)) -> Sources:
    """Their linear layers, one per group, as the blocks of ours."""
    return {
        name: (
            [prefix + name for prefix in prefixes],
            torch.cat if name.endswith("bias") or ".1." in name else lambda blocks: torch.block_diag(*blocks),
        )
        for name in module.state_dict()
        if name.startswith("project_")
    }


def check_options(
    what: str, options: Mapping[str, Any], known: set[str], refused: Mapping[str, str], needed: Sequence[str]
) -> None:
    """Raises UsageError for an option that does not exist, one that cannot be imported, and one that lacks."""
    for name, value in options.items():
        if name not in known and name not in refused:
            raise UsageError(f"{what} has no option {name}; {nearest(name, [*known, *refused])}")
        if name in refused and value:
            raise UsageError(f"{what}({name}={value!r}) cannot be imported: {refused[name]}")
    for name in needed:
        if options.get(name) is None:
            raise UsageError(f"the options of a {what} lack {name}, found {', '.join(options) or 'none'}")


def load(
    module: nn.Module, weights: Mapping[str, Tensor], sources: Sources, ignored: Mapping[str, str], what: str
) -> None:
    """Strict both ways: every weight is used or ignored with a reason, every place with a source is filled; the others keep what they start with.

    Raises: GenkitError that names, in their words, what is unknown, missing or of another shape.
    """
    own = module.state_dict()
    values, missing, misshapen = {}, [], []
    for name, (theirs, combine) in sources.items():
        if lacking := [key for key in theirs if key not in weights]:
            missing += lacking
            continue
        try:
            value = combine([weights[key] for key in theirs])
        except RuntimeError:  # parts of shapes that do not go together
            value = torch.empty(0)
        if value.shape == own[name].shape:
            values[name] = value.to(own[name].dtype)
        else:
            shapes = " + ".join(str(list(weights[key].shape)) for key in theirs)
            misshapen.append(f"{', '.join(theirs)} ({shapes}, expected {list(own[name].shape)})")
    used = {key for theirs, _ in sources.values() for key in theirs}
    unknown = sorted(key for key in weights if key not in used and key not in ignored)
    problems = (("unknown", unknown), ("missing", sorted(missing)), ("another shape", misshapen))
    if any(names for _, names in problems):
        told = "; ".join(f"{word}: {', '.join(names)}" for word, names in problems if names)
        raise GenkitError(f"weights of this {what} do not fit its options: {told}")
    module.load_state_dict({**own, **values})
