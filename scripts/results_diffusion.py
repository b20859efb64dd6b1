"""What docs/results/diffusion.md reports of convergence and of samplers: trains the models, measures, draws the pictures, fills in the tables.

    python scripts/results_diffusion.py                    # all of it: about half an hour on two idle CPU cores
    python scripts/results_diffusion.py train --only 'dimsum-*'
    python scripts/results_diffusion.py measure draw page --runs DIR

It may be stopped at any time: what is finished is not done again. The models of the comparison have as many weights, see the same latents of the same images
in the same order with the same noise, in batches of the same size, and differ in the backbone alone; one thread each.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pages import RESULTS, Store, axes, counts_on_x, fill, save_plot, table

import genkit
from genkit import config, recipes, registry
from genkit.errors import GenkitError
from genkit.images import write_png
from genkit.nn.layout import dense_layout
from genkit.optim import adamw
from genkit.pipeline import open_run
from genkit.rng import Rng, sample_seeds
from genkit.sampling import class_grid

PAGE = RESULTS / "diffusion.md"
LOG = ["log.sample_every_steps=100000", "log.save_every_steps=100000"]

# The tokenizers, and for how many images they are trained.
TOKENIZERS = {
    "fashion-kl": ("toy/kl-fashion", ["train.num_samples=8_000"]),
    "emoji-kl-32": ("toy/kl-emoji-32", []),
}
# Effect (a): name -> (recipe, what is changed in it).
MODELS: dict[str, tuple[str, list[str]]] = {
    "dit": ("toy/dit-fashion", []),
    "dimsum": ("toy/dimsum-fashion", []),
    "fit": ("toy/fit-fashion", []),
    "dit-vssd": ("toy/dit-fashion", ["backbone.mixer={type: vssd, state_size: 32, expand: 1}"]),
    "dit-gla": ("toy/dit-fashion", ["backbone.mixer={type: multi_scan, mixer: {type: gla, num_heads: 3}}"]),
}
TITLES = {"dit": "DiT", "dimsum": "DiMSUM", "fit": "FiTv2", "dit-vssd": "DiT, VSSD", "dit-gla": "DiT, GLA"}
SEEDS = (0, 1, 2)
REPEATED = ("dit", "dimsum")  # the models of which every seed is trained; of the others the first
SAMPLES, EVERY, BATCH = 16_000, 100, 32  # images seen by each model, steps between its checkpoints, images per step
LINE = 50  # steps to a line of metrics, as in the recipes
EMOJI, EMOJI_RECIPE, EMOJI_PICTURE = "emoji-dit", "toy/dit-kl-emoji", RESULTS / "diffusion-emoji-dit.png"


def runs() -> dict[str, tuple[str, list[str]]]:
    """Name of each run -> (recipe, overrides), in the order of training."""
    found = dict(TOKENIZERS)
    for name, (recipe, keys) in found.items():
        found[name] = (recipe, [*keys, *LOG])
    kept = ["log.sample_every_steps=100000", f"log.save_every_steps={EVERY}", "log.keep=100"]
    for seed in SEEDS:
        for name in trained(seed):
            recipe, keys = MODELS[name]
            budget = [f"train.num_samples={SAMPLES}", f"train.seed={seed}"]
            found[run_name(name, seed)] = (recipe, ["tokenizer.from={runs}/fashion-kl", *keys, *budget, *kept])
        if seed == SEEDS[0]:
            found[EMOJI] = (EMOJI_RECIPE, ["tokenizer.from={runs}/emoji-kl-32", *LOG])
    return found


def trained(seed: int) -> tuple[str, ...]:
    """The models of this seed."""
    return tuple(MODELS) if seed == SEEDS[0] else REPEATED


def run_name(model: str, seed: int) -> str:
    return f"{model}-seed{seed}"


# Training


def finished(folder: Path, name: str) -> bool:
    return (folder / name / "finished").exists()


def train_one(name: str, recipe: str, keys: list[str], folder: Path) -> None:
    """One run with one thread; where it was finished before, nothing."""
    torch.set_num_threads(1)
    if finished(folder, name):
        return
    print("train", name, flush=True)
    genkit.train(
        recipe,
        [key.format(runs=folder) if "{runs}" in key else key for key in keys],
        name=name,
        out=folder,
        device="cpu",
    )
    (folder / name / "finished").touch()


def train(folder: Path, only: str, jobs: int) -> None:
    """All runs whose names match, so many side by side; tokenizers first."""
    chosen = {name: run for name, run in runs().items() if fnmatch.fnmatch(name, only)}
    for stage in (TOKENIZERS.keys(), chosen.keys() - TOKENIZERS.keys()):
        todo = [name for name in chosen if name in stage]
        if jobs == 1:
            for name in todo:
                train_one(name, *chosen[name], folder)
            continue
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            for one in [pool.submit(train_one, name, *chosen[name], folder) for name in todo]:
                one.result()


# Measuring

CURVE_SAMPLER = {"type": "dpmpp", "num_steps": 12, "guidance": 1.0}  # of effect (a): nothing but the model
CURVE_COUNT, SAMPLER_COUNT, FINAL_COUNT = 500, 500, 1000  # samples
# Effect (d): title -> (changes of the recipe's sampler, the key that sets its effort, its values).
SAMPLERS: dict[str, tuple[dict[str, Any], str, tuple[float, ...]]] = {
    "euler (DDIM)": ({"type": "euler"}, "num_steps", (4, 8, 16, 32)),
    "heun": ({"type": "heun"}, "num_steps", (2, 4, 8, 16)),
    "dpmpp": ({"type": "dpmpp"}, "num_steps", (4, 8, 16, 32)),
    "dopri5": ({"type": "dopri5"}, "rtol", (0.3, 0.1, 0.03)),
    "ancestral": ({"type": "ancestral"}, "num_steps", (8, 16, 32, 64)),
    "sde": ({"type": "sde"}, "num_steps", (8, 16, 32, 64)),
    "scheduler": ({"type": "scheduler", "name": "FlowMatchHeunDiscreteScheduler"}, "num_steps", (4, 8, 16)),
}


def judged(run: Path, sampler: dict[str, Any], count: int) -> dict[str, float]:
    """FD, where there is one class accuracy, calls of the network per sample (with guidance each of the two halves counts), and CPU seconds."""
    shown = 0  # samples the network was shown

    def note(module: Any, args: tuple[Any, ...], out: Any) -> None:
        nonlocal shown
        shown += len(out)

    pipe = open_run(run)
    pipe.backbone.register_forward_hook(note)
    pipe.sampler = pipe.chosen_sampler(sampler)
    started = time.process_time()
    report = genkit.evaluate(pipe, count=count, batch_size=250)
    found = {"calls": shown / count, "seconds": time.process_time() - started}
    for row in report.rows:
        found[{"FD": "fd", "class": "accuracy"}[row["metric"].split()[0]]] = row["value"]
    return found


def checkpoints(folder: Path, name: str) -> list[Path]:
    """Those of a run that all runs have, in order; one more is left where a run was interrupted."""
    found = (folder / name / "checkpoints").glob("*")
    return sorted(path for path in found if path.name.isdigit() and int(path.name) % EVERY == 0)


def measure(folder: Path, only: str) -> None:
    """Everything that the runs allow which is not in measured.json yet."""
    store = Store(folder / "measured.json")
    for seed in SEEDS:
        for model in trained(seed):
            name = run_name(model, seed)
            if not fnmatch.fnmatch(name, only):
                continue
            for path in checkpoints(folder, name):
                at = f"{name} at {int(path.name) * BATCH}"
                store.get(at, partial(judged, path, CURVE_SAMPLER, CURVE_COUNT))
    for seed in SEEDS:
        for model in trained(seed):
            name = run_name(model, seed)
            if finished(folder, name) and fnmatch.fnmatch(name, only):
                store.get(f"{name} as its recipe", partial(judged, folder / name, {}, FINAL_COUNT))
    if finished(folder, EMOJI) and fnmatch.fnmatch(EMOJI, only):
        store.get(EMOJI, partial(emoji, folder / EMOJI))
    if finished(folder, "fashion-kl") and fnmatch.fnmatch("fashion-kl", only):
        store.get("floor", partial(floor, folder))
    for model in MODELS:
        if fnmatch.fnmatch(model, only):
            store.get(f"step {model}", partial(step_cost, *MODELS[model]))
    best = run_name("dit", SEEDS[0])
    if finished(folder, best) and fnmatch.fnmatch("samplers", only):
        efforts = [
            (rank, title, value) for title, (_, _, values) in SAMPLERS.items() for rank, value in enumerate(values)
        ]
        for _, title, value in sorted(efforts, key=lambda effort: effort[0]):  # of each the cheapest first
            spec, key, _ = SAMPLERS[title]
            sampler = {**spec, key: value, "guidance": 1.0}
            store.get(f"sampler {title} {key}={value}", partial(judged, folder / best, sampler, SAMPLER_COUNT))


def emoji(run: Path) -> dict[str, float]:
    """What 1,000 samples of the recipe's own sampler are like, and how near to training images; the same of held-out images for comparison."""
    told = [{"type": kind, "features": "emoji-cnn"} for kind in ("frechet", "memorisation")]
    pipe = open_run(run)
    data = pipe.run_config["data"]
    held_out = registry.build("data", {**data, "split": "val"})
    x = torch.stack([held_out[i]["x"] for i in range(len(held_out))])
    found: dict[str, float] = {"held out": len(x)}
    for name, of, count in (("", pipe, FINAL_COUNT), (" of held-out images", Shown(x, data), len(x))):
        for row in genkit.evaluate(of, metrics=told, count=count, batch_size=250).rows:
            found[row["metric"].split()[0] + name] = row["value"]
    return found


