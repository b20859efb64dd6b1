"""Everything that docs/results/tokens_ar.md reports: generators that draw in sequence, on fashion tokens, and what beams find.

    python scripts/results_tokens_ar.py            # trains what is missing in OUT, half an hour on two idle cores, then measures and writes the page
    python scripts/results_tokens_ar.py --no-train # measures what is there

What is measured is kept in OUT: stopped and started again, it goes on with what is missing.
"""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path
from typing import Any

import torch
from pages import RESULTS, Store, fill, table
from torch import Tensor

from genkit import evaluate, train
from genkit.errors import GenkitError, UsageError
from genkit.guidance import guide
from genkit.nn.layout import dense_layout
from genkit.objectives.next_token import NextToken
from genkit.pipeline import open_run
from genkit.rng import Rng
from genkit.samplers.autoregressive import Autoregressive
from genkit.samplers.beam import Beam
from genkit.samplers.jacobi import Jacobi

PAGE = RESULTS / "tokens_ar.md"
COUNT = 1000  # samples that figures are taken from
FINE = {"tokenizer.stride": 2, "tokenizer.codebook_size": 1024, "train.num_samples": 5000}
TOKENIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "vq": ("toy/vq-fashion", {"tokenizer.codebook_size": 1024, "train.num_samples": 8000}),
    "var_vq": ("toy/var_vq-fashion", {"train.num_samples": 8000}),
    "nfig": ("toy/nfig-fashion", {"train.num_samples": 8000}),
    "vq-fine": ("toy/vq-fashion", FINE),
    "dqvae": ("toy/dqvae-fashion", {"train.num_samples": 5000}),
}
# Name -> recipe, tokenizer, samples to train on.
GENERATORS = {
    "raster": ("toy/gpt-fashion", "vq", 12_800),
    "next scale": ("toy/var-fashion", "var_vq", 12_800),
    "next frequency": ("toy/nfig-ar-fashion", "nfig", 12_800),
    "raster, fine": ("toy/gpt-fashion", "vq-fine", 6_400),
    "positions and contents": ("toy/dq-fashion", "dqvae", 6_400),
}
BEAMS: list[tuple[str, dict[str, Any]]] = [
    ("beam search", {"num_beams": 8}),
    *((f"4 groups of 2, diversity {x}", {"num_beams": 8, "num_groups": 4, "diversity": x}) for x in (0.2, 0.5, 0.8)),
    *((f"8 groups of 1, diversity {x}", {"num_beams": 8, "num_groups": 8, "diversity": x}) for x in (0.2, 0.5, 0.8)),
]
SAME = 0.05  # root mean square difference in [-1, 1] below which two images count as one


def prepare(out: Path) -> None:
    """Train what has not been trained as long as it should be."""
    for name, (recipe, options) in TOKENIZERS.items():
        if samples_of(out / name) < options["train.num_samples"]:
            train(recipe, options, name=name, out=out)
    for name, (recipe, tokenizer, count) in GENERATORS.items():
        if samples_of(out / slug(name)) < count:
            options = {"tokenizer.from": str(out / tokenizer), "train.num_samples": count}
            train(recipe, {**options, "log.sample_every_steps": 100_000}, name=slug(name), out=out)


def slug(name: str) -> str:
    return re.sub(r"[^a-z]+", "-", name)


def samples_of(run: Path) -> int:
    """On how many samples the last checkpoint of a run was trained; 0 = there is none."""
    try:
        pipe = open_run(run)
    except (GenkitError, UsageError):
        return 0
    return int(pipe.folder.parent.name) * pipe.run_config["train"]["batch_size"]


def measure(out: Path) -> dict[str, Any]:
    """Every figure that can be taken of what is there, those of an earlier call kept."""
    store = Store(out / "measured.json")
    for name, (_, tokenizer, _) in GENERATORS.items():
        samples = samples_of(out / slug(name))
        if store.values.get(name, {}).get("samples") != samples:  # trained on since
            store.values.pop(name, None)
        if samples:
            store.get(name, lambda n=name, t=tokenizer, s=samples: figures(out / slug(n), out / t) | {"samples": s})
    if samples_of(out / "raster"):
        store.get("beams", lambda: beams(out / "raster"))
        store.get("guesses", lambda: guesses(out / "raster"))
    return store.values


def figures(run: Path, tokenizer: Path) -> dict[str, Any]:
    pipe = open_run(run)
    report = evaluate(run, count=COUNT)
    values = {row["metric"].partition(" ")[0]: row["value"] for row in report.rows}
    labels = torch.arange(20) % 10
    pipe.generate(labels[:2], [0, 1])
    started = time.process_time()
    pipe.generate(labels, list(range(20)))
    seconds = (time.process_time() - started) / 20
    of_tokenizer = evaluate(tokenizer, count=COUNT)
    ids = codes_of(pipe, labels)
    return {
        "fd": values["FD"],
        "accuracy": report.rows[-1]["value"],
        "parameters": sum(p.numel() for p in pipe.backbone.parameters()),
        "seconds": seconds,
        "psnr": next(row["value"] for row in of_tokenizer.rows if row["metric"] == "PSNR"),
        "rfd": next(row["value"] for row in of_tokenizer.rows if row["metric"].startswith("rFD")),
        **ids,
    }


def codes_of(pipe: Any, labels: Tensor) -> dict[str, float]:
    """Ids of an image and steps they are drawn in. Of varying density, the mean of images as sampled."""
    seen: list[Tensor] = []
    steps = 0

    def watch(step: int, total: int, ids: Tensor) -> None:
        nonlocal steps
        steps = step + 1
        seen[:] = [ids]

    pipe.generate(labels, list(range(len(labels))), on_step=watch)
    if hasattr(pipe.tokenizer, "pack"):
        return {"ids": sum(len(codes) for _, codes in pipe.tokenizer.pack(seen[0])) / len(labels), "steps": steps}
    return {"ids": float(seen[0][0].numel()), "steps": steps}


