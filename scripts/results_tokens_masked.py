"""Everything that docs/results/tokens_masked.md reports: what reused context saves and costs, and residual tokens at any depth.

    python scripts/results_tokens_masked.py                        # all of it: about half an hour on two idle CPU cores
    python scripts/results_tokens_masked.py train --samples 6400
    python scripts/results_tokens_masked.py measure page

It may be stopped at any time: what is finished is not done again.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import genkit
from genkit.backbones.resgen import ResGen
from genkit.guidance import Guidance, guide
from genkit.nn.layout import dense_layout
from genkit.objectives.resgen import ResGen as ResGenObjective
from genkit.pipeline import open_run
from genkit.reuse.recap import Recap
from genkit.rng import Rng
from genkit.samplers.mar import MAR as MARSampler
from genkit.samplers.masked import Masked as Sampler
from genkit.samplers.resgen import ResGen as ResGenSampler

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/results/tokens_masked.md"
DEPTHS = (1, 2, 4, 8)  # ids per place
TOY = ROOT / "genkit/configs/toy"
# Leading full steps, light steps per full one.
SETTINGS = ((0, 0), (8, 1), (0, 1), (4, 3), (0, 3), (0, 7))
FD_STEPS, SPEED_STEPS, SEEDS = 16, 32, (0, 1, 2)
RESGEN_STEPS = 16


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
        options = [*short, f"tokenizer.from={source(out, given, depth)}"]
        genkit.train(TOY / "resgen-fashion.yaml", options, name=f"resgen-{depth}", out=out)
    genkit.train(
        TOY / "masked-fashion.yaml", [*short, f"tokenizer.from={source(out, given, 1)}"], name="masked", out=out
    )


def source(out: Path, given: Path | None, depth: int) -> Path:
    """The run of a tokenizer: among those given (named as by results_tokenizers.py), else our own."""
    if given is not None:
        found = given / ("fashion-vq" if depth == 1 else f"fashion-rvq-{depth}")
        if (found / "checkpoints").is_dir():
            return found
    return out / tokenizer(depth)


class Store:
    """Figures by name, in a file that grows."""

    def __init__(self, path: Path):
        self.path = path
        self.found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def keep(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self.found:
            print(name, flush=True)
            self.found[name] = make()
            self.path.write_text(json.dumps(self.found, indent=1))
        return self.found[name]


def measure(out: Path, given: Path | None, count: int) -> None:
    store = Store(out / "masked.json")
    store.keep("count", lambda: count)
    for host in ("MaskGIT", "MAR"):
        for grid in (16, 32):
            store.keep(f"speed {host} {grid * grid}", lambda host=host, grid=grid: speeds(host, grid))
    if (out / "masked" / "checkpoints" / "last").exists():
        for alone, light in SETTINGS:
            for seed in SEEDS:
                name = f"fd masked {alone} {light} {seed}"
                store.keep(
                    name, lambda a=alone, c=light, s=seed: distance(out / "masked", count, s, reuse(a, c, FD_STEPS))
                )
        for steps in (4, 8):
            for seed in SEEDS:
                store.keep(
                    f"fd masked {steps} steps {seed}",
                    lambda t=steps, s=seed: distance(out / "masked", count, s, [f"num_steps={t}"]),
                )
    for depth in DEPTHS:
        run = out / f"resgen-{depth}"
        if (run / "checkpoints" / "last").exists():
            for seed in SEEDS:
                options = [f"num_steps={RESGEN_STEPS}"]
                store.keep(f"fd resgen {depth} {seed}", lambda r=run, s=seed, o=options: distance(r, count, s, o))
        if (coder := source(out, given, depth)).exists():
            store.keep(f"seconds resgen {depth}", lambda c=coder: seconds(c))


def reuse(alone: int, light: int, steps: int) -> list[str]:
    """Changes of the sampler."""
    return [
        f"num_steps={steps}",
        f"reuse={json.dumps({'type': 'recap', 'full_steps': alone, 'light': light})}" if light else "reuse=null",
    ]


def distance(run: Path, count: int, seed: int, sampler: list[str]) -> float:
    """FD of fashion features to the training images, all classes in turn."""
    report = genkit.evaluate(open_run(run), count=count, seed=seed, sampler=sampler, metrics=[{"type": "frechet"}])
    return float(report["FD"])


def seconds(tokenizer: Path) -> float:
    """CPU seconds per image of ids, 64 at a time, decoding left out: the time does not depend on weights, which are random."""
    coder = open_run(tokenizer).tokenizer
    objective, label = ResGenObjective(), torch.arange(64) % 10
    objective.bind(coder)
    torch.manual_seed(0)
    model = ResGen(
        channels=coder.channels, num_levels=coder.num_levels, num_classes=10, grid=(7, 7), dim=128, depth=4
    ).eval()
    layout, holes = dense_layout((7, 7)), torch.full((64, coder.num_levels, 7, 7), -1)
    predict = guide(objective, model, {"label": label}, layout, Guidance(2.0))
    taken = []
    with torch.inference_mode():
        for _ in range(3):
            started = time.process_time()
            ResGenSampler(num_steps=RESGEN_STEPS)(predict, holes, Rng.at(0, 0, 64))
            taken.append((time.process_time() - started) / 64)
    return min(taken)


def speeds(host: str, grid: int) -> dict[str, float]:
    """Setting -> how many times as fast as all steps full, by CPU time in turns. 12 layers of 384 channels, random weights."""
    spec = importlib.util.spec_from_file_location("tokens_masked", ROOT / "benchmarks/tokens_masked.py")
    assert spec is not None
    assert spec.loader is not None
    suite = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(suite)
    batch = 4 if grid == 16 else 1
    size: dict[str, Any] = {"dim": 384, "depth": 12, "num_heads": 6, "grid": (grid, grid)}
    calls = {}
    if host == "MaskGIT":
        model = suite.network(codebook_size=1024, **size)
        make, draw = Sampler, suite.sampling
        options: dict[str, Any] = {}
    else:
        model = suite.mar(**size)
        make, draw = MARSampler, suite.mar_sampling
        options = {"head_steps": 10}
    for alone, light in SETTINGS:
        kind = Recap(full_steps=2 * alone, light=light, keeps_condition=host == "MAR") if light else None
        calls[f"{alone} {light}"] = draw(model, batch, (grid, grid), make(num_steps=SPEED_STEPS, reuse=kind, **options))
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(2):
        for name, call in calls.items():
            started = time.process_time()
            call()
            taken[name].append(time.process_time() - started)
    least = {name: min(values) for name, values in taken.items()}
    return {name: least["0 0"] / value for name, value in least.items()} | {"seconds": least["0 0"] / batch}


def page(out: Path) -> None:
    """Fill in the tables between the marks of the page."""
    found = Store(out / "masked.json").found
    text = PAGE.read_text()
    for mark, rows in (("reuse", reuse_table(found)), ("depth", depth_table(found))):
        before, rest = text.split(f"<!-- {mark} -->\n", 1)
        after = rest.split(f"<!-- end of {mark} -->", 1)[1]
        text = f"{before}<!-- {mark} -->\n{rows}\n<!-- end of {mark} -->{after}"
    PAGE.write_text(text)


def spread(found: dict[str, Any], start: str) -> str:
    """Mean and deviation over seeds."""
    values = [found[f"{start} {seed}"] for seed in SEEDS if f"{start} {seed}" in found]
    if not values:
        return "not measured"
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.pstdev(values):.2f} ({len(values)})"


def reuse_table(found: dict[str, Any]) -> str:
    hosts = [(host, tokens) for host in ("MaskGIT", "MAR") for tokens in (256, 1024)]
    lines = [
        "| full steps at first | light per full one | full : light of 32 | "
        + " | ".join(f"{h}, {n}" for h, n in hosts)
        + f" | FD of {found.get('count', 0):,} images |"
    ]
    lines.append("|" + "---|" * (4 + len(hosts)))
    for alone, light in SETTINGS:
        groups = Recap(full_steps=2 * alone, light=light).groups(SPEED_STEPS)
        cells = [found.get(f"speed {host} {tokens}", {}).get(f"{alone} {light}") for host, tokens in hosts]
        shown = " | ".join("not measured" if cell is None else f"{cell:.2f}" for cell in cells)
        share = f"{alone / FD_STEPS:.0%}"
        counts = f"{len(groups)} : {SPEED_STEPS - len(groups)}"
        lines.append(f"| {share} | {light} | {counts} | {shown} | {spread(found, f'fd masked {alone} {light}')} |")
    for steps in (4, 8):
        dots = " | ".join("" for _ in hosts)
        lines.append(f"| {steps} of 16 steps, all full | | | {dots} | {spread(found, f'fd masked {steps} steps')} |")
    return "\n".join(lines)


def depth_table(found: dict[str, Any]) -> str:
    lines = [
        f"| ids per place | ids per image | FD of {found.get('count', 0):,} images | CPU ms per image |",
        "|---|---|---|---|",
    ]
    for depth in DEPTHS:
        taken = found.get(f"seconds resgen {depth}")
        cost = "not measured" if taken is None else f"{1000 * taken:.0f}"
        lines.append(f"| {depth} | {49 * depth} | {spread(found, f'fd resgen {depth}')} | {cost} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", nargs="*", choices=["train", "measure", "page", []], help="default: all three")
    parser.add_argument("--out", type=Path, default=Path("runs/results-masked"))
    parser.add_argument("--samples", type=int, default=25_600, help="that every generator is trained on")
    parser.add_argument("--count", type=int, default=1000, help="images that a distance is measured on")
    parser.add_argument("--tokenizers", type=Path, help="runs of results_tokenizers.py, to use its tokenizers")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    for what in args.what or ["train", "measure", "page"]:
        if what == "train":
            train(args.out, args.samples, args.tokenizers)
        elif what == "measure":
            measure(args.out, args.tokenizers, args.count)
        else:
            page(args.out)


if __name__ == "__main__":
    main()