class Shown:
    """Images [N, C, Y, X] as a pipeline that "generates" them: sample i is image i."""

    components: dict[str, Any] = {}  # noqa: RUF012
    num_classes, class_names, sampler = 0, (), {"type": "none"}

    def __init__(self, x: torch.Tensor, data: dict[str, Any]):
        self.x, self.run_config = x, {"data": data}

    def generate(self, labels: torch.Tensor, seeds: Sequence[int], **options: Any) -> torch.Tensor:
        return self.x[list(seeds)]


def floor(folder: Path) -> dict[str, float]:
    """FD of held-out images, and of what the tokenizer makes of them, by as many as effects (a) and (d) have samples: what no model is to go below."""
    data = {"type": "fashion", "source": "embedded", "split": "train", "size": 32}
    held_out = registry.build("data", {**data, "split": "val"})
    x = torch.stack([held_out[i]["x"] for i in range(CURVE_COUNT)])
    tokenizer = open_run(folder / "fashion-kl").tokenizer
    with torch.inference_mode():
        rebuilt = tokenizer.decode(tokenizer.encode(x).z).clamp(-1, 1)
    found = {}
    for name, images in (("images", x), ("rebuilt", rebuilt)):
        report = genkit.evaluate(
            Shown(images, data), metrics=[{"type": "frechet", "features": "fashion-cnn"}], count=len(x)
        )
        found[name] = report.rows[0]["value"]
    return found


