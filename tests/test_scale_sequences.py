"""Sequences of scales and of codes of varying density."""

import math

import pytest
import torch

from genkit.errors import UsageError
from genkit.nn import grain as grains
from genkit.nn.grain_sequence import GrainSequence
from genkit.rng import Rng
from genkit.samplers.autoregressive import Autoregressive
from tests.sequences import LABELS, LAYOUT, TOKENIZERS, S, empty, make, random_ids

# Scales


@torch.no_grad()
def test_a_scale_sees_itself_and_the_coarser_ones_alone():
    model, _ = make("var")
    x = torch.randn(2, 20, 6, generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[:, 2] += 1  # of the second scale, tokens 1 .. 4
    a, b = (model(y, None, {"label": LABELS[:2]}, LAYOUT) for y in (x, changed))
    torch.testing.assert_close(a[:, :1], b[:, :1])
    assert (a[:, 1:] - b[:, 1:]).abs().amax(-1).min() > 1e-5  # its whole scale, and all finer ones


@torch.no_grad()
def test_the_last_scale_never_reaches_the_network():
    ids = random_ids("var")
    changed = ids.clone()
    changed[..., 5:] = (changed[..., 5:] + 1) % S
    shown = [TOKENIZERS["var"].next_inputs(y) for y in (ids, changed)]
    torch.testing.assert_close(*shown)


@torch.no_grad()
def test_shared_modulation_and_plain_logits():
    model, objective = make(
        "var", shared_modulation=True, mixer={"type": "scale_attention", "num_heads": 2, "cosine": False}
    )
    predict = objective.predictor(model, {"label": LABELS}, LAYOUT)
    assert Autoregressive(top_k=3)(predict, empty(predict, 4), Rng.at(0, 0, 4)).min() >= 0
    assert "blocks.0.modulation.table" in model.state_dict()


# Varying density


@pytest.mark.parametrize(("num_grains", "grid"), [(2, (4, 6)), (3, (8, 4))])
def test_sequences_of_codes_and_back(num_grains, grid):
    sequence, side = GrainSequence(grid, num_grains), 2 ** (num_grains - 1)
    map_ = Rng.at(2, 0, 9).integers(num_grains, grid[0] // side, grid[1] // side)
    map_[0], map_[1] = 0, num_grains - 1
    ids = grains.spread(Rng.at(3, 0, 9).integers(50, *grid), grains.expand(2 ** (num_grains - 1 - map_), side))[:, None]
    positions, contents = sequence.encode(ids)
    assert torch.equal(sequence.decode(positions, contents), ids)
    assert torch.equal((contents >= 0).sum(1), grains.code_counts(grains.grain_of(ids[:, 0], num_grains)))
    at = sequence.progress(positions)
    allowed = sequence.allowed(at)
    for b, row in enumerate(positions):
        length = int((row >= 0).sum())
        assert allowed[b, torch.arange(length), row[:length]].all()
        assert at.grain[b, length] == num_grains
    assert (positions.diff(dim=1)[positions[:, 1:] >= 0] > 0).all()  # coarse to fine, in order


@pytest.mark.parametrize("num_grains", [2, 3])
def test_whatever_is_allowed_ends_with_a_whole_image(num_grains):
    sequence = GrainSequence((8, 4), num_grains)
    generator = torch.Generator().manual_seed(0)
    positions = torch.zeros(40, 0, dtype=torch.int64)
    for _ in range(sequence.length):
        allowed = sequence.allowed(sequence.progress(positions))[:, -1].float()
        positions = torch.cat([positions, torch.multinomial(allowed, 1, generator=generator)], dim=1)
    assert (sequence.progress(positions).grain[:, -1] == num_grains).all()
    assert sequence.decode(positions, torch.zeros_like(positions)).min() == 0


@torch.no_grad()
def test_positions_that_follow_cost_nothing():
    """Of two grains the finer positions follow: with everything fine or everything coarse only the first ones are unsure."""
    model, objective = make("dq", random=False)
    losses = objective(model, random_ids("dq"), {"label": LABELS}, LAYOUT, Rng.at(0, 0, 4))
    # All fine: the first end out of four regions and the end. All coarse: 5, 4, 3, 2 choices and a forced end.
    assert float(losses["position"][1] * 16) == pytest.approx(math.log(5), abs=1e-5)
    coarse = float(losses["position"][0] * 4)
    assert coarse == pytest.approx(math.log(5) + math.log(4) + math.log(3) + math.log(2), abs=1e-5)


def test_part_of_an_image_cannot_be_given():
    model, objective = make("dq")
    predict = objective.predictor(model, {"label": LABELS}, LAYOUT)
    start = empty(predict, 4)
    start[0, 0, 0, 0] = 1
    with pytest.raises(UsageError, match="cannot go on from given ids"):
        Autoregressive()(predict, start, Rng.at(0, 0, 4))
