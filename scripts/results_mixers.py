"""Everything that docs/results/mixers.md reports: every mixer trains in the same masked generator on fashion tokens, one thread each.

    python scripts/results_mixers.py            # the tokenizer where it is missing, then about ten minutes

What is measured is kept in OUT/mixers.json: stopped and started again, it goes on with the mixers that are missing.
"""

from __future__ import annotations

import argparse
import json
import re
import time
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


def measure(spec: Any, ids: Tensor, labels: Tensor) -> dict[str, Any]:
    """Train the quick start's generator, half as wide, with this mixer; the same ids, masks and learning rates for all."""
    torch.manual_seed(0)
    checked = (
        [check("mixer", part, "mixer") for part in spec] if isinstance(spec, list) else check("mixer", spec, "mixer")
    )
    grid = tuple(ids.shape[2:])
    model = Masked(codebook_size=512, num_levels=1, num_classes=10, grid=grid, dim=DIM, depth=4, mixer=checked)
    optimizer, objective, layout = adamw(model, TRAIN), Objective(label_smoothing=0.0), dense_layout(grid)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(1))
    losses, seconds = [], []
    for step in range(STEPS):
        started = time.process_time()
        chosen = order[(step * BATCH + torch.arange(BATCH)) % len(order)]
        rng = Rng.at(0, step * BATCH, BATCH, "cpu")
        loss = objective(model, ids[chosen], {"label": labels[chosen]}, layout, rng)["nll"].mean()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(TRAIN, (step + 1) * BATCH)
        torch.nn.utils.clip_grad_norm_(model.parameters(), TRAIN["clip"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        seconds.append(time.process_time() - started)
    return {
        "losses": losses,
        "ms": 1000 * sorted(seconds)[len(seconds) // 2],
        "parameters": sum(p.numel() for block in model.blocks for p in block.mixer.parameters()) // len(model.blocks),
    }


def last(found: dict[str, Any]) -> float:
    """Mean loss of the last 20 steps."""
    return sum(found["losses"][-20:]) / 20


def table(found: dict[str, dict[str, Any]]) -> str:
    rows = [
        "| mixer | loss at the end, nats per masked token | CPU ms per step | parameters of the mixer |",
        "|---|---|---|---|",
    ]
    for name, values in sorted(found.items(), key=lambda item: last(item[1])):
        rows.append(f"| {name} | {last(values):.3f} | {values['ms']:.0f} | {values['parameters']:,} |")
    return "\n".join(rows)


def draw(found: dict[str, dict[str, Any]]) -> None:
    """The losses, smoothed over 20 steps; names at the right end in the order of the curves."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 7))
    ranked = sorted(found, key=lambda name: -last(found[name]))
    low, high = last(found[ranked[-1]]), last(found[ranked[0]])
    for i, name in enumerate(ranked):
        losses = torch.tensor(found[name]["losses"])
        smooth = losses.unfold(0, 20, 1).mean(-1)
        color = plt.get_cmap("turbo")(i / max(1, len(ranked) - 1))
        axes.plot(range(20, len(losses) + 1), smooth, color=color, linewidth=1)
        place = high + (low - high) * i / max(1, len(ranked) - 1)
        spread = (place - (low + high) / 2) * 2.2 + (low + high) / 2  # room for every name
        axes.annotate(
            name,
            xy=(len(losses), float(smooth[-1])),
            xytext=(len(losses) + 12, spread),
            fontsize=7,
            color=color,
            va="center",
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.5},
            annotation_clip=False,
        )
    axes.set(xlabel="step (batch 32)", ylabel="nats per masked token, mean of 20 steps", xlim=(20, STEPS))
    figure.subplots_adjust(right=0.72)
    figure.savefig(PLOT, dpi=110)


def write(found: dict[str, dict[str, Any]]) -> None:
    """The table into the page, between its markers."""
    text = PAGE.read_text(encoding="utf-8")
    block = f"<!-- table -->\n{table(found)}\n<!-- end -->"
    PAGE.write_text(re.sub(r"<!-- table -->.*<!-- end -->", lambda _: block, text, flags=re.DOTALL), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/results-mixers"), help="where the tokenizer and figures lie"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    ids, labels = tokens(args.out)
    record = args.out / "mixers.json"
    found = json.loads(record.read_text()) if record.exists() else {}
    for name, spec in mixers().items():
        if found.get(name, {}).get("spec") != spec:
            found[name] = {"spec": spec, **measure(spec, ids, labels)}
            record.write_text(json.dumps(found))
        print(
            f"{name:40} {found[name]['losses'][0]:.3f} -> {last(found[name]):.3f}  {found[name]['ms']:.0f} ms",
            flush=True,
        )
    found = {name: found[name] for name in mixers()}
    draw(found)
    write(found)


if __name__ == "__main__":
    main()