def step_cost(recipe: str, keys: list[str]) -> float:
    """Milliseconds of CPU of a training step of BATCH latents with one thread: the least of ten."""
    settings = config.resolve(recipes.resolve(recipe), keys, None)
    network = registry.build("backbone", settings["backbone"], channels=4, num_classes=10, grid=(8, 8))
    objective, optimizer = registry.build("objective", settings["objective"]), adamw(network, settings["train"])
    z, cond, layout = torch.randn(BATCH, 4, 8, 8), {"label": torch.arange(BATCH) % 10}, dense_layout((8, 8))
    threads, taken = torch.get_num_threads(), []
    torch.set_num_threads(1)
    for step in range(12):
        started = time.process_time()
        objective(network, z, cond, layout, Rng.at(0, step * BATCH, BATCH))["velocity"].mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        taken.append(time.process_time() - started)
    torch.set_num_threads(threads)
    return 1000 * min(taken[2:])


# Pictures


def draw(folder: Path) -> None:
    """docs/results/diffusion-*.png of what is there."""
    for model in MODELS:
        if finished(folder, run_name(model, SEEDS[0])):
            picture(folder / run_name(model, SEEDS[0]), RESULTS / f"diffusion-{model}.png", 10)
    if (folder / EMOJI / "checkpoints/last").exists():
        picture(folder / EMOJI, EMOJI_PICTURE, 12)
    measured = Store(folder / "measured.json").values
    if curves := {model: found for model in MODELS if (found := curve(measured, model))}:
        plot_curves(RESULTS / "diffusion-convergence.png", curves)
    if lines := {title: points for title in SAMPLERS if (points := line(measured, title))}:
        plot_samplers(RESULTS / "diffusion-samplers.png", lines, measured.get("floor"))