def predictor(run: Path, guided: float) -> tuple[Any, Any]:
    """(pipeline, what a sampler calls for one sample of each class)."""
    pipe = open_run(run)
    how = pipe.guidance(guided)
    cond = {"label": torch.arange(10)}
    return pipe, guide(NextToken(), pipe.backbone, cond, dense_layout(pipe.grid), how)


@torch.no_grad()
def beams(run: Path) -> list[dict[str, Any]]:
    """Per class eight sequences: their log-likelihood, how many images of them differ, and by how much."""
    pipe, predict = predictor(run, 1.0)
    rows = []
    for name, options in BEAMS:
        sequences, likelihood = Beam(**options).search(predict, torch.full((10, len(predict.counts)), -1))
        rows.append({"name": name, **spread(pipe, predict, sequences, likelihood)})
    for temperature in (1.0, 0.5, 0.2):
        eight = predict.repeated(8)
        start = torch.full((80, *predict.shape), -1)
        ids = Autoregressive(temperature=temperature)(eight, start, Rng.at(0, 0, 80))
        sequences = eight.to_sequence(ids)
        logits = eight.several(sequences[:, :-1], None, sequences.shape[1])
        log_p = logits.log_softmax(-1).gather(-1, sequences.unsqueeze(-1)).squeeze(-1).sum(1)
        found = spread(pipe, predict, sequences.unflatten(0, (10, 8)), log_p.view(10, 8))
        rows.append({"name": f"drawn at temperature {temperature}", **found})
    return rows


def spread(pipe: Any, predict: Any, sequences: Tensor, likelihood: Tensor) -> dict[str, float]:
    x = pipe.tokenizer.decode(pipe.tokenizer.codes(predict.to_ids(sequences.flatten(0, 1)))).clamp(-1, 1)
    distance = torch.cdist(
        x.flatten(1).unflatten(0, sequences.shape[:2]), x.flatten(1).unflatten(0, sequences.shape[:2])
    )
    distance = distance / x[0].numel() ** 0.5  # [10, 8, 8]
    own = torch.tril(torch.ones(8, 8), -1).bool()
    repeats = ((distance < SAME) & own).any(-1)  # like an earlier one
    return {
        "likelihood": likelihood.mean().item() / sequences.shape[-1],
        "distinct": 8 - repeats.float().sum(-1).mean().item(),
        "distance": distance[:, own].mean().item(),
    }


@torch.no_grad()
def guesses(run: Path) -> list[dict[str, Any]]:
    """Calls of the model that parallel decoding needs for an image, one at a time, and whether its ids are those of drawing one by one."""
    pipe = open_run(run)
    rows = []
    for temperature, window in ((0.0, 8), (0.5, 8), (1.0, 8)):
        calls, same = 0, True
        for label in range(10):
            cond = {"label": torch.tensor([label])}
            predict: Any = guide(NextToken(), pipe.backbone, cond, dense_layout(pipe.grid), pipe.guidance(2.0))
            start = torch.full((1, *predict.shape), -1)
            parallel = Jacobi(window=window, temperature=temperature)
            ids = parallel(predict, start, Rng.at(0, label, 1))
            same &= torch.equal(ids, Autoregressive(temperature=temperature)(predict, start, Rng.at(0, label, 1)))
            calls += parallel.calls
        rows.append(
            {
                "temperature": temperature,
                "window": window,
                "calls": calls / 10,
                "ids": len(predict.counts),
                "same": same,
            }
        )
    return rows


def generators(found: dict[str, Any], names: tuple[str, ...]) -> str:
    rows = []
    for name in names:
        if name not in found:
            rows.append((name, *["not measured"] + ["-"] * 7))
            continue
        v = found[name]
        rows.append(
            (
                name,
                f"{v['parameters'] / 1e6:.2f} M",
                f"{v['samples']:,}",
                f"{v['ids']:.0f}",
                str(v["steps"]),
                f"{v['rfd']:.2f}",
                f"{v['fd']:.2f}",
                f"{v['accuracy']:.3f}",
                f"{1000 * v['seconds']:.0f}",
            )
        )
    head = (
        "drawn",
        "parameters",
        "trained on",
        "ids",
        "steps",
        "rFD of the tokens",
        "FD",
        "class accuracy",
        "CPU ms per image",
    )
    return table(head, rows)


def page(found: dict[str, Any]) -> None:
    parts = {
        "orders": generators(found, ("raster", "next scale", "next frequency")),
        "density": generators(found, ("raster, fine", "positions and contents")),
    }
    if "beams" in found:
        rows = [
            (r["name"], f"{r['likelihood']:.3f}", f"{r['distinct']:.1f}", f"{r['distance']:.3f}")
            for r in found["beams"]
        ]
        parts["beams"] = table(("search", "log-likelihood, nats per id", "distinct of 8", "mean distance"), rows)
        rows = [
            (str(r["temperature"]), str(r["window"]), str(r["ids"]), f"{r['calls']:.1f}", "yes" if r["same"] else "NO")
            for r in found["guesses"]
        ]
        parts["guesses"] = table(("temperature", "window", "ids", "calls", "the same ids"), rows)
    fill(PAGE, parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/results_tokens_ar"))
    parser.add_argument("--no-train", action="store_true")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if not arguments.no_train:
        prepare(arguments.out)
    page(measure(arguments.out))


if __name__ == "__main__":
    main()
