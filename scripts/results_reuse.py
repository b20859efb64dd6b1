"""Everything that docs/results/diffusion_reuse.md reports: what carrying attention or features from step to step of a sampler costs, and what it saves.

    python scripts/results_reuse.py                    # all of it: about half an hour on two idle CPU cores
    python scripts/results_reuse.py train
    python scripts/results_reuse.py measure draw page

It may be stopped at any time: what is finished is not done again.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pages import RESULTS, Store, fill, table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import genkit
from genkit import registry
from genkit.backbones.dit import DiT
from genkit.images import grid, write_png
from genkit.kernels.block_sparse_attention.op import block_sparse_attention
from genkit.metrics import sources
from genkit.nn.layout import dense_layout
from genkit.nn.packed import packed
from genkit.pipeline import open_run
from genkit.reuse.calls import What
from genkit.reuse.rettention import Rettention, Statistics
from genkit.rng import sample_seeds

PAGE, PICTURE = RESULTS / "diffusion_reuse.md", RESULTS / "diffusion_reuse.png"
# FiTv2 on the pixels of 28x28 fashion images in patches of 2: 196 tokens. Its positions are interpolated on larger grids, so that it draws 128x128, 4,096
# tokens, without training there.
NAME = "fit-pixels"
RECIPE: dict[str, Any] = {
    "data": {"type": "fashion", "source": "embedded", "split": "train"},
    "tokenizer": {"type": "pixels"},
    "backbone": {"type": "fit", "dim": 96, "depth": 4, "num_heads": 2, "patch_size": 2, "mlp_dim": 192, "rope": "interpolate", "time_scale": 1000.0},
    "objective": {"type": "flow", "time": "logit_normal"},
    "sampler": {"type": "euler", "num_steps": 20, "guidance": 2.0},
    "train": {"num_samples": 12_800, "batch_size": 32, "lr": 2e-3, "warmup_samples": 1_600, "weight_decay": 0.01, "ema": 0.995},
    "log": {"every_steps": 20, "sample_every_steps": 200, "save_every_steps": 100, "num_images": 20},
}  # fmt: skip
DENSITIES = (0.5, 0.25, 0.1, 0.03)
LARGE = "128x128"
COUNT, REFERENCES, LARGE_COUNT = 300, 5000, 1  # samples, images they are compared with, samples of 4,096 tokens
LEAST = 200  # a Frechet distance of fewer samples says nothing


def settings() -> dict[str, dict[str, Any]]:
    """Name -> changes of the sampler."""
    found: dict[str, dict[str, Any]] = {"full": {}}
    carries = {"Re-ttention": "both", "plain sparse": "none"}
    for density in (0.1, 0.03, 0.25, 0.5):
        for title, carry in carries.items():
            found[f"{title}, {density:.0%}"] = {"reuse": {"type": "rettention", "density": density, "carry": carry}}
    base = found["Re-ttention, 10%"]["reuse"]
    found["residual alone, 10%"] = {"reuse": base | {"carry": "residual"}}
    found["Re-ttention, 10%, ratio not raised"] = {"reuse": base | {"ramp": 0.0}}
    for period, order in ((2, 1), (3, 0), (3, 1)):
        name = f"skipped blocks, one call in {period} full, order {order}"
        found[name] = {"reuse": {"type": "skip_blocks", "period": period, "order": order}}
    return found | {f"{steps} steps": {"num_steps": steps} for steps in (14, 10, 7)}


def psnr(x: Tensor, exact: Tensor) -> float:
    """Mean over samples, in dB; images in [-1, 1]."""
    errors = (x - exact).square().flatten(1).mean(1).clamp_min(1e-12)
    return float((10 * torch.log10(4 / errors)).mean())


def draw(pipe: Any, changes: dict[str, Any], count: int, seed: int = 0, size: str | None = None) -> Tensor:
    labels = torch.arange(count) % pipe.num_classes
    seeds, parts = sample_seeds(seed, 0, count), []
    for first in range(0, count, 50):
        rows = slice(first, first + 50)
        parts.append(pipe.generate(labels[rows], seeds[rows], sampler=changes, size=size))
    return torch.cat(parts)


def measure(folder: Path, count: int) -> None:
    """Distances and Frechet distances at 196 tokens; distances and seconds at 4,096."""
    pipe, store = open_run(folder / NAME, device="cpu"), Store(folder / "reuse.json")
    images = sources.from_spec(RECIPE["data"]).read(0, REFERENCES)[0]
    exact: dict[str | None, Tensor] = {}

    def reference(size: str | None, count: int) -> Tensor:
        if size not in exact:
            exact[size] = draw(pipe, {}, count, size=size)
        return exact[size]

    def small(changes: dict[str, Any]) -> dict[str, float]:
        x = draw(pipe, changes, count) if changes else reference(None, count)
        found = {"psnr": psnr(x, reference(None, count)), "count": count}
        if count < LEAST:
            return found
        metric = registry.build("metrics", {"type": "frechet", "features": "fashion-cnn", "reference": "train"})
        metric.update(real=images)
        metric.update(fake=x)
        return found | {"frechet": next(iter(metric.result().values()))}

    def large(changes: dict[str, Any]) -> dict[str, float]:
        expected = reference(LARGE, LARGE_COUNT)
        started = time.process_time()
        x = draw(pipe, changes, LARGE_COUNT, size=LARGE)
        return {"psnr": psnr(x, expected), "seconds": time.process_time() - started}

    for density in DENSITIES:
        store.get(f"attention: {density:.0%}", lambda density=density: attention(density))
    for density in DENSITIES:
        store.get(f"calls: {density:.0%}", lambda density=density: calls(density))
    for name, changes in settings().items():
        store.get(f"4096 tokens: {name}", lambda changes=changes: large(changes))
    for name, changes in settings().items():
        store.get(f"196 tokens: {name}", lambda changes=changes: small(changes))


def attention(density: float) -> dict[str, float]:
    """CPU seconds of one attention over 4,096 tokens, 6 heads of 64: torch's, the same by blocks, and over a band; in turns."""
    N, options = 4096, Rettention(density=density)
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 6, N, 64, generator=random) for _ in "qkv")
    band, everything = options.pattern_for(q)[0], Rettention(density=1).pattern_for(q)[0]
    runs: dict[str, Callable[[], Any]] = {
        "torch": lambda: scaled_dot_product_attention(q, k, v),
        "blocks": lambda: block_sparse_attention(q, k, v, everything),
        "band": lambda: block_sparse_attention(q, k, v, band),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(5):
        for name, run in runs.items():
            started = time.process_time()
            run()
            seconds[name].append(time.process_time() - started)
    return {name: statistics.median(found) for name, found in seconds.items()} | {"density": band.density}


def calls(density: float) -> dict[str, float]:
    """CPU seconds of one call over 4,096 tokens of two layers of DiT-S/2, batch 1: plain, full and measured, sparse; the least of two."""
    torch.manual_seed(0)
    grid = (128, 128)
    network = DiT(channels=4, num_classes=10, grid=grid, dim=384, depth=2).eval()
    x, t, cond, layout = (
        torch.randn(1, 4, *grid),
        torch.full((1,), 500.0),
        {"label": torch.zeros(1).long()},
        dense_layout(grid),
    )
    statistics_of, found = Statistics(Rettention(density=density)), {}
    kinds: tuple[What, ...] = ("plain", "full", "reuse")
    with torch.inference_mode(), packed(network):
        network(x, t, cond, layout)  # lays the weights out
        for what in kinds:
            taken = []
            for _ in range(2):
                started = time.process_time()
                network(x, t, cond, layout, statistics_of.cache(what, t))
                taken.append(time.process_time() - started)
            found[what] = min(taken)
    return found


SHOWN = (
    "full", *(f"{title}, {density:.0%}" for title in ("Re-ttention", "plain sparse") for density in DENSITIES),
    "skipped blocks, one call in 3 full, order 1",
)  # fmt: skip


def picture(folder: Path) -> None:
    """The same noise under each setting, a row each."""
    pipe, chosen = open_run(folder / NAME, device="cpu"), settings()
    rows = [draw(pipe, chosen[name], pipe.num_classes) for name in SHOWN]
    write_png(PICTURE, grid(torch.cat(rows), columns=pipe.num_classes, row_names=SHOWN))


def page(folder: Path) -> None:
    """Fills in the tables of the page, between its marks."""
    found = Store(folder / "reuse.json").values
    parts = {"attention": attention_table(found), "calls": calls_table(found), "steps": steps_table(found)}
    if PICTURE.exists():
        rows = "Full attention; Re-ttention, then plain sparse attention, at 50, 25, 10 and 3 % of the tokens; skipped blocks"
        parts["steps"] += f"\n\n![The same noise under each setting]({PICTURE.name})\n\n*{rows}.*"
    fill(PAGE, parts)


def attention_table(found: dict[str, Any]) -> str:
    rows = []
    for density in DENSITIES:
        row = found[f"attention: {density:.0%}"]
        cells = [f"{1e3 * row[side]:.0f} ms" for side in ("torch", "blocks", "band")]
        ratios = [f"{row[side] / row['band']:.1f}x" for side in ("torch", "blocks")]
        rows.append((f"{density:.0%}", *cells, *ratios))
    return table(("tokens seen", "torch, full", "by blocks, full", "band", "torch / band", "blocks / band"), rows)


def calls_table(found: dict[str, Any]) -> str:
    rows = []
    for density in DENSITIES:
        call = found.get(f"calls: {density:.0%}")
        if call is None:
            continue
        steps = 5 * call["plain"] + 3 * call["full"] + 12 * call["reuse"]
        cells = [f"{1e3 * call[what]:.0f} ms" for what in ("plain", "full", "reuse")]
        ratios = (f"{call['plain'] / call['reuse']:.2f}x", f"{20 * call['plain'] / steps:.2f}x")
        rows.append((f"{density:.0%}", *cells, *ratios))
    return table(
        ("tokens seen", "plain call", "measured call", "sparse call", "plain / sparse", "20 steps, full / this"), rows
    )


def steps_table(found: dict[str, Any]) -> str:
    rows, whole = [], found.get("4096 tokens: full", {}).get("seconds", math.nan)
    for name in settings():
        small, large = found.get(f"196 tokens: {name}", {}), found.get(f"4096 tokens: {name}", {})
        if not small and not large:  # not measured yet
            continue
        near, near_large = ("-" if name == "full" else _shown(at.get("psnr"), "{:.1f} dB") for at in (small, large))
        ratio = whole / large["seconds"] if "seconds" in large else None
        cells = [near, _shown(small.get("frechet"), "{:.1f}"), near_large, _shown(large.get("seconds"), "{:.1f}")]
        rows.append((name, *cells, _shown(ratio, "{:.2f}x")))
    head = ("", "PSNR, 196 tokens", "FD, 196 tokens", "PSNR, 4,096 tokens", "CPU s, 4,096 tokens", "full / this")
    return table(head, rows)


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("actions", nargs="*", default=["train", "measure", "draw", "page"])
    parser.add_argument("--runs", type=Path, default=Path("runs/reuse"))
    parser.add_argument("--count", type=int, default=COUNT, help="samples of 196 tokens per setting")
    args = parser.parse_args()
    if "train" in args.actions:
        genkit.train(RECIPE, name=NAME, out=args.runs, device="cpu")
    if "measure" in args.actions:
        measure(args.runs, args.count)
    if "draw" in args.actions:
        picture(args.runs)
    if "page" in args.actions:
        page(args.runs)


if __name__ == "__main__":
    main()