def picture(run: Path, path: Path, columns: int) -> None:
    """A row of samples for each class, as `genkit sample` draws them."""
    pipe = open_run(run)
    labels = [i % pipe.num_classes for i in range(columns * pipe.num_classes)]
    x = pipe.generate(torch.tensor(labels), sample_seeds(0, 0, len(labels)))
    write_png(path, class_grid(x, labels, pipe.class_names, columns))


def curve(measured: dict[str, Any], model: str) -> list[tuple[int, list[float]]]:
    """(images seen, FD of each seed) of a model, in order."""
    found = []
    for samples in range(EVERY * BATCH, SAMPLES + 1, EVERY * BATCH):
        names = [f"{run_name(model, seed)} at {samples}" for seed in SEEDS]
        values = [measured[name]["fd"] for name in names if name in measured]
        if values:
            found.append((samples, values))
    return found


def losses(folder: Path, model: str) -> dict[int, list[float]]:
    """Images seen -> the loss of each seed, a mean over the 50 steps before: all models have seen the same images and noise then, so that little of a
    difference is chance."""
    found: dict[int, list[float]] = {}
    for seed in SEEDS:
        path = folder / run_name(model, seed) / "metrics.jsonl"
        before = 0
        for row in map(json.loads, path.read_text().splitlines() if path.exists() else []):
            # After an interruption a mean may be of few steps.
            if row["step"] % LINE == 0 and row["step"] - before > 0.9 * LINE:
                found.setdefault(row["samples"], []).append(row["velocity"])
            before = row["step"]
    return found


def line(measured: dict[str, Any], title: str) -> list[dict[str, float]]:
    """Points of a sampler, with its effort in words."""
    _, key, values = SAMPLERS[title]
    names = {f"sampler {title} {key}={value}": value for value in values}
    return [{**measured[name], "effort": value} for name, value in names.items() if name in measured]


def plot_curves(path: Path, curves: dict[str, list[tuple[int, list[float]]]]) -> None:
    """FD over images seen: the mean of the seeds, each seed a dot."""
    figure, axis = axes(7.5, 4.5)
    for model, points in curves.items():
        (drawn,) = axis.plot([n for n, _ in points], [statistics.fmean(v) for _, v in points], label=TITLES[model])
        dots = [(n, value) for n, values in points for value in values]
        axis.plot(*zip(*dots, strict=True), ".", color=drawn.get_color())
    axis.set(yscale="log", xlabel="images seen in training", ylabel=f"FD (fashion-cnn-v1), N={CURVE_COUNT}")
    save_plot(figure, axis, path)


def plot_samplers(path: Path, lines: dict[str, list[dict[str, float]]], least: dict[str, float] | None) -> None:
    """FD over calls of the network per sample."""
    figure, axis = axes(7.5, 4.5)
    for title, points in lines.items():
        axis.plot([p["calls"] for p in points], [p["fd"] for p in points], "o-", label=title, markersize=4)
    if least is not None:
        axis.axhline(least["rebuilt"], color="grey", linestyle=":", label="held-out images through the tokenizer")
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="calls of the network per sample",
        ylabel=f"FD (fashion-cnn-v1), N={SAMPLER_COUNT}",
    )
    counts_on_x(axis, [4, 8, 16, 32, 64, 128])
    save_plot(figure, axis, path)


# The page


def page(folder: Path) -> None:
    """Write every table between its two marks in docs/results/diffusion.md; other text there stays."""
    fill(PAGE, tables(folder, Store(folder / "measured.json").values))


