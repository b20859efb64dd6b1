"""Ids in raster order: mixers, positions, given ids, memory of the cache."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from genkit.errors import UsageError
from genkit.interfaces import Layout
from genkit.mixers.attention import KeysValues
from genkit.rng import Rng
from genkit.samplers.autoregressive import Autoregressive
from genkit.samplers.beam import Beam
from genkit.samplers.jacobi import Jacobi
from tests.sequences import ATTENTION, GRID, LABELS, LAYOUT, S, empty, make, random_ids


@torch.no_grad()
@pytest.mark.parametrize("mixer", [None, {"type": "gla", "num_heads": 2}, {"type": "mamba", "state_size": 4}])
def test_an_id_does_not_change_what_comes_before_it(mixer):
    model, _ = make("gpt", **({} if mixer is None else {"mixer": mixer}))
    ids = random_ids("gpt")
    changed = ids.clone()
    changed.view(4, -1)[:, 7] = (changed.view(4, -1)[:, 7] + 1) % S
    a, b = (model(x, None, {"label": LABELS}, LAYOUT).view(4, 16, S) for x in (ids, changed))
    torch.testing.assert_close(a[:, :8], b[:, :8], atol=1e-5, rtol=1e-5)
    assert (a[:, 8:] - b[:, 8:]).abs().amax(-1).min() > 1e-5


@torch.no_grad()
@pytest.mark.parametrize("mixer", [{"type": "gla", "num_heads": 2}, {"type": "mamba", "state_size": 4}])
def test_other_causal_mixers_generate_with_a_cache(mixer):
    model, objective = make("gpt", mixer=mixer)
    predict = objective.predictor(model, {"label": LABELS}, LAYOUT)
    samples = [Autoregressive(cache=c)(predict, empty(predict, 4), Rng.at(0, 0, 4)) for c in (True, False)]
    assert torch.equal(*samples)


def test_a_mixer_that_sees_ahead_is_refused():
    with pytest.raises(UsageError, match=r"layer 0: attention sees tokens .* is_causal: true"):
        make("gpt", mixer={"type": "attention"})


@torch.no_grad()
@pytest.mark.parametrize("num_kv_heads", [None, 1])
def test_keys_and_values_take_the_memory_of_the_formula(num_kv_heads):
    """2 depth B heads N width of 4 bytes, no more: the last id is never read."""
    model, objective = make("gpt", mixer={**ATTENTION, "num_heads": 4, "num_kv_heads": num_kv_heads})
    predict, cache = objective.predictor(model, {"label": LABELS}, LAYOUT), {}
    sequence = predict.to_sequence(random_ids("gpt"))
    for done in range(16):
        predict(sequence[:, :done], cache)
        held = [value for value in cache.values() if isinstance(value, KeysValues)]
        assert sum(value.num_bytes for value in held) == 2 * 2 * 4 * (num_kv_heads or 4) * 16 * 4 * 4
    assert {value.length for value in held} == {16}


@torch.no_grad()
def test_the_token_of_the_class_has_no_place():
    """Its keys and queries are 0: every later token sees it with logit 0."""
    model, _ = make("gpt")
    other, _ = make("gpt", class_rope="identity")
    other.load_state_dict(model.state_dict())
    ids = random_ids("gpt")
    a, b = (m.next_logits(ids.flatten(1)[:, :5], {"label": LABELS}, LAYOUT, last=6) for m in (model, other))
    assert (a[:, 1:] - b[:, 1:]).abs().max() > 1e-3
    torch.testing.assert_close(a[:, 0], b[:, 0])  # alone, it sees itself whatever the logit


@torch.no_grad()
def test_positions_matter_along_both_axes():
    model, _ = make("gpt")
    ids = torch.zeros(1, 14, dtype=torch.int64)
    swapped = Layout(coords=LAYOUT.coords.flip(-1), grid=GRID)
    a, b = (model.next_logits(ids, {}, layout) for layout in (LAYOUT, swapped))
    assert (a - b).abs().max() > 1e-4


@torch.no_grad()
def test_given_ids_are_kept_and_read_at_once():
    model, objective = make("gpt")
    predict = objective.predictor(model, {"label": LABELS}, LAYOUT)
    start, ids = empty(predict, 4), random_ids("gpt")
    start[:, :, :2], start[:, :, 3, 3] = ids[:, :, :2], ids[:, :, 3, 3]
    calls = []

    def counting(ids: Tensor, cache: Any) -> Tensor:
        calls.append(ids.shape[1])
        return predict(ids, cache)

    wrapped = SimpleNamespace(**{name: getattr(predict, name) for name in ("counts", "shape", "codebook_size")})
    wrapped.to_sequence, wrapped.to_ids, wrapped.is_over = predict.to_sequence, predict.to_ids, predict.is_over
    sampler = Autoregressive()
    out = sampler(_Calls(wrapped, counting), start, Rng.at(0, 0, 4))  # type: ignore[arg-type]
    assert torch.equal(out[start >= 0], start[start >= 0])
    assert calls[0] == 8
    assert out.min() >= 0


class _Calls:
    def __init__(self, like: Any, call: Any):
        self.__dict__.update(vars(like))
        self.call = call

    def __call__(self, ids: Tensor, cache: Any = None) -> Tensor:
        return self.call(ids, cache)


@pytest.mark.parametrize("sampler", [Autoregressive(), Beam(num_beams=2), Jacobi()])
def test_given_ids_outside_the_codebook_are_refused(sampler):
    model, objective = make("gpt")
    predict = objective.predictor(model, {"label": LABELS}, LAYOUT)
    start = empty(predict, 4)
    start[0, 0, 0, 0] = S
    with pytest.raises(UsageError, match="id 11 of a codebook of 11"):
        sampler(predict, start, Rng.at(0, 0, 4))


def test_on_step_sees_the_holes():
    model, objective = make("gpt")
    predict = objective.predictor(model, {"label": LABELS}, LAYOUT)
    shown: list[tuple[int, int, int]] = []
    with torch.no_grad():
        Autoregressive()(
            predict, empty(predict, 4), Rng.at(0, 0, 4), lambda i, n, ids: shown.append((i, n, int((ids[0] < 0).sum())))
        )
    assert shown == [(i, 16, 15 - i) for i in range(16)]
