"""The ids of each scale given those of the coarser ones (Tian et al., "Visual Autoregressive Modeling", VAR, NeurIPS 2024).

On ids of the tokenizer `nfig` a scale is a band of frequencies (Huang et al., "NFIG: Autoregressive Image Generation with Next-Frequency Prediction", 2025).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from genkit.errors import UsageError
from genkit.interfaces import Cache, Cond, Layout, PredictNext
from genkit.objectives.dropping import drop
from genkit.objectives.next_token import check_fractions, losses, repeat
from genkit.rng import Rng


class NextScale:
    """Cross-entropy of every id, the mean over the ids of all scales of each sample. Works with the backbone var.

    Args:
        label_smoothing: of the cross-entropy.
        cond_drop: probability in [0, 1] with which a label is dropped.
    """

    target = "ids"
    asks = "scales"
    draws = "next"

    def __init__(self, *, label_smoothing: float = 0.0, cond_drop: float = 0.1):
        check_fractions(label_smoothing=label_smoothing, cond_drop=cond_drop)
        self.label_smoothing, self.cond_drop = label_smoothing, cond_drop
        self.tokenizer: Any = None

    def bind(self, tokenizer: Any) -> None:
        """The tokenizer of the ids: what a scale is shown are sums of its codes. Raises UsageError for one that has no scales."""
        if not hasattr(tokenizer, "next_inputs"):
            word = type(tokenizer).__module__.rpartition(".")[2]
            raise UsageError(
                f"objective.type=next_scale needs a tokenizer that codes scale after scale (var_vq, nfig); tokenizer.from is a {word}"
            )
        self.tokenizer = tokenizer

    def __call__(self, model: Any, target: Tensor, cond: Cond, layout: Layout, rng: Rng) -> dict[str, Tensor]:
        """{"nll": [B] nats per id, "_accuracy": [B]} for ids target [B, 1, N]."""
        with torch.no_grad():
            shown = self.tokenizer.next_inputs(target)
        logits = model(shown, None, drop(cond, self.cond_drop, rng), layout).float()  # [B, N, S]
        return losses(logits, target[:, 0], self.label_smoothing)

    def predictor(self, model: Any, cond: Cond, layout: Layout) -> PredictNext:
        """What samplers of sequences call."""
        return NextScales(model, self.tokenizer.quantizer, cond, layout)


class NextScales:
    """PredictNext over scales. A cache holds the sum of codes so far beside the keys and values of the network."""

    def __init__(self, model: Any, quantizer: Any, cond: Cond, layout: Layout):
        self.model, self.quantizer, self.cond, self.layout = model, quantizer, cond, layout
        self.codebook_size: int = model.config.codebook_size
        self.counts: Sequence[int] = [p * p for p in self.quantizer.patch_sizes]
        self.shape: tuple[int, ...] = (1, sum(self.counts))

    def __call__(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        step = next(k for k in range(len(self.counts)) if sum(self.counts[:k]) == ids.shape[1])
        logits = self.model(self._shown(ids, step, cache), None, self.cond, self.layout, cache)
        return logits[:, -self.counts[step] :]

    def _shown(self, ids: Tensor, step: int, cache: Cache | None) -> Tensor:
        """What the scales up to this one are shown, with a cache those of them that it does not know: [B, n, C]."""
        first = 0 if cache is None else cache.get("scales", 0)
        if cache is not None:
            cache["scales"] = step
        if step == 0:
            return self.model.embed.weight.new_zeros(len(ids), 0, self.quantizer.dim)
        if first == 0 or cache is None:
            shown = self.quantizer.next_inputs(ids)
            if cache is not None:
                cache["total"] = self.quantizer.sums(ids)[-1]
            return shown if first == 0 else shown[:, sum(self.counts[1 : first + 1]) :]
        parts = []
        for k in range(first, step):
            of_scale = ids[:, sum(self.counts[:k]) : sum(self.counts[: k + 1])]
            cache["total"], shown = self.quantizer.add_scale(cache["total"], of_scale, k)
            parts.append(shown.flatten(2).mT)
        return torch.cat(parts, dim=1)

    def repeated(self, times: int) -> NextScales:
        return NextScales(self.model, self.quantizer, repeat(self.cond, times), self.layout)

    def to_sequence(self, ids: Tensor) -> Tensor:
        return ids[:, 0]

    def to_ids(self, sequence: Tensor) -> Tensor:
        return sequence[:, None]

    def is_over(self, ids: Tensor) -> bool:
        return False
