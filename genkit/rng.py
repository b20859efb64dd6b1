"""Random numbers with one stream per sample, the same on every device, batch size and number of processes.

Counter-based generator Philox-4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011), written as
vectorised integer arithmetic: the numbers of sample `i` depend only on its seed, the stream and how many draws came before. Nothing
has to be saved to resume: seeds are derived from the run's seed and the position of the sample in the run.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from genkit.errors import UsageError

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


Word = TypeVar("Word", Tensor, int)


def philox(counter: tuple[Word, Word, Word, Word], key: tuple[Word, Word]) -> tuple[Word, Word, Word, Word]:
    """Ten rounds of Philox-4x32. All words are int64 tensors that hold 32-bit values and broadcast against each other, or all are Python's integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The product of two 32-bit words wraps in int64, but its 64 bits are right; the mask drops the copied sign.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def derive(seed: int, *numbers: int) -> int:
    """A 63-bit seed from a seed and any further numbers (epoch, step, rank): well mixed, the same on every machine."""
    state = seed & 0xFFFFFFFFFFFFFFFF
    for number in (len(numbers), *numbers):
        low, high, _, _ = philox((number & _MASK, (number >> 32) & _MASK, 0, 1), (state & _MASK, state >> 32))
        state = low | (high << 32)
    return state & 0x7FFFFFFFFFFFFFFF


SEEDS = 2**31  # so many under which samples can be drawn


def sample_seeds(seed: int, first: int, count: int) -> list[int]:
    """Seeds of the samples number first .. first + count - 1 of everything sampled under one seed: seed * 2^32 + number.

    Raises: UsageError for a seed with which these do not fit 64 bits.
    """
    if not -SEEDS <= seed < SEEDS:
        raise UsageError(f"seed {seed} is out of range; it must be at least {-SEEDS} and below {SEEDS}")
    return [seed * 2**32 + number for number in range(first, first + count)]


class Rng:
    """A batch of random streams.

    Args:
        seeds: [B] int64 or a list of ints, one per sample.
        stream: the same seeds give independent numbers in another stream.
        device: where the numbers are made; their values do not depend on it.
    """

    def __init__(self, seeds: Tensor | Sequence[int], stream: int = 0, device: torch.device | str | None = None):
        self.seeds = torch.as_tensor(seeds, dtype=torch.int64, device=device)
        self.stream = stream
        self._draws = 0

    @classmethod
    def at(cls, seed: int, first: int, count: int, device: torch.device | str | None = None) -> Rng:
        """Streams of the samples first .. first + count - 1 of everything drawn under one seed."""
        key = derive(seed, 0x5EED)
        return cls((torch.arange(first, first + count, dtype=torch.int64) + key) & 0x7FFFFFFFFFFFFFFF, device=device)

    def __len__(self) -> int:
        return len(self.seeds)

    @property
    def device(self) -> torch.device:
        return self.seeds.device

    def fork(self, word: str) -> Rng:
        """The same samples in a stream of their own, so that a part which draws more does not shift the numbers of the next."""
        return Rng(self.seeds, zlib.crc32(f"{self.stream}/{word}".encode()))

    def __getitem__(self, rows: slice) -> Rng:
        return Rng(self.seeds[rows], self.stream)

    def words(self, count: int) -> Tensor:
        """[B, count] int64, uniform over the 32-bit words; advances the stream by one draw."""
        blocks = torch.arange(-(-count // 4), dtype=torch.int64, device=self.device)
        zero = torch.zeros((), dtype=torch.int64, device=self.device)
        counter = (blocks[None, :], zero + (self._draws & _MASK), zero + self.stream, zero)
        key = (self.seeds[:, None] & _MASK, (self.seeds[:, None] >> 32) & _MASK)
        self._draws += 1
        return torch.stack(philox(counter, key), dim=-1).flatten(1)[:, :count]

    def uniform(self, *shape: int) -> Tensor:
        """[B, *shape] float32 in [0, 1), on a grid of 2^-24."""
        return ((self.words(math.prod(shape)) >> 8).to(torch.float32) * 2.0**-24).reshape(len(self), *shape)

    def normal(self, *shape: int) -> Tensor:
        """[B, *shape] float32 standard normal (Box-Muller)."""
        count = math.prod(shape)
        half = -(-count // 2)
        u, v = self.uniform(2, half).unbind(1)
        radius, angle = (-2 * torch.log1p(-u)).sqrt(), 2 * math.pi * v
        return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :count].reshape(len(self), *shape)

    def gumbel(self, *shape: int) -> Tensor:
        """[B, *shape] float32 standard Gumbel; finite for every word: 23 bits and a half lie strictly between 0 and 1."""
        u = ((self.words(math.prod(shape)) >> 9).to(torch.float32) + 0.5) * 2.0**-23
        return -torch.log(-torch.log(u)).reshape(len(self), *shape)

    def integers(self, high: int, *shape: int) -> Tensor:
        """[B, *shape] int64 in [0, high); the bias of the scaling is below high / 2^32."""
        return ((self.words(math.prod(shape)) * high) >> 32).reshape(len(self), *shape)

    def order(self, count: int) -> Tensor:
        """[B, count] int64: a random permutation per sample."""
        return self.words(count).argsort(dim=1, stable=True)

    def categorical(self, logits: Tensor, temperature: float = 1.0) -> Tensor:
        """[B, *grid] int64 drawn from softmax(logits [B, *grid, S] / temperature): one number per token; 0 = the likeliest."""
        u = self.uniform(*logits.shape[1:-1])
        return pick(logits, u.to(logits.device), temperature)


def pick(logits: Tensor, u: Tensor, temperature: float = 1.0) -> Tensor:
    """[...] int64 from softmax(logits [..., S] / temperature) by inverting the cumulative sum at u [...] in [0, 1); of temperature 0 the likeliest."""
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = (logits if temperature == 1 else logits / temperature).softmax(-1, dtype=torch.float32).cumsum(-1)
    # u < 1 leaves room below the total, so that together with right=True no class of probability zero is ever drawn.
    at = u.unsqueeze(-1) * cumulative[..., -1:]
    return torch.searchsorted(cumulative, at.contiguous(), right=True).squeeze(-1).clamp_max(logits.shape[-1] - 1)
