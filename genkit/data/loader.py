"""From a dataset to batches: one endless stream that any number of processes share and any run enters anywhere.

Epoch e is a permutation made from (seed, e); the sample at position p = e * len + k of the stream is the k-th of it.
Nothing else decides what a run sees, so that a position is all there is to save, and resuming decodes nothing to get
there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from genkit.errors import GenkitError, UsageError
from genkit.interfaces import Dataset
from genkit.rng import Rng, derive


def batches(
    dataset: Dataset,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    stop: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    micro_batch_size: int | None = None,
    num_workers: int = 0,
    one_size: bool = False,
    device: torch.device | str | None = None,
) -> Iterator[dict[str, Any]]:
    """What one process trains on, a micro-batch at a time.

    A global batch is the next `batch_size` positions, across the borders of epochs; process `rank` takes its contiguous
    share of it, cut into micro-batches. The stream therefore depends on neither `world_size`, `micro_batch_size` nor
    `num_workers`.

    Args:
        batch_size: of all processes together.
        start: position in samples to begin at.
        stop: no global batch begins at or after this position; None = endless. The last batch is whole and may reach
            past it.
        micro_batch_size: samples per yielded batch; None = the whole share of this process.
        num_workers: processes that decode; 0 suits data held in memory.
        one_size: of data in sizes of their own: every global batch holds samples of one size. An epoch then has whole batches of every size, the last of
            them filled up from the front of that size's order.

    Yields: {"x" [b, C, Y, X] in [-1, 1] or "ids" [b, Q, *grid] or "z", "label" [b] int64, "index" [b] int64 in the
        dataset, "size" [b, A] int64 where samples have sizes of their own and x or z is padded, "position" [b] int64 in the stream, "key" list[str]}, tensors on `device`.

    Raises: UsageError, at once, when the numbers do not divide or the dataset is empty.
    """
    share, rest = divmod(batch_size, world_size)
    micro = micro_batch_size or share
    if rest or not share or share % micro:
        whole = f"{world_size} processes x micro_batch_size {micro_batch_size or 1}"
        multiple = world_size * (micro_batch_size or 1)
        raise UsageError(f"train.batch_size={batch_size} is not divisible by {whole}; use a multiple of {multiple}")
    if len(dataset) == 0:
        raise UsageError(f"the dataset is empty: {dataset.info.source}")

    rows = _rows_of_buckets(dataset) if one_size else None
    length = len(dataset) if rows is None else sum(-(-len(own) // batch_size) * batch_size for own in rows)

    @lru_cache(maxsize=2)  # a batch may lie across the border of two epochs
    def order(epoch: int) -> np.ndarray:
        rng = Rng([derive(seed, epoch)])
        mixed = rng.fork("order").order(len(dataset))[0].numpy()
        return mixed if rows is None else _in_batches(mixed, rows, batch_size, rng)

    def requests() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        first = start + rank * share
        while stop is None or first - rank * share < stop:
            for begin in range(first, first + share, micro):
                positions = np.arange(begin, begin + micro, dtype=np.int64)
                epochs, places = np.divmod(positions, length)
                yield positions, np.concatenate([order(int(e))[places[epochs == e]] for e in np.unique(epochs)])
            first += batch_size

    return _load(_Shuffled(dataset, seed), requests(), num_workers, device)


def _rows_of_buckets(dataset: Dataset) -> list[np.ndarray]:
    """The numbers of the samples of every size. Raises UsageError for a dataset whose sizes are not known beforehand."""
    sizes = getattr(dataset, "sizes", None)
    if sizes is None:
        raise UsageError(
            f"train.one_size_batches=true is for data in sizes of their own, and these have one ({dataset.info.source}); leave it out"
        )
    which = np.unique(sizes, axis=0, return_inverse=True)[1].reshape(-1)
    return [np.flatnonzero(which == number) for number in range(which.max() + 1)]


def _in_batches(mixed: np.ndarray, rows: list[np.ndarray], batch_size: int, rng: Rng) -> np.ndarray:
    """The order of an epoch, cut into batches of one size each, and these shuffled."""
    rank = np.empty(len(mixed), np.int64)
    rank[mixed] = np.arange(len(mixed))
    batches = []
    for own in rows:
        own = own[np.argsort(rank[own])]
        batches.append(np.resize(own, (-(-len(own) // batch_size), batch_size)))
    together = np.concatenate(batches)  # [batches, batch_size]
    return together[rng.fork("batches").order(len(together))[0].numpy()].reshape(-1)


def read_all(
    dataset: Dataset,
    batch_size: int,
    num_workers: int = 0,
    device: torch.device | str | None = None,
    first: int = 0,
) -> Iterator[dict[str, Any]]:
    """The whole dataset once, from its sample `first` on, in its own order, unflipped: for caching and evaluation.

    Yields the same parts as `batches`, without "position". Corrupt samples are left out, so that a batch may be smaller
    than `batch_size`; "index" tells which samples are there.
    """
    starts = range(first, len(dataset), batch_size)
    requests = (np.arange(start, min(start + batch_size, len(dataset)), dtype=np.int64) for start in starts)
    for batch in _load(_InOrder(dataset), requests, num_workers, device):
        if len(batch["index"]):
            yield batch


def take(dataset: Dataset, indices: np.ndarray) -> dict[str, Any]:
    """A batch of samples by number, from `__getitems__` where the dataset has it, else one by one."""
    if hasattr(dataset, "__getitems__"):
        return dataset.__getitems__(indices)
    items = [dataset[int(index)] for index in indices]
    tensors = {name: torch.stack([item[name] for item in items]) for name in ("x", "ids", "z") if name in items[0]}
    return {
        **tensors,
        "label": torch.tensor([item["label"] for item in items], dtype=torch.int64),
        "index": torch.from_numpy(indices),
        "key": [item["key"] for item in items],
    }


class _InOrder:
    """What a worker asks: indices -> batch.

    A GenkitError travels as a value, because torch would bury its one line in the traceback of a worker.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitems__(self, request: Any) -> dict[str, Any]:
        try:
            return self.answer(request)
        except GenkitError as error:
            return {"error": error}

    def answer(self, indices: np.ndarray) -> dict[str, Any]:
        return take(self.dataset, indices)


