"""Masked modelling of octree tokens, all depths in one sequence (Wei et al., "OctGPT", 2025, section 3.3)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from genkit.errors import UsageError
from genkit.interfaces import Cond, Layout, PredictTree
from genkit.objectives.dropping import drop
from genkit.octree import build
from genkit.octree.octree import Octree
from genkit.octree.tokens import OctreeTokens
from genkit.rng import Rng

_SIGMA = 0.25  # of the share of masked tokens around 1, as MAR (Li et al., 2024)


class OctreeMasked:
    """Cross-entropy of the masked split bits, and of the bits of the codes, given the other tokens.

    Per shape: a share r of its tokens, drawn from a normal distribution around 1 with deviation 0.25 that is cut to [min_masked, 1], is masked. (The official
    code draws one share for a batch.) The losses are means over the tokens of each shape.

    Args:
        min_masked: smallest share.
        flip: probability that a bit of a known code is turned around in what the model reads. The loss is then taken over all codes, so that it learns to
            put them right.
        cond_drop: probability that a shape is told nothing: no label, no text.
        code_weight: of the codes' loss beside that of the split bits.
    """

    target = "ids"
    asks = "octrees"

    def __init__(self, *, min_masked: float = 0.5, flip: float = 0.1, cond_drop: float = 0.0, code_weight: float = 1.0):
        for name, value in (("min_masked", min_masked), ("flip", flip), ("cond_drop", cond_drop)):
            if not 0 <= value <= 1:
                raise UsageError(f"objective.{name}={value} must be in [0, 1]")
        self.min_masked, self.flip, self.cond_drop, self.code_weight = min_masked, flip, cond_drop, code_weight

    def __call__(
        self, model: Any, target: OctreeTokens, cond: Cond, layout: Layout | None, rng: Rng
    ) -> dict[str, Tensor]:
        """{"split": [B], "code": [B]} nats per bit, "_split_accuracy" and "_code_accuracy" over masked ones."""
        samples, B = target.samples, target.batch_size
        known = ~self.draw_mask(samples, B, rng)  # [T]
        S = len(target.splits)
        codes = target.codes
        if self.flip and getattr(model, "training", False):
            turned = self._uniform(rng.fork("flip"), samples[S:], codes.shape[1]) < self.flip
            codes = torch.where(turned, 1 - codes, codes)
        cond = drop(cond, self.cond_drop, rng) if self.cond_drop else cond
        read = OctreeTokens(target.octree, target.splits, codes)
        of_splits, of_codes = model(read, known, cond)
        split = cross_entropy(of_splits.float(), target.splits, reduction="none")  # [S]
        code = cross_entropy(of_codes.float().flatten(0, 1), target.codes.flatten(), reduction="none")
        code = code.unflatten(0, target.codes.shape).mean(1)  # [M]
        counted = torch.ones_like(known[S:]) if self.flip else ~known[S:]

        def mean(values: Tensor, of: Tensor, chosen: Tensor) -> Tensor:
            total = values.new_zeros(B).index_add(0, of, torch.where(chosen, values, 0))
            return total / torch.bincount(of[chosen], minlength=B).clamp_min(1)

        with torch.no_grad():
            right = (of_splits.argmax(-1) == target.splits).float()
            right_code = (of_codes.argmax(-1) == target.codes).float().mean(1)
        return {
            "split": mean(split, samples[:S], ~known[:S]),
            "code": self.code_weight * mean(code, samples[S:], counted),
            "_split_accuracy": mean(right, samples[:S], ~known[:S]),
            "_code_accuracy": mean(right_code, samples[S:], ~known[S:]),
        }

    def draw_mask(self, samples: Tensor, batch_size: int, rng: Rng) -> Tensor:
        """[T] bool, True = masked: ceil(r n) of the n tokens of each shape."""
        # Inverse of the cumulative distribution of the normal one, cut to its lower half down to min_masked.
        lowest = 0.5 * (1 + math.erf((self.min_masked - 1) / _SIGMA / math.sqrt(2)))
        p = lowest + (0.5 - lowest) * rng.fork("ratio").uniform().double()
        share = (1 + _SIGMA * math.sqrt(2) * torch.erfinv(2 * p - 1)).clamp(self.min_masked, 1)  # [B]
        count = torch.bincount(samples, minlength=batch_size)
        noise = self._uniform(rng.fork("mask"), samples)
        order = noise.argsort(stable=True)
        order = order[samples[order].argsort(stable=True)]
        rank = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
        rank = rank - (count.cumsum(0) - count)[samples]
        return rank < (share.to(samples.device) * count).ceil()[samples]

    def _uniform(self, rng: Rng, samples: Tensor, width: int = 0) -> Tensor:
        """One number, or `width` of them, per token from the stream of its shape: the k-th token of a shape has the same in any batch."""
        count = torch.bincount(samples, minlength=len(rng))
        order = samples.argsort(stable=True)
        column = torch.empty_like(order)
        column[order] = torch.arange(len(order), device=order.device) - (count.cumsum(0) - count)[samples[order]]
        most = int(count.max()) if len(samples) else 0
        u = rng.uniform(most * max(1, width)).to(samples.device)
        return u.unflatten(1, (most, width))[samples, column] if width else u[samples, column]

    def predictor(self, model: Any, cond: Cond, layout: Layout | None) -> PredictTree:
        """Where a sampler makes shapes grow; see genkit/samplers/octree_masked.py."""
        return Grow(model, cond)

    def guided(self, model: Any, cond: Cond, guidance: Any, weak: Any = None) -> Grow:
        """The same, away from the model that is told nothing, or from a worse one. Raises UsageError for a strength that changes on the way."""
        if guidance.schedule != "constant":
            raise UsageError(f"sampler.guidance_schedule={guidance.schedule}: octrees are guided evenly; use constant")
        nothing = {"label": -1}
        none = cond if weak is not None else {k: torch.full_like(v, nothing.get(k, 0)) for k, v in cond.items()}
        return Grow(model, cond, [(model if weak is None else weak, none)], guidance.strength)


class Grow:
    """A batch of shapes on its way from the first depth to codes. Every shape with nothing to split splits its first node, as the official code does for
    a batch.

    Args:
        others: models and conditions to be guided away from, by `strength`.
    """

    def __init__(self, model: Any, cond: Cond, others: list[tuple[Any, Cond]] | None = None, strength: float = 1.0):
        self.model, self.cond, self.strength = model, cond, strength
        self.asked = [(model, cond), *(others or [])]
        self.depths = model.code_depth - model.full_depth + 1

    def start(self, batch_size: int | None = None) -> Octree:
        """Complete grids of the first depth, one per shape; by default as many as there are conditions."""
        count = batch_size if batch_size is not None else len(next(iter(self.cond.values())))
        return build.complete(self.model.full_depth, batch_size=count, device=self.model.device)

    def begin(self, octree: Octree) -> None:
        from genkit.backbones.octgpt import Growing

        self.octree = octree
        self.splits: list[Tensor] = []
        self.growing = [Growing(model, cond, octree) for model, cond in self.asked]

    @property
    def samples(self) -> Tensor:
        return self.octree.samples(self.octree.depth)

    @property
    def bits(self) -> int:
        return self.model.bits if self.octree.depth == self.model.code_depth else 0

    def logits(self, values: Tensor, known: Tensor) -> Tensor:
        found = [growing.logits(values, known) for growing in self.growing]
        return found[0] if len(found) == 1 else torch.lerp(found[1], found[0], self.strength)

    def light(self, values: Tensor, known: Tensor, chosen: Tensor, keeps_condition: bool = False) -> Tensor:
        """Of some tokens, numbers [m], with what the last `logits` kept of the others: [m, ...]."""
        found = [growing.light(values, known, chosen, keeps_condition) for growing in self.growing]
        return found[0] if len(found) == 1 else torch.lerp(found[1], found[0], self.strength)

    def finish(self, values: Tensor) -> None:
        if self.bits:
            self.codes = values
            return
        values = build.at_least_one(self.octree, values == 1).long()
        for growing in self.growing:
            growing.finish(values)
        self.splits.append(values)
        self.octree = build.split(self.octree, values.bool())
        for growing in self.growing:
            growing.at(self.octree)

    def result(self) -> OctreeTokens:
        return OctreeTokens(self.octree, torch.cat(self.splits), self.codes)
