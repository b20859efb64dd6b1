#!/usr/bin/env python
"""Train the judges of shapes: genkit/metrics/weights/shape-points-v1.safetensors and shape-views-v1.safetensors.

    python scripts/train_shape_nets.py [points|views] [--out FOLDER]

Trains on procedural shapes of a seed that no recipe uses, measures accuracy on the validation and test splits of that seed and on shapes of the
default seed, writes the files and prints their sha256, which belong into genkit/metrics/shape_nets.py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn.functional import cross_entropy
from train_feature_net import packed  # beside this file

from genkit.data.shapes import Shapes
from genkit.files import write_bytes
from genkit.meshes.mesh import normalised
from genkit.meshes.shading import shaded, view
from genkit.metrics.shape_nets import FOLDER, POINTS, SIDE, PointNet, ViewNet

SEED, THREADS = 7_000_003, 1
NUM = {"points": 720, "views": 240}
EPOCHS = {"points": 10, "views": 8}
BATCH_SIZE, MAX_LR = {"points": 32, "views": 64}, {"points": 4e-3, "views": 3e-3}
RECIPE = {
    "optimizer": "AdamW, weight decay 0.01, lr from 0 to its peak after a fifth and back to 0, linear",
    "augmentation": {
        "points": f"{POINTS} of 1024 points drawn anew, noise up to 0.02, scale of every axis 0.9 to 1.1, shift 0.03",
        "views": "shift up to 3 pixels, blur of half the pictures, contrast 0.8 to 1.2",
    },
    "label_smoothing": 0.1,
    "seed": SEED,
    "threads": THREADS,
}


def points_of(data: Shapes) -> tuple[Tensor, Tensor]:
    samples = [data[i] for i in range(len(data))]
    return torch.stack([s["points"] for s in samples]), torch.tensor([s["label"] for s in samples])


def views_of(data: Shapes, views: int) -> tuple[Tensor, Tensor]:
    """`views` of the 20 pictures of every shape, from meshes of 32 cells per axis or of 40, in turn."""
    pictures, labels = [], []
    for i in range(len(data)):
        mesh = normalised(data.mesh(i, 32 if i // 12 % 2 else 40), to="sphere", size=1.0)
        pictures += [shaded(mesh, view((i * 7 + 20 * k // views) % 20), SIDE) for k in range(views)]
        labels += [i % len(data.classes)] * views
    return torch.stack(pictures), torch.tensor(labels)


def varied_points(points: Tensor) -> Tensor:
    B, P, _ = points.shape
    chosen = torch.rand(B, P).topk(POINTS, dim=1).indices
    x = points.gather(1, chosen[..., None].expand(-1, -1, 3))
    noise = torch.rand(B, 1, 1) * 0.02 * torch.randn_like(x)
    return (x + noise) * (0.9 + 0.2 * torch.rand(B, 1, 3)) + 0.03 * (2 * torch.rand(B, 1, 3) - 1)


def varied_views(pictures: Tensor) -> Tensor:
    y, x = (int(torch.randint(-3, 4, ())) for _ in "yx")
    ink = (1 - pictures).roll((y, x), (1, 2)) * (0.8 + 0.4 * torch.rand(len(pictures), 1, 1))
    soft = torch.nn.functional.avg_pool2d(ink[:, None], 3, 1, 1)[:, 0]
    return 1 - torch.where(torch.rand(len(pictures), 1, 1) < 0.5, soft, ink)


@torch.no_grad()
def accuracy(net: torch.nn.Module, x: Tensor, labels: Tensor) -> float:
    net.eval()
    return float(torch.cat([net(part).argmax(1) for part in x.split(64)]).eq(labels).float().mean())


def train(what: str) -> tuple[torch.nn.Module, dict[str, float]]:
    torch.manual_seed(SEED)
    few = {"num_distances": 0, "num_points": 1024 if what == "points" else 16}
    net = PointNet() if what == "points" else ViewNet()
    started = time.perf_counter()

    def read(**settings: object) -> tuple[Tensor, Tensor]:
        data = Shapes(**{"num_shapes": NUM[what], "seed": SEED, **few, **settings})  # type: ignore[arg-type]
        return points_of(data) if what == "points" else views_of(data, 6)

    x, labels = read()
    print(f"{len(x)} inputs after {time.perf_counter() - started:.0f} s", flush=True)
    steps = EPOCHS[what] * (len(x) // BATCH_SIZE[what])
    optimizer = torch.optim.AdamW(net.parameters(), lr=MAX_LR[what], weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min((n + 1) / (0.2 * steps), (steps - n) / (0.8 * steps))
    )
    for epoch in range(EPOCHS[what]):
        net.train()
        total = 0.0
        for rows in torch.randperm(len(x)).split(BATCH_SIZE[what])[: len(x) // BATCH_SIZE[what]]:
            loss = cross_entropy(
                net((varied_points if what == "points" else varied_views)(x[rows])), labels[rows], label_smoothing=0.1
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(
            f"epoch {epoch + 1}: loss {total * BATCH_SIZE[what] / len(x):.3f}, {time.perf_counter() - started:.0f} s",
            flush=True,
        )
    state = packed(net)
    net.load_state_dict({name: value.float() for name, value in state.items()}, strict=False)
    scores = {}
    for name, settings in {
        "val": {"split": "val"},
        "test": {"split": "test"},
        "seed 0": {"seed": 0, "num_shapes": 120},
    }.items():
        inputs, truth = read(**settings)
        scores[name] = accuracy(net, inputs[:, :POINTS] if what == "points" else inputs, truth)
    return net, scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=["points", "views"])
    parser.add_argument("--out", type=Path, default=FOLDER)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    for what in [options.what] if options.what else ["points", "views"]:
        net, scores = train(what)
        recipe = {**RECIPE, "augmentation": RECIPE["augmentation"][what]}  # type: ignore[index]
        about = {
            "protocol": net.protocol, "accuracy": scores, "shapes": NUM[what], "epochs": EPOCHS[what], "batch_size": BATCH_SIZE[what], "lr": MAX_LR[what],
            **recipe, "torch": torch.__version__,
        }  # fmt: skip
        data = save(packed(net), metadata={"about": json.dumps(about)})
        path = options.out / f"{net.protocol}.safetensors"
        write_bytes(path, data)
        print(f"{scores}, {len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()}, {path}", flush=True)


if __name__ == "__main__":
    main()
