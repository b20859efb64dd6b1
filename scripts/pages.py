"""What the scripts of results share: figures that are measured once, tables between two marks of a page, plots."""

from __future__ import annotations

import json
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
