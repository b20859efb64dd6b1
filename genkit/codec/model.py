"""Ids coded by a masked generator of the same tokens: each group of positions given the groups before it.

Encoder and decoder must compute the same intervals to the last bit, while a network's output differs in the last digits between machines,
thread counts and batch sizes. So every image goes through the network alone, in float64 on one CPU thread, and logits are rounded to a 16th of an
octave before they become weights. That rounding hides differences up to a point: between unlike machines a logit may, very rarely, round both ways. Then the coder does
not end where it should, and the error says so.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from genkit import registry
from genkit.codec import ans
from genkit.codec.damaged import DamagedError
from genkit.codec.tables import Ints, Tables, Whole, precision_of
from genkit.errors import UsageError
from genkit.nn.layout import dense_layout
from genkit.rng import Rng

NUM_GROUPS = 8  # calls of the network per image: on ids of small images 16 save 1 % more and take twice as long
_PER_OCTAVE = 16  # rounding of logits: costs 1e-4 bits per id


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
        """ids [Q, *grid] of each image -> a lane for each."""
        return [self._encode(ids, advance) for ids in images]

    def decode(
        self, lanes: Sequence[bytes], grids: Sequence[tuple[int, ...]], num_levels: int, advance: Callable[[int], None]
    ) -> list[Ints]:
        """The inverse. Raises DamagedError where the network here does not compute what it did while encoding."""
        return [self._decode(lane, grid, num_levels, advance) for lane, grid in zip(lanes, grids, strict=True)]

    def _encode(self, ids: Ints, advance: Callable[[int], None]) -> bytes:
        Q, *grid = ids.shape
        flat = ids.reshape(Q, -1)
        known = np.full_like(flat, -1)
        starts, freqs = [], []
        for positions in self._groups(tuple(grid)):
            tables = self._tables(known, tuple(grid), positions)
            symbols = flat[:, positions].ravel()
            start, freq = tables.intervals(np.arange(len(symbols)), symbols)
            starts.append(start)
            freqs.append(freq)
            known[:, positions] = flat[:, positions]
        advance(1)
        start, freq = np.concatenate(starts), np.concatenate(freqs)
        return ans.encode(start[:, None], freq[:, None], [tables.precision] * len(start))[0]

    def _decode(self, lane: bytes, grid: tuple[int, ...], num_levels: int, advance: Callable[[int], None]) -> Ints:
        known = np.full((num_levels, math.prod(grid)), -1, np.int64)
        decoder = ans.Decoder([lane])
        for positions in self._groups(grid):
            tables = self._tables(known, grid, positions)
            found = np.empty(num_levels * len(positions), np.int64)
            for row in range(len(found)):
                context = np.array([row])
                found[row : row + 1] = symbol = tables.find(context, decoder.slots(tables.precision))
                decoder.advance(*tables.intervals(context, symbol), tables.precision)
            known[:, positions] = found.reshape(num_levels, -1)
        if not decoder.is_complete().all():
            raise DamagedError(
                "cannot be decoded: the generator computes other probabilities here than where the file was written; "
                "decode on a machine like that one, or encode with --prior adaptive"
            )
        advance(1)
        return known.reshape(num_levels, *grid)

    def _groups(self, grid: tuple[int, ...]) -> list[Ints]:
        """The positions in the order of coding, in groups that grow with what is known; the same scattered order for everybody."""
        n = math.prod(grid)
        order = Rng([0]).order(n)[0].numpy()
        bounds = sorted({n * g * g // self._num_groups**2 for g in range(self._num_groups + 1)})
        return [order[a:b] for a, b in pairwise(bounds)]

    def _tables(self, known: Ints, grid: tuple[int, ...], positions: Ints) -> Tables:
        """A row of intervals for each level and position, level by level, given known [Q, N] with -1 where unknown."""
        ids = torch.from_numpy(known).unflatten(1, grid).unsqueeze(0)
        predict = self._objective.predictor(self._network, {"label": torch.tensor([-1])}, dense_layout(grid))
        with torch.inference_mode(), one_thread():
            logits = predict(ids, ids >= 0, None)[0].flatten(1, -2)  # [Q, N, S]
        chosen = logits[:, torch.from_numpy(positions)].flatten(0, 1)  # [Q P, S]
        return Tables(weights_of(chosen), precision_of(self._codebook_size))


def weights_of(logits: Tensor) -> Whole:
    """logits [R, S] -> whole weights of the same shape in proportion to exp(logits), rounded to a 16th of an octave."""
    table = _powers(min(24, 46 - 2 * (logits.shape[-1] - 1).bit_length()))
    below = (logits.amax(-1, keepdim=True) - logits) * (_PER_OCTAVE / math.log(2))
    steps = below.double().add(0.5).floor().nan_to_num(math.inf).clamp_max(len(table) - 1).long()
    return table[steps.numpy()]


def _powers(octaves: int) -> NDArray[np.float64]:
    """floor(2^(octaves - i / 16)) for i = 0, 1, ... until it is 0, by integer roots: a library's pow may differ in the last digit."""
    roots = [1 << (_PER_OCTAVE * octaves - i) for i in range(_PER_OCTAVE * octaves + 1)]
    for _ in range(_PER_OCTAVE.bit_length() - 1):
        roots = [math.isqrt(root) for root in roots]
    return np.array([*roots, 0], np.float64)


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
