"""FiTv2 trained on emoji of several sizes against DiT trained on squares: at the trained size, at a shape and at sizes neither has seen.

    python scripts/results_sizes.py train     both runs, equal weights and samples seen; resumes
    python scripts/results_sizes.py measure   the distances, one line of results per model and size; resumes
    python scripts/results_sizes.py draw      the pictures, and docs/results/diffusion_sizes.md

Every distance is between samples and all training images letterboxed to the same size.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from genkit import AutoPipeline, evaluate, images, train
from genkit.data.sizes import parse_size
from genkit.rng import sample_seeds

ROOT = Path(__file__).parent.parent
OUT = ROOT / "docs" / "results"
RECIPES = {"DiT": "toy/dit-emoji", "FiTv2": "toy/fit-emoji"}
SIZES = {"24x24": "as trained", "16x32": "1:2, never seen", "36x36": "1.5 times as large"}
SAMPLER = {"type": "euler", "num_steps": 16}
METRICS = [{"type": "frechet", "features": "emoji-cnn"}, {"type": "kid", "features": "emoji-cnn"}]
METHODS: dict[str, dict[str, Any]] = {
    "positions continued": {},
    "interpolated": {"method": "interpolate"},
    "VisionNTK": {"method": "ntk"},
    "VisionYaRN": {"method": "yarn"},
    "VisionNTK, gain of the paper": {"method": "ntk", "gain": "paper"},
    "VisionNTK, gain of the release": {"method": "ntk", "gain": "release"},
}
BEYOND = {"positions stretched": "stretch", "positions continued": "continue"}
SHOWN = 8  # pictures of every row


def cases() -> Iterator[tuple[str, str, str]]:
    """(model, size, how positions meet it)."""
    for size in SIZES:
        for model, ways in (("DiT", list(BEYOND)), ("FiTv2", list(METHODS))):
            yield from ((model, size, way) for way in (ways[:1] if size == "24x24" else ways))


def opened(runs: Path, checkpoint: str, model: str) -> Any:
    pipe = AutoPipeline.from_pretrained(runs / RECIPES[model].split("/")[1] / "checkpoints" / checkpoint)
    pipe.sampler = {**pipe.sampler, **SAMPLER}
    return pipe


def asked(pipe: Any, model: str, size: str, way: str) -> dict[str, Any]:
    """What a case asks of the pipeline; DiT's positions are set in it."""
    if model == "DiT":
        pipe.backbone.position.beyond = BEYOND[way]
        return {"size": size}
    return {"size": size, "rope": METHODS[way]}


def measure(runs: Path, checkpoint: str, count: int, file: Path, only: str) -> None:
    found = json.loads(file.read_text()) if file.exists() else {}
    pipes: dict[str, Any] = {}
    for model, size, way in cases():
        name = f"{model}, {size}, {way}"
        if name in found or only not in name:
            continue
        if model not in pipes:
            pipes[model] = opened(runs, checkpoint, model)
        pipe = pipes[model]
        report = evaluate(pipe, metrics=METRICS, count=count, batch_size=64, **asked(pipe, model, size, way))
        rows = {row["metric"].partition(" (")[0]: row["value"] for row in report.rows}
        found[name] = {"model": model, "size": size, "way": way, "count": count, **rows}
        found[name] |= {"samples": report.settings.get("samples"), "protocol": report.rows[0]["protocol"]}
        file.write_text(json.dumps(found, indent=1) + "\n")
        print(name, rows, flush=True)


