"""The most likely sequences instead of drawn ones: beam search, and beam search in groups that avoid each other.

Vijayakumar et al., "Diverse Beam Search: Decoding Diverse Solutions from Neural Sequence Models", AAAI 2018, with Hamming diversity. Behaviour as in
ashwinkalyan/dbs, but for its staggered groups (the same result), its tables of finished beams (images end together) and its token for unknown words.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from genkit.errors import UsageError
from genkit.interfaces import Cache, OnStep, PredictNext
from genkit.rng import Rng
from genkit.samplers.autoregressive import check_ids


class Beam:
    """For every sample a search of its own; which of its sequences is returned is decided by the sample's stream.

    At a step the groups choose in turn. Group g scores the continuation of its beam b by y as S_b + log p(y | b) - diversity (beams of groups before it
    that have just chosen y) and keeps its best num_beams / num_groups. S carries the penalties on. With one group it is plain beam search.

    The groups see the same logits and differ only by the penalties: with num_groups beams of one each, every group is a greedy search that avoids what
    the others have just chosen.

    Args:
        num_beams: of all groups together.
        num_groups: divides num_beams.
        diversity: strength of the penalty, 0.2 to 0.8 in the paper.
        temperature: divides the logits.
        pick: which sequence becomes the sample: "best", the one of highest log-likelihood, or "any", drawn evenly.

    Raises: UsageError for numbers that do not divide, and for generators that draw several ids in a step.
    """

    def __init__(
        self,
        *,
        num_beams: int = 4,
        num_groups: int = 1,
        diversity: float = 0.5,
        temperature: float = 1.0,
        pick: Literal["best", "any"] = "best",
    ):
        if num_beams < 1 or num_groups < 1 or num_beams % num_groups:
            raise UsageError(f"sampler.num_groups={num_groups} must divide sampler.num_beams={num_beams}")
        if diversity < 0:
            raise UsageError(f"sampler.diversity={diversity} must not be negative")
        if temperature <= 0:
            raise UsageError(f"sampler.temperature={temperature} must be positive")
        self.num_beams, self.num_groups, self.pick = num_beams, num_groups, pick
        self.diversity, self.temperature = diversity, temperature

    def __call__(self, predict: PredictNext, start: Tensor, rng: Rng, on_step: OnStep | None = None) -> Tensor:
        """ids [B, *predict.shape]; ids given in the start (not -1) are kept."""
        given = predict.to_sequence(start)
        check_ids(given, predict.codebook_size)
        sequences, likelihood = self.search(predict, given, on_step)
        if self.pick == "best":
            chosen = likelihood.argmax(1)
        else:
            chosen = rng.fork("beam").integers(self.num_beams, 1)[:, 0].to(start.device)
        return predict.to_ids(sequences[torch.arange(len(sequences), device=start.device), chosen])

    def search(self, predict: PredictNext, given: Tensor, on_step: OnStep | None = None) -> tuple[Tensor, Tensor]:
        """Every beam of every sample: sequences [B, num_beams, N], group after group, each with the best score first, and their log-likelihoods
        [B, num_beams] in nats.

        Args:
            given: [B, N], -1 where an id is to be found.
        """
        if any(count != 1 for count in predict.counts):
            raise UsageError("sampler.type=beam follows sequences id by id; this generator draws several ids in a step")
        B, N = given.shape
        K, G, per = self.num_beams, self.num_groups, self.num_beams // self.num_groups
        device = given.device
        ids = given.repeat_interleave(K, 0)  # [B K, N]
        scores = torch.zeros(B, K, device=device)  # with penalties
        likelihood = torch.zeros(B, K, device=device)
        first_row = torch.arange(B, device=device).unsqueeze(1) * K  # of each sample in the flattened batch
        cache: Cache = {}
        of_beams = predict.repeated(K)
        for step in range(N):
            logits = of_beams(ids[:, :step], cache)[:, -1].float().unflatten(0, (B, K))
            log_p = (logits / self.temperature).log_softmax(-1)  # [B, K, S]
            S = log_p.shape[-1]
            fixed = given[:, step]
            if bool((fixed >= 0).any()):
                others = torch.arange(S, device=device) != fixed.clamp_min(0).unsqueeze(1)
                log_p = log_p.masked_fill((others & (fixed >= 0).unsqueeze(1)).unsqueeze(1), -torch.inf)
            used = torch.zeros(B, S, device=device)
            parents, chosen, new_scores, new_likelihood = [], [], [], []
            for g in range(G):
                own = slice(g * per, (g + 1) * per)
                penalised = scores[:, own].unsqueeze(2) + log_p[:, own] - self.diversity * used.unsqueeze(1)
                if step == 0:  # all beams of a group are the same sequence: one is continued
                    penalised = torch.cat([penalised[:, :1], torch.full_like(penalised[:, 1:], -torch.inf)], dim=1)
                best = penalised.flatten(1).topk(per, dim=1)  # [B, per]
                parent, y = best.indices // S + g * per, best.indices % S
                used.scatter_add_(1, y, torch.ones_like(best.values))
                parents.append(parent)
                chosen.append(y)
                new_scores.append(best.values)
                own_p = log_p.flatten(1).gather(1, parent * S + y)
                new_likelihood.append(likelihood.gather(1, parent) + own_p)
            scores, likelihood = torch.cat(new_scores, dim=1), torch.cat(new_likelihood, dim=1)
            rows = (torch.cat(parents, dim=1) + first_row).flatten()
            if not torch.equal(rows, torch.arange(B * K, device=device)):
                ids = ids[rows]
                reorder(cache, rows, B * K)
            ids[:, step] = torch.cat(chosen, dim=1).flatten()
            if on_step is not None:
                on_step(step, N, predict.to_ids(ids.view(B, K, N)[:, 0]))
        return ids.view(B, K, N), likelihood


def reorder(cache: Cache, rows: Tensor, batch: int) -> None:
    """Sample i of everything in a cache goes on as sample rows[i]. Guided caches hold twice the batch, in two halves."""
    for name, value in cache.items():
        if isinstance(value, dict):
            reorder(value, rows, batch)
        elif isinstance(value, Tensor):
            cache[name] = value[_for(rows, value.shape[0], batch)]
        elif hasattr(value, "select"):
            value.select(_for(rows, value.batch, batch))
        elif isinstance(value, tuple | list):
            cache[name] = type(value)(
                part[_for(rows, part.shape[0], batch)] if isinstance(part, Tensor) else part for part in value
            )


def _for(rows: Tensor, held: int, batch: int) -> Tensor:
    """The rows of a cache that holds the batch once or, half after half, twice."""
    return torch.cat([rows + batch * half for half in range(held // batch)])
