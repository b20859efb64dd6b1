"""What a person sees while genkit works: a bar on a terminal, lines elsewhere, all of it on stderr.

Standard output belongs to results. Of several processes only the first one speaks. Imports nothing but the standard
library until a bar is drawn.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_quiet = False


def set_quiet(quiet: bool) -> None:
    """Silence everything but warnings, for the rest of the process."""
    global _quiet
    _quiet = quiet


def is_main_process() -> bool:
    """Whether this process speaks for all; torchrun and accelerate number the processes in RANK."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """A line for people, on stderr."""
    if is_main_process() and not _quiet:
        print(text, file=sys.stderr, flush=True)


class Progress:
    """How far a long piece of work is, as a context manager.

    On a terminal a bar with rate, remaining time and the latest numbers; elsewhere a line for each `report`.

    Args:
        total: how much there is to do, in `unit`.
        unit: plural noun of what is counted: "images".
        title: what is being done, a word or two.
        initial: how much was done before this process started; it does not count for the rate.
        enabled: False shows nothing.
    """

    def __init__(self, total: int, unit: str, title: str, initial: int = 0, enabled: bool = True):
        self.total, self.unit, self.title = total, unit, title
        self._done = self._initial = initial
        self._started = time.monotonic()
        self._shown = enabled and is_main_process() and not _quiet
        self._numbers: dict[str, float] = {}
        self._bar: Any = None
        if self._shown and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total,
                initial=initial,
                desc=title,
                unit=f" {unit}",
                dynamic_ncols=True,
                bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} "
                "{rate_noinv_fmt}, {remaining} left{postfix}",
            )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, n: int, **numbers: float) -> None:
        """`n` more are done; the numbers (loss=0.12) stand at the end of the bar until they are replaced."""
        self._done += n
        if self._bar is not None:
            self._show(numbers)
            self._bar.update(n)

    def report(self, numbers: Mapping[str, float]) -> None:
        """What was measured over one log interval: the loss goes to the bar, elsewhere everything makes a line."""
        if self._bar is not None:
            self._show({name: numbers[name] for name in ("loss",) if name in numbers})
        else:
            self.log(self.text(numbers))

    def text(self, numbers: Mapping[str, float]) -> str:
        """The line of one log interval: "vq 1,280/20,000 images, 35 s left: step 20  loss 0.31  lr 0.001"."""
        new = self._done - self._initial
        seconds = (time.monotonic() - self._started) / new * (self.total - self._done) if new else 0.0
        left = f", {duration(seconds)} left" if new and self._done < self.total else ""
        listed = "  ".join(f"{name} {number(value)}" for name, value in numbers.items() if name != "samples")
        return f"{self.title} {self._done:,}/{self.total:,} {self.unit}{left}: {listed}"

    def line(self, text: str) -> None:
        """An event worth a line of its own, above the bar: a step was skipped, a checkpoint was saved."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        elif self._shown:
            say(text)

    def log(self, text: str) -> None:
        """A line for where there is no bar; the bar shows the same in its own way."""
        if self._bar is None and self._shown:
            say(text)

    def _show(self, numbers: Mapping[str, float]) -> None:
        self._numbers.update(numbers)
        if numbers:
            self._bar.set_postfix_str("  ".join(f"{k} {number(v)}" for k, v in self._numbers.items()), refresh=False)


def number(value: Any) -> str:
    """A number as people read it: four digits, no more."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or not math.isfinite(value):
        return f"{value}"
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def duration(seconds: float) -> str:
    """8 s, 2 min 05 s, 3 h 20 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def table(rows: Iterable[Sequence[Any]], header: Sequence[str] = ()) -> str:
    """Aligned columns: numbers to the right, words to the left."""
    body = [list(row) for row in rows]
    right = [all(isinstance(row[i], int | float) for row in body) for i in range(len(body[0]))] if body else []
    cells = [*([list(header)] if header else []), *([number(cell) for cell in row] for row in body)]
    if not cells:
        return ""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    if header:
        cells.insert(1, ["-" * width for width in widths])
    lines = (
        "  ".join(
            cell.rjust(w) if body and right[i] else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    )
    return "\n".join(line.rstrip() for line in lines)


def records(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of mappings: one column per key, empty where a row lacks it."""
    header = list(dict.fromkeys(key for row in rows for key in row))
    return table([["" if row.get(key) is None else row[key] for key in header] for row in rows], header)


def to_json(value: Any) -> str:
    """JSON that every reader accepts: NaN and infinities become null, paths and everything unknown become text."""
    return json.dumps(_plain(value), indent=2, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    if not isinstance(value, float) and hasattr(value, "tolist"):  # numpy and torch, scalars and arrays
        return _plain(value.tolist())
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return str(value)
