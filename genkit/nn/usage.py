"""How evenly codes are used: usage, perplexity, dead codes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from genkit.nn.global_rows import is_distributed


def usage(counts: Tensor, least: float = 1.0) -> dict[str, float]:
    """Use of codes from a histogram of ids, `torch.bincount(ids.flatten(), minlength=S)`.

    Args:
        counts: [S] or [Q, S], how often each code was used.
        least: a code counts as used from here on.

    Returns:
        "usage": fraction of codes that are used; "perplexity": exp of the entropy of their use, S when all are used equally; "dead": how
        many are not used. Means over the Q histograms, "dead" their sum.
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


class Usage(nn.Module):
    """Q histograms of S codes that forget: what was chosen over about the last 1 / (1 - decay) optimiser steps, on all processes together.

    Args:
        num_levels: Q.
        codebook_size: S.
        decay: share of the histograms kept per step.
    """

    recent: Tensor  # [Q, S], decayed number of rows per code

    def __init__(self, *, num_levels: int, codebook_size: int, decay: float = 0.99):
        super().__init__()
        self.decay = decay
        self.register_buffer("recent", torch.zeros(num_levels, codebook_size))
        # Plain attributes: DistributedDataParallel copies the buffers of rank 0 over those of the others before a forward pass, which
        # would replace what the others have gathered since the last update.
        self._counts: Tensor | None = None  # [Q, S] since the last step
        self._has_counted = False

    def count(self, ids: Tensor, first: int = 0) -> None:
        """Remember ids [G, N] in [0, S) for the histograms first .. first + G - 1 until `after_step`."""
        if self._counts is None or self._counts.device != ids.device:
            self._counts = torch.zeros_like(self.recent, dtype=torch.float32)
        part = self._counts[first : first + len(ids)]
        # Not bincount: on an accelerator that waits for the largest id.
        part.scatter_add_(1, ids, torch.ones((), device=ids.device).expand_as(ids))
        self._has_counted = True

    def take(self) -> Tensor | None:
        """[Q, S] counts since the last call, of all processes; None when nothing was counted. The caller zeroes them when done."""
        if not self._has_counted or self._counts is None:
            return None
        self._has_counted = False
        if is_distributed():
            dist.all_reduce(self._counts)
        return self._counts

    @torch.no_grad()
    def after_step(self) -> None:
        """Add what was counted since the last step. Every process must call it after the same optimiser steps."""
        counts = self.take()
        if counts is not None:
            self.blend(counts)
            counts.zero_()

    def blend(self, counts: Tensor) -> None:
        """Add counts [Q, S]; a histogram without any (a level left out by quantiser dropout) stays as it is."""
        self.recent.lerp_(counts, (1 - self.decay) * (counts.sum(-1, keepdim=True) > 0))

    def stats(self) -> dict[str, float]:
        """As `usage`, a code counting as used when it had a row in that time; with several levels also "usage_0", "usage_1", ..."""
        # What a single row has left of its weight at the end of that time.
        least = (1 - self.decay) * self.decay ** (self.decay / (1 - self.decay))
        levels = [usage(level, least)["usage"] for level in self.recent] if len(self.recent) > 1 else []
        return usage(self.recent, least) | {f"usage_{q}": value for q, value in enumerate(levels)}
