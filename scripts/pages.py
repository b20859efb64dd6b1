"""What the scripts of results share: figures that are measured once, tables between two marks of a page, plots."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
END = "<!-- end -->"


class Store:
    """Figures under names, in a JSON file: what is there is not measured again."""

    def __init__(self, path: Path):
        self.path = path
        self.values: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        """The figure of this name, measured now if it is not there."""
        if name not in self.values:
            self.values[name] = measure()
            self.path.write_text(json.dumps(self.values, indent=1) + "\n")
            print(name, self.values[name], flush=True)
        return self.values[name]


def run_parts(
    about: str | None,
    measured: Mapping[str, Callable[[Path], Any]],
    train: Callable[[Path], None],
    page: Callable[[Mapping[str, Any], Path], None],
    file: str,
) -> None:
    """The command line of a script that trains, measures part by part and fills a page, all in a folder of runs.

    Args:
        about: the script's own words.
        measured: name -> figures of a folder of runs.
        page: writes what has been measured, given the folder too.
        file: in that folder, where figures are kept.
    """
    parser = argparse.ArgumentParser(description=(about or "").split("\n")[0])
    parser.add_argument("what", nargs="*", default=["train", "measure", "page"], metavar="train measure page")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--only", choices=list(measured), help="one part of what is measured")
    args = parser.parse_args()
    if "train" in args.what:
        train(args.runs)
    store = Store(args.runs / file)
    if "measure" in args.what:
        for name, measure in measured.items():
            if args.only in (None, name):
                started = time.process_time()
                store.get(name, lambda measure=measure: measure(args.runs))
                print(f"{name}: {time.process_time() - started:.0f} CPU seconds", flush=True)
    if "page" in args.what:
        page(store.values, args.runs)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first column to the left, numbers to the right."""
    if not rows or len(head) == 1:
        return "*Not measured yet.*"
    lines = [head, tuple("---" if i == 0 else "---:" for i in range(len(head))), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fill(page: Path, parts: Mapping[str, str]) -> None:
    """Write every part behind its mark `<!-- name -->`, up to the next `<!-- end -->`; all other text stays."""
    text = page.read_text(encoding="utf-8")
    for name, part in parts.items():
        before, mark, after = text.partition(f"<!-- {name} -->\n")
        if not mark:
            raise SystemExit(f"{page} has no place for {name}")
        text = before + mark + part + "\n" + after[after.index(END) :]
    page.write_text(text, encoding="utf-8")


def axes(width: float, height: float) -> tuple[Any, Any]:
    """(figure, axes) of matplotlib, without a screen."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(width, height))


def save_plot(figure: Any, axis: Any, path: Path) -> None:
    """With a legend and a grid of lines."""
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def counts_on_x(axis: Any, values: Sequence[int]) -> None:
    """These numbers under a logarithmic axis, as they are."""
    axis.set_xticks(values, [f"{n:,}" for n in values])
    axis.set_xticks([], minor=True)
