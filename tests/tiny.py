"""Recipes that train in a second: the same parts as the real ones, as small as they go."""

from typing import Any

TOKENIZER: dict[str, Any] = {
    "name": "vq",
    "data": {"type": "fashion", "source": "embedded", "split": "train"},
    "tokenizer": {"type": "vq", "stride": 4, "width": 8, "num_blocks": 1, "channels": 8, "codebook_size": 16},
    "objective": {"type": "reconstruction"},
    "train": {"num_samples": 128, "batch_size": 16, "lr": 1e-3, "ema": 0.9},
    "log": {"every_steps": 2, "sample_every_steps": 100, "save_every_steps": 4, "num_images": 4},
}
GENERATOR: dict[str, Any] = {
    "name": "masked",
    "data": {"type": "fashion", "source": "embedded", "split": "train"},
    "tokenizer": {"from": "runs/vq"},
    "backbone": {
        "type": "masked",
        "dim": 16,
        "depth": 1,
        "dropout": 0.1,
        "mixer": {"type": "attention", "num_heads": 2},
    },
    "objective": {"type": "masked"},
    "sampler": {"type": "masked", "num_steps": 2, "guidance": 2.0},
    "train": {"num_samples": 128, "batch_size": 16, "lr": 1e-3, "ema": 0.9},
    "log": {"every_steps": 2, "sample_every_steps": 100, "save_every_steps": 4, "num_images": 4},
}
