"""Texts that stand in front of the ids: padding, guidance, generation, and a recipe from training to sampling."""

import pytest
import torch
from torch import Tensor

from genkit.backbones.gpt import GPT
from genkit.errors import UsageError
from genkit.guidance import _and_null
from genkit.kernels.decode_block.op import _decode_block
from genkit.nn.layout import dense_layout
from genkit.objectives.dropping import drop
from genkit.objectives.next_token import NextToken
from genkit.rng import Rng
from genkit.samplers.autoregressive import Autoregressive
from genkit.samplers.beam import Beam, reorder

GRID, LENGTH = (3, 4), 6
LAYOUT = dense_layout(GRID)


def network(**options) -> GPT:
    torch.manual_seed(0)
    given = {"context_dim": 10, "context": "concat", "context_length": LENGTH, "multiple_of": 8, "dim": 32, "depth": 2}
    model = GPT(codebook_size=20, num_levels=1, num_classes=0, grid=GRID, **given | options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def said(*lengths: int) -> Tensor:
    """States [B, LENGTH, 10] of texts, 0 behind the end."""
    states = torch.randn(len(lengths), LENGTH, 10, generator=torch.Generator().manual_seed(1))
    return states * (torch.arange(LENGTH) < torch.tensor(lengths)[:, None]).unsqueeze(-1)


def ids(batch: int) -> Tensor:
    return Rng.at(0, 0, batch).integers(20, 12)


@torch.no_grad()
def test_padding_and_other_samples_change_nothing():
    model, context, given = network(), said(6, 2, 4), ids(3)
    out = model.next_logits(given, {"context": context}, LAYOUT, last=13)
    short = model.next_logits(given[1:2], {"context": context[1:2, :2]}, LAYOUT, last=13)
    torch.testing.assert_close(out[1:2], short, atol=1e-5, rtol=1e-5)
    in_front = torch.cat([context[1:2, 2:], context[1:2, :2]], dim=1)
    moved = model.next_logits(given[1:2], {"context": in_front}, LAYOUT, last=13)
    torch.testing.assert_close(out[1:2], moved, atol=1e-5, rtol=1e-5)
    other = model.next_logits(given, {"context": context.flip(0)}, LAYOUT, last=13)
    assert (other[0] - out[0]).abs().max() > 1e-3


@torch.no_grad()
def test_nothing_said_is_as_long_as_what_it_stands_for():
    model, context, given = network(), said(6, 2), ids(2)
    silent = model.next_logits(given, {}, LAYOUT)
    torch.testing.assert_close(silent, model.next_logits(given, {"context": torch.zeros_like(context)}, LAYOUT))
    cond = {"context": context, "said": (context != 0).any(-1)}
    doubled = model.next_logits(given.repeat(2, 1), _and_null(cond), LAYOUT)
    torch.testing.assert_close(doubled[2], silent[0], atol=1e-5, rtol=1e-5)
    assert (doubled[3] - silent[1]).abs().max() > 1e-3
    dropped = drop(cond, 1.0, Rng.at(0, 0, 2))
    assert not dropped["context"].any()
    assert torch.equal(dropped["said"], cond["said"])


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(6, 6), (6, 1), (3, 0)])
def test_cached_steps_equal_one_pass(lengths, monkeypatch):
    model, given = network(), ids(2)
    predict = NextToken().predictor(model, {"context": said(*lengths)}, LAYOUT)
    expected = torch.cat([predict(given[:, :n]) for n in range(12)], dim=1)
    for path in ("cpu", "reference") if _decode_block.table().get("cpu") == "ready" else ("reference",):
        monkeypatch.setenv("GENKIT_KERNEL", f"decode_block={path}")
        cache: dict = {}
        found = torch.cat([predict(given[:, :n], cache) for n in range(12)], dim=1)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert bool(cache.get("quick")) == (path == "cpu")


@torch.no_grad()
def test_padding_goes_along_where_samples_change_places():
    model, given, cache = network(), ids(2), {}
    context, rows = said(6, 2), torch.tensor([1, 0])
    predict = NextToken().predictor(model, {"context": context}, LAYOUT)
    for n in range(6):
        predict(given[:, :n], cache)
    reorder(cache, rows, 2)
    swapped = NextToken().predictor(model, {"context": context[rows]}, LAYOUT)
    for n in (6, 7):
        torch.testing.assert_close(predict(given[rows, :n], cache), swapped(given[rows, :n]), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_beams_of_texts_of_different_lengths_go_their_own_ways():
    model, start = network(), torch.full((2, 1, *GRID), -1)

    def likeliest(context: Tensor) -> Tensor:
        predict = NextToken().predictor(model, {"context": context}, LAYOUT)
        return Beam(num_beams=3)(predict, start[: len(context)], Rng.at(0, 0, len(context)))

    context = said(6, 2)
    assert torch.equal(likeliest(context)[1:], likeliest(context[1:]))
    predict = NextToken().predictor(model, {"context": context}, LAYOUT)
    assert torch.equal(
        Autoregressive(temperature=0)(predict, start, Rng.at(0, 0, 2))[:1],
        Autoregressive(temperature=0)(
            predict.__class__(model, {"context": context[:1]}, LAYOUT), start[:1], Rng.at(0, 0, 1)
        ),
    )


def test_a_text_is_learned():
    """Which of two texts stands in front decides every id."""
    torch.manual_seed(0)
    model = network().train()
    context = said(3, 5)
    target = torch.stack([torch.full((1, *GRID), 4), torch.full((1, *GRID), 11)])
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    objective = NextToken(cond_drop=0.1)
    for step in range(60):
        cond = {"context": context, "said": (context != 0).any(-1)}
        loss = objective(model, target, cond, LAYOUT, Rng.at(step, 0, 2))["nll"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        first = model.eval().next_logits(torch.zeros(2, 0, dtype=torch.int64), {"context": context}, LAYOUT)
    assert first.argmax(-1).flatten().tolist() == [4, 11]
    assert "front.nothing" in model.state_dict()
    assert "front.nothing" not in dict(model.named_parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context_length": None}, "needs backbone.context_length"),
        ({"context_dim": None}, "needs vectors"),
        ({"context_dim": None, "text_length": 8}, "letters are attended to"),
        ({"context": "cross"}, "is of backbone.context=concat alone"),
    ],
)
def test_options_that_do_not_go_together_are_named(options, message):
    with pytest.raises(UsageError, match=message):
        network(**options)


@pytest.mark.parametrize("shape", [(2, 7, 10), (2, 6, 9)])
def test_a_context_that_does_not_fit_is_refused(shape):
    with pytest.raises(UsageError, match=r"expected \[B, k, 10\].* k at most 6"):
        network().next_logits(ids(2), {"context": torch.ones(shape)}, LAYOUT)
