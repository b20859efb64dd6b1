"""Everything that docs/results/mixers.md reports: every mixer trains in the same masked generator on fashion tokens, one thread each.

    python scripts/results_mixers.py            # the tokenizer where it is missing, then about ten minutes

What is measured is kept in OUT: stopped and started again, it goes on with the mixers that are missing.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genkit import train
from genkit.backbones.masked import Masked
from genkit.data.fashion import Fashion
from genkit.nn.layout import dense_layout
from genkit.objectives.masked import Masked as Objective
from genkit.optim import adamw, learning_rate
from genkit.pipeline import AutoTokenizer
from genkit.registry import check, words
from genkit.rng import Rng

ROOT = Path(__file__).parent.parent
PAGE, PLOT = ROOT / "docs/results/mixers.md", ROOT / "docs/results/mixers.png"
STEPS, BATCH, DIM = 200, 32, 64
TRAIN: dict[str, Any] = {
    "lr": 3e-3,
    "warmup_samples": 1_600,
    "weight_decay": 0.03,
    "betas": (0.9, 0.99),
    "schedule": "cosine",
    "num_samples": STEPS * BATCH,
    "clip": 1.0,
}
# Name in the table -> mixer. Every word once with what fits a 7x7 grid and 64 channels, and the variants that differ in kind.
SIZES: dict[str, dict[str, Any]] = {
    "block_sparse": {"tile": 2, "reach": 1},
    "longconv": {"size": [7, 7]},
    "rpe_fft": {"size": [7, 7]},
    "multi_scan": {"orders": ["raster", "reversed-raster"], "combine": "sum"},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "attention, causal": {"type": "attention", "is_causal": True},
    "lightnet, causal": {"type": "lightnet", "is_causal": True},
    "lightnet, no positions": {"type": "lightnet", "positions": None},
    "mamba, both ways": {"type": "mamba", "is_bidirectional": True},
    "mamba, sweep-4": {"type": "mamba", "order": "sweep-4"},
    "rmt, decomposed": {"type": "rmt", "form": "decomposed"},
    "s5, both ways": {"type": "s5", "is_bidirectional": True},
    "ssd, both ways": {"type": "ssd", "is_bidirectional": True},
    "lightnet, window, multi_scan, attention": [  # type: ignore[dict-item]
        {"type": "lightnet"},
        {"type": "window"},
        {"type": "multi_scan", "orders": ["hilbert", "reversed-hilbert"], "combine": "sum"},
        {"type": "attention"},
    ],
}


def mixers() -> dict[str, Any]:
    """Name -> mixer, or the list of a pattern."""
    found = {word: {"type": word, **SIZES.get(word, {})} for word in words("mixer")} | VARIANTS
    return dict(sorted(found.items()))


def tokens(out: Path) -> tuple[Tensor, Tensor]:
    """ids [9000, 1, 7, 7] and labels of the embedded training images, by the toy recipe's tokenizer."""
    kept = out / "tokens.pt"
    if not kept.exists():
        run = train("toy/vq-fashion", out=out)
        tokenizer, data = AutoTokenizer.from_pretrained(run.path, device="cpu"), Fashion(source="embedded")
        x = torch.stack([torch.as_tensor(data[i]["x"]) for i in range(len(data))])
        labels = torch.tensor([int(data[i]["label"]) for i in range(len(data))])
        with torch.no_grad():
            ids = torch.cat([tokenizer.encode(part).ids for part in x.split(500)])
        torch.save({"ids": ids, "labels": labels}, kept)
    loaded = torch.load(kept, weights_only=True)
    return loaded["ids"], loaded["labels"]