def tables(folder: Path, measured: dict[str, Any]) -> dict[str, str]:
    curves = {model: dict(curve(measured, model)) for model in MODELS}
    seen = sorted({samples for points in curves.values() for samples in points})
    convergence = [
        (TITLES[model], *(numbers(points.get(samples, [])) for samples in seen))
        for model, points in curves.items()
        if points
    ]
    steps = []
    for title in SAMPLERS:
        for p in line(measured, title):
            key = SAMPLERS[title][1]
            steps.append(
                (title, f"{key}={p['effort']:g}", f"{p['calls']:.0f}", f"{p['fd']:.2f}", f"{p['seconds']:.0f}")
            )
    least, drawn = measured.get("floor"), measured.get(EMOJI)
    lost = {model: losses(folder, model) for model in MODELS}
    read = sorted({samples for points in lost.values() for samples in points})
    return {
        "a loss": table(
            ("images seen", *(f"{samples:,}" for samples in read)),
            [
                (TITLES[model], *(numbers(points.get(samples, []), 3) for samples in read))
                for model, points in lost.items()
                if points
            ],
        ),
        "a": table(("images seen", *(f"{samples:,}" for samples in seen)), convergence),
        "a final": table(
            ("model", "weights", "a training step, ms of CPU", "FD, N=1,000", "class accuracy", "seeds"),
            [row for model in MODELS if (row := final(folder, measured, model))],
        ),
        "d": table(("sampler", "effort", "calls per sample", "FD, N=500", "CPU s"), steps),
        "emoji": ("*Not measured yet.*" if drawn is None else emoji_table(drawn)) + emoji_caption(folder / EMOJI),
        "floor": "*Not measured yet.*"
        if least is None
        else f"{least['images']:.2f} for the images themselves, {least['rebuilt']:.2f} for what the tokenizer makes of them.",
    }


def emoji_table(found: dict[str, float]) -> str:
    """The samples beside held-out images, which are few: FD grows as their number falls."""
    rows = [
        (
            f"{title}, N={count:,}",
            *(f"{found[key + of]:.{digits}f}" for key, digits in (("FD", 1), ("AuthPct", 1), ("near-copies", 3))),
        )
        for title, of, count in (
            ("samples", "", FINAL_COUNT),
            ("held-out images", " of held-out images", found["held out"]),
        )
    ]
    return table(("", "FD to the training images", "AuthPct", "share of near-copies"), rows)


def emoji_caption(run: Path) -> str:
    """The picture, and how long the model that drew it has been trained."""
    if not EMOJI_PICTURE.exists():
        return ""
    seen = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["samples"]
    planned = config.resolve(recipes.resolve(EMOJI_RECIPE), [], None)["train"]["num_samples"]
    when = f"{seen:,} images" if seen >= planned else f"{seen:,} of its {planned:,} images, stopped"
    return f"\n\n![Twelve samples of each class]({EMOJI_PICTURE.name})\n\n*DiT after {when}; twelve samples of each class, none chosen.*"


def numbers(values: Sequence[float], digits: int = 2) -> str:
    """Mean of the seeds, and by how much the furthest of them is away from it."""
    if not values:
        return "-"
    mean = statistics.fmean(values)
    spread = f" ± {max(abs(value - mean) for value in values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean:.{digits}f}{spread}"


def final(folder: Path, measured: dict[str, Any], model: str) -> tuple[str, ...] | None:
    """A model's row: weights, and what its finished runs are like by their recipe's sampler."""
    names = [run_name(model, seed) for seed in SEEDS if f"{run_name(model, seed)} as its recipe" in measured]
    if not names:
        return None
    found = [measured[f"{name} as its recipe"] for name in names]
    weights = sum(p.numel() for p in open_run(folder / names[0]).backbone.parameters())
    return (
        TITLES[model],
        f"{weights:,}",
        f"{measured[f'step {model}']:.0f}" if f"step {model}" in measured else "-",
        numbers([f["fd"] for f in found]),
        numbers([f["accuracy"] for f in found], 3),
        str(len(names)),
    )


STEPS = ("train", "measure", "draw", "page")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"{', '.join(STEPS)} (default: all)")
    parser.add_argument("--runs", type=Path, default=Path("runs/results-diffusion"), help="where the runs lie")
    parser.add_argument("--only", default="*", help="train only runs of such names")
    parser.add_argument("--jobs", "-j", type=int, default=2, help="trainings side by side")
    args = parser.parse_args()
    if unknown := set(args.steps) - set(STEPS):
        parser.error(f"no such step: {', '.join(sorted(unknown))}; there are {', '.join(STEPS)}")
    folder = args.runs.resolve()
    steps = args.steps or STEPS
    if "train" in steps:
        train(folder, args.only, args.jobs)
    torch.set_num_threads(args.jobs)
    if "measure" in steps:
        measure(folder, args.only)
    if "draw" in steps:
        draw(folder)
    if "page" in steps:
        page(folder)


if __name__ == "__main__":
    try:
        main()
    except GenkitError as error:  # stopped by a signal, with everything saved
        raise SystemExit(str(error)) from None
