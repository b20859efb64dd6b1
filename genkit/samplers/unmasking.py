"""How many tokens are still masked, step by step: what samplers of masked generators share, and their training too.

Chang et al., "MaskGIT", CVPR 2022, section 3.1 and appendix; schedules as in google-research/maskgit libml/mask_schedule.py, and arccos as in Besnier et al.,
"Halton Scheduler for Masked Generative Image Transformer", ICLR 2025.
"""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

from genkit.errors import UsageError

POWERS = {"linear": 1.0, "square": 2.0, "cubic": 3.0, "sqrt": 0.5}
KNOWN = "cosine, arccos, linear, square, cubic, sqrt, log, exp, or pow and a number as in pow2.5"


def power_of(schedule: str) -> float | None:
    """p of the schedules 1 - r^p, None of others."""
    if match := re.fullmatch(r"pow(\d+(?:\.\d+)?)", schedule):
        return float(match[1]) or None
    return POWERS.get(schedule)


def check_schedule(schedule: str, key: str) -> None:
    """Raises UsageError for a word that is no schedule, naming the key it was set under."""
    if schedule not in ("cosine", "arccos", "log", "exp") and power_of(schedule) is None:
        raise UsageError(f"{key}={schedule} is not a schedule; known: {KNOWN}")


def gamma(r: Tensor, schedule: str, num_tokens: Tensor | int = 256) -> Tensor:
    """Masked fraction for r in [0, 1], falling from 1 to 0.

    "cosine" cos(pi r / 2), MaskGIT's choice; "arccos" 2 / pi arccos(r); "linear", "square", "cubic", "sqrt", "pow2.5" 1 - r^p; "log" -log2(r) / log2(N)
    and "exp" 1 - N^(r - 1), where a token or none is left at the end.

    Args:
        num_tokens: N, of the schedules that depend on it.
    """
    if schedule == "cosine":
        return (r * (math.pi / 2)).cos()
    if schedule == "arccos":
        return r.acos() * (2 / math.pi)
    if (power := power_of(schedule)) is not None:
        return 1 - r**power
    N = torch.as_tensor(num_tokens, dtype=r.dtype, device=r.device).clamp_min(2)
    if schedule == "log":
        return (-r.log2() / N.log2()).clamp(0, 1)
    return (1 - N ** (r - 1)).clamp(0, 1)


def counts(num_unknown: Tensor, num_steps: int, schedule: str) -> Tensor:
    """Positions of each sample still masked after each step, [num_steps, B], from the numbers [B] at the start.

    floor(gamma((step + 1) / num_steps) of them); at least one position is filled per step and one is left for the next step, while there are that many.
    """
    left, table = num_unknown, []
    for step in range(num_steps - 1):
        r = torch.tensor((step + 1) / num_steps, dtype=torch.float64, device=num_unknown.device)
        # A hair more, so that 12 (1 - 1/12) is 11.
        wanted = (num_unknown * gamma(r, schedule, num_unknown) + 1e-9).floor().long()
        left = torch.minimum(wanted.clamp_min(1), left - 1).clamp_min(0)
        table.append(left)
    return torch.stack([*table, torch.zeros_like(num_unknown)])


def check_steps(num_steps: int, num_tokens: int) -> None:
    """Raises UsageError for more steps than there are tokens to fill."""
    if num_steps > num_tokens:
        raise UsageError(
            f"sampler.num_steps={num_steps}, but a sample has {num_tokens} tokens and every step fills at least one; use {num_tokens} or fewer"
        )


def annealed(start: float, end: float | None, power: float, step: int, num_steps: int) -> float:
    """From `start` at the first step to `end` at the last, along 1 - (step / (num_steps - 1))^power."""
    if end is None or num_steps == 1:
        return start
    return end + (start - end) * (1 - (step / (num_steps - 1)) ** power)
