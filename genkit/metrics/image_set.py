"""Numbered images of one shape, read at their own size: what every source of images gives."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from genkit.metrics.arrays import shown

_NAMED = 3  # files a note names


class Images:
    """Numbered images of one shape.

    Attributes:
        name: for people: "fashion train".
        shape: (C, Y, X).
        count: how many.
        has_labels: whether all of them have one.
        is_exact: whether `sha` changes with every pixel. Where it does not, nothing may be kept under it for another time.
        converted: number -> what was done to an image that was not 8-bit grey or RGB, of those read so far.
        missing: number -> name of the images a dataset could not decode, of those asked for so far.
    """

    is_exact = True

    def __init__(self, name: str, shape: tuple[int, ...], count: int, has_labels: bool = False):
        self.name = name
        self.shape = shape
        self.count = count
        self.has_labels = has_labels
        self.converted: dict[int, tuple[str, ...]] = {}
        self.missing: dict[int, str] = {}

    def take(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images [B, C, Y, X] float32 in [-1, 1] and labels [B] int64 (-1 = none) with these numbers, in this order.

        Images a dataset cannot decode are left out.
        """
        raise NotImplementedError

    def read(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """What `take` gives for first .. last - 1. Reading one batch after the other is the fast way."""
        return self.take(range(first, last))

    @functools.cached_property
    def sha(self) -> str:
        """Hash of what is in the set, hex. Taken when it is first asked for: files that were read before are not read again."""
        return self._hash()

    @property
    def about(self) -> str:
        """One line for a report; takes the hash."""
        return f"{self.name}, n={self.count}, sha {self.sha[:8]}"

    @property
    def notes(self) -> tuple[str, ...]:
        """What was left out, and how many images had to be converted to 8-bit grey or RGB.

        Images are looked at when they are read: complete once this process has read all of them, or all processes have and did `gather`.
        """
        found = []
        if self.missing:
            names = [name for _, name in sorted(self.missing.items())]
            found.append(f"images of {self.name} that cannot be decoded, left out: {some(names)}")
        counts = Counter(kind for kinds in list(self.converted.values()) for kind in kinds)
        return (
            *found,
            *(f"{n} of {self.count} images {'is' if n == 1 else 'are'} {kind}" for kind, n in sorted(counts.items())),
        )

    def gather(self) -> None:
        """Under torch.distributed: learn what the other processes saw in the images they read. All must call it."""
        parts: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, (self.converted, self.missing))
        for converted, missing in parts:
            self.converted |= converted
            self.missing |= missing

    def _hash(self) -> str:
        raise NotImplementedError


def some(files: list[str]) -> str:
    """ "5 (a.txt, b.txt, c.txt, ...)" """
    named = ", ".join(shown(file) for file in files[:_NAMED])
    return f"{len(files)} ({named}{', ...' if len(files) > _NAMED else ''})"
