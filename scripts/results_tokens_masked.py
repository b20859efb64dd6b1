"""Everything that docs/results/tokens_masked.md reports: what reused context saves and costs, and residual tokens at any depth.

    python scripts/results_tokens_masked.py                        # all of it: hours on two CPU cores, most of them for emoji
    python scripts/results_tokens_masked.py train --samples 6400
    python scripts/results_tokens_masked.py measure page

It may be stopped at any time: what is finished is not done again.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pages import RESULTS, Store, fill, table

import genkit
from genkit.optional import require
from genkit.pipeline import open_run
from genkit.reuse.recap import Recap
from genkit.samplers.mar import MAR as MARSampler
from genkit.samplers.masked import Masked as Sampler

ROOT = Path(__file__).parent.parent
PAGE, CURVE = RESULTS / "tokens_masked.md", RESULTS / "tokens-reuse.png"
DEPTHS = (1, 2, 4, 8)  # ids per place
TOY = ROOT / "genkit/configs/toy"
# Leading full steps, light steps per full one.
SETTINGS = ((0, 0), (8, 1), (0, 1), (4, 3), (0, 3), (0, 7))
FD_STEPS, SPEED_STEPS, SEEDS = 16, {"MaskGIT": 32, "MAR": 64}, (0, 1, 2)


class How(NamedTuple):
    """How a sampler draws."""

    steps: int
    light: int = 0  # per full one
    chosen: str = "once"  # what light steps of ids fill
    end: float = 1.0  # what the temperature of the draw of ids falls to
    alone: int = 0  # leading full steps


# MaskGIT in as many steps as times are measured of, at every end of ENDS. The last ones are what fewer full steps give.
CHOICES = {
    "all full": How(32),
    "chosen once": How(32, 3),
    "1 light anew": How(32, 1, "anew"),
    "chosen anew": How(32, 3, "anew"),
    "7 light anew": How(32, 7, "anew"),
    "16 full": How(16),
    "8 full": How(8),
}
MEASURED = {"16 full": "fd MaskGIT 0 0", "8 full": "fd MaskGIT 8 steps"}  # with the temperature of the recipe
ENDS = (1.0, 0.65)  # what the temperature of the draw falls to; the second is the paper's of 16 steps
RUNS = {"MaskGIT": "masked", "MAR": "mar"}  # trained on the same tokens
RESGEN_STEPS = 16
# 64x64 emoji in 16x16 tokens: tokenizer, generator, and what its sampler is compared by; noise and guidance stay the recipe's.
FINE = {"MaskGIT": ("vq-emoji-fine", "masked-emoji"), "MAR": ("kl-emoji-fine", "mar-emoji")}
FINE_CHOICES = {
    "MaskGIT": {
        "all full": How(32),
        "chosen once": How(32, 3),
        "chosen once to 0.8": How(32, 3, end=0.8),
        "4 full first to 0.8": How(32, 3, end=0.8, alone=4),
        "chosen anew": How(32, 3, "anew"),
        "8 full": How(8),
        "8 full to 0.8": How(8, end=0.8),
    },
    "MAR": {"all full": How(32), "chosen once": How(32, 3), "8 full": How(8)},
}
FINE_COUNT = 300  # images of each; five times as many tokens take their time
SIZE = ["backbone.dim=160", "backbone.depth=3"]  # of ResGen: 1.46 million weights
RQ_SIZE = ["backbone.depth=3", "backbone.head_depth=1"]  # of the generator that draws depth first: 1.49 million


def tokenizer(depth: int) -> str:
    return "vq-fashion" if depth == 1 else f"rvq-{depth}-fashion"


def train(out: Path, samples: int, given: Path | None) -> None:
    """The tokenizers that are not given, then a generator on each."""
    for depth in DEPTHS:
        name = tokenizer(depth)
        if source(out, given, depth) == out / name:
            extra = [] if depth == 1 else [f"tokenizer.num_levels={depth}"]
            genkit.train(TOY / f"{'vq' if depth == 1 else 'rvq'}-fashion.yaml", extra, name=name, out=out)
    short = [f"train.num_samples={samples}", "train.warmup_samples=1280", "train.ema=0.99", "log.every_steps=20"]
    short += ["log.sample_every_steps=10000", "log.save_every_steps=10000"]
    for depth in DEPTHS:
        options = [*short, *SIZE, f"tokenizer.from={source(out, given, depth)}"]
        genkit.train(TOY / "resgen-fashion.yaml", options, name=f"resgen-{depth}", out=out)
    options = [*short, *RQ_SIZE, f"tokenizer.from={source(out, given, 4)}"]
    genkit.train(TOY / "rq-fashion.yaml", options, name="rq-4", out=out)
    for name, own in (("masked", []), ("mar", ["backbone.head_width=96"])):
        options = [*short, *own, f"tokenizer.from={source(out, given, 1)}"]
        genkit.train(TOY / f"{name}-fashion.yaml", options, name=name, out=out)
    for tokens, generator in FINE.values():
        genkit.train(TOY / f"{tokens}.yaml", name=tokens, out=out)
        genkit.train(TOY / f"{generator}.yaml", [f"tokenizer.from={out / tokens}"], name=generator, out=out)


def source(out: Path, given: Path | None, depth: int) -> Path:
    """The run of a tokenizer: among those given (named as by results_tokenizers.py), else our own."""
    if given is not None:
        found = given / ("fashion-vq" if depth == 1 else f"fashion-rvq-{depth}")
        if (found / "checkpoints").is_dir():
            return found
    return out / tokenizer(depth)


def measure(out: Path, given: Path | None, count: int, only: list[str]) -> None:
    """What is not there yet; `only`: of figures whose names begin with one of these."""
    store = Store(out / "masked.json")
    store.get("count", lambda: count)

    def keep(name: str, make: Any) -> None:
        if name.startswith(tuple(only or [""])):
            store.get(name, make)

    for depth in DEPTHS:
        keep(f"rfd {depth}", lambda d=depth: reconstructed(source(out, given, d)))
    for run in (*(f"resgen-{depth}" for depth in DEPTHS), "rq-4"):
        if (out / run / "checkpoints" / "last").exists():
            for seed in SEEDS:
                options = [f"num_steps={RESGEN_STEPS}"] if run.startswith("resgen") else []
                keep(f"fd {run} {seed}", lambda r=run, s=seed, o=options: distance(out / r, count, s, o))
            keep(f"seconds {run}", lambda r=run: seconds(out / r))
    for host, name in RUNS.items():
        if not (out / name / "checkpoints" / "last").exists():
            continue
        for alone, light in SETTINGS:
            for seed in SEEDS:
                changes = reuse(host, alone, light, FD_STEPS)
                keep(
                    f"fd {host} {alone} {light} {seed}",
                    lambda n=name, s=seed, c=changes: distance(out / n, count, s, c),
                )
        if host == "MaskGIT":
            for end, (label, how), seed in itertools.product(ENDS, CHOICES.items(), SEEDS):
                if label in MEASURED and end == 1:
                    continue
                keep(
                    f"fd choice {label}, {end:g}, {seed}",
                    lambda n=name, h=how, e=end, s=seed: distance(out / n, count, s, choice(h._replace(end=e))),
                )
        for steps in (4, 8):
            for seed in SEEDS:
                keep(
                    f"fd {host} {steps} steps {seed}",
                    lambda n=name, t=steps, s=seed: distance(out / n, count, s, [f"num_steps={t}"]),
                )
    for host, (_, generator) in FINE.items():
        if not (out / generator / "checkpoints" / "last").exists():
            continue
        for seed, (label, setting) in itertools.product(SEEDS, FINE_CHOICES[host].items()):
            changes = fine(host, setting)
            keep(f"fine {host} {label} {seed}", lambda g=generator, s=seed, c=changes: timed(out / g, FINE_COUNT, s, c))
    for grid in (16, 32):
        for host in RUNS:
            keep(f"speed {host} {grid * grid}", lambda host=host, grid=grid: speeds(host, grid))


def reuse(host: str, alone: int, light: int, steps: int) -> list[str]:
    """Changes of the sampler: so many leading full steps, so many light ones per full one."""
    spec = {"type": "recap", "full_steps": alone, "light": light, "keeps_condition": host == "MAR"}
    return [f"num_steps={steps}", f"reuse={json.dumps(spec)}" if light else "reuse=null"]


def choice(how: How) -> list[str]:
    """Changes of the sampler of ids; the temperature of the draw falls along a root, as in the paper."""
    spec = {"type": "recap", "full_steps": how.alone, "light": how.light, "choice": how.chosen}
    anneal = [f"softmax_end={how.end}", "softmax_power=0.5"]
    return [f"num_steps={how.steps}", f"reuse={json.dumps(spec)}" if how.light else "reuse=null", *anneal]


def fine(host: str, how: How) -> list[str]:
    """Changes of the sampler of a generator of 256 tokens."""
    return choice(how) if host == "MaskGIT" else reuse(host, how.alone, how.light, how.steps)


def distance(run: Path, count: int, seed: int, sampler: list[str], features: str = "fashion-cnn") -> float:
    """FD of the features of the data's own small classifier to the training images, all classes in turn."""
    report = genkit.evaluate(
        open_run(run), count=count, seed=seed, sampler=sampler, metrics=[{"type": "frechet", "features": features}]
    )
    return float(report["FD"])


