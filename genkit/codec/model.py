"""Ids coded by a masked generator of the same tokens: each group of positions given the groups before it.

Encoder and decoder must compute the same probabilities to the last bit, while a network's output differs in the last digits between machines,
thread counts and batch sizes. So every image goes through the network alone, in float64 on one CPU thread, and logits are rounded to a 16th of an
octave. That rounding hides differences up to a point: between unlike machines a logit may, very rarely, round both ways. Then the ids are not
those that the stream's check is of, and the error says so.
"""

from __future__ import annotations

import contextlib
import copy
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genkit import registry
from genkit.codec.damaged import DamagedError
from genkit.codec.lanes import STREAM_IMAGES
from genkit.codec.stream import Decoder, Encoder, Ints, Rows
from genkit.errors import UsageError
from genkit.nn.layout import dense_layout
from genkit.rng import Rng

NUM_GROUPS = 8  # calls of the network per image: on ids of small images 16 save 1 % more and take twice as long
_PER_OCTAVE = 16  # rounding of logits: costs 1e-4 bits per id
_OCTAVES = 26  # less than 2^-26 of the most probable id's makes no difference to the coder
# 2^(-i / 16) by square roots and products, which are the same everywhere; a library's pow may differ in the last digit.
_ROOTS = np.cumprod([1.0] + [math.sqrt(math.sqrt(math.sqrt(math.sqrt(0.5))))] * (_PER_OCTAVE - 1))


class Model:
    """The prior "model".

    Args:
        pipeline: of a masked generator.
        fingerprint: 8 bytes that differ where its weights do.
    """

    kind = "model"

    def __init__(self, pipeline: Any, fingerprint: bytes, num_groups: int = NUM_GROUPS):
        self.table = fingerprint + bytes([num_groups])
        self._num_groups = num_groups
        self._objective = masked_objective(pipeline)
        # A copy: the pipeline's own network stays as precise and where it is.
        self._network = copy.deepcopy(pipeline.backbone).cpu().double().eval()
        self._codebook_size = pipeline.tokenizer.codebook_size

    def encode(self, images: Sequence[Ints], advance: Callable[[int], None]) -> list[bytes]:
        """ids [Q, *grid] of the images of a chunk -> its lanes, each of STREAM_IMAGES images."""
        return [self._encode(images[i : i + STREAM_IMAGES], advance) for i in range(0, len(images), STREAM_IMAGES)]

    def decode(
        self, lane: bytes, grids: Sequence[tuple[int, ...]], num_levels: int, advance: Callable[[int], None]
    ) -> list[Ints]:
        """The images of a lane. Raises DamagedError where the network here does not compute what it did while encoding."""
        decoder = Decoder(lane)
        images = []
        for grid in grids:
            known = np.full((num_levels, math.prod(grid)), -1, np.int64)
            for positions in self._groups(grid):
                found = decoder.pop(num_levels * len(positions), self._rows(known, grid, positions))
                known[:, positions] = found.reshape(num_levels, -1)
            images.append(known.reshape(num_levels, *grid))
            advance(1)
        if decoder.rest() != _check(images):
            raise DamagedError(
                "cannot be decoded: the generator computes other probabilities here than where the file was written; "
                "decode on a machine like that one, or encode with --prior adaptive"
            )
        return images

    def _encode(self, images: Sequence[Ints], advance: Callable[[int], None]) -> bytes:
        encoder = Encoder(_check(images))
        for ids in reversed(images):
            Q, *grid = ids.shape
            flat = ids.reshape(Q, -1)
            known = flat.copy()
            for positions in reversed(self._groups(tuple(grid))):
                known[:, positions] = -1
                encoder.push(flat[:, positions].ravel(), self._rows(known, tuple(grid), positions))
            advance(1)
        return encoder.to_bytes()

    def _groups(self, grid: tuple[int, ...]) -> list[Ints]:
        """The positions in the order of coding, in groups that grow with what is known; the same scattered order for everybody."""
        n = math.prod(grid)
        order = Rng([0]).order(n)[0].numpy()
        bounds = sorted({n * g * g // self._num_groups**2 for g in range(self._num_groups + 1)})
        return [order[a:b] for a, b in pairwise(bounds)]

    def _rows(self, known: Ints, grid: tuple[int, ...], positions: Ints) -> Rows:
        """A distribution for each level and position, level by level, given known [Q, N] with -1 where unknown."""
        ids = torch.from_numpy(known).unflatten(1, grid).unsqueeze(0)
        predict = self._objective.predictor(self._network, {"label": torch.tensor([-1])}, dense_layout(grid))
        with torch.inference_mode(), one_thread():
            logits = predict(ids, ids >= 0, None)[0].flatten(1, -2)  # [Q, N, S]
        chosen = logits[:, torch.from_numpy(positions)].flatten(0, 1)  # [Q P, S]
        return weights_of(chosen)


def _check(images: Sequence[Ints]) -> int:
    """16 bits that differ where ids do, most often. They cost nothing, see genkit.codec.stream."""
    return zlib.crc32(b"".join(ids.astype("<u4").tobytes() for ids in images)) >> 16


def weights_of(logits: Tensor) -> Rows:
    """logits [R, S] -> exp(logits) of the same shape in float64, in proportion and rounded to a 16th of an octave."""
    below = (logits.amax(-1, keepdim=True) - logits) * (_PER_OCTAVE / math.log(2))
    steps = below.double().add(0.5).floor().nan_to_num(math.inf).clamp_max(_PER_OCTAVE * _OCTAVES).long().numpy()
    return np.ldexp(_ROOTS[steps % _PER_OCTAVE], -(steps // _PER_OCTAVE))


def masked_objective(pipeline: Any) -> Any:
    """The objective of a generator that fills in masked ids. Raises UsageError for any other."""
    if getattr(pipeline, "objective", {}).get("type") != "masked":
        found = getattr(pipeline, "objective", {}).get("type", "a tokenizer alone")
        raise UsageError(
            f"{pipeline.folder} holds {found}; a masked generator (objective: masked) is needed to predict ids"
        )
    return registry.build("objective", pipeline.objective)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One torch thread inside the block: sums are then always added in one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
