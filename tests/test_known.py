"""What an evaluation keeps of its reference for the next one."""

import os

import pytest
import torch

from genkit.metrics import known
from genkit.metrics.rows import FeatureRows
from genkit.metrics.statistics import FeatureSums
from tests.reference_files import DIM, ROWS

KEY = {"images_sha": "i", "net_sha": "n", "net_name": "net", "layer": "pool", "kind": "FeatureSums", "count": 3}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GENKIT_CACHE", str(tmp_path / "cache"))
    known._tell.cache_clear()
    return tmp_path / "cache" / "references"


def test_a_kept_state_comes_back_under_exactly_its_key(cache):
    sums = FeatureSums(DIM)
    sums.update(torch.from_numpy(ROWS))
    assert known.load(**KEY) is None
    known.save(sums.state(), **KEY)
    again = FeatureSums(DIM)
    again.restore(known.load(**KEY))
    assert all(torch.equal(value, sums.state()[name]) for name, value in again.state().items())
    for name, value in KEY.items():
        assert known.load(**(KEY | {name: value + (1 if name == "count" else "x")})) is None, name
    assert known.load(**KEY, device="cuda") is None
    rows = FeatureRows(DIM)
    rows.update(torch.from_numpy(ROWS))
    known.save(rows.state(), **(KEY | {"kind": "FeatureRows"}))
    kept = FeatureRows(DIM)
    kept.restore(known.load(**(KEY | {"kind": "FeatureRows"})))
    assert torch.equal(kept.rows(), rows.rows())


def test_other_versions_do_not_see_it(cache, monkeypatch):
    known.save({"a": torch.ones(2)}, **KEY)
    assert known.load(**KEY) is not None
    monkeypatch.setattr(known, "VERSION", known.VERSION + 1)
    assert known.load(**KEY) is None


def test_damaged_or_foreign_entries_are_as_good_as_none(cache):
    known.save({"a": torch.ones(2)}, **KEY)
    known.save({"a": torch.zeros(2)}, **(KEY | {"count": 4}))
    (path,) = [p for p in cache.iterdir() if p == known._place(*KEY.values(), "cpu")[0]]
    (other,) = [p for p in cache.iterdir() if p != path]
    whole = path.read_bytes()
    path.write_bytes(other.read_bytes())  # whose key is another
    assert known.load(**KEY) is None
    for broken in (b"", b"x", whole[:-3], whole[:20]):
        path.write_bytes(broken)
        assert known.load(**KEY) is None
    path.write_bytes(whole)
    assert known.load(**KEY) is not None


def test_the_least_recently_used_entries_go_first(cache, monkeypatch):
    state = {"a": torch.ones(1000)}
    for count in range(4):
        known.save(state, **(KEY | {"count": count}))
        os.utime(known._place(*(KEY | {"count": count}).values(), "cpu")[0], (count, count))
    known.load(**(KEY | {"count": 0}))
    size = next(cache.iterdir()).stat().st_size
    monkeypatch.setattr(known, "MAX_TOTAL", 3 * size + 100)
    known.save(state, **(KEY | {"count": 9}))
    assert [count for count in (0, 1, 2, 3, 9) if known.load(**(KEY | {"count": count}))] == [0, 3, 9]


def test_large_states_are_not_kept(cache, monkeypatch):
    monkeypatch.setattr(known, "MAX_ENTRY", 100)
    known.save({"a": torch.ones(26)}, **KEY)
    assert known.load(**KEY) is None
    known.save({"a": torch.ones(25)}, **KEY)
    assert known.load(**KEY) is not None


def test_a_folder_that_cannot_be_written_costs_one_line(cache, caplog):
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the folder should be")
    for count in (1, 2):
        known.save({"a": torch.ones(2)}, **(KEY | {"count": count}))
        assert known.load(**(KEY | {"count": count})) is None
    assert len([record for record in caplog.records if "not kept" in record.message]) == 1