def timed(run: Path, count: int, seed: int, sampler: list[str]) -> list[float]:
    """(`distance`, CPU seconds an image of all that it takes)."""
    started = time.process_time()
    found = distance(run, count, seed, sampler, "emoji-cnn")
    return [found, (time.process_time() - started) / count]


def reconstructed(tokenizer: Path) -> float:
    """rFD of held-out images."""
    rows = genkit.evaluate(open_run(tokenizer)).rows
    return float(next(row["value"] for row in rows if row["metric"].startswith("rFD")))


def seconds(run: Path) -> float:
    """CPU seconds per image, 20 at a time, the least of three."""
    pipe, labels, taken = open_run(run), torch.arange(20) % 10, []
    steps = RESGEN_STEPS if "num_steps" in pipe.sampler else None
    for _ in range(3):
        started = time.process_time()
        pipe.generate(labels, list(range(20)), steps=steps)
        taken.append((time.process_time() - started) / 20)
    return min(taken)


def speeds(host: str, grid: int) -> dict[str, float]:
    """Setting -> how many times as fast as all steps full, by CPU time in turns. 12 layers of 384 channels, random weights."""
    spec = importlib.util.spec_from_file_location("tokens_masked", ROOT / "benchmarks/tokens_masked.py")
    assert spec is not None
    assert spec.loader is not None
    suite = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(suite)
    size: dict[str, Any] = {"dim": 384, "depth": 12, "num_heads": 6, "grid": (grid, grid)}
    calls = {}
    make: Any
    if host == "MaskGIT":
        model = suite.network(codebook_size=1024, **size)
        make, draw = Sampler, suite.sampling
        options: dict[str, Any] = {}
    else:
        model = suite.mar(**size)
        make, draw = MARSampler, suite.mar_sampling
        options = {"head_steps": 10}
    steps = SPEED_STEPS[host]
    for alone, light in SETTINGS:
        if grid > 16 and alone:  # minutes each
            continue
        kind = recap(host, alone, light) if light else None
        calls[f"{alone} {light}"] = draw(model, 1, (grid, grid), make(num_steps=steps, reuse=kind, **options))
    for light in (1, 3, 7) if host == "MaskGIT" else ():
        anew = Recap(light=light, choice="anew")
        calls[f"anew {light}"] = draw(model, 1, (grid, grid), make(num_steps=steps, reuse=anew))
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(2 if grid == 16 else 1):
        for name, call in calls.items():
            started = time.process_time()
            call()
            taken[name].append(time.process_time() - started)
    least = {name: min(values) for name, values in taken.items()}
    return {name: least["0 0"] / value for name, value in least.items()} | {"seconds": least["0 0"]}


