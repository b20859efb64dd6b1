"""Everything that docs/results/tokens.md reports: every kind of generator on one tokenizer, and generators that are told neighbours or captions.

    python scripts/results_tokens.py                       # all of it, an hour and a half on two idle CPU cores
    python scripts/results_tokens.py train --only masked gpt
    python scripts/results_tokens.py measure page --tokenizer runs/vq-fashion

It may be stopped at any time: what is finished is not done again.
"""

from __future__ import annotations

import argparse
import json
import re
import textwrap
import time
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pages import RESULTS, Store, fill, table
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import genkit
from genkit.conditions.embeddings import Database
from genkit.conditions.label import Label
from genkit.data.emoji import Emoji
from genkit.data.fashion import CLASS_NAMES, Fashion
from genkit.errors import GenkitError, UsageError
from genkit.evaluation import comparing
from genkit.images import grid, to_pil
from genkit.metrics import features, sources
from genkit.nn.layout import dense_layout
from genkit.nn.told import once
from genkit.objectives.masked import Masked
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
DIT: dict[str, Any] = {"data.size": None, "backbone.dim": 112, "backbone.mixer.num_heads": 4, "metrics": []}
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
# The two of the first table as they are published to begin.
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "uvit-published": ("toy/uvit-fashion", {**FAIR["uvit"][1], "backbone.head": "tied_detached"}),
    "mage-published": (
        "toy/mage-fashion",
        {**FAIR["mage"][1], "backbone.head": "tied_detached", "backbone.position_std": 0.02},
    ),
}
LEARNING = ("masked", "bert", "uvit-published", "uvit", "mage-published", "mage")
CAPTIONS = "captions"
CAPTIONED: dict[str, Any] = {
    "train.num_samples": 51_200,
    "backbone.dropout": 0.1,
    "log.sample_every_steps": 10_000,
    "log.keep": 6,
}
FRACTIONS = (1.0, 0.5)  # of an image's ids that are masked, where likelihoods of captions are compared
TIMES = 2  # samples of every caption


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


def train(out: Path, tokenizer: Path, of_emoji: Path, only: list[str]) -> None:
    """Every generator, on a tokenizer that is trained first where it is not given."""
    if not (tokenizer / "checkpoints").is_dir():
        options = {"tokenizer.codebook_size": 1024, "train.num_samples": 8000}
        genkit.train("toy/vq-fashion", options, name=tokenizer.name, out=tokenizer.parent)
    write_eight(out / "eight-classes")
    if (not only or CAPTIONS in only) and not finished(out / CAPTIONS, CAPTIONED["train.num_samples"]):
        if not (of_emoji / "checkpoints").is_dir():
            genkit.train("toy/vq-emoji", name=of_emoji.name, out=of_emoji.parent)
        genkit.train("toy/captions-emoji", CAPTIONED | {"tokenizer.from": str(of_emoji)}, name=CAPTIONS, out=out)
    everyone: dict[str, tuple[str, dict[str, Any]]] = {**FAIR, **PUBLISHED, **TOLD}
    for name, (recipe, options) in everyone.items():
        if (only and name not in only) or finished(out / name):
            continue
        chosen = SHORT | options | {"tokenizer.from": str(tokenizer)}
        if "data.path" in options:
            chosen["data.path"] = str(out / str(options["data.path"]))
        genkit.train(recipe, chosen, name=name, out=out)


def finished(run: Path, samples: int = SAMPLES) -> bool:
    try:
        pipe = open_run(run)
    except (GenkitError, UsageError):
        return False
    return int(pipe.folder.parent.name) * pipe.run_config["train"]["batch_size"] >= samples


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

    for name in (*FAIR, *PUBLISHED):
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
    if is_asked(CAPTIONS):
        pipe = open_run(out / CAPTIONS)
        for split in ("val", "train"):
            keep(f"captions drawn {split}", lambda s=split: followed(pipe, s))
            keep(f"captions ranked {split}", lambda s=split: ranked(pipe, s))
        keep("captions picture", lambda: sheet(pipe))


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


# Captions


def emoji(pipe: Any, split: Literal["train", "val"]) -> tuple[Tensor, list[str], Tensor]:
    """Pictures [N, 3, Y, X], names, groups [N]: all that were not trained on, or as many that were, spread over all."""
    held_out = Emoji(size=64, split="val")
    images = held_out if split == "val" else Emoji(size=64, split=split)
    rows = torch.linspace(0, len(images) - 1, len(held_out)).round().long().tolist()
    batch = images.__getitems__(rows)
    names = [pipe.told.caption(key, label) for key, label in zip(batch["key"], batch["label"].tolist(), strict=True)]
    return batch["x"], names, batch["label"]


