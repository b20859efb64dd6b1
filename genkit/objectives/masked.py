"""Masked token modelling, the masked fraction drawn anew for every sample (Chang et al., "MaskGIT", CVPR 2022)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from genkit.errors import UsageError
from genkit.interfaces import Cache, Cond, Layout, PredictIds
from genkit.nn.context import context_of
from genkit.nn.told import once
from genkit.nn.wrapped import unwrapped
from genkit.objectives.dropping import drop
from genkit.objectives.masking import ranks, truncated_normal
from genkit.rng import Rng
from genkit.samplers.unmasking import check_schedule, gamma


class Masked:
    """Cross-entropy of the masked ids given the others.

    Per sample: r ~ U(0, 1), ceil(gamma(r) N) random positions are masked, all Q levels of a position together (section
    3.1). Labels are dropped to -1 with probability cond_drop, which trains the null class of classifier-free guidance.

    The loss is the mean over the masked tokens of each sample, not of the batch: a value that does not depend on what
    else is in the batch, so that neither micro-batches nor processes change it.

    The model must accept `positions` (see backbones/masked.py): logits are needed only where ids are masked.

    Args:
        schedule: gamma, the masked fraction, see genkit.samplers.unmasking: "cosine" MaskGIT, "arccos" Halton-MaskGIT; or "normal": of r, the fraction
            with mean `mean` and deviation `std` within [min_masked, 1], as MAGE (Li et al., CVPR 2023) with 0.55, 0.25 and 0.5.
        label_smoothing: of the cross-entropy.
        cond_drop: probability in [0, 1].
        min_masked: the smallest fraction that is masked, in [0, 1]; the released MaskGIT config uses 0.5, its paper 0.
        dropped: this fraction of all tokens, masked ones, is not given to the encoder of a backbone that has one (mage); MAGE 0.5.
    """

    target = "ids"  # what of the data it learns
    asks = "masked ids"
    fills_holes = True  # sampling may start from what is known of an image

    def __init__(
        self,
        *,
        schedule: str = "cosine",
        label_smoothing: float = 0.1,
        cond_drop: float = 0.1,
        min_masked: float = 0.0,
        mean: float = 0.55,
        std: float = 0.25,
        dropped: float = 0.0,
    ):
        for name, value in (
            ("label_smoothing", label_smoothing),
            ("cond_drop", cond_drop),
            ("min_masked", min_masked),
            ("dropped", dropped),
        ):
            if not 0 <= value <= 1:
                raise UsageError(f"objective.{name}={value} must be in [0, 1]")
        if dropped > min_masked:
            raise UsageError(
                f"objective.dropped={dropped} must not be above objective.min_masked={min_masked}: only masked tokens are dropped"
            )
        if std <= 0:
            raise UsageError(f"objective.std={std} must be positive")
        if schedule != "normal":
            check_schedule(schedule, "objective.schedule")
        self.schedule, self.label_smoothing = schedule, label_smoothing
        self.mean, self.std, self.dropped = mean, std, dropped
        self.cond_drop, self.min_masked = cond_drop, min_masked

    def __call__(self, model: Any, target: Tensor, cond: Cond, layout: Layout, rng: Rng) -> dict[str, Tensor]:
        """{"nll": [B] nats per masked token, "_accuracy": [B]} for ids target [B, Q, *grid]."""
        B, Q, *grid = target.shape
        rank, num_valid = ranks(rng.fork("mask").order(math.prod(grid)), layout.valid)  # [B, N]
        masked = rank < self.count(num_valid, rng)
        x = torch.where(masked.unflatten(1, grid).unsqueeze(1), mask_id(model), target)
        positions = masked.flatten().nonzero().squeeze(1)  # [P]
        options = {}
        if self.dropped:
            if not getattr(unwrapped(model), "drops_tokens", False):
                raise UsageError(
                    f"objective.dropped={self.dropped} needs a backbone with an encoder, such as mage; set it to 0"
                )
            options["dropped"] = rank < math.ceil(self.dropped * masked.shape[1])
        logits = model(
            x, None, drop(cond, self.cond_drop, rng), layout, None, positions=positions, **options
        ).float()  # [P, Q, S]

        answers = target.flatten(2).transpose(1, 2).flatten(0, 1).index_select(0, positions)  # [P, Q]
        nll = cross_entropy(
            logits.flatten(0, 1), answers.flatten(), reduction="none", label_smoothing=self.label_smoothing
        )
        with torch.no_grad():
            is_right = logits.gather(-1, answers.unsqueeze(-1)).squeeze(-1) >= logits.amax(-1)  # [P, Q]

        def per_sample(values: Tensor) -> Tensor:
            sums = values.new_zeros(B).index_add(0, positions // masked.shape[1], values.mean(1))
            return sums / masked.sum(1)

        return {"nll": per_sample(nll.unflatten(0, (-1, Q))), "_accuracy": per_sample(is_right.float())}

    def draw_mask(self, num_tokens: int, valid: Tensor | None, rng: Rng) -> Tensor:
        """[B, N] bool, True = masked: exactly max(1, ceil(gamma(r) n)) of the n valid positions of each sample."""
        rank, num_valid = ranks(rng.fork("mask").order(num_tokens), valid)
        return rank < self.count(num_valid, rng)

    def count(self, num_valid: int | Tensor, rng: Rng) -> Tensor:
        """How many positions of each sample are masked, [B, 1]."""
        r = rng.fork("ratio").uniform()  # [B]
        if self.schedule == "normal":
            fraction = truncated_normal(r, self.mean, self.std, self.min_masked)
        else:
            fraction = gamma(r, self.schedule, num_valid).clamp_min(self.min_masked)
        return (fraction * num_valid).ceil().clamp_min(1).unsqueeze(1)

    def predictor(self, model: Any, cond: Cond, layout: Layout) -> PredictIds:
        """(ids, known, cache) -> logits [B, Q, *grid, S] of the model under this condition."""
        cond = once(model, cond)

        def predict(ids: Tensor, known: Tensor, cache: Cache | None = None) -> Tensor:
            x, context = torch.where(known, ids, mask_id(model)), context_of(cache)
            if context is None:
                return model(x, None, cond, layout, None)
            return model(x, None, cond, context.layout(layout, len(x)), {"context": context})

        return predict


def mask_id(model: Any) -> int:
    """The id that stands for "unknown": one past the codebook."""
    return unwrapped(model).config.codebook_size
