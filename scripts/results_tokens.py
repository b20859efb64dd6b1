"""Everything that docs/results/tokens.md reports: every kind of generator on one tokenizer, and generators that are told neighbours.

    python scripts/results_tokens.py                       # all of it, three quarters of an hour on two idle CPU cores
    python scripts/results_tokens.py train --only masked gpt
    python scripts/results_tokens.py measure page --tokenizer runs/vq-fashion

It may be stopped at any time: what is finished is not done again.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from pages import RESULTS, Store, fill, table
from PIL import Image
from torch import Tensor

import genkit
from genkit.conditions.embeddings import Database
from genkit.conditions.label import Label
from genkit.data.fashion import CLASS_NAMES, Fashion
from genkit.errors import GenkitError, UsageError
from genkit.evaluation import comparing
from genkit.images import grid
from genkit.metrics import features, sources
from genkit.nn.layout import dense_layout
from genkit.objectives.next_token import NextToken
from genkit.pipeline import open_run
from genkit.rng import Rng, sample_seeds

PAGE = RESULTS / "tokens.md"
SAMPLES, COUNT = 12_800, 1000
# The same for all: how long, and an average over fewer steps than the recipes'.
SHORT = {
    "train.num_samples": SAMPLES,
    "train.warmup_samples": 1280,
    "train.ema": 0.99,
    "log.every_steps": 20,
    "log.sample_every_steps": 10_000,
    "log.save_every_steps": 10_000,
}
DIT = {"data.size": None, "backbone.dim": 112, "backbone.mixer.num_heads": 4, "metrics": []}
# Run -> recipe and what makes it as large as the others, 1.43 to 1.49 million weights.
FAIR: dict[str, tuple[str, dict[str, Any]]] = {
    "masked": ("toy/masked-fashion", {}),
    "bert": ("toy/bert-fashion", {"backbone.dim": 144, "backbone.depth": 5}),
    "uvit": ("toy/uvit-fashion", {"backbone.dim": 120, "backbone.depth": 6}),
    "mage": ("toy/mage-fashion", {"backbone.dim": 144}),
    "gpt": ("toy/gpt-fashion", {}),
    "resgen-1": ("toy/resgen-fashion", {"backbone.dim": 160, "backbone.depth": 3}),
    "mar": ("toy/mar-fashion", {"backbone.head_width": 96}),
    "dit": ("toy/dit-fashion", {**DIT, "backbone.depth": 6}),
}
HELD_OUT = ("bag", "sneaker")
NARROW = {"backbone.dim": 112}  # with attention to the neighbours as large as the generator without
ALONE = {"objective.cond_drop": 1.0, "sampler.guidance": 1.0}  # told nothing
TOLD: dict[str, tuple[str, dict[str, Any]]] = {
    "told-nothing": ("toy/gpt-fashion", ALONE),
    "told-neighbours": ("toy/rarm-fashion", NARROW),
    "told-eight": (
        "toy/rarm-fashion",
        {**NARROW, "data.type": "folder", "data.path": "eight-classes", "data.size": 28, "data.channels": 1},
    ),
    "dit-nothing": ("toy/dit-fashion", {**DIT, **ALONE, "backbone.depth": 6}),
    "dit-neighbours": ("toy/rdm-fashion", {**DIT, "backbone.depth": 5, "condition.cells": 2}),
}


# Of the second table: generator, run, what it was told, guidance.
ROWS = (
    ("raster", "told-nothing", "nothing", 1),
    ("raster", "told-neighbours", "four neighbours", 1),
    ("raster", "told-neighbours", "four neighbours", 2),
    ("diffusion", "dit-nothing", "nothing", 1),
    ("diffusion", "dit-neighbours", "four neighbours", 1),
    ("diffusion", "dit-neighbours", "four neighbours", 2),
)
SWAPPED = {  # run -> what the third table calls it
    "told-neighbours": ("raster", "all ten classes"),
    "dit-neighbours": ("diffusion", "all ten classes"),
    "told-eight": ("raster", f"eight, without {' and '.join(HELD_OUT)}"),
}


def train(out: Path, tokenizer: Path, only: list[str]) -> None:
    """Every generator, on a tokenizer that is trained first where it is not given."""
    if not (tokenizer / "checkpoints").is_dir():
        options = {"tokenizer.codebook_size": 1024, "train.num_samples": 8000}
        genkit.train("toy/vq-fashion", options, name=tokenizer.name, out=tokenizer.parent)
    write_eight(out / "eight-classes")
    for name, (recipe, options) in {**FAIR, **TOLD}.items():
        if (only and name not in only) or finished(out / name):
            continue
        chosen = SHORT | options | {"tokenizer.from": str(tokenizer)}
        if "data.path" in options:
            chosen["data.path"] = str(out / options["data.path"])
        genkit.train(recipe, chosen, name=name, out=out)


def finished(run: Path) -> bool:
    try:
        pipe = open_run(run)
    except (GenkitError, UsageError):
        return False
    return int(pipe.folder.parent.name) * pipe.run_config["train"]["batch_size"] >= SAMPLES


def write_eight(folder: Path) -> None:
    """The training images without two of their classes, as a folder of PNGs."""
    if folder.is_dir():
        return
    images = Fashion(source="embedded", split="train")
    for i, label in enumerate(images.labels.tolist()):
        if CLASS_NAMES[label] not in HELD_OUT:
            path = folder / CLASS_NAMES[label] / f"{i:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images.pixels[i, 0].numpy()).save(path)


def measure(out: Path, only: list[str]) -> None:
    """Figures that are not there yet; those of the fair table are the reports of the runs themselves."""
    keep = Store(out / "tokens.json").get

    def is_asked(name: str) -> bool:
        return (not only or name in only) and finished(out / name)

    for name in FAIR:
        if is_asked(name):
            if not list((out / name / "eval").glob(f"*-{COUNT}.json")):
                genkit.evaluate(out / name, count=COUNT, batch_size=100)
            keep(f"seconds {name}", lambda run=out / name: seconds(run))
    for _, name, told, guidance in ROWS:
        if is_asked(name):
            figures = withheld if told == "nothing" else distance
            keep(f"fd {name} {guidance}", lambda n=name, g=guidance, f=figures: f(open_run(out / n), g))
            keep(f"parameters {name}", lambda n=name: weights(open_run(out / n)))
    if is_asked("gpt"):
        keep("fd withheld", lambda: withheld(open_run(out / "gpt"), 1))
    for name in SWAPPED:
        if is_asked(name):
            pipe = open_run(out / name)
            others = pipe.told.open("fashion:val").of_classes(map(CLASS_NAMES.index, HELD_OUT))
            for said, database in (("own", pipe.told.database), ("others", others)):
                keep(f"share {name} {said}", lambda p=pipe, d=database: share_of_held_out(p, d))
            keep(f"picture {name}", lambda p=pipe, d=others, n=name: picture(p, d, n))
    if is_asked("told-neighbours"):
        keep("nll", lambda: likelihoods(open_run(out / "told-neighbours")))


def seconds(run: Path) -> float:
    """CPU seconds per image, 20 at a time."""
    pipe, labels = open_run(run), torch.arange(20) % 10
    pipe.generate(labels[:2], [0, 1])
    started = time.process_time()
    pipe.generate(labels, list(range(20)))
    return (time.process_time() - started) / 20


def weights(pipe: Any) -> int:
    return sum(p.numel() for p in pipe.backbone.parameters())


def distance(pipe: Any, guidance: float) -> dict[str, float]:
    """FD to the training images, and how often samples are of the class that was asked for, or looked up."""
    report = genkit.evaluate(pipe, count=COUNT, guidance=guidance, batch_size=100)
    return {row["metric"].partition(" ")[0]: row["value"] for row in report.rows}


def withheld(pipe: Any, guidance: float) -> dict[str, float]:
    """FD of a generator of classes that is told none: all that it knows if it was trained so, and its rows of classes were not."""
    pipe._told = Label()
    report = genkit.evaluate(pipe, count=COUNT, guidance=guidance, metrics=[{"type": "frechet"}], batch_size=100)
    return {"FD": float(report["FD"])}


@torch.no_grad()
def likelihoods(pipe: Any) -> dict[str, float]:
    """Nats per id of 1,000 images that were not trained on: told their neighbours, those of other images, nothing."""
    images = sources.from_spec(pipe.run_config["data"], "val")
    x, _ = images.read(0, images.count)
    ids = pipe.tokenizer.encode(x).ids
    database: Database = pipe.told.database
    context = database.vectors[database.search(pipe.told.embed(x), pipe.told.k)]
    objective, found = NextToken(cond_drop=0.0), {}
    for name, said in (("own", context), ("others", context.roll(1, 0)), ("nothing", context * 0)):
        losses = objective(pipe.backbone, ids, {"context": said}, dense_layout(pipe.grid), Rng.at(0, 0, len(ids)))
        found[name] = losses["nll"].mean().item()
    return found


def share_of_held_out(pipe: Any, database: Database) -> float:
    """Share of samples in which a classifier sees one of the two classes."""
    held_out = torch.tensor([CLASS_NAMES.index(name) for name in HELD_OUT])
    seen = []
    for first in range(0, COUNT // 2, 100):
        x = draw(pipe, database, range(first, first + 100))
        seen.append(torch.isin(features.load("fashion-cnn").logits(x).argmax(1), held_out))
    return torch.cat(seen).float().mean().item()


def draw(pipe: Any, database: Database, numbers: range) -> Tensor:
    labels = torch.full((len(numbers),), -1)
    return pipe.generate(labels, sample_seeds(0, numbers.start, len(numbers)), guidance=2.0, database=database)


def picture(pipe: Any, others: Database, name: str) -> str:
    """Samples after the database of training, and after another one."""
    rows = [draw(pipe, database, range(16)) for database in (pipe.told.database, others)]
    file = RESULTS / f"tokens-{name}.png"
    grid(torch.cat(rows), columns=16, row_names=("trained", "swapped")).save(file)
    return file.name


# The page


def page(out: Path) -> None:
    found = Store(out / "tokens.json").values
    fill(PAGE, {"fair": fair_table(out, found), "told": told_table(found), "swapped": swapped_table(found)})


def fair_table(out: Path, found: dict[str, Any]) -> str:
    """What `genkit eval --compare` says of the runs, with the time of an image beside."""
    reports = [path for name in FAIR for path in sorted((out / name / "eval").glob(f"*-{COUNT}.json"))[-1:]]
    compared = comparing.compare(reports)
    rows = []
    figures: dict[str, dict[str, Any]] = {}
    for part in compared["tables"]:
        for row in part["rows"]:
            figures.setdefault(row["report"].partition("/")[0], {}).update(row)
    for budget in compared["budget"]:
        name = budget["report"].partition("/")[0]
        of = {key.partition(" ")[0]: value for key, value in figures[name].items()}
        rows.append(
            (
                f"`{name}`",
                f"{budget['parameters'] / 1e6:.2f} M",
                f"{budget['samples']:,}",
                str(budget["num_steps"] or 49),
                f"{budget['guidance']:g}",
                f"{of['FD']:.2f}",
                f"{of['class']:.3f}",
                f"{1000 * found[f'seconds {name}']:.0f}" if f"seconds {name}" in found else "not measured",
            )
        )
    head = ("backbone", "parameters", "trained on", "steps", "guidance", "FD", "class accuracy", "CPU ms per image")
    same = (
        "the same tokenizer, images seen and size for all"
        if not compared["unfair"]
        else f"NOT the same: {compared['unfair']}"
    )
    return f"{table(head, rows)}\n\nBy `genkit eval --compare`: {same}."


def told_table(found: dict[str, Any]) -> str:
    rows = []
    for generator, name, told, guidance in ROWS:
        figures = found.get(f"fd {name} {guidance}")
        if figures is None:
            rows.append((generator, told, "not measured", str(guidance), "not measured", ""))
            continue
        accuracy = "" if told == "nothing" else f"{figures['class']:.3f}"
        weights_of = f"{found[f'parameters {name}'] / 1e6:.2f} M"
        rows.append((generator, told, weights_of, str(guidance), f"{figures['FD']:.2f}", accuracy))
    if "fd withheld" in found:
        withheld_of = "nothing, by a generator that was told classes"
        rows.insert(1, ("raster", withheld_of, "1.47 M", "1", f"{found['fd withheld']['FD']:.2f}", ""))
    text = table(("generator", "told", "parameters", "guidance", "FD", "of the class looked up"), rows)
    if "nll" in found:
        own, others, nothing = (f"{found['nll'][name]:.3f}" for name in ("own", "others", "nothing"))
        text += (
            f"\n\nOf 1,000 images never trained on, the raster generator says {own} nats per id when told their neighbours, {others} when told those of "
            f"another image, {nothing} when told nothing."
        )
    return text


def swapped_table(found: dict[str, Any]) -> str:
    rows = []
    for name, (generator, trained) in SWAPPED.items():
        shares = [found.get(f"share {name} {said}") for said in ("own", "others")]
        rows.append((generator, trained, *("not measured" if share is None else f"{share:.1%}" for share in shares)))
    two = " and ".join(HELD_OUT)
    return table(("generator", "trained on", "database of training", f"database of {two}"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", nargs="*", choices=["train", "measure", "page", []], help="default: all three")
    parser.add_argument("--out", type=Path, default=Path("runs/results-tokens"))
    parser.add_argument("--tokenizer", type=Path, help="of all generators (default: OUT/vq)")
    parser.add_argument("--only", nargs="+", default=[], help="train and measure: these runs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    for what in args.what or ["train", "measure", "page"]:
        if what == "train":
            train(args.out, args.tokenizer or args.out / "vq", args.only)
        elif what == "measure":
            measure(args.out, args.only)
        else:
            page(args.out)


if __name__ == "__main__":
    main()
