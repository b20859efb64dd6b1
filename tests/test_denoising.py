"""Objectives of noisy latents: what they ask of a network, what they make of its output, and diffusers' schedulers over them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from genkit.errors import UsageError
from genkit.nn.layout import dense_layout
from genkit.nn.paths import along
from genkit.objectives.diffusion import Diffusion, interpolated, posterior
from genkit.objectives.edm import Edm
from genkit.objectives.flow import Flow
from genkit.rng import Rng
from genkit.samplers.ancestral import Ancestral
from genkit.samplers.euler import Euler
from genkit.samplers.scheduler import Scheduler
from genkit.samplers.steps import interval

LAYOUT = dense_layout((4, 4))
OBJECTIVES = {
    "noise": Diffusion(),
    "v": Diffusion(prediction="v", schedule="cosine"),
    "x0": Diffusion(prediction="x0", schedule="scaled_linear"),
    "flow": Flow(),
    "data flow": Flow(towards="data"),
    "trigonometric": Flow(path="trigonometric", time="logit_normal"),
    "flow of x0": Flow(predicts="x0", time="logit_normal", time_mean=1.4),
    "data flow of x0": Flow(predicts="x0", towards="data"),
    "edm": Edm(),
}


def data(count: int = 8) -> Tensor:
    return 0.5 * torch.randn(count, 2, 4, 4, generator=torch.Generator().manual_seed(0))


class Knowing:
    """A network that knows x0: it gives exactly what its objective asks for."""

    def __init__(self, objective, x0: Tensor, channels: int = 1):
        self.objective, self.x0, self.channels, self.heard = objective, x0, channels, []

    def __call__(self, x: Tensor, t: Tensor, cond, layout) -> Tensor:
        self.heard.append((x, t, cond))
        o = self.objective
        if isinstance(o, Edm):
            sigma = (4 * t.double()).exp()
            total = torch.sqrt(sigma**2 + o.sigma_data**2)
            x_t = x * along(total, x)
            return (self.x0 - along(o.sigma_data**2 / total**2, x) * x_t) / along(sigma * o.sigma_data / total, x)
        if isinstance(o, Flow):
            at = (t if o.towards == "noise" else 1 - t).double()
            if o.predicts == "x0":
                return self.x0
            a, s = along(o.path.alpha(at), x), along(o.path.sigma(at), x)
            d_a, d_s = (along(slope, x) for slope in o.path.slopes(at))
            v = d_a * self.x0 + d_s * (x - a * self.x0) / s
            return v if o.towards == "noise" else -v
        at = (t.double() + 1) / o.path.num_times
        a, s = along(o.path.alpha(at), x), along(o.path.sigma(at), x)
        noise = (x - a * self.x0) / s
        found = {"noise": noise, "v": a * noise - s * self.x0, "x0": self.x0}[o.prediction]
        return torch.cat([found] * self.channels, 1)


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_a_network_that_knows_has_no_loss(name):
    objective, x0 = OBJECTIVES[name], data()
    losses = objective(Knowing(objective, x0), x0, {"label": torch.arange(8)}, LAYOUT, Rng.at(0, 0, 8))
    for value in losses.values():
        assert value.shape == (8,)
        assert float(value.max()) < 1e-4


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_predictors_give_x0_and_the_noise_that_is_in_x_t(name):
    objective, x0 = OBJECTIVES[name], data()
    predict = objective.predictor(Knowing(objective, x0), {}, LAYOUT)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    for t in (torch.tensor(0.3, dtype=torch.float64), torch.linspace(0.2, 0.9, 8, dtype=torch.float64)):
        x_t = along(predict.path.alpha(t), x0) * x0 + along(predict.path.sigma(t), x0) * noise
        found_x0, found_noise = predict(x_t, t)[:2]
        torch.testing.assert_close(found_x0, x0, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found_noise, noise, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_a_loss_does_not_depend_on_the_batch(name):
    objective, x0 = OBJECTIVES[name], data()

    def network(x: Tensor, t: Tensor, cond, layout) -> Tensor:
        return x * along(t.double().sigmoid(), x) + cond["label"].view(-1, 1, 1, 1)

    label = torch.arange(8)
    whole = objective(network, x0, {"label": label}, LAYOUT, Rng.at(3, 0, 8))
    alone = objective(network, x0[5:6], {"label": label[5:6]}, LAYOUT, Rng.at(3, 5, 1))
    for key, value in whole.items():
        torch.testing.assert_close(value[5:6], alone[key])


def test_labels_are_dropped_as_often_as_asked():
    objective = Flow(cond_drop=0.25)
    network = Knowing(objective, data(1))
    for first in range(0, 4000, 1000):
        x0 = data(1).expand(1000, -1, -1, -1)
        objective(network, x0, {"label": torch.ones(1000, dtype=torch.int64)}, LAYOUT, Rng.at(0, first, 1000))
    dropped = torch.cat([cond["label"] == -1 for _, _, cond in network.heard]).float().mean()
    assert abs(float(dropped) - 0.25) < 0.03


def test_variances_alone_feel_the_bound():
    # The published values of a network that gives zeros, on standard normal data (per step k of the chain).
    objective, x0 = Diffusion(), torch.randn(512, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    variance = torch.zeros_like(x0, requires_grad=True)
    for k, expected in ((0, 1.99), (1, 0.63), (10, 0.108), (100, 0.0145), (500, 0.0080)):
        t = torch.full((512,), (k + 1) / 1000, dtype=torch.float64)
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(k + 1))
        x_t = along(objective.path.alpha(t), x0) * x0 + along(objective.path.sigma(t), x0) * noise
        found, _ = objective.split(torch.zeros_like(x0), x_t, t)
        bits = objective.bound(found, x0, x_t, variance, torch.full((512,), k), LAYOUT).mean().detach()
        assert math.isclose(float(bits), expected, rel_tol=0.06), f"k={k}: {float(bits)}"

    weight = torch.ones((), requires_grad=True)
    other = torch.ones((), requires_grad=True)

    def network(x: Tensor, t: Tensor, cond, layout) -> Tensor:
        return torch.cat([weight * x, other * 0.1 * torch.ones_like(x)], 1)

    losses = objective(network, data(), {}, LAYOUT, Rng.at(0, 0, 8))
    assert float(torch.autograd.grad(losses["vb"].sum(), weight, retain_graph=True)[0]) == 0
    assert float(torch.autograd.grad(losses["mse"].sum(), other, retain_graph=True)[0]) == 0
    assert float(torch.autograd.grad(losses["vb"].sum(), other)[0].abs()) > 0


def test_min_snr_bounds_the_weight_of_easy_steps():
    t = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
    plain, bounded = Diffusion(prediction="x0"), Diffusion(prediction="x0", min_snr=5.0)
    snr = plain.path.alpha(t).square() / plain.path.sigma(t).square()
    torch.testing.assert_close(bounded.weight(t), snr.clamp_max(5.0))
    torch.testing.assert_close(Diffusion(min_snr=5.0).weight(t), (5 / snr).clamp_max(1.0))
    assert bool((plain.weight(t) == 1).all())


def test_an_error_of_x0_counts_as_the_velocity_it_makes_and_not_without_bound():
    for t, weight in ((0.5, 2.0), (0.1, 10.0), (0.01, 1 + 0.99 / 0.05)):  # 1 / t down to t = 0.05
        objective, at = Flow(predicts="x0"), torch.full((8,), t, dtype=torch.float64)
        right, wrong = (
            objective.velocity(lambda *_, error=error: data() + error, data().flip(0), at, {}, LAYOUT)
            for error in (0, 0.3)
        )
        torch.testing.assert_close(right - wrong, torch.full_like(right, 0.3 * weight), rtol=1e-4, atol=1e-4)


def test_ancestral_steps_are_the_chains_posterior():
    objective, x0 = Diffusion(), data()
    x_t = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    times = objective.path.times(250)
    for step in (0, 100, 200):
        t, s = times[step], times[step + 1]
        mean, log_variance = posterior(objective.path, x0, x_t, t, s)
        at = interval(objective.path, times, step)
        a = at.alpha_t / at.alpha_s
        more = at.sigma_t**2 - (a * at.sigma_s) ** 2
        torch.testing.assert_close((a * at.sigma_s**2 * x_t + at.alpha_s * more * x0) / at.sigma_t**2, mean)
        sampler = Ancestral(variance="learned")
        for f in (0.0, 0.3, 1.0):
            fraction = torch.full_like(x0, f)
            strength = sampler.strength(at, more, [fraction])
            torch.testing.assert_close(2 * torch.log(strength), interpolated(objective.path, 2 * fraction - 1, t, s))
        assert math.isclose(2 * math.log(Ancestral().strength(at, more, [])), float(log_variance), rel_tol=1e-6)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DDIMScheduler", {"timestep_spacing": "linspace"}),
        ("DPMSolverMultistepScheduler", {}),
        ("EulerDiscreteScheduler", {}),
        ("UniPCMultistepScheduler", {}),
        ("HeunDiscreteScheduler", {}),
        ("DDPMScheduler", {"timestep_spacing": "linspace"}),
        ("FlowMatchEulerDiscreteScheduler", {}),
    ],
)
def test_schedulers_of_diffusers_end_at_the_data(name, options):
    objective = Flow() if name.startswith("Flow") else Diffusion()
    x0 = data()
    predict = objective.predictor(Knowing(objective, x0), {}, LAYOUT)
    sampler = Scheduler(name=name, num_steps=25, options=options)
    noise = Rng.at(0, 0, 8).normal(2, 4, 4)
    found = sampler(predict, noise, Rng.at(1, 0, 8))
    assert float((found - x0).abs().mean()) < 0.05
    alone_predict = objective.predictor(Knowing(objective, x0[2:3]), {}, LAYOUT)
    torch.testing.assert_close(found[2:3], sampler(alone_predict, noise[2:3], Rng.at(1, 2, 1)), rtol=1e-4, atol=1e-4)


def test_flow_match_is_our_euler():
    objective, x0 = Flow(), data()

    def network(x: Tensor, t: Tensor, cond, layout) -> Tensor:
        return torch.tanh(x + along(t.double(), x))

    predict = objective.predictor(network, {}, LAYOUT)
    noise = Rng.at(0, 0, 8).normal(2, 4, 4)
    ours = Euler(num_steps=10)(predict, noise, Rng.at(1, 0, 8))
    theirs = Scheduler(name="FlowMatchEulerDiscreteScheduler", num_steps=10)(predict, noise, Rng.at(1, 0, 8))
    # Its times end at 1 / 1000 before the last step, ours step evenly.
    assert float((ours - theirs).abs().mean()) < 0.02 * float(ours.abs().mean() + x0.std())


def test_paths_and_schedulers_that_do_not_fit_say_so():
    objective = Flow()
    predict = objective.predictor(Knowing(objective, data()), {}, LAYOUT)
    with pytest.raises(UsageError, match="DDIMScheduler needs the discrete chain"):
        Scheduler()(predict, data(), Rng.at(0, 0, 8))
    with pytest.raises(UsageError, match="is no scheduler of the installed diffusers"):
        Scheduler(name="NoScheduler")
