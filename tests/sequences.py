"""Generators that draw ids in sequence, small, one of each kind."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from genkit.backbones.dq import DQ
from genkit.backbones.gpt import GPT
from genkit.backbones.rq import RQ
from genkit.backbones.var import VAR
from genkit.nn import grain as grains
from genkit.nn.layout import dense_layout
from genkit.nn.multiscale import ScaleQuantizer
from genkit.objectives.next_code import NextCode
from genkit.objectives.next_scale import NextScale
from genkit.objectives.next_token import NextToken
from genkit.rng import Rng

S, GRID, SCALES = 11, (4, 4), (1, 2, 4)
LABELS = torch.tensor([0, 1, 3, -1])
ATTENTION = {"type": "attention", "num_heads": 2, "is_causal": True, "qk_norm": False, "rope_base": 100.0}
KINDS = ["gpt", "rq", "var", "dq"]


def quantizer() -> ScaleQuantizer:
    torch.manual_seed(1)
    made = ScaleQuantizer(dim=6, codebook_size=S, patch_sizes=SCALES, num_phi=2).eval()
    torch.nn.init.normal_(made.codebook.embed)
    return made


TOKENIZERS = {
    "gpt": SimpleNamespace(),
    "rq": SimpleNamespace(),
    "var": SimpleNamespace(quantizer=quantizer(), next_inputs=lambda ids: quantizer().next_inputs(ids[:, 0])),
    "dq": SimpleNamespace(num_grains=2),
}


def make(kind: str, random: bool = True, **options: Any) -> tuple[Any, Any]:
    """(backbone, objective): small, and away from the initialisation, where logits are zero."""
    torch.manual_seed(0)
    given: dict[str, Any] = {"codebook_size": S, "num_classes": 4}
    if kind == "gpt":
        options = {"dim": 16, "depth": 2, "multiple_of": 8, "mixer": {**ATTENTION, "bias": False}} | options
        model: Any = GPT(**given, num_levels=1, grid=GRID, **options)
        objective: Any = NextToken(cond_drop=0.0)
    elif kind == "rq":
        options = {"dim": 16, "depth": 2, "head_depth": 2, "mixer": ATTENTION, "head_mixer": ATTENTION} | options
        model, objective = RQ(**given, num_levels=3, grid=GRID, **options), NextToken(cond_drop=0.0)
    elif kind == "var":
        options = {"dim": 16, "depth": 2, "mixer": {"type": "scale_attention", "num_heads": 2}} | options
        model, objective = VAR(**given, channels=6, patch_sizes=SCALES, **options), NextScale(cond_drop=0.0)
    else:
        options = {"dim": 16, "position_depth": 1, "content_depth": 2, "mixer": {**ATTENTION, "rope": False}} | options
        model, objective = DQ(**given, grid=GRID, num_grains=2, **options), NextCode(cond_drop=0.0)
    if hasattr(objective, "bind"):
        objective.bind(TOKENIZERS[kind])
    if random:
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
    return model.eval(), objective


def random_ids(kind: str, batch: int = 4) -> Tensor:
    """[B, Q, *grid] as the tokenizer of this generator makes them."""
    if kind == "var":
        return Rng.at(0, 0, batch).integers(S, 1, sum(p * p for p in SCALES))
    ids = Rng.at(0, 0, batch).integers(S, 3 if kind == "rq" else 1, *GRID)
    if kind == "dq":
        map_ = Rng.at(1, 0, batch).integers(2, 2, 2)
        map_[0], map_[1] = 0, 1
        ids = grains.spread(ids[:, 0], grains.expand(2 ** (1 - map_), 2))[:, None]
    return ids


def empty(predict: Any, batch: int) -> Tensor:
    return torch.full((batch, *predict.shape), -1)


def sequence_of(kind: str, predict: Any, ids: Tensor) -> Tensor:
    """In the order of drawing; of dq, of the first sample alone, since lengths differ."""
    if kind != "dq":
        return predict.to_sequence(ids)
    positions, contents = predict.sequence.encode(ids[:1])
    return torch.stack([positions, contents.clamp_min(0)], dim=-1).flatten(1)


LAYOUT = dense_layout(GRID)
each = pytest.mark.parametrize("kind", KINDS)