def recap(host: str, alone: int, light: int) -> Recap:
    """As large a share of leading full steps as where distances are measured."""
    leading = alone * SPEED_STEPS[host] // FD_STEPS
    return Recap(full_steps=leading, light=light, keeps_condition=host == "MAR")


def page(out: Path) -> None:
    """Fill in the tables between the marks of the page."""
    found = Store(out / "masked.json").values
    fill(
        PAGE,
        {
            "reuse": reuse_table(found),
            "choice": choice_table(found),
            "fine": fine_table(found),
            "depth": depth_table(found),
        },
    )
    curve(found)


def taken(found: dict[str, Any], start: str) -> list[Any]:
    return [found[f"{start} {seed}"] for seed in SEEDS if f"{start} {seed}" in found]


def spread(found: dict[str, Any], start: str) -> str:
    """Mean and deviation over seeds of sampling."""
    return mean_of(taken(found, start))


def mean_of(values: list[float]) -> str:
    if not values:
        return "not measured"
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.pstdev(values):.2f} ({len(values)})"


def reuse_table(found: dict[str, Any]) -> str:
    hosts = [(host, tokens) for host in RUNS for tokens in (256, 1024)]
    times, distances = (f"{host}, {n} tokens" for host, n in hosts), (f"FD, {host}" for host in RUNS)
    rows = []
    for alone, light in SETTINGS:
        cells = [found.get(f"speed {host} {tokens}", {}).get(f"{alone} {light}") for host, tokens in hosts]
        shown = ["not measured" if cell is None else f"{cell:.2f}" for cell in cells]
        of_hosts = [spread(found, f"fd {host} {alone} {light}") for host in RUNS]
        rows.append((f"{alone / FD_STEPS:.0%}", str(light), *shown, *of_hosts))
    for steps in (4, 8):
        of_hosts = [spread(found, f"fd {host} {steps} steps") for host in RUNS]
        rows.append(
            (f"{steps} of {FD_STEPS} steps, all full", "", *(f"{FD_STEPS / steps:.2f}" for _ in hosts), *of_hosts)
        )
    return table(("full steps at first", "light per full one", *times, *distances), rows)


