"""A table of codes that follows the vectors assigned to it: k-means with exponential forgetting.

van den Oord et al., "Neural Discrete Representation Learning", 2017, appendix A.1. Differences: counts start at 1 with sums equal to the
codes (a start at 0 throws every code unused in the first step to infinity); the first batch is clustered before it is quantised; codes
that fell out of use are replaced by vectors of the batch. Statistics wait for `after_step`, so that neither the number of micro-batches nor
of processes changes the update.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from genkit.kernels.nearest_code.chunked import nearest_code
from genkit.nn.global_rows import count_rows, is_distributed, take_rows
from genkit.rng import Rng

_LLOYD_STEPS = 10
_KMEANS_ROWS = 64  # per code: the most rows that k-means looks at, drawn from the whole batch
_EPSILON = 1e-5  # Laplace smoothing of the counts, in counts


def normalise(z: Tensor) -> Tensor:
    """z / |z| along the last axis; the zero vector stays zero."""
    return F.normalize(z, dim=-1, eps=1e-6)


class Codebook(nn.Module):
    """G independent tables of S codes of width d. Look-up and statistics are in float32 whatever the precision around them.

    Args:
        num_codebooks: G.
        codebook_size: S.
        dim: d.
        cosine: rows and codes have length 1 and similarity is their dot product. The caller normalises the rows.
        decay: share of the statistics kept per update.
        restart: a code whose count fell below this fraction of the mean count is replaced by a random row of the batch; 0 = never.
            Values near 1 recycle live codes all the time; 0.1 to 0.3 is usual.
    """

    embed: Tensor  # [G, S, d]
    embed_sum: Tensor  # [G, S, d], decayed sum of the rows assigned to each code
    cluster_size: Tensor  # [G, S], decayed number of rows assigned to each code
    recent: Tensor  # [G, S], as cluster_size but from 0 and untouched by restarts: what was really used
    initialised: Tensor  # [] bool, False until the first training batch was clustered
    num_updates: Tensor  # [] int64

    def __init__(
        self,
        *,
        num_codebooks: int = 1,
        codebook_size: int,
        dim: int,
        cosine: bool = False,
        decay: float = 0.99,
        restart: float = 0.0,
    ):
        super().__init__()
        self.cosine, self.decay, self.restart = cosine, decay, restart
        embed = torch.randn(num_codebooks, codebook_size, dim) / math.sqrt(dim)
        self.register_buffer("embed", normalise(embed) if cosine else embed)
        self.register_buffer("embed_sum", self.embed.clone())
        self.register_buffer("cluster_size", torch.ones(num_codebooks, codebook_size))
        self.register_buffer("recent", torch.zeros(num_codebooks, codebook_size))
        self.register_buffer("initialised", torch.tensor(False))
        self.register_buffer("num_updates", torch.tensor(0))
        # Plain attributes: DistributedDataParallel copies the buffers of rank 0 over those of the others before a forward pass, which
        # would replace what the others have gathered since the last update.
        self._counts: Tensor | None = None  # [G, S]
        self._sums: Tensor | None = None  # [G, S, d]
        self._rows: list[Tensor] = []  # [G, N, d] each
        self._is_ready = False  # a copy of `initialised` that costs no device synchronisation

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._is_ready = False

    def set_codes(self, embed: Tensor) -> None:
        """Use these codes [G, S, d] instead of clustering the first batch: every count 1, every sum equal to its code."""
        self.embed.copy_(embed)
        self.embed_sum.copy_(embed)
        self.cluster_size.fill_(1.0)
        self.initialised.fill_(True)

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """rows [G, N, d] float32 -> (their nearest codes [G, N, d], ids [G, N] int64), neither with a gradient.

        In training mode the assignment is remembered for `after_step`; the codes returned are those before that update.
        """
        rows = rows.detach()
        if self.training and not self._is_ready:
            if not bool(self.initialised):
                self._cluster(rows)
            self._is_ready = bool(self.initialised)
        ids = nearest_code(rows, self.embed.float(), cosine=self.cosine)
        if self.training:
            self._remember(rows, ids)
        return self.codes(ids), ids

    def codes(self, ids: Tensor) -> Tensor:
        """ids [G, N] in [0, S) -> codes [G, N, d]."""
        G, S, _ = self.embed.shape
        return F.embedding(ids + S * torch.arange(G, device=ids.device)[:, None], self.embed.flatten(0, 1))

    def _remember(self, rows: Tensor, ids: Tensor) -> None:
        if self._counts is None or self._sums is None or self._counts.device != rows.device:
            self._counts, self._sums = torch.zeros_like(self.cluster_size), torch.zeros_like(self.embed)
        _add_statistics(self._counts, self._sums, rows, ids)
        # An empty entry marks that there is something to update from when restarts, which need the rows themselves, are off.
        self._rows.append(rows if self.restart else rows[:, :0])

    @torch.no_grad()
    def after_step(self) -> None:
        """One update from everything assigned since the last one, over all micro-batches and processes.

        Every process must call it after the same optimiser steps. Statistics that are not finite are dropped: one bad batch would
        stay in the table for ever.
        """
        if not self._rows:
            return
        counts, sums = self._counts, self._sums
        assert counts is not None
        assert sums is not None
        if is_distributed():
            dist.all_reduce(counts)
            dist.all_reduce(sums)
        if bool(sums.sum().isfinite()):
            # N <- decay N + (1 - decay) n, M <- decay M + (1 - decay) s, E <- M / smoothed N
            self.cluster_size.lerp_(counts, 1 - self.decay)
            self.embed_sum.lerp_(sums, 1 - self.decay)
            self.recent.lerp_(counts, 1 - self.decay)
            self._divide()
            if self.restart:
                self._restart(torch.cat(self._rows, dim=1))
            self.num_updates += 1
        counts.zero_()
        sums.zero_()
        self._rows = []

    def _divide(self) -> None:
        total = self.cluster_size.sum(-1, keepdim=True)  # [G, 1]
        smoothed = (self.cluster_size + _EPSILON) / (total + self.cluster_size.shape[1] * _EPSILON) * total
        torch.div(self.embed_sum, smoothed.unsqueeze(-1), out=self.embed)
        if self.cosine:
            self.embed.copy_(normalise(self.embed))

    def _restart(self, rows: Tensor) -> None:
        """Codes that are hardly used start again at random rows of the batch, with the count of an average code."""
        mean = self.cluster_size.mean(-1)  # [G]
        dead = self.cluster_size < self.restart * mean[:, None]  # [G, S]
        if not bool(dead.any()):
            return
        total, first = count_rows(rows)
        for g in range(len(dead)):
            which = dead[g].nonzero().squeeze(1)  # [R]
            if not len(which):
                continue
            fresh = take_rows(rows[g], self._draw(total, len(which), g), first)
            self.embed[g, which] = fresh
            self.embed_sum[g, which] = fresh * mean[g]
            self.cluster_size[g, which] = mean[g]

    def _draw(self, total: int, count: int, group: int) -> Tensor:
        """[count] int64 random numbers below `total`: each at most once where there are enough. Equal on every process."""
        rng = Rng([int(self.num_updates)], stream=group)
        drawn = rng.order(total)[0, :count] if count <= total else rng.integers(total, count)[0]
        return drawn.to(self.embed.device)

    @torch.no_grad()
    def _cluster(self, rows: Tensor) -> None:
        """Lloyd's k-means on at most 64 S rows of the whole first batch. Empty clusters keep their centre."""
        G, S, _ = self.embed.shape
        total, first = count_rows(rows)
        subset = self._draw(total, min(total, _KMEANS_ROWS * S), G).sort().values
        sample = torch.stack([take_rows(rows[g], subset, first) for g in range(G)])  # [G, R, d]
        if not bool(sample.sum().isfinite()):
            return  # a broken batch: the next one is clustered instead
        centres = torch.stack([sample[g, self._draw(len(subset), S, g)] for g in range(G)])  # [G, S, d]
        counts, sums = torch.zeros_like(self.cluster_size), torch.zeros_like(self.embed)
        for _ in range(_LLOYD_STEPS):
            counts.zero_()
            sums.zero_()
            _add_statistics(counts, sums, sample, nearest_code(sample, centres, cosine=self.cosine))
            means = normalise(sums) if self.cosine else sums / counts.clamp_min(1)[..., None]
            centres = torch.where(counts[..., None] > 0, means, centres)
        self.embed.copy_(centres)
        self.embed_sum.copy_(centres * counts[..., None])
        self.cluster_size.copy_(counts)
        self.initialised.fill_(True)

    def stats(self) -> dict[str, float]:
        """Use of the codes over about the last 1 / (1 - decay) updates.

        Returns:
            "usage": fraction of codes with at least one row in that time; "perplexity": exp of the entropy of their use, S when all
            are used equally; "dead": how many have had no row. Means over the G tables, "dead" their sum.
        """
        # What is left in `recent` of a single row after 1 / (1 - decay) updates.
        least = (1 - self.decay) * self.decay ** (1 / (1 - self.decay)) if self.decay < 1 else 0.0
        return usage(self.recent, least)


