"""Classifier-free guidance."""

import types

import pytest
import torch
from torch import Tensor

from genkit.guidance import Guidance, guide
from genkit.interfaces import Layout
from genkit.nn.layout import dense_layout

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
