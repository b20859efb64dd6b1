"""Distances between sets of points, and between collections of such sets: how generated 3D shapes are judged.

Conventions of PointFlow (Yang et al. 2019, arXiv:1906.12320; `stevenygd/PointFlow metrics/evaluation_metrics.py`), whose names the results keep. Others
exist: Chamfer distances without the square, with a mean or a maximum of both ways, times 1000. Print which one a number is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from genkit.errors import UsageError
from genkit.metrics.neighbours import BLOCK
from genkit.optional import require


def nearest_squared(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distance of every point to the nearest of the other set, from differences: no rounding below zero for close clouds.

    Args:
        x: [*pairs, P, A], A coordinates.
        y: [*pairs, R, A].

    Returns: [*pairs, P] from x to y, and [*pairs, R] from y to x.
    """
    if 0 in (x.shape[-2], y.shape[-2]):
        raise UsageError(f"sets of {x.shape[-2]} and {y.shape[-2]} points have no nearest points")
    distance = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    return distance.amin(-1).square(), distance.amin(-2).square()


def chamfer(x: Tensor, y: Tensor) -> Tensor:
    """Chamfer distance of pairs of sets: mean squared distance to the nearest point, both ways summed.

    Args:
        x: [*pairs, P, A].
        y: [*pairs, R, A].

    Returns: [*pairs].
    """
    forth, back = nearest_squared(x, y)
    return forth.mean(-1) + back.mean(-1)


def earth_mover(x: Tensor, y: Tensor) -> Tensor:
    """Exact earth mover's distance of pairs of sets: mean Euclidean (not squared) distance under the best one-to-one assignment.

    Solved on the CPU by scipy, in O(P^3): 0.03 s a pair at 256 points, seconds at 2048. Fast approximations differ by several percent.

    Args:
        x, y: [B, P, A], sets of the same size.

    Returns: [B]. Raises UsageError for different sizes, GenkitError without scipy.
    """
    if x.shape != y.shape:
        raise UsageError(
            f"an assignment needs sets of one size, got {tuple(x.shape)} and {tuple(y.shape)}; draw the same number of points"
        )
    assign = require("scipy").optimize.linear_sum_assignment
    values = []
    for one, other in zip(x.detach().cpu(), y.detach().cpu(), strict=True):
        cost = torch.cdist(one.double(), other.double(), compute_mode="donot_use_mm_for_euclid_dist").numpy()
        values.append(float(cost[assign(cost)].mean()))
    return x.new_tensor(values)


def pairwise_chamfer(x: Tensor, y: Tensor) -> Tensor:
    """Chamfer distances of all pairs, in memory bounded by neighbours.BLOCK (or by one pair, where that is larger).

    Args:
        x: [N, P, A].
        y: [M, R, A].

    Returns: [N, M].
    """
    columns = max(1, BLOCK // (x.shape[1] * y.shape[1]))
    rows = max(1, columns // len(y))
    return torch.cat(
        [
            torch.cat([chamfer(some[:, None], others[None]) for others in y.split(columns)], dim=1)
            for some in x.split(rows)
        ]
    )


def pairwise_earth_mover(x: Tensor, y: Tensor) -> Tensor:
    """Earth mover's distances of all pairs, [N, P, A] and [M, P, A] -> [N, M]. N M assignments: keep P small (256) and say so."""
    return torch.stack([earth_mover(one.expand(len(y), -1, -1), y) for one in x])


def mmd_coverage(reference_sample: Tensor) -> dict[str, float]:
    """Minimum matching distance and coverage (Achlioptas et al. 2018, arXiv:1707.02392, section 2).

    Args:
        reference_sample: [R, S], distances of reference shapes (rows) to samples (columns).

    Returns:
        "lgan_mmd": mean distance of a reference to its nearest sample; lower is better, and bad samples cost nothing.
        "lgan_mmd_smp": mean distance of a sample to its nearest reference.
        "lgan_cov": share of references that are nearest to some sample, in [0, 1]; real shapes reach little more than half.
    """
    to_sample, to_reference = reference_sample.amin(dim=1), reference_sample.min(dim=0)
    return {
        "lgan_mmd": float(to_sample.double().mean()),
        "lgan_mmd_smp": float(to_reference.values.double().mean()),
        "lgan_cov": len(to_reference.indices.unique()) / len(reference_sample),
    }


def nearest_neighbour_accuracy(
    reference_reference: Tensor, reference_sample: Tensor, sample_sample: Tensor
) -> dict[str, float]:
    """1-NNA: how well the nearest other shape tells samples from references (Lopez-Paz and Oquab 2017, arXiv:1610.06545). 0.5 is ideal.

    Args:
        reference_reference: [n, n] distances. Their diagonal does not count.
        reference_sample: [n, n], references in rows.
        sample_sample: [n, n].

    Returns: "acc" over all 2n shapes; above 0.5 sets differ, below samples copy references. "acc_t" over references, "acc_f" over samples.
    Raises: UsageError for sets of different sizes, where 0.5 would not be ideal.
    """
    n, m = reference_sample.shape
    if n != m:
        raise UsageError(f"1-NNA needs as many samples as references, got {m} and {n}")
    rows = [
        torch.cat([reference_reference, reference_sample], 1),
        torch.cat([reference_sample.T, sample_sample], 1),
    ]
    distance = torch.cat(rows).clone()  # [2n, 2n], references first
    distance.fill_diagonal_(float("inf"))
    is_reference = torch.arange(2 * n, device=distance.device) < n
    right = is_reference[distance.argmin(dim=0)] == is_reference
    acc_t, acc_f = float(right[:n].double().mean()), float(right[n:].double().mean())
    return {"acc": (acc_t + acc_f) / 2, "acc_t": acc_t, "acc_f": acc_f}
