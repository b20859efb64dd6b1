"""The golden case `frechet`: metrics of fixed features, logits and point clouds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def run_frechet(case: Any) -> dict[str, Tensor]:
    from genkit.metrics import point_sets
    from genkit.metrics.density_coverage import density_coverage
    from genkit.metrics.inception_score import inception_score
    from genkit.metrics.kid import mmd2, mmd2_of_subsets
    from genkit.metrics.neighbours import count_balls, kth_distance
    from genkit.metrics.precision_recall import precision_recall
    from genkit.metrics.statistics import FeatureSums, frechet_distance

    real, fake = case.inputs["features_real"], case.inputs["features_generated"]
    config = case.config
    moments = []
    for rows in (real, fake):
        sums = FeatureSums(config["dim"])
        sums.update(rows)
        moments.append(sums.moments())
    ours, theirs = moments[1], moments[0]
    subsets = {"subsets": config["kid_subsets"], "subset_size": config["kid_subset_size"], "seed": config["kid_seed"]}
    kid_mean, kid_std = mmd2_of_subsets(real, fake, **subsets)
    score_mean, score_std = inception_score(case.inputs["logits"], splits=4)
    doubles = {
        "frechet": frechet_distance(ours.mu, ours.sigma, theirs.mu, theirs.sigma),
        "kid_mean": kid_mean,
        "kid_std": kid_std,
        "mmd2_full": mmd2(real, fake),
        "inception_score_mean": score_mean,
        "inception_score_std": score_std,
    }
    singles: dict[str, float] = {}
    for k in (3, 5):
        singles[f"tf_precision_k{k}"], singles[f"tf_recall_k{k}"] = precision_recall(real, fake, k)
        singles[f"prdc_density_k{k}"], singles[f"prdc_coverage_k{k}"] = density_coverage(real, fake, k)
        # prdc leaves the rim of a ball out.
        for name, points, centres in (("precision", fake, real), ("recall", real, fake)):
            balls, _ = count_balls(points, centres, kth_distance(centres, k), closed=False)
            singles[f"prdc_{name}_k{k}"] = float((balls > 0).double().mean())

    reference, sample = case.inputs["clouds_ref"], case.inputs["clouds_sample"]
    tensors = {"mean_generated": ours.mu, "cov_generated_first8": ours.sigma[:8, :8]}
    # "left" of the original runs over the points of the second set.
    tensors["chamfer_right"], tensors["chamfer_left"] = point_sets.nearest_squared(sample, reference)
    tensors |= {"chamfer": point_sets.chamfer(sample, reference), "emd": point_sets.earth_mover(sample, reference)}
    distances = {"CD": point_sets.pairwise_chamfer, "EMD": point_sets.pairwise_earth_mover}
    for kind, pairwise in distances.items():
        across = pairwise(reference, sample)
        tensors[f"pairwise_{kind.lower()}_ref_sample"] = across
        singles |= {f"pf_{name}-{kind}": value for name, value in point_sets.mmd_coverage(across).items()}
        told = point_sets.nearest_neighbour_accuracy(pairwise(reference, reference), across, pairwise(sample, sample))
        singles |= {f"pf_1-NN-{kind}-{name}": value for name, value in told.items()}
    return (
        tensors
        | {name: torch.tensor(value, dtype=torch.float64) for name, value in doubles.items()}
        | {name: torch.tensor(value) for name, value in singles.items()}
    )
