"""Our side and a named peer, timed in turns in one process.

A suite is a file benchmarks/NAME.py of the checkout with a function `cases(quick) -> Iterable[Case]`. Both sides of a case do equal work on
equal inputs; the tests hold their results equal.
"""

from __future__ import annotations

import gc
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch

from genkit.errors import UsageError, nearest

_FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
_PAIRS, _QUICK_PAIRS = 9, 5
_LEAST_S = 0.02  # a timing shorter than this is repeated inside one reading
_LONG_S = 10.0  # a pair that takes longer than this steadies itself: the fewest of them are enough


@dataclass(frozen=True)
class Case:
    """One comparison.

    Args:
        name: what is done and on what size.
        peer_name: whom we compare with, with its version.
        goal: how many times as fast as the peer we mean to be.
        ours: does it once, our way.
        peer: does it once, the peer's way; or one line on why it cannot be run here.
    """

    name: str
    peer_name: str
    goal: float
    ours: Callable[[], Any]
    peer: Callable[[], Any] | str


class Row(TypedDict):
    """`ratio` is the median over pairs of peer seconds / our seconds, above 1 = we are faster; None when there was no peer to run."""

    case: str
    peer: str
    ratio: float | None
    goal: float
    ours_s: float  # median seconds of one call
    peer_s: float | None
    runs: int  # timed pairs
    threads: int
    note: str  # why there is no ratio, else empty


def run(
    suite: str,
    *,
    quick: bool = False,
    threads: int | None = None,
    only: str = "",
    on_row: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Time the cases of a suite.

    Args:
        suite: name of a file in benchmarks/.
        quick: smaller cases and the fewest pairs, 5.
        threads: torch threads for both sides; None leaves them as they are.
        only: words that a case's name has, in any case of letters; empty = all cases.
        on_row: is told of each case as soon as it is timed.

    Raises: UsageError outside a checkout, for an unknown suite and for words that no case has.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"threads={threads} must be at least 1")
    cases = load(suite)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        rows, others = [], []
        for case in cases(quick):
            if only.lower() in case.name.lower():
                rows.append(_time(case, _QUICK_PAIRS if quick else _PAIRS))
                on_row(rows[-1])
            else:
                others.append(case.name)
    finally:
        torch.set_num_threads(before)
    if not rows:
        raise UsageError(f"no case of suite {suite} has '{only}' in its name: {'; '.join(others)}")
    return rows


def line(row: Row) -> str:
    """A row in a line, for those who wait for the others."""
    name, peer, ratio, _, ours, theirs, *_ = _cells(row)
    return f"{name}: {ratio} ({ours}, {theirs} by {peer})"


def render(rows: list[Row]) -> str:
    """The rows as a table for people."""
    head = ("case", "peer", "ratio", "goal", "ours", "peer's", "runs", "threads")
    lines = [head, *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join(text)


def _cells(row: Row) -> tuple[str, ...]:
    numbers = (str(row["runs"]), str(row["threads"]))
    ours, goal = f"{row['ours_s'] * 1e3:.2f} ms", f"{row['goal']:g}x"
    if row["ratio"] is None or row["peer_s"] is None:
        return (row["case"], f"{row['peer']}: {row['note']}", "-", goal, ours, "-", *numbers)
    return (row["case"], row["peer"], f"{row['ratio']:.2f}x", goal, ours, f"{row['peer_s'] * 1e3:.2f} ms", *numbers)


def load(suite: str) -> Callable[[bool], Iterable[Case]]:
    """The function `cases` of a suite. Raises UsageError outside a checkout or for an unknown suite."""
    return module(suite).cases


def module(suite: str) -> Any:
    """The file of a suite as a module. Raises UsageError outside a checkout or for an unknown suite."""
    if not _FOLDER.is_dir():
        raise UsageError(f"benchmarks live in a checkout of genkit, and {_FOLDER} does not exist; run from a clone")
    known = sorted(path.stem for path in _FOLDER.glob("*.py"))
    if suite not in known:
        raise UsageError(f"no benchmark suite '{suite}'; {nearest(suite, known)}")
    spec = importlib.util.spec_from_file_location(f"genkit_benchmarks_{suite}", _FOLDER / f"{suite}.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def _time(case: Case, pairs: int) -> Row:
    """Warm up, then time A B, B A, A B, ...: whatever drifts during the measurement meets both sides alike."""
    sides = [case.ours] if isinstance(case.peer, str) else [case.ours, case.peer]
    started = time.perf_counter()
    repeats = [_warm_up(side) for side in sides]
    if time.perf_counter() - started > 2 * _LONG_S:  # each side was called twice
        pairs = min(pairs, _QUICK_PAIRS)
    seconds: list[list[float]] = [[] for _ in sides]
    was_collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection would be charged to whichever side happens to run
    try:
        for pair in range(pairs):
            order = range(len(sides)) if pair % 2 == 0 else reversed(range(len(sides)))
            for side in order:
                seconds[side].append(_seconds(sides[side], repeats[side]))
    finally:
        if was_collecting:
            gc.enable()
    row = Row(
        case=case.name,
        peer=case.peer_name,
        ratio=None,
        goal=case.goal,
        ours_s=statistics.median(seconds[0]),
        peer_s=None,
        runs=pairs,
        threads=torch.get_num_threads(),
        note=case.peer if isinstance(case.peer, str) else "",
    )
    if len(sides) == 2:
        row["peer_s"] = statistics.median(seconds[1])
        row["ratio"] = statistics.median(peer / ours for ours, peer in zip(*seconds, strict=True))
    return row


def _warm_up(side: Callable[[], Any]) -> int:
    """Two calls, then how many of them make a reading long enough to trust."""
    side()
    return max(1, int(_LEAST_S / max(_seconds(side, 1), 1e-9)))


def _seconds(side: Callable[[], Any], repeats: int) -> float:
    """Of one call, the mean over the repeats. Waits for the device to finish."""
    _synchronise()
    start = time.perf_counter()
    for _ in range(repeats):
        side()
    _synchronise()
    return (time.perf_counter() - start) / repeats


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
