"""Everything that docs/results/shapes.md reports: trains the toy tokenizer and generator of shapes, measures them, draws, fills the page.

    python scripts/results_shapes.py                     # about an hour and a quarter on two idle CPU cores, of which the dense models take half
    python scripts/results_shapes.py measure page --runs DIR

Training and what is measured are kept in the folder of runs: a part that is finished is not done again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import results_shapes_dense as dense  # beside this file
import results_shapes_meshes as meshes
import results_shapes_parts as parts
from pages import RESULTS, fill, run_parts, table

from genkit import files

PAGE = RESULTS / "shapes.md"
MEASURED: dict[str, Callable[[Path], Any]] = {
    "by depth": parts.by_depth,
    "classes": parts.classes,
    "longer": parts.longer,
    "by steps": parts.by_steps,
    "dense": dense.measure,
    "by size": parts.by_size,
    "prepared": parts.prepared,
    "real meshes": meshes.real_meshes,
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
    dense.train_all(runs)
    meshes.train(runs)


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
        "real meshes": of_real_meshes,
    }
    fill(PAGE, {name: render[name](found) for name in render if name in found})
    for name in ("shapes.png", "shapes-long.png", "shapes-decoded.png", "shapes-dense.png", "shapes-furniture.png"):
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
    cells = []
    for name, row in own["rows"].items():
        trained = (
            [f"{row['seconds']:.0f}", f"{row['samples']:,}", f"{row['cpu_seconds']:.2f}"]
            if "seconds" in row
            else ["-"] * 3
        )
        shares = [f"{100 * row[key]:.0f} %" for key in ("accuracy", "one piece", "watertight")]
        # The shapes themselves are what distances are measured to.
        is_far = "mmd" in row and "seconds" in row
        near = [f"{x:.3g}" for x in (1000 * row["mmd"], row["cov"], row["nna"])] if is_far else ["-"] * 3
        cells.append((name, *trained, shares[0], f"{row['pieces']:.1f}", *shares[1:], *near))
    head = (
        "model",
        "CPU s of training",
        "shapes seen",
        "CPU s a sample",
        "named rightly",
        "pieces",
        "of one piece",
        "watertight",
        "MMD-CD x 1000",
        "COV",
        "1-NNA",
    )
    weights = ", ".join(f"{name} {count / 1e6:.2f}" for name, count in own["parameters"].items())
    told = (
        f"Millions of weights: {weights}. {dense.COUNT} samples against as many held-out shapes by {dense.POINTS:,} points each. A grid of 64 in patches of 4, eight "
        f"times the tokens, takes {own['fine']['training']:.1f} CPU seconds of training a shape and {own['fine']['drawing']:.0f} to draw one."
    )
    return f"{told}\n\n{table(head, cells)}\n\n![Samples, one row per class, two of each model](shapes-dense.png)"


def of_real_meshes(found: Mapping[str, Any]) -> str:
    own = found["real meshes"]
    rows = [
        (
            name,
            f"{row['tokens']:,.0f}",
            f"{row['iou']:.3f}",
            f"{1000 * row['chamfer']:.2f}",
            f"{row['normal_consistency']:.3f}",
            f"{row['f_score']:.3f}",
            f"{100 * row['watertight']:.0f} %",
        )
        for name, row in own["rows"].items()
    ]
    head = ("tokenizer", "tokens", "IoU", "Chamfer x 1000", "normal consistency", "F-score", "watertight")
    told = (
        f"{own['count']} held-out pieces; trained on for {own['seconds'] / 60:.0f} minutes, {own['samples']:,} samples."
    )
    return f"{told}\n\n{table(head, rows)}\n\n![Held-out furniture as prepared, and given back](shapes-furniture.png)"


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
