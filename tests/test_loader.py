"""The stream of samples: one order for any number of processes, workers and micro-batches, entered at any position."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from genkit.data.folder import Folder
from genkit.data.loader import batches, read_all
from genkit.data.memory import InMemory
from genkit.errors import GenkitError, UsageError
from genkit.interfaces import DataInfo

BROKEN = {"a/1.png", "a/11.png"}


def counted(length: int) -> InMemory:
    """Sample i is a 1x1 image of value i with label i mod 3."""
    number = np.arange(length)
    return InMemory(number.astype(np.uint8).reshape(-1, 1, 1, 1), number % 3, [f"s{i}" for i in number], "abc", "test")


def collect(dataset, count: int | None = None, **options) -> dict:
    found = list(islice(batches(dataset, **options), count))
    joined = {name: torch.cat([b[name] for b in found]) for name in ("x", "label", "index", "position")}
    return {**joined, "key": [key for b in found for key in b["key"]]}


def same(a: dict, b: dict) -> bool:
    return a["key"] == b["key"] and all(torch.equal(a[name], b[name]) for name in ("x", "label", "index", "position"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven left-to-right ramps and two broken files, one after the other."""
    for i in range(7):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        ramp = np.tile(np.arange(8, dtype=np.uint8) * 30 + i, (8, 1))
        Image.fromarray(ramp).save(tmp_path / "ab"[i % 2] / f"{i}.png")
    for key in BROKEN:
        (tmp_path / key).write_bytes(b"broken")
    return tmp_path


def test_every_epoch_shows_every_sample_once_in_an_order_of_its_own():
    index = collect(counted(10), batch_size=5, seed=1, stop=30)["index"].view(3, 10)
    assert torch.equal(index.sort(1).values, torch.arange(10).expand(3, 10))
    assert len({tuple(row) for row in index.tolist()}) == 3
    assert not torch.equal(index[0], collect(counted(10), batch_size=10, seed=2, stop=10)["index"])


def test_batches_cross_the_border_of_epochs_and_samples_stay_together():
    stream = collect(counted(7), batch_size=4, seed=0, stop=28)
    assert stream["position"].tolist() == list(range(28))
    assert torch.equal(stream["index"].view(4, 7).sort(1).values, torch.arange(7).expand(4, 7))
    assert torch.equal(((stream["x"].flatten() + 1) * 127.5).round().long(), stream["index"])
    assert torch.equal(stream["label"], stream["index"] % 3)
    assert stream["key"] == [f"s{i}" for i in stream["index"].tolist()]


def test_a_dataset_smaller_than_the_batch_repeats():
    stream = collect(counted(3), 1, batch_size=10, seed=0)
    assert torch.bincount(stream["index"][:9]).tolist() == [3, 3, 3]


@settings(max_examples=30, deadline=None)
@given(length=st.integers(1, 40), batch_size=st.integers(1, 16), step=st.integers(0, 12), seed=st.integers(0, 2**40))
def test_resuming_at_any_position_equals_never_having_stopped(length, batch_size, step, seed):
    whole = collect(counted(length), step + 3, batch_size=batch_size, seed=seed)
    rest = collect(counted(length), 3, batch_size=batch_size, seed=seed, start=step * batch_size)
    assert all(torch.equal(whole[name][step * batch_size :], rest[name]) for name in ("x", "index", "position"))


def test_a_start_inside_a_batch_continues_the_same_stream():
    whole = collect(counted(11), batch_size=4, seed=3, stop=40)
    rest = collect(counted(11), 3, batch_size=4, seed=3, start=5)
    assert torch.equal(rest["index"], whole["index"][5:17])


@settings(max_examples=20, deadline=None)
@given(world_size=st.integers(1, 4), micro=st.integers(1, 3), steps=st.integers(1, 4), length=st.integers(1, 30))
def test_processes_and_micro_batches_share_one_stream(world_size, micro, steps, length):
    batch_size = world_size * micro * 2
    single = collect(counted(length), steps, batch_size=batch_size, seed=5)
    ranks = [
        collect(
            counted(length),
            steps * 2,
            batch_size=batch_size,
            seed=5,
            rank=rank,
            world_size=world_size,
            micro_batch_size=micro,
        )
        for rank in range(world_size)
    ]
    joined = torch.cat([part["index"].view(steps, -1) for part in ranks], dim=1).flatten()
    assert torch.equal(joined, single["index"])


