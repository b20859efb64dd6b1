#!/usr/bin/env python
"""Train the feature net of the embedded data: genkit/metrics/weights/fashion-cnn-v1.safetensors.

    python scripts/train_feature_net.py [--data /usr/share/datasets/fashion-mnist] [--out FILE]

Reads the four IDX files of Fashion-MNIST (Debian package dataset-fashion-mnist, or FashionMNIST/raw of torchvision), trains on the
60,000 train images, measures on the 10,000 test images, writes the file and prints its sha256, which belongs into
genkit/metrics/fashion_net.py. The same seed, torch version and thread count give the same weights.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from genkit.files import write_bytes
from genkit.metrics.fashion_net import PROTOCOL, WEIGHTS, FashionCNN

EPOCHS, BATCH_SIZE, MAX_LR, SEED, THREADS = 10, 128, 0.05, 0, 2
# Shifts in pixels. No mirroring: every shoe of the data points left, and a feature net should find a mirrored one unusual.
SHIFT = 2
RECIPE = {
    "data": "Fashion-MNIST, train split (60,000)",
    "epochs": EPOCHS,
    "batch_size": BATCH_SIZE,
    "optimizer": "SGD, Nesterov momentum 0.9, weight decay 5e-4",
    "lr": f"0 -> {MAX_LR} over the first fifth, then -> 0, both linear",
    "augmentation": f"shift by up to {SHIFT} pixels",
    "seed": SEED,
    "threads": THREADS,
}


def read_idx(path: Path) -> Tensor:
    """A gzipped IDX file of unsigned bytes (four-byte magic, then one big-endian int32 per axis) as a uint8 tensor."""
    data = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(data, ">i4", count=data[3], offset=4)
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape).copy())


def scaled(images: Tensor) -> Tensor:
    """uint8 [B, Y, X] -> float [B, 1, Y, X] in [-1, 1]."""
    return images[:, None].float() / 127.5 - 1


def accuracy(net: FashionCNN, images: Tensor, labels: Tensor) -> float:
    """Share of images whose highest logit is their label."""
    net.eval()
    with torch.no_grad():
        hits = [
            (net(scaled(x)).argmax(1) == y).sum() for x, y in zip(images.split(500), labels.split(500), strict=True)
        ]
    return int(sum(hits)) / len(labels)


def train(images: Tensor, labels: Tensor, test: tuple[Tensor, Tensor]) -> FashionCNN:
    """The whole recipe; prints one line per epoch."""
    torch.manual_seed(SEED)
    net = FashionCNN().to(memory_format=torch.channels_last)
    steps_per_epoch = len(labels) // BATCH_SIZE
    steps = EPOCHS * steps_per_epoch
    optimizer = torch.optim.SGD(net.parameters(), lr=MAX_LR, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.2 * steps), (steps - step) / (0.8 * steps))
    )
    # Every shift is a window of the padded image: [N, 2 SHIFT + 1, 2 SHIFT + 1, Y, X], a view.
    windows = pad(images, [SHIFT] * 4).unfold(1, 28, 1).unfold(2, 28, 1)
    for epoch in range(EPOCHS):
        net.train()
        start, total = time.perf_counter(), 0.0
        for rows in torch.randperm(len(labels)).split(BATCH_SIZE)[:steps_per_epoch]:
            dy, dx = torch.randint(2 * SHIFT + 1, (2, len(rows)))
            x = scaled(windows[rows, dy, dx])
            loss = cross_entropy(net(x), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() / steps_per_epoch
        seconds = time.perf_counter() - start
        print(
            f"epoch {epoch + 1}/{EPOCHS}: loss {total:.4f}, test accuracy {accuracy(net, *test):.4f}, {seconds:.0f} s",
            flush=True,
        )
    return net


def packed(net: torch.nn.Module) -> dict[str, Tensor]:
    """The state as stored: matrices and kernels in half precision, norms and biases in full; step counters are left out."""
    state = {name: value for name, value in net.state_dict().items() if value.is_floating_point()}
    return {name: (value.half() if value.ndim > 1 else value).contiguous() for name, value in state.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help="folder of the four .gz files"
    )
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    options = parser.parse_args()

    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    images, labels, test_images, test_labels = (
        read_idx(options.data / f"{split}-{kind}-idx{axes}-ubyte.gz")
        for split in ("train", "t10k")
        for kind, axes in (("images", 3), ("labels", 1))
    )
    test = (test_images, test_labels.long())
    net = train(images, labels.long(), test)

    state = packed(net)
    net.load_state_dict({name: value.float() for name, value in state.items()}, strict=False)
    score = accuracy(net, *test)  # of what is stored, after rounding
    # One metadata key: safetensors writes several in random order, which would change the sha256 of equal weights.
    about = {"protocol": PROTOCOL, "test_accuracy": score, **RECIPE, "torch": torch.__version__}
    data = save(state, metadata={"about": json.dumps(about)})
    write_bytes(options.out, data)
    print(f"test accuracy {score:.4f}, {len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()}, {options.out}")


if __name__ == "__main__":
    main()
