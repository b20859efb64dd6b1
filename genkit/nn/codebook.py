"""Tables of codes: look-up, and how they learn from the vectors assigned to them.

With `update="ema"` codes follow their vectors, k-means with exponential forgetting: van den Oord et al., "Neural Discrete Representation
Learning", 2017, appendix A.1. Differences: counts start at 1 with sums equal to the codes (a start at 0 throws every code unused in the first
step to infinity). With `update="gradient"` codes are a parameter (section 3.2, the codebook term of eq. 3, which the caller forms). Either way
the first batch is clustered before it is quantised, and codes that fell out of use are replaced by vectors of the batch. Statistics wait for
`after_step`, so that neither the number of micro-batches nor of processes changes the update.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from genkit.errors import UsageError
from genkit.kernels.nearest_code.chunked import nearest_code
from genkit.nn.global_rows import count_rows, is_distributed, take_rows
from genkit.nn.usage import Usage
from genkit.rng import Rng

Update = Literal["ema", "gradient"]

_LLOYD_STEPS = 10
_KMEANS_ROWS = 64  # per code: the most rows that k-means looks at, drawn from the whole batch
_EPSILON = 1e-5  # Laplace smoothing of the counts, in counts


def normalise(z: Tensor) -> Tensor:
    """z / |z| along the last axis; the zero vector stays zero."""
    return F.normalize(z, dim=-1, eps=1e-6)


class Codebook(Usage):
    """Tables of S codes of width d: G side by side for as many groups of rows, and that once for each of L levels of residuals.

    Look-up and statistics are in float32 whatever the precision around them.

    Args:
        num_codebooks: G.
        num_levels: L. Level l looks up in the tables l G .. l G + G - 1.
        is_shared: all levels look up in the same G tables.
        codebook_size: S.
        dim: d.
        cosine: rows and codes have length 1 and similarity is their dot product. The caller normalises the rows.
        update: "ema", or "gradient" for a table that is a parameter.
        decay: share of the statistics kept per update.
        restart: a code whose count fell below this fraction of the mean count is replaced by a random row of the batch; 0 = never.
            Values near 1 recycle live codes all the time; 0.1 to 0.3 is usual.

    Raises: UsageError for a size below 1, or decay or restart outside [0, 1).
    """

    embed: Tensor  # [T, S, d], T = G or L G tables; a parameter with update="gradient"
    embed_sum: Tensor  # [T, S, d], decayed sum of the rows assigned to each code; with update="ema"
    cluster_size: Tensor  # [T, S], decayed number of rows assigned to each code
    recent: Tensor  # [L G, S], as cluster_size but from 0 and untouched by restarts: what was really used
    initialised: Tensor  # [] bool, False until the first training batch was clustered, on every level
    num_updates: Tensor  # [] int64

    def __init__(
        self,
        *,
        num_codebooks: int = 1,
        num_levels: int = 1,
        is_shared: bool = False,
        codebook_size: int,
        dim: int,
        cosine: bool = False,
        update: Update = "ema",
        decay: float = 0.99,
        restart: float = 0.0,
    ):
        if codebook_size < 1 or dim < 1:
            raise UsageError(f"codebook_size={codebook_size} and the width of its codes, {dim}, must be at least 1")
        if not 0 <= decay < 1 or not 0 <= restart < 1:
            raise UsageError(f"decay={decay} and restart={restart} must be in [0, 1)")
        super().__init__(num_levels=num_levels * num_codebooks, codebook_size=codebook_size, decay=decay)
        self.num_codebooks, self.is_shared = num_codebooks, is_shared
        self.cosine, self.update, self.restart = cosine, update, restart
        num_tables = num_codebooks if is_shared else num_codebooks * num_levels
        embed = torch.randn(num_tables, codebook_size, dim) / math.sqrt(dim)
        embed = normalise(embed) if cosine else embed
        if update == "gradient":
            self.embed = nn.Parameter(embed)
        else:
            self.register_buffer("embed", embed)
            self.register_buffer("embed_sum", embed.clone())
        self.register_buffer("cluster_size", torch.ones(num_tables, codebook_size))
        self.register_buffer("initialised", torch.tensor(False))
        self.register_buffer("num_updates", torch.tensor(0))
        # Plain attributes for the reason given in Usage.
        self._sums: Tensor | None = None  # [T, S, d] since the last update
        self._rows: dict[int, list[Tensor]] = {}  # level -> [G, N, d] each
        self._clustered: set[int] = set()  # first tables of the levels whose codes were clustered
        self._is_ready = False  # a copy of `initialised` that costs no device synchronisation

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._is_ready = False

    @property
    def is_ready(self) -> bool:
        """Whether every table was set or clustered."""
        self._is_ready = self._is_ready or bool(self.initialised)
        return self._is_ready

    @torch.no_grad()
    def set_codes(self, embed: Tensor) -> None:
        """Use these codes [T, S, d] instead of clustering the first batch: every count 1, every sum equal to its code."""
        self._write(slice(None), embed, torch.ones_like(self.cluster_size))
        self.initialised.fill_(True)

    def forward(self, rows: Tensor, level: int = 0) -> tuple[Tensor, Tensor]:
        """rows [G, N, d] float32 -> (their nearest codes [G, N, d], ids [G, N] int64); no gradient reaches the rows.

        In training mode the assignment is remembered for `after_step`; the codes returned are those before that update.
        """
        rows = rows.detach()
        if self.training and not self.is_ready and self._first(level) not in self._clustered:
            self._cluster(rows, self._first(level))
        ids = self.search(rows, self.table(level).detach().float())
        if self.training:
            self._remember(rows, ids, level)
        return self.codes(ids, level), ids

    def search(self, rows: Tensor, table: Tensor) -> Tensor:
        """rows [G, N, d], table [G, S, d] -> ids [G, N]. What "nearest" means, for a subclass to change."""
        return nearest_code(rows, table, cosine=self.cosine)

    def start(self, rows: Tensor, codes: Tensor) -> Tensor:
        """Rows [..., R, d] as new codes beside codes [..., S, d], for a subclass to change."""
        return rows

    def codes(self, ids: Tensor, level: int = 0) -> Tensor:
        """ids [G, N] in [0, S) -> codes [G, N, d]; with update="gradient" the table receives their gradient."""
        G, S = self.num_codebooks, self.embed.shape[1]
        return F.embedding(ids + S * torch.arange(G, device=ids.device)[:, None], self.table(level).flatten(0, 1))

    def table(self, level: int = 0) -> Tensor:
        """[G, S, d], the codes of a level."""
        first = self._first(level)
        table = self.embed[first : first + self.num_codebooks]
        return normalise(table) if self.cosine and self.update == "gradient" else table

    def _first(self, level: int) -> int:
        return 0 if self.is_shared else level * self.num_codebooks

    def _remember(self, rows: Tensor, ids: Tensor, level: int = 0) -> None:
        """Keep what `after_step` learns from: rows [G, N, d] without gradient and their ids [G, N]."""
        self.count(ids, level * self.num_codebooks)
        if self.update == "ema":
            if self._sums is None or self._sums.device != rows.device:
                self._sums = torch.zeros_like(self.embed, dtype=torch.float32)
            _add_rows(self._sums[self._first(level) :][: self.num_codebooks], rows, ids)
        if self.restart:
            self._rows.setdefault(level, []).append(rows)

    @torch.no_grad()
    def after_step(self) -> None:
        """One update from everything assigned since the last one, over all micro-batches and processes.

        Every process must call it after the same optimiser steps. Statistics that are not finite are dropped: one bad batch would
        stay in the table for ever.
        """
        counts, sums = self.take(), self._sums
        if counts is None:
            return
        if sums is not None and is_distributed():
            dist.all_reduce(sums)
        if sums is None or bool(sums.sum().isfinite()):
            self.blend(counts)
            per_table = counts.unflatten(0, (-1, len(self.embed))).sum(0)  # [T, S]
            # N <- decay N + (1 - decay) n, M <- decay M + (1 - decay) s, E <- M / smoothed N, for the tables that were used
            weight = (1 - self.decay) * (per_table.sum(-1, keepdim=True) > 0)  # [T, 1]
            self.cluster_size.lerp_(per_table, weight)
            if sums is not None:
                self.embed_sum.lerp_(sums, weight[..., None])
                self._divide()
            if self.restart:
                self._restart()
            self.num_updates += 1
        counts.zero_()
        if sums is not None:
            sums.zero_()
        self._rows = {}

    def _divide(self) -> None:
        total = self.cluster_size.sum(-1, keepdim=True)  # [T, 1]
        smoothed = (self.cluster_size + _EPSILON) / (total + self.cluster_size.shape[1] * _EPSILON) * total
        torch.div(self.embed_sum, smoothed.unsqueeze(-1), out=self.embed)
        if self.cosine:
            self.embed.copy_(normalise(self.embed))

    def _restart(self) -> None:
        """Codes that are hardly used start again at random rows of the batch, with the count of an average code."""
        mean = self.cluster_size.mean(-1)  # [T]
        dead = self.cluster_size < self.restart * mean[:, None]  # [T, S]
        if not bool(dead.any()):
            return
        levels = {level: torch.cat(parts, dim=1) for level, parts in self._rows.items()}  # [G, N, d] each
        if self.is_shared:
            # All levels of a row side by side: neither micro-batches nor processes then change the order of the rows.
            levels = {0: torch.stack(list(levels.values()), dim=2).flatten(1, 2)}
        for level, rows in levels.items():
            total, first = count_rows(rows)
            for g in range(len(rows)):
                table = self._first(level) + g
                which = dead[table].nonzero().squeeze(1)  # [R]
                if not len(which):
                    continue
                fresh = take_rows(rows[g], self._draw(total, len(which), table), first)
                if bool(fresh.sum().isfinite()):
                    fresh = self.start(fresh, self.embed.data[table])
                    self._write((table, which), fresh, mean[table].expand(len(which)))

    def _write(self, where: Any, codes: Tensor, counts: Tensor) -> None:
        """Put codes [..., d] with counts [...] in a place of the tables."""
        # `.data`: clustering writes between the look-ups of two levels, and must not invalidate what the first saved for its gradient.
        self.embed.data[where] = codes.to(self.embed.dtype)
        self.cluster_size[where] = counts
        if self.update == "ema":
            self.embed_sum[where] = (codes * counts[..., None]).to(self.embed_sum.dtype)

    def _draw(self, total: int, count: int, stream: int) -> Tensor:
        """[count] int64 random numbers below `total`: each at most once where there are enough. Equal on every process."""
        rng = Rng([int(self.num_updates)], stream=stream)
        drawn = rng.order(total)[0, :count] if count <= total else rng.integers(total, count)[0]
        return drawn.to(self.embed.device)

    @torch.no_grad()
    def _cluster(self, rows: Tensor, first_table: int = 0) -> None:
        """Lloyd's k-means on at most 64 S rows of the whole batch, for G tables. Empty clusters keep their centre.

        Of the first optimiser step it sees the first micro-batch alone: that one's codes are wanted before the next one exists.
        """
        T, S, _ = self.embed.shape
        G = len(rows)
        total, first = count_rows(rows)
        subset = self._draw(total, min(total, _KMEANS_ROWS * S), T).sort().values
        sample = torch.stack([take_rows(rows[g], subset, first) for g in range(G)])  # [G, R, d]
        if not bool(sample.sum().isfinite()):
            return  # a broken batch: the next one is clustered instead
        centres = torch.stack([sample[g, self._draw(len(subset), S, first_table + g)] for g in range(G)])  # [G, S, d]
        for _ in range(_LLOYD_STEPS):
            counts, sums = centres.new_zeros(G, S), torch.zeros_like(centres)
            ids = nearest_code(sample, centres, cosine=self.cosine)
            counts.scatter_add_(1, ids, counts.new_ones(()).expand_as(ids))
            _add_rows(sums, sample, ids)
            means = normalise(sums) if self.cosine else sums / counts.clamp_min(1)[..., None]
            centres = torch.where(counts[..., None] > 0, means, centres)
        self._write(slice(first_table, first_table + G), self.start(centres, centres), counts)
        self._clustered.add(first_table)
        if len(self._clustered) * G == T:
            self.initialised.fill_(True)


def _add_rows(sums: Tensor, rows: Tensor, ids: Tensor) -> None:
    """sums [G, S, d] += sum of rows [G, N, d] per code, ids [G, N].

    A scatter-add: the product of a one-hot matrix with the rows costs as much as the search itself.
    """
    G, S, d = sums.shape
    flat = (ids + S * torch.arange(G, device=ids.device)[:, None]).flatten()  # [G N]
    sums.view(G * S, d).index_add_(0, flat, rows.reshape(-1, d))