def choice_table(found: dict[str, Any]) -> str:
    rows = []
    for label, how in CHOICES.items():
        speed = [choice_speed(found, how, tokens) for tokens in (256, 1024)]
        starts = (MEASURED[label] if label in MEASURED and end == 1 else f"fd choice {label}, {end:g}," for end in ENDS)
        distances = (spread(found, start) for start in starts)
        times = ("not measured" if cell is None else f"{cell:.2f}" for cell in speed)
        rows.append((str(how.steps), filled(how), *times, *distances))
    head = ("steps", "light steps choose", "256 tokens", "1024 tokens")
    return table((*head, *(f"FD, temperature {'1' if end == 1 else f'1 to {end:g}'}" for end in ENDS)), rows)


def fine_table(found: dict[str, Any]) -> str:
    rows = []
    for host, choices in FINE_CHOICES.items():
        full = [second for _, second in taken(found, f"fine {host} all full")]
        for label, how in choices.items():
            own, cells = taken(found, f"fine {host} {label}"), ["not measured"] * 3
            if own and full:
                seconds = statistics.mean(second for _, second in own)
                times = f"{statistics.mean(full) / seconds:.2f}"
                cells = [mean_of([value for value, _ in own]), f"{1000 * seconds:.0f}", times]
            falls = "1" if how.end == 1 else f"1 to {how.end:g}"
            # MAR's order is random, and what it draws has a temperature of another kind.
            told = (filled(how), falls) if host == "MaskGIT" else (filled(how).removeprefix("once, "), "")
            rows.append((host, str(how.steps), *told, *cells))
    head = ("generator", "steps", "light steps choose", "temperature", "FD", "CPU ms per image", "times as fast")
    return table(head, rows)


def filled(how: How) -> str:
    """What light steps fill, in a table."""
    after = f", after {how.alone} full ones" if how.alone else ""
    return f"{how.chosen}, {how.light} per full one{after}" if how.light else "none"


def choice_speed(found: dict[str, Any], how: How, tokens: int) -> float | None:
    """Times as fast as 32 steps, all full."""
    if not how.light:
        return 32 / how.steps
    key = f"anew {how.light}" if how.chosen == "anew" else f"0 {how.light}"
    return found.get(f"speed MaskGIT {tokens}", {}).get(key)


