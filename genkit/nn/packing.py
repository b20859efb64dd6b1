"""Samples of different lengths without their padding: packed for what works token by token, in groups of about one length for attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SLACK = (
    0.04  # by how much the samples of a group may be shorter than its longest: what padding is left is less than that
)


@dataclass(frozen=True)
class Group:
    """Samples whose tokens lie one after the other from `start` on, each in `length` places."""

    start: int
    count: int  # samples
    length: int
    held: Tensor | None  # [count, length] bool, which places hold a token; None = all

    def of(self, padded: Tensor) -> Tensor:
        """[P, ...] -> [count, length, ...]."""
        return padded[self.start : self.start + self.count * self.length].unflatten(0, (self.count, self.length))


@dataclass(frozen=True)
class Packing:
    """Which of B x N tokens are real, M in all, and their places in groups of samples, P places in all."""

    index: Tensor  # [M] int64, in the flattened [B, N]
    sample: Tensor  # [M] int64, 0 .. B - 1
    place: Tensor  # [M] int64, 0 .. P - 1
    groups: tuple[Group, ...]
    batch_size: int  # B

    @staticmethod
    def of(valid: Tensor, slack: float = SLACK) -> Packing:
        """Of valid [B, N] bool.

        Args:
            slack: a sample joins a group when it has at least (1 - slack) times the tokens of the longest in it; 1 = one group.
        """
        B, N = valid.shape
        device = valid.device
        counts = valid.sum(1)  # [B]
        lengths = counts.tolist()
        order = sorted(range(B), key=lambda i: -lengths[i])
        starts, groups, used, first = [0] * B, [], 0, 0
        while first < B:
            longest = max(1, lengths[order[first]])
            last = first
            while last < B and lengths[order[last]] >= (1 - slack) * longest:
                last += 1
            last = max(last, first + 1)  # a sample without a token
            members = order[first:last]
            for rank, i in enumerate(members):
                starts[i] = used + rank * longest
            held = None
            if any(lengths[i] < longest for i in members):
                held = torch.arange(longest, device=device) < counts[torch.tensor(members, device=device)][:, None]
                held[:, 0] = True  # attention over nothing would be NaN
            groups.append(Group(used, len(members), longest, held))
            used, first = used + len(members) * longest, last
        index = valid.flatten().nonzero().squeeze(1)
        sample = index // N
        rank_in_sample = torch.arange(len(index), device=device) - (counts.cumsum(0) - counts).index_select(0, sample)
        place = torch.tensor(starts, device=device).index_select(0, sample) + rank_in_sample
        return Packing(index, sample, place, tuple(groups), B)

    @property
    def num_places(self) -> int:
        """P: the tokens that attention computes, padding included."""
        return sum(group.count * group.length for group in self.groups)

    def pack(self, x: Tensor) -> Tensor:
        """[B, N, ...] -> [M, ...]."""
        return x.flatten(0, 1).index_select(0, self.index)

    def unpack(self, x: Tensor, num_tokens: int) -> Tensor:
        """[M, ...] -> [B, N, ...], 0 at padding."""
        B, N = self.batch_size, num_tokens
        return x.new_zeros(B * N, *x.shape[1:]).index_copy(0, self.index, x).unflatten(0, (B, N))

    def pad(self, x: Tensor) -> Tensor:
        """[M, ...] -> [P, ...], which `Group.of` cuts."""
        return x.new_zeros(self.num_places, *x.shape[1:]).index_copy(0, self.place, x)

    def unpad(self, x: Tensor) -> Tensor:
        """[P, ...] -> [M, ...]."""
        return x.index_select(0, self.place)
