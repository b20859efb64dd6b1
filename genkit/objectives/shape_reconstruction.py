"""What an octree tokenizer is trained on: the octree, the signed distance at every depth, and codes that are all in use.

Wei et al., "OctGPT", 2025, section 3.1, with the weights of `octree-nn/octgpt` (sdf_reg_loss of `ognn/loss.py`, configs/ShapeNet/shapenet_vae.yaml).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from genkit.errors import UsageError
from genkit.interfaces import Cond, Layout
from genkit.octree.octree import Octree
from genkit.rng import Rng


class ShapeReconstruction:
    """Losses of a batch {"points", "normals" [B, P, 3], "sdf_points" [B, Q, 3], "sdf" [B, Q]}.

    Of the depths from the codes to the finest: whether a node is split (cross-entropy), the distance (squared error) and its gradient (squared error).
    Distances are cut to +-band; where they are cut, and where nothing is known of it, the gradient counts as 0 or not at all. On the surface, the
    distance is 0 and the gradient the normal.

    Args:
        num_surface: points of the surface that are asked for in each shape.
        band: where distances are cut.
        distance, gradient, split, entropy: weights.
        last_split: weight of the finest depth's split bits within `split`; nothing grows from them.
    """

    target = "batch"  # all of it

    def __init__(
        self,
        *,
        num_surface: int = 1024,
        band: float = 0.05,
        distance: float = 200.0,
        gradient: float = 1.0,
        split: float = 1.0,
        last_split: float = 0.1,
        entropy: float = 1.0,
    ):
        if num_surface < 1 or not band > 0:
            raise UsageError(f"objective.num_surface={num_surface} must be at least 1, objective.band={band} above 0")
        self.num_surface, self.band = num_surface, band
        self.distance, self.gradient, self.split = distance, gradient, split
        self.last_split, self.entropy = last_split, entropy

    def __call__(
        self, model: Any, target: dict[str, Tensor], cond: Cond, layout: Layout | None, rng: Rng
    ) -> dict[str, Tensor]:
        """{"split", "distance", "gradient", "entropy"} [B] each, and "_split_accuracy", "_sign_accuracy"."""
        if "sdf" not in target:
            raise UsageError("these data hold no signed distances to learn from; data.num_distances must be above 0")
        points, normals = target["points"], target["normals"]
        B, P, _ = points.shape
        chosen = rng.fork("surface").integers(P, self.num_surface).to(points.device)  # [B, S]
        rows = torch.arange(B, device=points.device)[:, None]
        queries = torch.cat([target["sdf_points"], points[rows, chosen]], 1)  # [B, Q + S, 3]
        sdf = target["sdf"].clamp(-self.band, self.band)
        truth = torch.cat([sdf, sdf.new_zeros(B, self.num_surface)], 1)
        slope = torch.cat([torch.zeros_like(target["sdf_points"]), normals[rows, chosen]], 1)
        # In the volume only the flat part of the cut distance has a known gradient.
        is_flat = target["sdf"].abs() >= self.band
        counted = torch.cat([is_flat, torch.ones_like(truth[:, : self.num_surface], dtype=torch.bool)], 1).float()
        found = model(points, normals, queries)
        octree: Octree = found.octree
        losses = {name: points.new_zeros(B) for name in ("split", "distance", "gradient")}
        right = []
        for d, logits in found.splits.items():
            answer = octree.is_occupied(d).long()
            nll = cross_entropy(logits.float(), answer, reduction="none")
            weight = self.split * (self.last_split if d == octree.depth else 1)
            losses["split"] = losses["split"] + weight * self._per_sample(nll, octree, d)
            right.append(self._per_sample((logits.argmax(1) == answer).float(), octree, d))
        for value, rise in found.at.values():
            error = (value.view_as(truth) - truth).square().mean(1)
            losses["distance"] = losses["distance"] + self.distance * error
            error = (rise.view_as(slope) - slope).square().mean(2)
            losses["gradient"] = losses["gradient"] + self.gradient * (error * counted).sum(1) / counted.sum(1)
        with torch.no_grad():
            last = found.at[octree.depth][0].view_as(truth)[:, : sdf.shape[1]]
            sign = ((last < 0) == (target["sdf"] < 0)).float().mean(1)
        # One number for the batch: the mean assignment is taken over all of it.
        losses["entropy"] = self.entropy * found.entropy.expand(B)
        return losses | {"_split_accuracy": torch.stack(right).mean(0), "_sign_accuracy": sign}

    @staticmethod
    def _per_sample(values: Tensor, octree: Octree, depth: int) -> Tensor:
        total = values.new_zeros(octree.batch_size).index_add(0, octree.samples(depth), values)
        return total / octree.counts_of_samples(depth).clamp_min(1)