def curve(found: dict[str, Any]) -> None:
    """Distance over speed: light steps, and fewer steps that are all full."""
    require("matplotlib").use("agg")
    figure = require("matplotlib.figure").Figure(figsize=(8, 3), layout="constrained")
    measured = [host for host in RUNS if taken(found, f"fd {host} 0 0")]
    for number, host in enumerate(measured, 1):
        panel = figure.add_subplot(1, len(measured), number)
        for name, points in (choice_lines(found) if host == "MaskGIT" else reuse_lines(found, host)).items():
            shown = [(at, values) for at, start in points if at is not None and (values := taken(found, start))]
            shown.sort()
            panel.errorbar(
                [at for at, _ in shown],
                [statistics.mean(values) for _, values in shown],
                [statistics.pstdev(values) for _, values in shown],
                marker="o",
                linestyle="--" if name.startswith("light") else "-",
                capsize=3,
                label=name,
            )
        panel.set_title(f"{host}, {'temperature to 0.65' if host == 'MaskGIT' else '16 steps'}")
        panel.set_xlabel("times as fast as all steps full, 256 tokens")
        panel.set_ylabel(f"FD of {found.get('count', 0)} images")
        panel.legend(fontsize="small")
    figure.savefig(CURVE, dpi=110)


Lines = dict[str, list[tuple[float | None, str]]]  # name -> (speed, figures in the store)


def reuse_lines(found: dict[str, Any], host: str) -> Lines:
    speed = found.get(f"speed {host} 256", {})
    light = [(speed.get(f"{a} {c}"), f"fd {host} {a} {c}") for a, c in SETTINGS]
    fewer = [(1.0, f"fd {host} 0 0")] + [(FD_STEPS / s, f"fd {host} {s} steps") for s in (8, 4)]
    return {"light steps": light, "fewer steps, all full": fewer}


def choice_lines(found: dict[str, Any]) -> Lines:
    lines: Lines = {"light steps, chosen once": [], "light steps, chosen anew": [], "fewer steps, all full": []}
    for label, how in CHOICES.items():
        point = choice_speed(found, how, 256), f"fd choice {label}, {ENDS[1]:g},"
        lines["fewer steps, all full" if not how.light else f"light steps, chosen {how.chosen}"].append(point)
    for chosen in ("once", "anew"):
        lines[f"light steps, chosen {chosen}"].append((1.0, f"fd choice all full, {ENDS[1]:g},"))
    return lines


def depth_table(found: dict[str, Any]) -> str:
    head = ("generator", "ids per place", "ids per image", "rFD of the tokens", "FD", "CPU ms per image")
    rows = []
    for name, run, depth in (
        *(("ResGen", f"resgen-{depth}", depth) for depth in DEPTHS),
        ("RQ, depth first", "rq-4", 4),
    ):
        cost, bound = found.get(f"seconds {run}"), found.get(f"rfd {depth}")
        shown = "not measured" if cost is None else f"{1000 * cost:.0f}"
        of_tokens = "not measured" if bound is None else f"{bound:.2f}"
        rows.append((name, str(depth), str(49 * depth), of_tokens, spread(found, f"fd {run}"), shown))
    return table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", nargs="*", choices=["train", "measure", "page", []], help="default: all three")
    parser.add_argument("--out", type=Path, default=Path("runs/results-masked"))
    parser.add_argument("--samples", type=int, default=25_600, help="that every generator is trained on")
    parser.add_argument("--count", type=int, default=500, help="images that a distance is measured on")
    parser.add_argument(
        "--only", nargs="+", default=[], help="measure: figures whose names begin so: fd, seconds, speed"
    )
    parser.add_argument("--tokenizers", type=Path, help="runs of results_tokenizers.py, to use its tokenizers")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    for what in args.what or ["train", "measure", "page"]:
        if what == "train":
            train(args.out, args.samples, args.tokenizers)
        elif what == "measure":
            measure(args.out, args.tokenizers, args.count, args.only)
        else:
            page(args.out)


if __name__ == "__main__":
    main()
