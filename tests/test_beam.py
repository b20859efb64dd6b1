"""Beams and parallel decoding."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from genkit.errors import UsageError
from genkit.guidance import Guidance, guide
from genkit.nn.layout import dense_layout
from genkit.rng import Rng
from genkit.samplers.autoregressive import Autoregressive
from genkit.samplers.beam import Beam
from genkit.samplers.jacobi import Jacobi
from tests.sequences import LABELS, LAYOUT, S, empty, make


@torch.no_grad()
def all_sequences(predict: Any, length: int) -> tuple[Tensor, Tensor]:
    """Every sequence of a row of ids and its log-likelihood [B, S^length]."""
    every = torch.tensor(list(itertools.product(range(predict.codebook_size), repeat=length)))
    many, B = predict.repeated(len(every)), 2
    total = torch.zeros(B * len(every))
    for step in range(length):
        log_p = many(every[:, :step].repeat(B, 1))[:, 0].log_softmax(-1)
        total += log_p.gather(1, every[:, step].repeat(B).unsqueeze(1))[:, 0]
    return every, total.view(B, -1)


def searched(guidance: float = 1.0) -> Any:
    model, objective = make("gpt", random=True)
    row = dense_layout((1, 3))
    return guide(objective, model, {"label": LABELS[:2]}, row, Guidance(guidance))


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_beam_as_wide_as_all_sequences_finds_them_in_order(guidance):
    predict = searched(guidance)
    every, likelihood = all_sequences(predict, 3)
    found, values = Beam(num_beams=S**3).search(predict, torch.full((2, 3), -1))
    best = likelihood.sort(dim=1, descending=True)
    torch.testing.assert_close(values, best.values, atol=1e-4, rtol=1e-5)
    assert torch.equal(found[:, :20], every[best.indices[:, :20]])


@torch.no_grad()
def test_groups_without_penalty_are_all_the_plain_beam_and_the_first_always_is():
    predict, given = searched(), torch.full((2, 3), -1)
    plain, _ = Beam(num_beams=2).search(predict, given)
    same, _ = Beam(num_beams=6, num_groups=3, diversity=0.0).search(predict, given)
    for g in range(3):
        assert torch.equal(same[:, 2 * g : 2 * g + 2], plain)
    diverse, values = Beam(num_beams=6, num_groups=3, diversity=1.0).search(predict, given)
    assert torch.equal(diverse[:, :2], plain)
    assert not torch.equal(diverse[:, 2:4], plain)
    every, likelihood = all_sequences(predict, 3)
    index = (diverse * torch.tensor([S**2, S, 1])).sum(-1)
    torch.testing.assert_close(values, likelihood.gather(1, index), atol=1e-4, rtol=1e-5)  # penalties do not count
    assert torch.equal(every[index], diverse)


@torch.no_grad()
def test_strong_diversity_keeps_groups_of_one_apart_at_every_step():
    found, _ = Beam(num_beams=8, num_groups=8, diversity=1e6).search(searched(), torch.full((2, 3), -1))
    for sample in found:
        assert all(len(set(sample[:, step].tolist())) == 8 for step in range(3))


@torch.no_grad()
def test_beams_keep_given_ids_and_one_beam_is_greedy():
    predict = searched()
    start = torch.full((2, 1, 1, 3), -1)
    start[:, 0, 0, 1] = 5
    assert (Beam(num_beams=3)(predict, start, Rng.at(0, 0, 2))[:, 0, 0, 1] == 5).all()
    start[:] = -1
    greedy = Autoregressive(temperature=0.0)(predict, start, Rng.at(0, 0, 2))
    assert torch.equal(Beam(num_beams=1)(predict, start, Rng.at(0, 0, 2)), greedy)
    picked = Beam(num_beams=3, pick="any")(predict, start, Rng.at(0, 0, 2))
    assert torch.equal(picked[1:], Beam(num_beams=3, pick="any")(predict, start, Rng.at(0, 0, 2))[1:])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dq", "rq"])
def test_beams_follow_other_sequences(kind):
    model, objective = make(kind)
    predict = objective.predictor(model, {"label": LABELS[:2]}, LAYOUT)
    given = torch.full((2, len(predict.counts)), -1)
    _, low = Beam(num_beams=1).search(predict, given)
    many, high = Beam(num_beams=4).search(predict, given)
    assert (high.amax(1) >= low[:, 0] - 1e-4).all()
    assert predict.to_ids(many[:, 0]).min() >= 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 4, "num_groups": 3}, "sampler.num_groups=3 must divide"),
        ({"diversity": -1.0}, "sampler.diversity"),
        ({"temperature": 0.0}, "sampler.temperature"),
    ],
)
def test_beam_refuses_wrong_options(options, message):
    with pytest.raises(UsageError, match=message):
        Beam(**options)


def test_beams_and_guesses_refuse_scales():
    model, objective = make("var")
    predict = objective.predictor(model, {"label": LABELS}, LAYOUT)
    for sampler in (Beam(), Jacobi()):
        with pytest.raises(UsageError, match="this generator"):
            sampler(predict, empty(predict, 4), Rng.at(0, 0, 4))


@torch.no_grad()
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 3, "temperature": 0.5}])
@pytest.mark.parametrize("window", [1, 5, 40])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_parallel_decoding_gives_the_ids_of_drawing_one_by_one(options, window, guidance):
    model, objective = make("gpt")
    predict = guide(objective, model, {"label": LABELS}, LAYOUT, Guidance(guidance, "cosine"))
    start = empty(predict, 4)
    start[:, 0, 0, :2], start[:, 0, 2, 1] = 4, 6
    parallel = Jacobi(window=window, **options)
    expected = Autoregressive(**options)(predict, start, Rng.at(0, 0, 4))
    assert torch.equal(parallel(predict, start, Rng.at(0, 0, 4)), expected)
    assert parallel.calls <= 14
    if window == 1:
        assert parallel.calls == 14


@torch.no_grad()
def test_parallel_decoding_needs_fewer_calls_where_guesses_hold():
    model, objective = make("gpt", random=False)
    torch.nn.init.normal_(model.head.weight)
    torch.nn.init.zeros_(model.embed.table.weight)  # what comes does not depend on what came
    predict = objective.predictor(model, {"label": LABELS}, LAYOUT)
    parallel = Jacobi(window=8, temperature=0.0)
    parallel(predict, empty(predict, 4), Rng.at(0, 0, 4))
    assert parallel.calls < 8


def test_parallel_decoding_refuses_mixers_that_cannot_take_back():
    model, objective = make("gpt", mixer={"type": "gla", "num_heads": 2})
    predict = objective.predictor(model, {"label": LABELS}, LAYOUT)
    with torch.no_grad(), pytest.raises(UsageError, match="only attention can"):
        Jacobi()(predict, empty(predict, 4), Rng.at(0, 0, 4))


@pytest.mark.parametrize("strength", [1.0, 2.0])
def test_parallel_decoding_refuses_generators_that_draw_in_turn_guided_or_not(strength: float) -> None:
    model, objective = make("dq")
    predict: Any = guide(objective, model, {"label": LABELS}, LAYOUT, Guidance(strength))
    with torch.no_grad(), pytest.raises(UsageError, match="sampled by autoregressive"):
        Jacobi()(predict, empty(predict, 4), Rng.at(0, 0, 4))
