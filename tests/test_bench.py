"""The benchmark harness, and that both sides of its tokenizer suite do the same."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from genkit import bench
from genkit.bench import Case
from genkit.errors import UsageError

SUITES = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of suites of our own, with one named `toy`, by a clock that stands still but for what its calls say."""
    (tmp_path / "toy.py").write_text(
        "from genkit import bench\n"
        "from genkit.bench import Case\n"
        "def wait(name, seconds):\n"
        "    bench.time.sleep(seconds)\n"
        "def cases(quick):\n"
        "    yield Case('wait', 'sleeper 1.0', 2.0, lambda: wait('ours', 0.02), lambda: wait('peer', 0.06))\n"
        "    if not quick:\n"
        "        yield Case('alone', 'nobody', 2.0, lambda: wait('ours', 0.001), 'not installed; pip install nobody')\n"
    )
    monkeypatch.setattr(bench, "_FOLDER", tmp_path)
    now = [0.0]
    clock = SimpleNamespace(perf_counter=lambda: now[0], sleep=lambda s: now.__setitem__(0, now[0] + s))
    monkeypatch.setattr(bench, "time", clock)
    return tmp_path


def test_ratio_is_peer_seconds_over_ours(suite: Path) -> None:
    (row,) = bench.run("toy", quick=True)
    assert row["ratio"] == pytest.approx(3.0)
    assert row["ours_s"] == pytest.approx(0.02)
    assert row["peer_s"] == pytest.approx(0.06)
    assert row["runs"] == 5
    assert row["threads"] == torch.get_num_threads()


def test_a_missing_peer_is_a_row_that_says_so(suite: Path) -> None:
    rows = bench.run("toy")
    assert rows[1]["ratio"] is rows[1]["peer_s"] is None
    assert rows[1]["ours_s"] > 0
    assert json.loads(json.dumps(rows)) == rows
    last = bench.render(rows).splitlines()[-1]
    assert "nobody: not installed; pip install nobody" in last


def test_long_pairs_are_fewer_and_each_case_is_told_of_at_once(suite: Path) -> None:
    toy = (suite / "toy.py").read_text()
    (suite / "toy.py").write_text(toy.replace("0.02", "4.0").replace("0.06", "8.0"))
    told: list[str] = []
    rows = bench.run("toy", on_row=lambda row: told.append(bench.line(row)))
    assert [row["runs"] for row in rows] == [5, 9]
    assert told[0] == "wait: 2.00x (4000.00 ms, 8000.00 ms by sleeper 1.0)"


def test_only_the_cases_that_are_asked_for(suite: Path) -> None:
    assert [row["case"] for row in bench.run("toy", only="ALO")] == ["alone"]
    with pytest.raises(UsageError, match="no case of suite toy has 'vq' in its name: wait; alone"):
        bench.run("toy", only="vq")


def test_sides_take_turns_at_going_first() -> None:
    calls: list[str] = []
    case = Case("turns", "peer", 1.0, lambda: calls.append("a") or torch.ones(1), lambda: calls.append("b"))
    seconds = iter(range(1, 1000))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            bench.time, "perf_counter", lambda: float(next(seconds))
        )  # every reading lasts a second: no repeats
        bench._time(case, 4)
    assert "".join(calls) == "aabb" + "abbaabba"


def test_threads_are_set_for_both_sides_and_put_back(suite: Path) -> None:
    before = torch.get_num_threads()
    (row,) = bench.run("toy", quick=True, threads=before + 1)
    assert row["threads"] == before + 1
    assert torch.get_num_threads() == before


def test_wrong_use_is_told_in_one_line(suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no benchmark suite 'tou'; did you mean 'toy'"):
        bench.run("tou")
    with pytest.raises(UsageError, match="threads=0"):
        bench.run("toy", threads=0)
    monkeypatch.setattr(bench, "_FOLDER", suite / "nowhere")
    with pytest.raises(UsageError, match="checkout"):
        bench.run("toy")


@pytest.fixture(scope="module")
def tokenizers() -> ModuleType:
    return bench.module("tokenizers")


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("shape", [(1, 96, 16), (2, 16, 6, 5)])
def test_both_sides_of_vq_do_the_same(tokenizers: ModuleType, shape: tuple[int, ...], cosine: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=True)
    ours, peer = tokenizers.sides(x, 40, cosine=cosine)
    if isinstance(peer, str):
        pytest.skip(peer)
    for _ in range(3):
        codes, ids, table = ours()
        gradient = x.grad
        other_codes, other_ids, other_table = peer()
        assert torch.equal(ids.squeeze(-1), other_ids)
        torch.testing.assert_close(codes, other_codes, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(table, other_table, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(gradient, x.grad, atol=1e-6, rtol=1e-5)


def test_every_suite_lists_its_cases() -> None:
    for path in sorted(SUITES.glob("*.py")):
        assert callable(bench.load(path.stem)), path


def test_both_sides_of_marching_cubes_do_the_same() -> None:
    pytest.importorskip("skimage")
    case = next(case for case in bench.load("meshes")(True) if case.name.startswith("marching cubes"))
    assert callable(case.peer)
    ours, (vertices, faces, *_) = case.ours(), case.peer()
    cell = 2 / 47  # theirs counts in cells, ours from -1 to 1

    def area_and_volume(vertices: torch.Tensor, faces: torch.Tensor) -> torch.Tensor:
        a, b, c = vertices.double()[faces.long()].unbind(1)
        across = torch.linalg.cross(b - a, c - a)
        return torch.stack([across.norm(dim=1).sum() / 2, (a * across).sum().abs() / 6])

    expected = area_and_volume(torch.from_numpy(vertices.copy()) * cell - 1, torch.from_numpy(faces.copy()))
    torch.testing.assert_close(area_and_volume(ours.vertices, ours.faces), expected, rtol=1e-4, atol=0)
