"""Quantisers of lucidrains/vector-quantize-pytorch (checked with release 1.32.0): constructor options and state dict -> ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from genkit.errors import GenkitError, UsageError, nearest
from genkit.nn.quantize import Quantizer

# Their key -> ours. `project_in` holds a LayerNorm as a second entry when layernorm_after_project_in is set.
_KEYS = {
    "_codebook.embed": "codebook.embed",
    "_codebook.embed_avg": "codebook.embed_sum",
    "_codebook.cluster_size": "codebook.cluster_size",
    "_codebook.initted": "codebook.initialised",
    **{
        f"{layer}.{name}": f"{layer}.{name}"
        for layer in ("project_in", "project_in.0", "project_in.1", "project_out")
        for name in ("weight", "bias")
    },
}
_OURS_ALONE = {"codebook.recent", "codebook.num_updates"}  # statistics theirs does not keep; they start at zero

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
        "gradients pass straight through here",
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


@dataclass(frozen=True)
class Imported:
    """A quantiser with the layout of inputs and outputs that the original was built for."""

    quantizer: Quantizer
    is_channels_first: bool  # [B, D, *grid] in and out instead of [B, *grid, D]

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x, [B, *grid, D] or [B, D, *grid] -> (codes like x, ids [B, *grid], with a last axis of heads where there are several)."""
        found = self.quantizer(self.to_rows(x))
        ids = found.ids if self.quantizer.num_heads > 1 else found.ids.squeeze(-1)
        return self.from_rows(found.codes), ids

    def decode(self, ids: Tensor) -> Tensor:
        """ids as `quantize` returns them -> codes like its input."""
        return self.from_rows(self.quantizer.codes(ids if self.quantizer.num_heads > 1 else ids.unsqueeze(-1)))

    def to_rows(self, x: Tensor) -> Tensor:
        return x.movedim(1, -1) if self.is_channels_first else x

    def from_rows(self, rows: Tensor) -> Tensor:
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
    _check_options(options)
    heads = options.get("heads", 1)
    quantizer = Quantizer(
        dim=options["dim"],
        codebook_size=options["codebook_size"],
        codebook_dim=options.get("codebook_dim"),
        num_heads=heads,
        is_shared=heads > 1 and not options.get("separate_codebook_per_head", False),
        cosine=options.get("use_cosine_sim", False),
        decay=options.get("decay", 0.8),
    )
    if options.get("layernorm_after_project_in") and isinstance(quantizer.project_in, nn.Linear):
        quantizer.project_in = nn.Sequential(quantizer.project_in, nn.LayerNorm(quantizer.project_in.out_features))
    _load(quantizer, weights)
    is_channels_first = (
        options.get("accept_image_fmap") or options.get("accept_3d_fmap") or not options.get("channel_last", True)
    )
    return Imported(quantizer.eval(), bool(is_channels_first))


def _check_options(options: Mapping[str, Any]) -> None:
    known = [*_USED, *_TRAINING_ONLY, *_REFUSED]
    for name, value in options.items():
        if name not in known:
            raise UsageError(f"VectorQuantize has no option {name}; {nearest(name, known)}")
        if name in _REFUSED and value:
            raise UsageError(f"VectorQuantize({name}={value!r}) cannot be imported: {_REFUSED[name]}")
    for name in ("dim", "codebook_size"):
        if name not in options:
            raise UsageError(f"the options of a VectorQuantize lack {name}, found {', '.join(options) or 'none'}")


def _load(quantizer: Quantizer, weights: Mapping[str, Tensor]) -> None:
    """Strict both ways: every weight is used, every place is filled."""
    own = quantizer.state_dict()
    state = {_KEYS.get(name, name): value for name, value in weights.items()}
    left_over = sorted(name for name in weights if _KEYS.get(name) not in own)
    missing = sorted(theirs for theirs, ours in _KEYS.items() if ours in own and ours not in state)
    misshapen = sorted(
        f"{name} ({list(value.shape)}, expected {list(own[_KEYS[name]].shape)})"
        for name, value in weights.items()
        if name not in left_over and value.shape != own[_KEYS[name]].shape
    )
    problems = (("unknown", left_over), ("missing", missing), ("another shape", misshapen))
    if any(names for _, names in problems):
        told = "; ".join(f"{word}: {', '.join(names)}" for word, names in problems if names)
        raise GenkitError(f"weights of this VectorQuantize do not fit its options: {told}")
    zeros = {name: torch.zeros_like(own[name]) for name in _OURS_ALONE}
    quantizer.load_state_dict({**{name: value.to(own[name].dtype) for name, value in state.items()}, **zeros})
