"""Tokenizers whose ids have a structure, small, and images with something to choose."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genkit.nn.grid_tokenizer import GridTokenizer
from genkit.tokenizers.dqvae import DQVAE
from genkit.tokenizers.nfig import NFIG
from genkit.tokenizers.titok import TiTok
from genkit.tokenizers.var_vq import VarVq

SCALES = (1, 2, 3, 4)
SMALL = {"width": 32, "num_blocks": 1, "channels": 8, "codebook_size": 24}
KINDS: dict[str, tuple[type[GridTokenizer], dict[str, Any]]] = {
    "scales": (VarVq, SMALL | {"patch_sizes": SCALES}),
    "scales by direction": (VarVq, SMALL | {"patch_sizes": SCALES, "cosine": True, "num_phi": 1}),
    "deep scales": (VarVq, SMALL | {"patch_sizes": SCALES, "stride": 2, "widths": (32, 64)}),
    "bands": (NFIG, SMALL | {"patch_sizes": SCALES}),
    "tokens": (TiTok, {"image_size": 16, "num_tokens": 5, "dim": 24, "depth": 2, "channels": 6, "codebook_size": 24}),
    "two grains": (DQVAE, SMALL | {"image_size": 16, "stride": 2}),
    "three grains": (DQVAE, SMALL | {"image_size": 16, "stride": 2, "num_grains": 3, "targets": (0.3, 0.3)}),
    "entropy": (DQVAE, SMALL | {"image_size": 16, "stride": 2, "router": "entropy", "thresholds": (1.5,)}),
    "deep grains": (
        DQVAE,
        SMALL
        | {
            "image_size": 16,
            "stride": 2,
            "widths": (32, 32, 64),
            "attention": (2,),
            "feature_channels": 16,
            "positions": "waves+tables",
        },
    ),
}


def images(*shape: int) -> Tensor:
    """Blocks of noise and of grey: routers find something to choose."""
    x = torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    x[..., : shape[-1] // 2] *= 0.05
    return x


def make(kind: str) -> Any:
    torch.manual_seed(0)
    cls, options = KINDS[kind]
    return cls(image_channels=3, **options)
