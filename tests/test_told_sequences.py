"""Generators in sequence that are told neighbours or a text."""

from typing import Any

import pytest
import torch
from torch import Tensor

from genkit.errors import UsageError
from genkit.guidance import Guidance, guide
from genkit.nn.text import bytes_of
from genkit.objectives.dropping import drop
from genkit.objectives.next_token import NextToken
from genkit.rng import Rng
from genkit.samplers.autoregressive import Autoregressive
from genkit.samplers.beam import Beam
from genkit.samplers.jacobi import Jacobi
from tests.sequences import LAYOUT, empty, make, random_ids


def conditioned(name: str) -> tuple[Any, dict[str, Tensor]]:
    options = {"context_dim": 5} if name == "context" else {"text_length": 12}
    model, _ = make("gpt", **options)
    given = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(4))
    texts = ["a sneaker", "a bag", "schön", "a coat that is far too long"]
    return model, {name: given if name == "context" else bytes_of(texts, 12)}


@torch.no_grad()
@pytest.mark.parametrize("name", ["context", "text"])
def test_the_context_matters_and_zeros_are_none(name):
    model, cond = conditioned(name)
    layout, objective = LAYOUT, NextToken()
    ids = random_ids("gpt").flatten(1)[:, :5]
    with_it, without = (objective.predictor(model, c, layout)(ids) for c in (cond, {}))
    assert (with_it - without).abs().amax((1, 2)).min() > 1e-3
    nothing = objective.predictor(model, {name: cond[name] * 0}, layout)(ids)
    torch.testing.assert_close(nothing, without, atol=1e-5, rtol=1e-5)
    guided = guide(objective, model, cond, layout, Guidance(3.0))(ids)
    torch.testing.assert_close(guided, torch.lerp(without, with_it, 3.0), atol=1e-4, rtol=1e-5)
    dropped = drop(cond, 1.0, Rng.at(0, 0, 4))
    assert (dropped[name] == 0).all()


@torch.no_grad()
@pytest.mark.parametrize("name", ["context", "text"])
def test_samples_with_a_context_are_the_same_by_every_way(name):
    model, cond = conditioned(name)
    predict = guide(NextToken(), model, cond, LAYOUT, Guidance(2.0))
    start = empty(predict, 4)
    expected = Autoregressive(cache=False)(predict, start, Rng.at(0, 0, 4))
    assert torch.equal(Autoregressive()(predict, start, Rng.at(0, 0, 4)), expected)
    assert torch.equal(Jacobi()(predict, start, Rng.at(0, 0, 4)), expected)
    assert Beam(num_beams=2)(predict, start, Rng.at(0, 0, 4)).min() >= 0


@torch.no_grad()
def test_the_order_of_neighbours_does_not_matter_and_their_number_may_change():
    model, cond = conditioned("context")
    ids = random_ids("gpt").flatten(1)[:, :5]
    a, b = (model.next_logits(ids, {"context": c}, LAYOUT) for c in (cond["context"], cond["context"].flip(1)))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert model.next_logits(ids, {"context": cond["context"][:, :1]}, LAYOUT).isfinite().all()
    with pytest.raises(UsageError, match=r"expected \[B, k, 5\] as in training"):
        model.next_logits(ids, {"context": torch.zeros(4, 3, 6)}, LAYOUT)


def test_the_text_encoder_learns_with_the_generator():
    model, cond = conditioned("text")
    loss = NextToken(cond_drop=0.0)(model.train(), random_ids("gpt"), cond, LAYOUT, Rng.at(0, 0, 4))["nll"].mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.told.parameters())