def usage(counts: Tensor, least: float = 1.0) -> dict[str, float]:
    """Use of codes from a histogram of ids, `torch.bincount(ids.flatten(), minlength=S)`.

    Args:
        counts: [S] or [G, S], how often each code was used.
        least: a code counts as used from here on.
    """
    counts = counts.double().reshape(-1, counts.shape[-1])
    is_used = counts >= least
    share = counts / counts.sum(-1, keepdim=True).clamp_min(1e-30)
    entropy = -torch.special.xlogy(share, share).sum(-1)  # nats
    return {
        "usage": is_used.double().mean().item(),
        "perplexity": entropy.exp().mean().item(),
        "dead": float((~is_used).sum()),
    }


def _add_statistics(counts: Tensor, sums: Tensor, rows: Tensor, ids: Tensor) -> None:
    """counts [G, S] += number of rows, sums [G, S, d] += sum of rows, per code.

    A scatter-add: the product of a one-hot matrix with the rows costs as much as the search itself.
    """
    G, S, d = sums.shape
    flat = (ids + S * torch.arange(G, device=ids.device)[:, None]).flatten()  # [G N]
    counts += torch.bincount(flat, minlength=G * S).reshape(G, S)
    sums.view(G * S, d).index_add_(0, flat, rows.reshape(-1, d))