def steps(spec: Any, ids: Tensor, labels: Tensor, count: int) -> Iterator[tuple[float, float, Masked]]:
    """(loss, seconds, model) of each step of the quick start's generator, half as wide, with this mixer.

    The same ids, masks and learning rates for all mixers.
    """
    torch.manual_seed(0)
    parts = spec if isinstance(spec, list) else [spec]
    mixer = [check("mixer", part, "mixer") for part in parts]
    grid = tuple(ids.shape[2:])
    model = Masked(codebook_size=512, num_levels=1, num_classes=10, grid=grid, dim=DIM, depth=4, mixer=mixer)
    optimizer, objective, layout = adamw(model, TRAIN), Objective(label_smoothing=0.0), dense_layout(grid)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(1))
    for step in range(count):
        chosen = order[(step * BATCH + torch.arange(BATCH)) % len(order)]
        rng = Rng.at(0, step * BATCH, BATCH, "cpu")
        started = time.process_time()
        loss = objective(model, ids[chosen], {"label": labels[chosen]}, layout, rng)["nll"].mean()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(TRAIN, (step + 1) * BATCH)
        torch.nn.utils.clip_grad_norm_(model.parameters(), TRAIN["clip"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield loss.item(), time.process_time() - started, model


def trained(spec: Any, ids: Tensor, labels: Tensor) -> dict[str, Any]:
    """All losses of a training, and the mean number of parameters of a mixer."""
    taken = list(steps(spec, ids, labels, STEPS))
    blocks = [block for name, block in taken[-1][2].blocks.named_children()]
    count = sum(p.numel() for block in blocks for p in block.get_submodule("mixer").parameters()) // len(blocks)
    return {"losses": [loss for loss, _, _ in taken], "parameters": count}


def timed(ids: Tensor, labels: Tensor) -> dict[str, float]:
    """Median milliseconds of a step by name, in CPU time of the one thread, the mixers taking turns."""
    running = {name: steps(spec, ids, labels, 25) for name, spec in mixers().items()}
    rounds = [{name: next(run)[1] for name, run in running.items()} for _ in range(25)]
    return {name: 1000 * statistics.median([seconds[name] for seconds in rounds[5:]]) for name in running}


def last(found: dict[str, Any]) -> float:
    """Mean loss of the last 20 steps."""
    return sum(found["losses"][-20:]) / 20


def table(found: dict[str, dict[str, Any]], times: dict[str, float]) -> str:
    rows = [
        "| mixer | loss at the end, nats per masked token | CPU ms per step | of attention's | parameters of the mixer |",
        "|---|---|---|---|---|",
    ]
    for name, values in sorted(found.items(), key=lambda item: last(item[1])):
        rows.append(
            f"| {name} | {last(values):.3f} | {times[name]:.0f} | {times[name] / times['attention']:.2f} | {values['parameters']:,} |"
        )
    return "\n".join(rows)


def draw(found: dict[str, dict[str, Any]]) -> None:
    """The losses, smoothed over 20 steps; names at the right end in the order of the curves."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 7))
    ranked = sorted(found, key=lambda name: -last(found[name]))
    for i, name in enumerate(ranked):
        losses = torch.tensor(found[name]["losses"])
        smooth = losses.unfold(0, 20, 1).mean(-1)
        place = i / max(1, len(ranked) - 1)
        color = plt.get_cmap("turbo")(place)
        axes.plot(range(20, len(losses) + 1), smooth, color=color, linewidth=1)
        axes.annotate(
            name,
            xy=(len(losses), float(smooth[-1])),
            xytext=(1.06, 1 - place),  # from top to bottom, room for every name
            textcoords="axes fraction",
            fontsize=7,
            va="center",
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "relpos": (0, 0.5)},
            annotation_clip=False,
        )
    axes.set(xlabel="step (batch 32)", ylabel="nats per masked token, mean of 20 steps", xlim=(20, STEPS))
    figure.subplots_adjust(left=0.07, right=0.72, bottom=0.07, top=0.98)
    figure.savefig(PLOT, dpi=110)


def write(found: dict[str, dict[str, Any]], times: dict[str, float]) -> None:
    """The table into the page, between its markers."""
    text = PAGE.read_text(encoding="utf-8")
    block = f"<!-- table -->\n{table(found, times)}\n<!-- end -->"
    PAGE.write_text(re.sub(r"<!-- table -->.*<!-- end -->", lambda _: block, text, flags=re.DOTALL), encoding="utf-8")


def losses(out: Path, ids: Tensor, labels: Tensor) -> dict[str, dict[str, Any]]:
    """Every training, kept in a file: a mixer that is there with the same options is not trained again."""
    path = out / "mixers.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    for name, spec in mixers().items():
        if found.get(name, {}).get("spec") != spec:
            found[name] = {"spec": spec, **trained(spec, ids, labels)}
            path.write_text(json.dumps(found))
        print(f"{name:40} {found[name]['losses'][0]:.3f} -> {last(found[name]):.3f}", flush=True)
    return {name: found[name] for name in mixers()}


def times(out: Path, ids: Tensor, labels: Tensor) -> dict[str, float]:
    """What `timed` found, kept in a file."""
    path = out / "times.json"
    if not path.exists():
        path.write_text(json.dumps(timed(ids, labels)))
    return json.loads(path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "what", nargs="*", default=["losses", "times", "page"], help="losses, times, page; by default all"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/results-mixers"), help="where the tokenizer and figures lie"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    ids, labels = tokens(args.out)
    if "losses" in args.what:
        losses(args.out, ids, labels)
    if "times" in args.what:
        times(args.out, ids, labels)
    if "page" in args.what:
        found = losses(args.out, ids, labels)
        draw(found)
        write(found, times(args.out, ids, labels))


if __name__ == "__main__":
    main()