def test_stop_ends_with_a_whole_batch():
    found = list(batches(counted(10), batch_size=4, seed=0, stop=9))
    assert [len(batch["index"]) for batch in found] == [4, 4, 4]
    assert list(batches(counted(10), batch_size=4, seed=0, start=12, stop=12)) == []


def test_workers_give_the_same_stream_and_leave_the_global_generator_alone(folder):
    options = {"batch_size": 6, "seed": 2, "start": 3, "stop": 40, "micro_batch_size": 3}
    here = Folder(path=str(folder), size=8, flip=True)
    there = Folder(path=str(folder), size=8, flip=True)
    plain = collect(here, **options)
    state = torch.get_rng_state()
    assert same(plain, collect(there, **options, num_workers=2))
    assert torch.equal(state, torch.get_rng_state())
    assert there.skipped.keys() == here.skipped.keys() == BROKEN  # learnt from the workers
    flipped = plain["x"][:, 0, 0, 0] > plain["x"][:, 0, 0, 7]
    assert 8 < flipped.sum() < 34


def test_flips_belong_to_the_position_in_the_stream(folder):
    def get():
        return Folder(path=str(folder), size=8, flip=True)

    whole = collect(get(), batch_size=4, seed=2, stop=40)
    assert torch.equal(whole["x"][20:], collect(get(), batch_size=5, seed=2, start=20, stop=40)["x"])
    shares = [
        collect(get(), batch_size=4, seed=2, stop=40, rank=r, world_size=2)["x"].unflatten(0, (-1, 2)) for r in (0, 1)
    ]
    assert torch.equal(torch.cat(shares, dim=1).flatten(0, 1), whole["x"])


def test_a_corrupt_sample_is_replaced_while_training_and_left_out_when_reading_all(folder):
    dataset = Folder(path=str(folder), size=8)
    stream = collect(dataset, batch_size=8, seed=0, stop=16)
    assert not BROKEN & set(stream["key"])
    assert len(stream["key"]) == 16
    for num_workers in (0, 1):
        keys = [key for batch in read_all(Folder(path=str(folder), size=8), 3, num_workers) for key in batch["key"]]
        assert keys == [key for key in dataset.keys if key not in BROKEN]


def test_read_all_leaves_out_empty_batches(folder):
    dataset = Folder(path=str(folder), size=8)
    assert [len(batch["index"]) for batch in read_all(dataset, 1)] == [1] * 7


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_in_a_worker_stays_one_line(tmp_path, num_workers):
    (tmp_path / "a.png").write_bytes(b"broken")
    with pytest.raises(GenkitError, match="none of the 1 images") as error:
        next(batches(Folder(path=str(tmp_path), size=8), batch_size=1, seed=0, num_workers=num_workers))
    assert "\n" not in str(error.value)


def test_a_dataset_with_nothing_but_samples_can_be_loaded():
    class Plain:
        info = DataInfo((1, 2, 2), (), "0", "plain")

        def __len__(self):
            return 5

        def __getitem__(self, index):
            return {"x": torch.full((1, 2, 2), float(index)), "label": -1, "key": str(index)}

    batch = next(batches(Plain(), batch_size=5, seed=0))
    assert batch["x"].shape == (5, 1, 2, 2)
    assert batch["x"][:, 0, 0, 0].long().tolist() == batch["index"].tolist()
    assert batch["label"].tolist() == [-1] * 5


def test_sizes_that_do_not_divide_are_refused_at_once_with_the_numbers():
    with pytest.raises(
        UsageError, match="batch_size=50 is not divisible by 2 processes x micro_batch_size 16; use a multiple of 32"
    ):
        batches(counted(4), batch_size=50, seed=0, world_size=2, micro_batch_size=16)
    with pytest.raises(UsageError, match="batch_size=3 is not divisible by 2 processes"):
        batches(counted(4), batch_size=3, seed=0, world_size=2)
    with pytest.raises(UsageError, match="the dataset is empty"):
        batches(counted(0), batch_size=2, seed=0)