def by_words(names: list[str]) -> dict[str, Tensor]:
    """[N] bool: names of which every word, or none, occurs in a name trained on."""
    known = {word for key in Emoji(size=64, split="train").keys for word in words_of(key)}
    share = torch.tensor([sum(word in known for word in words_of(name)) / len(words_of(name)) for name in names])
    return {"of known words alone": share == 1, "of no known word": share == 0}


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def drawn(pipe: Any, texts: list[str], guidance: float, seed: int = 0) -> Tensor:
    parts = [texts[first : first + 40] for first in range(0, len(texts), 40)]
    seeds = [sample_seeds(seed, 40 * i, len(part)) for i, part in enumerate(parts)]
    return torch.cat(
        [
            pipe.generate(torch.full((len(part),), -1), own, texts=part, guidance=guidance)
            for part, own in zip(parts, seeds, strict=True)
        ]
    )


@torch.no_grad()
def followed(pipe: Any, split: Literal["train", "val"]) -> dict[str, dict[str, float]]:
    """How often a classifier names the group of the caption, and how near samples are to the emoji of that name among all of the split."""
    x, names, groups = emoji(pipe, split)
    net = features.load("emoji-cnn")

    def judge(samples: Tensor, of: Tensor | None = None) -> dict[str, float]:
        near = torch.nn.functional.normalize(net(samples), dim=1) @ torch.nn.functional.normalize(net(x), dim=1).T
        own = near[torch.arange(len(samples)), torch.arange(len(samples)) % len(x)]
        rank = (near >= own[:, None]).sum(1).float()  # 1 = the own picture is the nearest
        times = len(samples) // len(x)
        is_seen = net.logits(samples).argmax(1) == groups.repeat(times)
        judged = torch.ones(len(samples), dtype=torch.bool) if of is None else of.repeat(times)
        found = {"group": is_seen, "nearest": rank == 1, "tenth": rank <= len(x) / 10}
        return {name: values[judged].float().mean().item() for name, values in found.items()}

    others = names[len(names) // 2 :] + names[: len(names) // 2]
    guided = drawn(pipe, names * TIMES, 3.0)
    parts = by_words(names) if split == "val" else {}
    return {
        "count": {"names": len(names)},
        "the pictures": judge(x),
        "their tokens": judge(pipe.tokenizer.decode(pipe.tokenizer.encode(x).z).clamp(-1, 1)),
        "the name, guidance 1": judge(drawn(pipe, names * TIMES, 1.0)),
        "the name, guidance 3": judge(guided),
        **{f"the name, guidance 3, {part} ({int(of.sum())})": judge(guided, of) for part, of in parts.items()},
        "another name, guidance 3": judge(drawn(pipe, others * TIMES, 3.0)),
        "nothing": judge(drawn(pipe, [""] * len(names) * TIMES, 1.0)),
    }


@torch.no_grad()
def ranked(pipe: Any, split: Literal["train", "val"]) -> dict[str, dict[str, float]]:
    """The likelihood of every picture under every name: nats per masked id, and where its own name comes, among all and among those of its group."""
    x, names, groups = emoji(pipe, split)
    ids = pipe.tokenizer.encode(x).ids  # [N, 1, Y, X]
    count, layout = len(names), dense_layout(pipe.grid)

    def told(texts: list[str]) -> Any:
        rng = Rng.at(0, 0, len(texts))
        cond = pipe.told.of_request(torch.full((len(texts),), -1), rng, texts=texts)
        return Masked().predictor(pipe.backbone, once(pipe.backbone, cond), layout)

    def nll(predict: Any, number: int, size: int) -> Tensor:
        """[size] of one picture under every condition, the mean over fractions."""
        own, found = ids[number].expand(size, -1, -1, -1), torch.zeros(size)
        order = Rng.at(1, number, 1).order(own[0].numel()).view(1, *own.shape[1:])
        for fraction in FRACTIONS:
            known = (order >= fraction * own[0].numel()).expand_as(own)
            losses = -predict(own, known, None).log_softmax(-1).gather(-1, own.unsqueeze(-1)).squeeze(-1)
            found += losses[~known].view(size, -1).mean(1) / len(FRACTIONS)
        return found

    by_name, by_nothing = told(names), told([""])
    matrix = torch.stack([nll(by_name, i, count) for i in range(count)])  # [picture, name]
    nothing = torch.cat([nll(by_nothing, i, 1) for i in range(count)])
    own = matrix.diagonal()
    rank = (matrix <= own[:, None]).sum(1).float()
    alike = groups[:, None] == groups
    in_group = ((matrix <= own[:, None]) & alike).sum(1).float() / alike.sum(1)
    chance = (1 + alike.sum(1)) / (2 * alike.sum(1))
    found = {
        "own": own,
        "others": (matrix.sum(1) - own) / (count - 1),
        "nothing": nothing,
        "first": rank == 1,
        "tenth": rank <= count / 10,
        "within the group": in_group,
        "within the group by chance": chance,
    }
    parts = {"": torch.ones(count, dtype=torch.bool)} | (by_words(names) if split == "val" else {})
    return {
        part: {"count": int(of.sum()), "median": rank[of].median().item()}
        | {name: values[of].float().mean().item() for name, values in found.items()}
        for part, of in parts.items()
    }


def sheet(pipe: Any) -> str:
    """Names never trained on, the emoji of these names, their tokens, and two samples."""
    x, names, _ = emoji(pipe, "val")
    columns, side, low = 12, 64, 44
    rows = torch.linspace(0, len(names) - 1, 3 * columns).round().long()
    texts = [names[i] for i in rows.tolist()]
    own = pipe.tokenizer.decode(pipe.tokenizer.encode(x[rows]).z).clamp(-1, 1)
    kinds = {"emoji": x[rows], "its tokens": own} | {
        f"drawn {seed + 1}": drawn(pipe, texts, 3.0, seed) for seed in range(2)
    }
    block = len(kinds) * (side + 2) + low
    page = Image.new("RGB", (70 + columns * (side + 16), len(rows) // columns * block), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=9)
    for number, text in enumerate(texts):
        left, top = 70 + number % columns * (side + 16), number // columns * block
        for line, (kind, pictures) in enumerate(kinds.items()):
            page.paste(to_pil(pictures[number : number + 1])[0], (left, top + line * (side + 2)))
            if number % columns == 0:
                draw.text((4, top + line * (side + 2) + side / 2), kind, fill="black", font=font, anchor="lm")
        wrapped = "\n".join(textwrap.wrap(text, 15)[:3])
        draw.multiline_text((left, top + block - low), wrapped, fill="black", font=font, spacing=1)
    file = RESULTS / "tokens-captions.png"
    page.save(file)
    return file.name


# The page


def page(out: Path) -> None:
    found = Store(out / "tokens.json").values
    parts = {"fair": fair_table(out, found), "learning": learning_table(out), "told": told_table(found)}
    fill(PAGE, parts | {"swapped": swapped_table(found), "drawn": drawn_table(found), "ranked": ranked_table(found)})


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


def learning_table(out: Path) -> str:
    """Losses of runs on the way, and what became of them."""
    rows, at = [], (40, 80, 160, 240, 400)
    for name in LEARNING:
        if not (out / name / "metrics.jsonl").exists():
            continue
        lines = map(json.loads, (out / name / "metrics.jsonl").read_text().splitlines())
        losses = {line["step"]: line["nll"] for line in lines if "nll" in line}
        settings = yaml.safe_load((out / name / "config.resolved.yaml").read_text())["backbone"]
        figures = {}
        for path in sorted((out / name / "eval").glob(f"*-{COUNT}.json"))[-1:]:
            rows_of = json.loads(path.read_text())["rows"]
            figures = {row["metric"].partition(" ")[0]: row["value"] for row in rows_of}
        shown = [f"{losses[step]:.2f}" if step in losses else "not measured" for step in at]
        of_samples = [f"{figures[key]:.2f}" if key in figures else "not measured" for key in ("FD", "class")]
        head = settings.get("head", {"masked": "linear", "mage": "tied_detached"}.get(settings["type"], "tied"))
        positions = f"{settings.get('position_std', 0.02):g}" if settings["type"] == "mage" else ""
        rows.append((f"`{settings['type']}`", head, positions, *shown, *of_samples))
    return table(
        ("backbone", "head", "decoder's positions", *(f"after {step} steps" for step in at), "FD", "class accuracy"),
        rows,
    )


def drawn_table(found: dict[str, Any]) -> str:
    rows = []
    for split, which in (("val", "never trained on"), ("train", "trained on")):
        figures = dict(found.get(f"captions drawn {split}", {}))
        count = figures.pop("count", {"names": 0})["names"]
        for told, row in figures.items():
            rows.append((f"{count} names {which}", told, *(f"{row[key]:.1%}" for key in ("group", "nearest", "tenth"))))
    return table(("of", "judged", "group seen", "own emoji nearest", "among the nearest tenth"), rows)


def ranked_table(found: dict[str, Any]) -> str:
    rows = []
    for split, which in (("val", "never trained on"), ("train", "trained on")):
        for part, row in found.get(f"captions ranked {split}", {}).items():
            nats = (f"{row[key]:.3f}" for key in ("own", "others", "nothing"))
            shares = (f"{row[key]:.1%}" for key in ("first", "tenth"))
            within = f"{row['within the group']:.2f} ({row['within the group by chance']:.2f})"
            name = f"{row['count']} {which}{', ' * bool(part)}{part}"
            rows.append((name, *nats, *shares, f"{row['median']:.0f}", within))
    head = ("emoji", "own name", "names of others", "nothing", "own name first", "in the first tenth", "median place")
    return table((*head, "place within the group (by chance)"), rows)


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
    parser.add_argument("--emoji-tokenizer", type=Path, help="of the one that is told captions (default: OUT/vq-emoji)")
    parser.add_argument("--only", nargs="+", default=[], help="train and measure: these runs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    for what in args.what or ["train", "measure", "page"]:
        if what == "train":
            train(args.out, args.tokenizer or args.out / "vq", args.emoji_tokenizer or args.out / "vq-emoji", args.only)
        elif what == "measure":
            measure(args.out, args.only)
        else:
            page(args.out)


if __name__ == "__main__":
    main()
