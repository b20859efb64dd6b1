"""Everything that docs/results/shapes.md reports: trains the toy tokenizer and generator of shapes, measures them, draws, fills the page.

    python scripts/results_shapes.py                     # about twenty minutes on two idle CPU cores
    python scripts/results_shapes.py measure page --runs DIR

Training and what is measured are kept in the folder of runs: a part that is finished is not done again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import results_shapes_parts as parts  # beside this file
from pages import RESULTS, fill, run_parts, table

from genkit import files

PAGE = RESULTS / "shapes.md"
MEASURED: dict[str, Callable[[Path], Any]] = {
    "by depth": parts.by_depth,
    "classes": parts.classes,
    "longer": parts.longer,
    "by steps": parts.by_steps,
    "dense": parts.dense,
    "by size": parts.by_size,
    "prepared": parts.prepared,
}


def main() -> None:
    run_parts(__doc__, MEASURED, train, page, "results-shapes.json")


def train(runs: Path) -> None:
    from genkit.training import train as run

    run(f"toy/{parts.TOKENIZER}", out=runs)
    from_it = f"tokenizer.from={runs / parts.TOKENIZER}"
    run(f"toy/{parts.GENERATOR}", [from_it], out=runs)
    longer = [from_it, f"train.num_samples={parts.LONGER_SAMPLES}"]
    run(f"toy/{parts.GENERATOR}", longer, name=parts.LONGER, out=runs)


def page(found: Mapping[str, Any], runs: Path) -> None:
    """Fill in what has been measured; what has not keeps what the page says."""
    render = {
        "by depth": of_depths,
        "classes": of_classes,
        "longer": of_longer,
        "by steps": of_steps,
        "dense": of_dense,
        "by size": of_sizes,
        "prepared": of_prepared,
    }
    fill(
        PAGE,
        {name: render[name](found) for name in render if name in found and (name != "dense" or "by steps" in found)},
    )
    for name in ("shapes.png", "shapes-long.png", "shapes-decoded.png", "shapes-dense.png"):
        if (runs / name).exists():
            files.write_bytes(RESULTS / name, (runs / name).read_bytes())


def of_depths(found: Mapping[str, Any]) -> str:
    own = found["by depth"]
    rows = [
        (
            name,
            *(
                f"{value:.3g}"
                for value in (1000 * row["chamfer"], row["normal_consistency"], row["iou"], row["watertight"])
            ),
        )
        for name, row in own["rows"].items()
    ]
    told = f"This tokenizer saw {own['samples']:,} shapes with repetition in {own['seconds'] / 60:.1f} minutes; a shape has {own['tokens']:.0f} tokens on average."
    return f"{told}\n\n" + table(("function of", "Chamfer x 1000", "normal consistency", "IoU", "watertight"), rows)


def of_classes(found: Mapping[str, Any]) -> str:
    rows = [
        (
            name,
            f"{100 * row['accuracy']:.0f} %",
            *(f"{100 * row[key]:.0f} %" if key in row else "" for key in ("one piece", "watertight")),
        )
        for name, row in found["classes"]["rows"].items()
    ]
    return table(
        (f"of {found['classes']['count']} samples, or 60 shapes", "named rightly", "of one piece", "watertight"), rows
    )


def of_longer(found: Mapping[str, Any]) -> str:
    rows = []
    for steps, row in found["longer"]["rows"].items():
        shares = (f"{100 * row[key]:.0f} %" for key in ("accuracy", "one piece", "watertight"))
        near = (f"{value:.3g}" for value in (1000 * row["mmd"], row["cov"], row["nna"]))
        rows.append((steps, str(row["count"]), *shares, *near))
    names = ("steps", "samples", "named rightly", "of one piece", "watertight", "MMD-CD x 1000", "COV", "1-NNA")
    return f"After {found['longer']['samples']:,} shapes with repetition.\n\n" + table(names, rows)


def of_steps(found: Mapping[str, Any]) -> str:
    own = found["by steps"]
    told = (
        f"This generator has {own['parameters'] / 1e6:.2f} million weights and saw {own['samples']:,} shapes with repetition in "
        f"{own['seconds'] / 60:.1f} minutes."
    )
    return f"{told}\n\n" + _sampled(own["rows"], "steps")


def of_dense(found: Mapping[str, Any]) -> str:
    own = found["dense"]
    told = (
        f"{own['parameters'] / 1e6:.2f} million weights, trained on as many shapes as the generator, {own['samples']:,} with repetition, in {own['seconds'] / 60:.1f} CPU minutes. "
        f"On a grid of 64 in the same patches, eight times the tokens, drawing takes {own['fine']:.1f} CPU seconds a shape (untrained weights)."
    )
    rows = {
        "OctGPT, 12 + 24 steps": found["by steps"]["rows"]["12 + 24"],
        f"dense, {parts.DENSE_STEPS} steps of Heun's": own["row"],
    }
    return f"{told}\n\n{_sampled(rows, 'model')}\n\n![Samples of the dense model, one row per class](shapes-dense.png)"


def _sampled(rows: Mapping[str, Mapping[str, float]], first: str) -> str:
    cells = []
    for name, row in rows.items():
        figures = (
            [f"{value:.3g}" for value in (1000 * row["mmd"], row["cov"], row["nna"])] if "mmd" in row else ["-"] * 3
        )
        cells.append(
            (name, f"{row['cpu_seconds']:.2f}", f"{100 * row['accuracy']:.0f} %", f"{row['pieces']:.1f}", *figures)
        )
    return table((first, "CPU seconds a shape", "named rightly", "pieces", "MMD-CD x 1000", "COV", "1-NNA"), cells)


def of_sizes(found: Mapping[str, Any]) -> str:
    rows = [
        (
            depth,
            f"{row['tokens']:,}",
            f"{row['kept']:.2f}",
            f"{row['computed again']:.2f}",
            f"{row['computed again'] / row['kept']:.1f}",
        )
        for depth, row in found["by size"].items()
    ]
    return table(("surface at depth", "tokens", "CPU seconds, kept", "computed again", "times"), rows)


def of_prepared(found: Mapping[str, Any]) -> str:
    own = found["prepared"]
    return f"**{own['a minute']:.0f} meshes a minute** on one core, of {own['faces']:,.0f} faces on average."


if __name__ == "__main__":
    main()
