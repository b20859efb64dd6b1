"""Procedural furniture and things: solid shapes in 12 classes, as many as wanted, made from a seed; nothing is downloaded."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from genkit.data.shape_classes.classes import CLASSES
from genkit.data.shape_classes.design import Design, Dice
from genkit.errors import UsageError, nearest
from genkit.interfaces import DataInfo
from genkit.meshes.marching_cubes import extract
from genkit.meshes.mesh import Mesh
from genkit.meshes.solids import Solid
from genkit.rng import Rng, derive

VERSION = 1  # of what a number means; raise it when any shape changes
SIZE = 1.6  # longest side of every shape, so that it reaches from -0.8 to 0.8
NEAR, AROUND = 0.02, 0.1  # standard deviations of the places where distances are asked for, from the surface
_NUMBERS = 64  # random numbers a design may use
_SPLITS = {"train": 0, "val": 1, "test": 2}


class Shapes:
    """Points on the surface, and signed distances around it, of solids that are watertight by construction.

    Shape i has class i mod (number of classes); y is up, the front looks towards +z. A shape is a function of (seed, split, i) alone, its points of
    that and of `num_points`. While training (`fetch`) points are drawn anew every time, or chosen anew of those that are kept.

    Args:
        num_shapes: of the split train; val and test have a tenth of it, at least one of each class, from seeds of their own.
        classes: names of some of the 12; None = all, in the order of shape_classes.classes.CLASSES.
        num_points: P, on the surface of each shape.
        num_distances: Q, places with their signed distance: a half within about 0.02 of the surface, a quarter within about 0.1, a quarter anywhere in
            [-1, 1]. 0 = none.
        num_kept: points, and places, made once of a shape and kept in memory (40 bytes of both); `fetch` then chooses num_points of them, and num_distances,
            in a tenth of the time. 0 = none are kept.

    Raises: UsageError for an unknown class and for numbers that are too small.
    """

    def __init__(
        self,
        *,
        num_shapes: int = 1200,
        seed: int = 0,
        split: Literal["train", "val", "test"] = "train",
        classes: list[str] | None = None,
        num_points: int = 8192,
        num_distances: int = 8192,
        num_kept: int = 0,
    ) -> None:
        names = tuple(CLASSES) if classes is None else tuple(classes)
        for name in names:
            if name not in CLASSES:
                raise UsageError(f"data.classes: there is no class {name} in shapes; {nearest(name, list(CLASSES))}")
        if not names or len(set(names)) < len(names):
            raise UsageError(f"data.classes={classes} must name at least one class, and none twice")
        if num_shapes < 1 or num_points < 1 or num_distances < 0:
            raise UsageError(
                f"data.num_shapes={num_shapes} and data.num_points={num_points} must be at least 1, data.num_distances={num_distances} at least 0"
            )
        if num_kept and num_kept < max(num_points, num_distances):
            raise UsageError(
                f"data.num_kept={num_kept} must be 0, or at least data.num_points={num_points} and data.num_distances={num_distances}"
            )
        self.classes, self.seed, self.split, self.num_kept = names, seed, split, num_kept
        self.num_points, self.num_distances = num_points, num_distances
        self._length = num_shapes if split == "train" else max(len(names), num_shapes // 10)
        how = (VERSION, names, seed, split, self._length, num_points, num_distances)  # num_kept changes no sample
        digest = hashlib.blake2b(repr(how).encode(), digest_size=16).hexdigest()
        source = f"procedural shapes, {split}: {self._length:,} in {len(names)} classes, seed {seed}"
        self.info = DataInfo((3,), names, digest, source)
        self._made = lru_cache(maxsize=4096)(self._make)
        self._stored: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample.

        Returns: {"points" [P, 3] float32 in [-0.8, 0.8], "normals" [P, 3] of length 1, "sdf_points" [Q, 3] in [-1, 1], "sdf" [Q], negative inside,
            "label" int, "index" int, "key" str, "caption" str}.
        """
        return self._sample(index, self._rng(index))

    def __getitems__(self, indices: Sequence[int] | np.ndarray) -> dict[str, Any]:
        """The same, stacked: tensors with B in front, "label" and "index" [B] int64, "key" and "caption" list[str]."""
        return stacked([self[int(index)] for index in indices])

    def fetch(self, indices: Sequence[int] | np.ndarray, rng: Rng) -> dict[str, Any]:
        """As __getitems__, with points drawn from streams of the caller, one per sample."""
        make = self._chosen if self.num_kept else self._sample
        return stacked([make(int(index), rng[i : i + 1]) for i, index in enumerate(indices)])

    def design(self, index: int) -> Design:
        """Parts, caption and style of a shape, before it is scaled."""
        return self._made(index)[1]

    def caption(self, index: int) -> str:
        """What a shape is made of, in words."""
        return self.design(index).caption

    def solid(self, index: int) -> Solid:
        """The shape, scaled to a longest side of 1.6 around the origin."""
        return self._made(index)[0]

    def mesh(self, index: int, resolution: int = 64) -> Mesh:
        """The shape as a watertight mesh, from distances on a grid of resolution^3 cells over [-1, 1]^3."""
        return extract(self.solid(index).distance, resolution)

    def _rng(self, index: int) -> Rng:
        return Rng.at(derive(self.seed, _SPLITS[self.split]), index, 1)

    def _make(self, index: int) -> tuple[Solid, Design]:
        if not 0 <= index < self._length:
            raise IndexError(f"shape {index} of {self._length}")
        numbers = self._rng(index).fork("design").uniform(_NUMBERS)[0].tolist()
        design = CLASSES[self.classes[index % len(self.classes)]](Dice(numbers))
        return Solid(design.parts).normalised(SIZE), design

    def _chosen(self, index: int, rng: Rng) -> dict[str, Any]:
        if index not in self._stored:
            distances = self.num_kept if self.num_distances else 0
            self._stored[index] = self._sample(index, self._rng(index).fork("kept"), self.num_kept, distances)
        sample = dict(self._stored[index])
        for names, count in ((("points", "normals"), self.num_points), (("sdf_points", "sdf"), self.num_distances)):
            rows = rng.fork(names[0]).order(self.num_kept)[0, :count]
            sample |= {name: sample[name].index_select(0, rows) for name in names if name in sample}
        return sample

    def _sample(
        self, index: int, rng: Rng, num_points: int | None = None, num_distances: int | None = None
    ) -> dict[str, Any]:
        num_points = self.num_points if num_points is None else num_points
        num_distances = self.num_distances if num_distances is None else num_distances
        solid, design = self._made(index)
        # Distances need points to measure depths from; with few of their own, some more are drawn.
        points, normals = solid.sample_surface(max(num_points, num_distances // 2), rng)
        label = index % len(self.classes)
        sample: dict[str, Any] = {
            "points": points[:num_points],
            "normals": normals[:num_points],
            "label": label,
            "index": index,
            "key": f"{self.split}/{index:05d} {self.classes[label]}",
            "caption": design.caption,
        }
        if num_distances:
            places = around(points, num_distances, rng)
            sample |= {"sdf_points": places, "sdf": solid.signed_distance(places, points)}
        return sample


def around(points: Tensor, count: int, rng: Rng) -> Tensor:
    """Where distances are asked for: [count, 3] in [-1, 1], half of it near points [P, 3], a quarter around them, a quarter anywhere."""
    rng = rng.fork("around")
    near = torch.arange(count)
    # Fewer points than places are used several times; they come in random order.
    base = points[near % len(points)]
    spread = torch.where(near < count // 2, NEAR, AROUND)[:, None]
    places = base + spread * rng.normal(count, 3)[0]
    anywhere = 2 * rng.uniform(count, 3)[0] - 1
    return torch.where((near < count * 3 // 4)[:, None], places, anywhere).clamp(-1, 1)


def stacked(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Samples as a batch: tensors stacked, numbers as int64 tensors, texts as lists."""
    batch: dict[str, Any] = {}
    for name in samples[0] if samples else ():
        values = [sample[name] for sample in samples]
        if isinstance(values[0], Tensor):
            batch[name] = torch.stack(values)
        else:
            batch[name] = values if isinstance(values[0], str) else torch.tensor(values, dtype=torch.int64)
    return batch