class _Shuffled(_InOrder):
    """While training: (positions, indices) -> batch. `fetch`, where a dataset has it, gets streams of the positions."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        super().__init__(dataset)
        self.seed = seed

    def answer(self, request: Any) -> dict[str, Any]:
        positions, indices = request
        if hasattr(self.dataset, "fetch"):
            batch = self.dataset.fetch(indices, Rng.at(self.seed, int(positions[0]), len(positions)).fork("data"))
        else:
            batch = take(self.dataset, indices)
        return batch | {"position": torch.from_numpy(positions)}


def _load(
    source: _InOrder, requests: Iterable[Any], num_workers: int, device: torch.device | str | None
) -> Iterator[dict[str, Any]]:
    """Answers in the order of the requests, from this process or from workers."""
    answers: Iterable[dict[str, Any]]
    if num_workers:
        on_gpu = device is not None and torch.device(device).type == "cuda"
        answers = DataLoader(
            source,  # type: ignore[arg-type]
            batch_sampler=requests,
            num_workers=num_workers,
            collate_fn=_as_it_is,
            pin_memory=on_gpu,
            generator=torch.Generator(),  # otherwise starting workers would advance torch's global generator
        )
    else:
        answers = map(source.__getitems__, requests)
    for batch in answers:
        if "error" in batch:
            raise batch["error"]
        skipped = batch.pop("skipped", None)
        if skipped and hasattr(source.dataset, "note"):
            source.dataset.note(skipped)
        if device is not None:
            batch = {
                name: value.to(device, non_blocking=True) if hasattr(value, "to") else value
                for name, value in batch.items()
            }
        yield batch


def _as_it_is(batch: Sequence[Any]) -> Sequence[Any]:
    return batch
