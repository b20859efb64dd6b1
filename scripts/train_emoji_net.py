#!/usr/bin/env python
"""Train the feature net of emoji: genkit/metrics/weights/emoji-cnn-v1.safetensors.

    python scripts/train_emoji_net.py [--out FILE]

Needs the font of the dataset `emoji`. Trains on its train split, measures class accuracy on the images of its validation split, which the net has
not seen, writes the file and prints its sha256, which belongs into genkit/metrics/emoji_net.py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.functional import affine_grid, cross_entropy, grid_sample
from train_feature_net import packed  # beside this file

from genkit.data.emoji import Emoji
from genkit.files import write_bytes
from genkit.metrics.emoji_net import PROTOCOL, SIDE, WEIGHTS, EmojiCNN

EPOCHS, BATCH_SIZE, MAX_LR, SEED, THREADS = 90, 64, 0.04, 0, 1
SHIFT, TURN, ZOOM, COLOUR = 0.08, 12.0, 0.15, 0.2
RECIPE = {
    "data": "emoji, train split, 64 pixels",
    "task": "class and identity of each emoji, cross-entropies with equal weight, label smoothing 0.1 on identities",
    "epochs": EPOCHS,
    "batch_size": BATCH_SIZE,
    "optimizer": "SGD, Nesterov momentum 0.9, weight decay 5e-4",
    "lr": f"0 -> {MAX_LR} over the first fifth, then -> 0, both linear",
    "augmentation": f"shift {SHIFT} of the side, turn {TURN} degrees, zoom {ZOOM}, colour matrix {COLOUR}",
    "seed": SEED,
    "threads": THREADS,
}


def varied(x: Tensor) -> Tensor:
    """Images [B, 3, Y, X] in [-1, 1], each shifted, turned, zoomed and recoloured a little; what comes in from outside is white."""
    B = len(x)
    turn = (torch.rand(B) * 2 - 1) * math.radians(TURN)
    zoom = 1 + (torch.rand(B) * 2 - 1) * ZOOM
    shift = (torch.rand(B, 2) * 2 - 1) * 2 * SHIFT
    cos, sin = turn.cos() * zoom, turn.sin() * zoom
    theta = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    grid = affine_grid(theta, list(x.shape), align_corners=False)
    ink = grid_sample(1 - x, grid, align_corners=False)  # 0 = white, also outside
    colours = torch.eye(3) + (torch.rand(B, 3, 3) * 2 - 1) * COLOUR
    return 1 - torch.einsum("bdc,bcyx->bdyx", colours, ink).clamp(0, 2)


def accuracy(net: EmojiCNN, images: Tensor, labels: Tensor) -> float:
    net.eval()
    with torch.no_grad():
        return (net(images).argmax(1) == labels).float().mean().item()


def train(images: Tensor, labels: Tensor, test: tuple[Tensor, Tensor]) -> EmojiCNN:
    """The whole recipe; prints a line every ten epochs."""
    torch.manual_seed(SEED)
    net = EmojiCNN().to(memory_format=torch.channels_last)
    identity = nn.Linear(net.dims["pool"], len(images))
    parameters = [*net.parameters(), *identity.parameters()]
    steps_per_epoch = len(labels) // BATCH_SIZE
    steps = EPOCHS * steps_per_epoch
    optimizer = torch.optim.SGD(parameters, lr=MAX_LR, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.2 * steps), (steps - step) / (0.8 * steps))
    )
    started = time.perf_counter()
    for epoch in range(EPOCHS):
        net.train()
        total = hits = 0.0
        for rows in torch.randperm(len(labels)).split(BATCH_SIZE)[:steps_per_epoch]:
            features = net.features(varied(images[rows]).contiguous(memory_format=torch.channels_last))
            named = identity(features)
            loss = cross_entropy(named, rows, label_smoothing=0.1) + cross_entropy(net.classify(features), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() / steps_per_epoch
            hits += (named.argmax(1) == rows).float().mean().item() / steps_per_epoch
        if epoch % 10 == 9:
            score, seconds = accuracy(net, *test), time.perf_counter() - started
            print(
                f"epoch {epoch + 1}/{EPOCHS}: loss {total:.3f}, identities {hits:.3f}, unseen classes {score:.3f}, {seconds:.0f} s",
                flush=True,
            )
    return net


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    seen, unseen = (Emoji(size=SIDE, split=split) for split in ("train", "val"))
    images, test_images = (data.pixels.float() / 127.5 - 1 for data in (seen, unseen))
    test = (test_images, unseen.labels)
    net = train(images, seen.labels, test)
    state = packed(net)
    net.load_state_dict({name: value.float() for name, value in state.items()}, strict=False)
    score = accuracy(net, *test)  # of what is stored, after rounding
    # One metadata key: safetensors writes several in random order, which would change the sha256 of equal weights.
    about = {"protocol": PROTOCOL, "unseen_class_accuracy": score, **RECIPE, "torch": torch.__version__}
    data = save(state, metadata={"about": json.dumps(about)})
    write_bytes(options.out, data)
    print(f"unseen classes {score:.4f}, {len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()}, {options.out}")


if __name__ == "__main__":
    main()
