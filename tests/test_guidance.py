"""Classifier-free guidance."""

import types

import pytest
import torch
from torch import Tensor

from genkit.guidance import Guidance, guide
from genkit.interfaces import Layout
from genkit.nn.layout import dense_layout
from genkit.nn.paths import Predictor, Straight

LABELS = torch.tensor([3, 1, 2])
IDS = torch.zeros(3, 1, 2, 2, dtype=torch.int64)
LAYOUT = dense_layout((2, 2))


class Spy:
    """An objective whose prediction is the label (the null class: -1) plus what it was given; it records its calls."""

    def __init__(self, target: str):
        self.target = target
        self.batch_sizes: list[int] = []
        self.layouts: list[Layout] = []

    def predictor(self, model, cond, layout):
        self.layouts.append(layout)

        def ids(ids: Tensor, known: Tensor, cache=None) -> Tensor:
            self.batch_sizes.append(len(ids))
            base = (ids + known).unsqueeze(-1) * torch.tensor([1.0, 2.0])
            return base + cond["label"].float().view(-1, 1, 1, 1, 1)

        def latents(x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            self.batch_sizes.append(len(x_t))
            shift = cond["label"].float().view(-1, 1, 1, 1)
            return x_t + shift, x_t - shift

        latents.path = types.SimpleNamespace(name="straight")
        return ids if self.target == "ids" else latents


@pytest.mark.parametrize("strength", [0.0, 0.5, 2.0, 4.5])
def test_logits_are_extrapolated_from_null_to_label(strength):
    spy = Spy("ids")
    logits = guide(spy, None, {"label": LABELS}, LAYOUT, Guidance(strength))(IDS, IDS > 0, None)
    expected = -1 + strength * (LABELS + 1.0)
    torch.testing.assert_close(logits, expected.view(3, 1, 1, 1, 1).expand(3, 1, 2, 2, 2))
    assert spy.batch_sizes == [6]


@pytest.mark.parametrize("target", ["ids", "z"])
def test_strength_one_is_one_plain_pass(target):
    spy = Spy(target)
    predict = guide(spy, None, {"label": LABELS}, LAYOUT, Guidance(1.0))
    predict(*((IDS, IDS > 0, None) if target == "ids" else (torch.zeros(3, 1, 2, 2), torch.tensor(0.5))))
    assert spy.batch_sizes == [3]


def test_linear_schedule_grows_with_each_samples_known_fraction():
    known = torch.zeros(3, 1, 2, 2, dtype=torch.bool)
    known[1, 0, 0] = True  # half
    known[2] = True
    predict = guide(Spy("ids"), None, {"label": LABELS}, LAYOUT, Guidance(5.0, "linear"))
    found = predict(IDS, known, None) - Spy("ids").predictor(None, {"label": LABELS * 0}, LAYOUT)(IDS, known)
    weight = torch.tensor([1.0, 3.0, 5.0])
    torch.testing.assert_close(found[:, 0, 0, 0, 0], -1 + weight * (LABELS + 1.0))


def test_both_estimates_of_a_latent_are_guided_and_the_path_is_kept():
    x_t = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    predict = guide(Spy("z"), None, {"label": LABELS}, LAYOUT, Guidance(3.0))
    x0, noise = predict(x_t, torch.tensor(0.5))
    shift = (-1 + 3 * (LABELS + 1.0)).view(3, 1, 1, 1)
    torch.testing.assert_close(x0, x_t + shift)
    torch.testing.assert_close(noise, x_t - shift)
    assert predict.path.name == "straight"


def test_layout_of_single_samples_is_doubled_and_shared_coordinates_are_not():
    own = Layout(coords=torch.rand(3, 4, 2), grid=None, valid=torch.ones(3, 4, dtype=torch.bool))
    spy = Spy("ids")
    guide(spy, None, {"label": LABELS}, own, Guidance(2.0))
    guide(spy, None, {"label": LABELS}, LAYOUT, Guidance(2.0))
    assert spy.layouts[0].coords.shape == (6, 4, 2)
    assert spy.layouts[0].valid is not None
    assert spy.layouts[0].valid.shape == (6, 4)
    assert spy.layouts[1].coords is LAYOUT.coords


def guided(guidance: Guidance, t: Tensor, weak=None, spy: Spy | None = None) -> Tensor:
    """What is added to x_t = 0 in the first channel of two, labels 3, 1, 2."""
    predict = guide(spy or Spy("z"), None, {"label": LABELS}, LAYOUT, guidance, weak)
    return predict(torch.zeros(3, 2, 2, 2), t)[0][:, :, 0, 0]


def test_outside_its_interval_guidance_costs_nothing():
    spy = Spy("z")
    interval = Guidance(3.0, interval=(0.2, 0.6))
    torch.testing.assert_close(guided(interval, torch.tensor(0.7), spy=spy)[:, 0], LABELS.float())
    assert spy.batch_sizes == [3]
    torch.testing.assert_close(guided(interval, torch.tensor(0.5))[:, 0], -1 + 3 * (LABELS + 1.0))
    mixed = guided(interval, torch.tensor([0.1, 0.5, 0.9]))[:, 0]  # each sample at a time of its own
    torch.testing.assert_close(mixed, torch.tensor([3.0, -1 + 3 * 2.0, 2.0]))


def test_channels_that_are_not_guided_keep_the_condition():
    found = guided(Guidance(3.0, channels=1), torch.tensor(0.5))
    torch.testing.assert_close(found[:, 0], -1 + 3 * (LABELS + 1.0))
    torch.testing.assert_close(found[:, 1], LABELS.float())


@pytest.mark.parametrize(("schedule", "at_quarter"), [("linear", 0.25), ("cosine", (1 - 0.5**0.5) / 2)])
def test_schedules_grow_while_noise_is_removed(schedule, at_quarter):
    for t, fraction in ((1.0, 0.0), (0.75, at_quarter), (0.0, 1.0)):
        weight = 1 + 4 * fraction
        found = guided(Guidance(5.0, schedule), torch.tensor(t))[:, 0]
        torch.testing.assert_close(found, -1 + weight * (LABELS + 1.0))


def test_autoguidance_leads_away_from_a_worse_model():
    class Models(Spy):
        def predictor(self, model, cond, layout):
            def latents(x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
                return x_t + model, x_t - model

            return Predictor(Straight(), latents)

    predict = guide(Models("z"), 5.0, {"label": LABELS}, LAYOUT, Guidance(2.0), weak=1.0)
    x0, noise = predict(torch.zeros(3, 1, 2, 2), torch.tensor(0.5))
    assert float(x0.mean()) == 1 + 2 * (5 - 1)
    assert float(noise.mean()) == -(1 + 2 * (5 - 1))