def draw(runs: Path, checkpoint: str, file: Path) -> None:
    """One block per size, one row per model and way that was measured, the same seeds and classes in all."""
    found = json.loads(file.read_text())
    labels, seeds = torch.arange(SHOWN), sample_seeds(0, 0, SHOWN)
    pipes = {model: opened(runs, checkpoint, model) for model in RECIPES}
    blocks = []
    for size in SIZES:
        own = [(model, way) for model, at, way in cases() if at == size and f"{model}, {size}, {way}" in found]
        if not own:
            continue
        tiles = [pipes[model].generate(labels, seeds, **asked(pipes[model], model, size, way)) for model, way in own]
        names = [model if size == "24x24" else f"{model}, {way}" for model, way in own]
        scale = max(1, 72 // parse_size(size)[0])
        blocks.append(images.grid(torch.cat(tiles), columns=SHOWN, row_names=names, scale=scale))
    gap = 14
    sheet = Image.new("RGB", (max(b.width for b in blocks), sum(b.height + gap for b in blocks)), "white")
    top = 0
    for block in blocks:
        sheet.paste(block, (0, top))
        top += block.height + gap
    sheet.save(OUT / "diffusion_sizes.png")


def write(file: Path) -> None:
    found = json.loads(file.read_text())
    any_row = next(iter(found.values()))
    table = ["| size (rows x columns) | model | positions beyond | FD | KID |", "|---|---|---|---|---|"]
    for model, size, way in cases():
        row = found.get(f"{model}, {size}, {way}")
        if row is None:  # not measured
            continue
        told = "-" if size == "24x24" else way
        table.append(f"| {size}, {SIZES[size]} | {model} | {told} | {row['FD']:.1f} | {row['KID']:.2f} |")
    left = [name for model, size, way in cases() if (name := f"{model}, {size}, {way}") not in found]
    missing = f"\nNot measured here: {'; '.join(left)}.\n" if left else ""
    text = f"""# Sizes a model was not trained on

Two networks with as many weights ({_weights()}), trained on the same number of emoji ({any_row["samples"]:,} of the {_planned():,} of their recipes{_unfinished(any_row["samples"])}) with the same
objective, learning rate and seed:

- **DiT** on squares of 24x24 pixels, positions as fixed waves (`{RECIPES["DiT"]}`);
- **FiTv2** on 24x24, 20x24, 24x20, 20x28 and 28x20, mixed in every batch (`{RECIPES["FiTv2"]}`): a fifth of what it sees is square.

Each then draws three sizes. Neither has seen a picture twice as wide as high, nor one of 36x36. FD is the Fréchet distance and KID the kernel distance of emoji-cnn-v1's
features between {any_row["count"]} samples (classes in turn, {SAMPLER["type"]}, {SAMPLER["num_steps"]} steps, guidance of the recipes, averaged weights) and all 1,270 training images,
letterboxed to the same size: the emoji in the middle, as large as the shorter side, white at both ends. With so few samples FD is biased upwards, in all rows
alike; KID is not. One seed.

{chr(10).join(table)}
{missing}
![One block per size: {", ".join(SIZES)}; the same seeds and classes in every row](diffusion_sizes.png)

"positions continued": one unit per token, as while training; "stretched": laid over the trained grid. The other rules are those of
`genkit sample --rope METHOD --rope-gain WORD` (FiT, FiTv2), each axis by its own length.

## What padding costs

Tokens that attention computes beyond real ones, of images brought to at most 256x256 pixels in units of 16 as FiT does (2,048 images with the sizes of photographs, or
log-normal sides; `tests/test_sizes.py`). Linear layers compute real tokens alone.

| batch | padded to the longest of the batch | in groups of about one length |
|---|---|---|
| 8 | 9.6 %, 6.5 % | 1.2 %, 1.2 % |
| 64 | 10.8 %, 8.3 % | 1.2 %, 1.5 % |
| 256 | 11.1 %, 8.7 % | 1.4 %, 1.7 % |

How to make this again (with the runs trained to the end of their recipes): `python scripts/results_sizes.py train measure draw`.
By hand: `genkit train toy/fit-emoji`, `genkit eval runs/fit-emoji --size 16x32 --rope ntk`, `genkit sample runs/fit-emoji --size 36x36`.
"""
    (OUT / "diffusion_sizes.md").write_text(text)


def _planned() -> int:
    from genkit import config, recipes

    return config.load(recipes.resolve(RECIPES["FiTv2"]))["train"]["num_samples"]


def _unfinished(samples: int) -> str:
    return (
        ""
        if samples >= _planned()
        else ": stopped early, so that pictures are rough and the figures are not those of the finished recipes"
    )


def _weights() -> str:
    from genkit import config, recipes, registry

    counts = []
    for model, recipe in RECIPES.items():
        spec = config.load(recipes.resolve(recipe))["backbone"]
        with torch.device("meta"):
            network = registry.build("backbone", spec, channels=3, num_classes=16, grid=(24, 24))
        counts.append(f"{model} {sum(p.numel() for p in network.parameters()):,}")
    return ", ".join(counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("steps", nargs="+", choices=["train", "measure", "draw", "write"])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--checkpoint", default="last", help="of both runs (default: last)")
    parser.add_argument("--count", type=int, default=1000, help="samples of every row (default: 1000)")
    parser.add_argument("--results", type=Path, default=Path("results_sizes.json"), help="rows measured so far")
    parser.add_argument("--only", default="", metavar="TEXT", help="of measure: rows whose name holds this")
    args = parser.parse_args()
    if "train" in args.steps:
        for recipe in RECIPES.values():
            train(recipe, out=args.runs)
    if "measure" in args.steps:
        measure(args.runs, args.checkpoint, args.count, args.results, args.only)
    if "draw" in args.steps:
        draw(args.runs, args.checkpoint, args.results)
    if {"draw", "write"} & set(args.steps):
        write(args.results)


if __name__ == "__main__":
    main()
