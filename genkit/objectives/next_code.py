"""Position and content of each code in turn, coarse codes first (Huang et al., DQ-Transformer, CVPR 2023, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from genkit.errors import UsageError
from genkit.interfaces import Cache, Cond, Layout, PredictNext
from genkit.nn.grain_sequence import GrainSequence
from genkit.objectives.dropping import drop
from genkit.objectives.next_token import check_fractions, check_grid, repeat
from genkit.rng import Rng


class NextCode:
    """Cross-entropy of positions and of contents on ids of the tokenizer dqvae. Works with the backbone dq.

    Positions that cannot be are left out of the distribution, so that where only one can be nothing is learned and nothing lost: with two grains the
    finer positions follow from the coarser ones. Sums are over the pairs of each sample and divided by its number of codes.

    Args:
        position_weight: of the positions, 1 makes the sum the negative log-likelihood; the paper's two losses have half of that each.
        label_smoothing: of the contents.
        cond_drop: probability in [0, 1] with which a label is dropped.
    """

    target = "ids"
    asks = "codes in turn"
    draws = "next"

    def __init__(self, *, position_weight: float = 1.0, label_smoothing: float = 0.0, cond_drop: float = 0.1):
        check_fractions(label_smoothing=label_smoothing, cond_drop=cond_drop)
        if position_weight < 0:
            raise UsageError(f"objective.position_weight={position_weight} must not be negative")
        self.position_weight, self.label_smoothing, self.cond_drop = position_weight, label_smoothing, cond_drop
        self.num_grains = 0

    def bind(self, tokenizer: Any) -> None:
        """The tokenizer of the ids. Raises UsageError for one whose ids do not vary in density."""
        if not getattr(tokenizer, "num_grains", None):
            word = type(tokenizer).__module__.rpartition(".")[2]
            raise UsageError(
                f"objective.type=next_code needs a tokenizer whose ids vary in density (dqvae); tokenizer.from is a {word}"
            )
        self.num_grains = tokenizer.num_grains

    def __call__(self, model: Any, target: Tensor, cond: Cond, layout: Layout, rng: Rng) -> dict[str, Tensor]:
        """{"content", "position": [B] nats per code, "_accuracy", "_codes": [B]} for ids target [B, 1, Y, X]."""
        check_grid(target, layout)
        assert layout.grid is not None
        sequence = GrainSequence(layout.grid, self.num_grains)
        positions, contents = sequence.encode(target)  # [B, n]
        at = sequence.progress(positions)
        now = at.first(positions.shape[1])
        where, what = model((positions, contents, now.grain), None, drop(cond, self.cond_drop, rng), layout)
        where = where.float().masked_fill(~sequence.allowed(now), -torch.inf)
        is_code, is_pair = contents >= 0, positions >= 0
        count = is_code.sum(1)

        def per_code(logits: Tensor, answers: Tensor, counted: Tensor, smoothing: float) -> Tensor:
            nll = cross_entropy(
                logits.flatten(0, 1), answers.clamp_min(0).flatten(), reduction="none", label_smoothing=smoothing
            )
            return nll.view(answers.shape).masked_fill(~counted, 0).sum(1) / count

        # Behind the end the answer -1 stands for position 0, which may not be allowed: its loss is infinite, and masked.
        where = where.masked_fill(~is_pair.unsqueeze(-1), 0)
        with torch.no_grad():
            is_right = what.gather(-1, contents.clamp_min(0).unsqueeze(-1)).squeeze(-1) >= what.amax(-1)
        return {
            "content": per_code(what.float(), contents, is_code, self.label_smoothing),
            "position": self.position_weight * per_code(where, positions, is_pair, 0.0),
            "_accuracy": (is_right & is_code).sum(1) / count,
            "_codes": count.float(),
        }

    def predictor(self, model: Any, cond: Cond, layout: Layout) -> PredictNext:
        """What samplers of sequences call."""
        return NextCodes(model, self.num_grains, cond, layout)


class NextCodes:
    """PredictNext over positions and contents in turn; a sequence is [position, content, position, ...]. Behind its end a sequence says nothing more."""

    def __init__(self, model: Any, num_grains: int, cond: Cond, layout: Layout):
        assert layout.grid is not None
        self.model, self.cond, self.layout = model, cond, layout
        self.sequence = GrainSequence(layout.grid, num_grains)
        self.codebook_size: int = model.config.codebook_size
        self.counts: Sequence[int] = [1] * (2 * self.sequence.length)
        self.shape: tuple[int, ...] = (1, *layout.grid)

    def __call__(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        pairs = ids[:, : ids.shape[1] // 2 * 2].unflatten(1, (-1, 2))
        positions, contents = pairs.unbind(-1)  # [B, n] each
        if ids.shape[1] % 2 == 0:
            hidden, at = self._contexts(positions, contents, cache)
            logits = self.model.position_logits(hidden[:, -1:])
            return logits.masked_fill(~self.sequence.allowed(at)[:, -1:], -torch.inf)
        position = ids[:, -1:]
        positions = torch.cat([positions, position], dim=1)
        if cache is None:
            hidden, _ = self._contexts(positions[:, :-1], contents, None)
            logits = self.model.content_logits(hidden, positions)[:, -1:]
        else:
            if cache.get("seen", 0) < positions.shape[1]:
                self._contexts(positions[:, :-1], contents, cache)
            hidden = cache["hidden"]
            logits = self.model.content_logits(hidden, positions[:, -hidden.shape[1] :], cache)[:, -1:]
            cache["hidden"] = hidden[:, :0]
        # An end has no content: an id that is certain says nothing and costs nothing.
        is_end = self.sequence.region.to(position.device)[position] < 0  # [B, 1]
        nothing = torch.full_like(logits[:1, :1], -torch.inf)
        nothing[..., 0] = 0
        return torch.where(is_end.unsqueeze(-1), nothing, logits)

    def _contexts(self, positions: Tensor, contents: Tensor, cache: Cache | None) -> tuple[Tensor, Any]:
        at = self.sequence.progress(positions)
        is_end = self.sequence.region.to(positions.device)[positions] < 0
        contents = contents.masked_fill(is_end, -1)
        if cache is None:
            return self.model.contexts(positions, contents, at.grain, self.cond), at
        cache.setdefault("num_tokens", self.sequence.length)
        before = cache.get("seen", 0)
        known = max(0, before - 1)
        hidden = self.model.contexts(positions[:, known:], contents[:, known:], at.grain[:, before:], self.cond, cache)
        # Those whose contents are still to be read.
        cache["hidden"] = torch.cat([cache["hidden"], hidden], dim=1) if "hidden" in cache else hidden
        return hidden, at

    def repeated(self, times: int) -> NextCodes:
        return NextCodes(self.model, self.sequence.num_grains, repeat(self.cond, times), self.layout)

    def to_sequence(self, ids: Tensor) -> Tensor:
        """Raises UsageError for images of which only a part is given: what of them is coded how finely is not known."""
        if bool((ids < 0).all()):
            return ids.new_full((len(ids), len(self.counts)), -1)
        raise UsageError("this generator draws where codes are before it draws them; it cannot go on from given ids")

    def to_ids(self, sequence: Tensor) -> Tensor:
        positions, contents = sequence.unflatten(1, (-1, 2)).unbind(-1)
        return self.sequence.decode(positions, contents)

    def is_over(self, ids: Tensor) -> bool:
        if ids.shape[1] % 2 or ids.shape[1] == 0:
            return False
        is_last = ids[:, ::2] == self.sequence.ends[-1]
        return bool(is_last.any(1).all())
