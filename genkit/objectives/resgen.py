"""Masked generation over residual tokens at a cost that does not depend on their depth (Kim et al., "ResGen", ICML 2025).

The levels of a place are known from the first on: a mask is a suffix in depth. For every place that has unknown levels the network gives a distribution of
one vector, the sum of their codes; which ids it stands for follows by quantising it again, level by level.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from genkit.errors import UsageError
from genkit.interfaces import Cache, Cond, Layout, PredictMixture
from genkit.nn.mixture import Mixture, lerp_logits
from genkit.objectives.dropping import drop
from genkit.rng import Rng
from genkit.samplers.resgen import deepest
from genkit.samplers.unmasking import check_schedule, gamma


class ResGen:
    """-log p of the sums of masked codes, per number of the vector.

    Per sample: r ~ U(0, 1), n = ceil(gamma(r) N Q) of the N Q cells of a sample are drawn at random; of a place that k of them lie in, the k deepest levels
    are masked (a multivariate hypergeometric distribution of k). Sums are divided by their deviation over all codes, one number per k.

    Args:
        schedule: gamma, see genkit.samplers.unmasking.
        loss: "nll" exact; "bound" by responsibilities without the weights of components, which keeps all of them in use.
        cond_drop: probability in [0, 1] that a label is dropped.
    """

    target = "ids"
    asks = "sums of codes"
    fills_holes = True  # sampling may start from what is known of an image
    lerp = staticmethod(lerp_logits)  # guidance works on the weights of components

    def __init__(self, *, schedule: str = "cosine", loss: Literal["nll", "bound"] = "nll", cond_drop: float = 0.1):
        if not 0 <= cond_drop <= 1:
            raise UsageError(f"objective.cond_drop={cond_drop} must be in [0, 1]")
        check_schedule(schedule, "objective.schedule")
        self.schedule, self.loss, self.cond_drop = schedule, loss, cond_drop
        self.codes: Codes | None = None

    def bind(self, tokenizer: Any) -> None:
        """Take the codebooks of this tokenizer. Raises UsageError for one whose codes do not add up."""
        self.codes = Codes.of(tokenizer)

    def __call__(self, model: Any, target: Tensor, cond: Cond, layout: Layout, rng: Rng) -> dict[str, Tensor]:
        """{"nll": [B]} in nats per number, for ids target [B, Q, *grid]."""
        assert self.codes is not None
        B, Q, *grid = target.shape
        N = math.prod(grid)
        num_masked = self.draw_mask(N, Q, rng)  # [B, N]
        positions = (num_masked > 0).flatten().nonzero().squeeze(1)  # [P]
        codes = self.codes.to(target.device)
        known, rest = codes.sums(target.flatten(2), num_masked)  # [B, N, C] each
        raw = model(
            known.mT.unflatten(2, grid),
            None,
            drop(cond, self.cond_drop, rng),
            layout,
            None,
            num_known=Q - num_masked,
            positions=positions,
        )
        mixture = Mixture(*(value.float() for value in raw))
        scale = codes.std[num_masked.flatten()[positions]].unsqueeze(1)  # [P, 1]
        z = rest.flatten(0, 1)[positions] / scale
        log_p = mixture.log_prob(z) if self.loss == "nll" else mixture.bound(z)
        nll = -log_p / z.shape[1]
        total = nll.new_zeros(B).index_add(0, positions // N, nll)
        return {"nll": total / (num_masked > 0).sum(1)}

    def draw_mask(self, num_tokens: int, num_levels: int, rng: Rng) -> Tensor:
        """[B, N] int64: how many levels of each place are masked, the deepest."""
        cells = num_tokens * num_levels
        r = rng.fork("ratio").uniform()
        count = (gamma(r, self.schedule, cells) * cells).ceil().clamp(1, cells)
        drawn = rng.fork("mask").order(cells) < count.unsqueeze(1)
        return drawn.view(-1, num_levels, num_tokens).sum(1)

    def predictor(self, model: Any, cond: Cond, layout: Layout) -> PredictMixture:
        """(ids [B, Q, *grid], known, cache) -> Mixture of every place, with `codes` to make ids of its vectors."""
        assert self.codes is not None
        codes = self.codes

        def predict(ids: Tensor, known: Tensor, cache: Cache | None = None) -> Mixture:
            num_masked = (~known.flatten(2)).sum(1)  # [B, N]
            sums, _ = codes.to(ids.device).sums(ids.flatten(2).clamp_min(0), num_masked)
            x, num_known = sums.mT.unflatten(2, ids.shape[2:]), ids.shape[1] - num_masked
            raw = model(x, None, cond, layout, None, num_known=num_known)
            return replace(Mixture(*(value.float() for value in raw)), codes=codes)

        return predict


@dataclass
class Codes:
    """Codebooks whose codes add up.

    Attributes:
        tables: [Q, S, C].
        std: [Q + 1], deviation of the sum of the k deepest codes, for k = 0 .. Q (1 for k = 0).
    """

    tables: Tensor
    std: Tensor

    @classmethod
    def of(cls, tokenizer: Any) -> Codes:
        """Raises UsageError for a tokenizer without codebooks."""
        Q, S = tokenizer.num_levels, tokenizer.codebook_size
        quantizer: Any = getattr(tokenizer, "quantizer", None)
        if not Q or not hasattr(quantizer, "codebook") or hasattr(tokenizer, "latent_grid"):
            raise UsageError(
                f"objective.type=resgen needs a tokenizer whose codes come from codebooks and add up, such as rvq or vq; found {type(tokenizer).__name__}"
            )
        device = tokenizer.latent_mean.device
        ids = torch.full((Q, S, Q), -1, device=device)
        ids.diagonal(dim1=0, dim2=2).copy_(torch.arange(S, device=device)[:, None].expand(S, Q))
        with torch.no_grad():
            nothing = quantizer.codes(torch.full((1, 1, Q), -1, device=device))  # what a projection adds by itself
            tables = (quantizer.codes(ids) - nothing).float()  # [Q, S, C]
        power = tables.var(dim=1, correction=0).mean(-1).flip(0).cumsum(0)  # [Q]: of the 1, 2, ... deepest
        return cls(tables, torch.cat([torch.ones_like(power[:1]), power.sqrt().clamp_min(1e-6)]))

    def to(self, device: torch.device) -> Codes:
        if self.tables.device != device:
            self.tables, self.std = self.tables.to(device), self.std.to(device)
        return self

    def sums(self, ids: Tensor, num_masked: Tensor) -> tuple[Tensor, Tensor]:
        """ids [B, Q, N] -> sums of the known codes and of the num_masked [B, N] deepest ones, [B, N, C] each."""
        Q, S, _ = self.tables.shape
        rows = ids + S * torch.arange(Q, device=ids.device)[:, None]
        codes = self.tables.flatten(0, 1)[rows]  # [B, Q, N, C]
        is_masked = deepest(num_masked, len(self.tables)).unsqueeze(-1)
        return (codes * ~is_masked).sum(1), (codes * is_masked).sum(1)

    def quantise(
        self, z: Tensor, ids: Tensor, num_masked: Tensor, sigma: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Vectors as ids: at every masked level the nearest code to what the ones before left over.

        Args:
            z: [B, N, C], sums of masked codes.
            ids: [B, Q, N], what is known.
            sigma: [B, N], the deviation of z.

        Returns: ids [B, Q, N]; with sigma, the log-probability of each new one [B, Q, N] if z is off by that much, 0 at known ones.
        """
        Q, is_masked = len(self.tables), deepest(num_masked, len(self.tables))
        found = ids.transpose(0, 1).flatten(1).clone()  # [Q, B N]
        sure, left = torch.zeros_like(found, dtype=z.dtype), z.flatten(0, 1).clone()
        for level, table in enumerate(self.tables):  # levels depend on each other; places do not
            rows = is_masked[:, level].flatten().nonzero().squeeze(1)  # [P]
            own = left.index_select(0, rows)
            # <z, e> - |e|^2 / 2 is -|z - e|^2 / 2 but for what is the same for all codes.
            scores = torch.addmm(-0.5 * table.square().sum(-1), own, table.T)  # [P, S]
            most, nearest = scores.max(-1)
            found[level].index_copy_(0, rows, nearest)
            if sigma is not None:
                precision = sigma.flatten().index_select(0, rows).square().reciprocal()
                log_p = most * precision - scores.mul_(precision.unsqueeze(1)).logsumexp(-1)
                sure[level].index_copy_(0, rows, log_p)
            if level + 1 < Q:
                left.index_copy_(0, rows, own - table.index_select(0, nearest))
        shape = (Q, *z.shape[:2])
        return found.view(shape).transpose(0, 1), None if sigma is None else sure.view(shape).transpose(0, 1)
