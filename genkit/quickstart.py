"""The whole line on embedded data: tokenizer, tokens, generator, samples, figures. Run again, it continues."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from genkit import files

RECIPES = Path(__file__).parent / "configs" / "toy"
IMAGES_PER_CLASS = 10
EVALUATED = 1000
SHAPES = 24  # in the contact sheet
SHAPES_EVALUATED = 24
# What is made -> recipe of the tokenizer, recipe of the generator, its classes; the runs are called like the recipes.
LINES = {"images": ("vq-fashion", "masked-fashion", 10), "shapes": ("octree-shapes", "octgpt-shapes", 6)}


def quickstart(
    *, what: str = "images", out: str | Path = "runs", seed: int = 0, device: str | None = None
) -> dict[str, Any]:
    """Train a toy tokenizer and a toy masked generator, sample a labelled grid, evaluate both.

    Every phase that is complete is kept: training resumes from its checkpoint, finished phases keep their figures.

    Args:
        what: "images" of clothes, or "shapes", procedural furniture and things as meshes.
        out: where the two runs lie: vq-fashion and masked-fashion, or octree-shapes and octgpt-shapes.

    Returns: figures by name, seconds per phase, paths of the pictures.
    """
    from genkit.caching import cache
    from genkit.evaluation.evaluate import evaluate
    from genkit.sampling import sample
    from genkit.training import train

    out = Path(out)
    first, second, classes = LINES[what]
    suffix = "" if what == "images" else f"-{what}"
    record = out / f"quickstart{suffix}.json"
    tokenizer_run, generator_run, folder = out / first, out / second, out / f"quickstart{suffix}-samples"
    kept: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {}
    seconds: dict[str, float] = {}
    recipe = RECIPES / f"{second}.yaml"
    overrides = [f"train.seed={seed}", f"tokenizer.from={tokenizer_run}"]

    def once(name: str, run: Any, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of a phase, kept for the next start while the checkpoint it is about stays the same."""
        key = f"{run.last}@{(run.last / 'state' / 'state.json').stat().st_mtime_ns}"
        if kept.get(name, {}).get("key") != key:
            started = time.perf_counter()
            result = work()
            kept[name] = {"key": key, "result": result, "seconds": time.perf_counter() - started}
            files.write_json(record, kept)
        seconds[name] = kept[name]["seconds"]
        return kept[name]["result"]

    tokenizer = train(RECIPES / f"{first}.yaml", overrides[:1], out=out, device=device)
    seconds["train tokenizer"] = _training_seconds(tokenizer)
    once("cache tokens", tokenizer, lambda: cache(recipe, overrides, out=str(out.parent / "cache"), device=device))
    generator = train(recipe, overrides, out=out, device=device)
    seconds["train generator"] = _training_seconds(generator)
    few = None if what == "images" else SHAPES_EVALUATED
    count = IMAGES_PER_CLASS * classes if what == "images" else SHAPES
    grid = once("sample", generator, lambda: sample(generator_run, count=count, seed=seed, out=folder, device=device))
    rebuilt = once("evaluate tokenizer", tokenizer, lambda: evaluate(tokenizer_run, count=few, device=device).to_dict())
    samples = once(
        "evaluate generator",
        generator,
        lambda: evaluate(
            generator_run, count=EVALUATED if what == "images" else few, seed=seed + 1, device=device
        ).to_dict(),
    )
    return {
        "figures": [*rebuilt["rows"], *samples["rows"]],
        "seconds": seconds,
        "pictures": {
            "samples": grid["grid"],
            "reconstructions": str(_newest_picture(tokenizer_run)),
            "samples during training": str(generator_run / "samples"),
        },
    }


def render(found: dict[str, Any]) -> str:
    """The figures with their protocols below, the seconds, the pictures."""
    from genkit import console

    protocols = list(dict.fromkeys(row["protocol"] for row in found["figures"]))
    figures = [(row["metric"], row["value"], f"[{protocols.index(row['protocol']) + 1}]") for row in found["figures"]]
    total = sum(found["seconds"].values())
    return "\n\n".join(
        [
            console.table(figures, ("figure", "value", "protocol")),
            "\n".join(f"[{i}] {protocol}" for i, protocol in enumerate(protocols, 1)),
            console.table([*found["seconds"].items(), ("together", total)], ("phase", "seconds")),
            console.table(found["pictures"].items()),
        ]
    )


def _training_seconds(run: Any) -> float:
    """Seconds in the training loop over all starts, as the last checkpoint counts them."""
    state = json.loads((run.last / "state" / "state.json").read_text())
    return state["counters"]["seconds"]


def _newest_picture(run: Path) -> Path:
    return max((run / "samples").glob("*.png"))
