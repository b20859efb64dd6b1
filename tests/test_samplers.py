"""Samplers of latents on Gaussian data, where the predictor and the solution are known exactly."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from genkit.errors import GenkitError, UsageError
from genkit.interfaces import Path
from genkit.nn.paths import Discrete, Exploding, Predictor, Straight, Trigonometric, along
from genkit.rng import Rng
from genkit.samplers.ancestral import Ancestral
from genkit.samplers.dopri5 import Dopri5
from genkit.samplers.dpmpp import Dpmpp
from genkit.samplers.euler import Euler
from genkit.samplers.heun import Heun
from genkit.samplers.scheduler import Scheduler
from genkit.samplers.sde import Sde

PATHS: dict[str, Path] = {
    "straight": Straight(),
    "shifted": Straight(3.0),
    "trigonometric": Trigonometric(),
    "discrete": Discrete(),
    "cosine": Discrete("cosine"),
    "exploding": Exploding(sigma_max=20.0),
}
MEAN, STD = 0.7, 0.4


class Exact:
    """(x0, noise) of data N(MEAN, STD^2); counts its calls."""

    def __init__(self, path: Path):
        self.path, self.calls = path, 0

    def __call__(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        a, s = along(self.path.alpha(t), x_t), along(self.path.sigma(t), x_t)
        spread = (x_t - a * MEAN) / (a**2 * STD**2 + s**2)
        return MEAN + a * STD**2 * spread, s * spread


def start(count: int = 64) -> Tensor:
    return Rng.at(0, 0, count).normal(1, 4, 4).double()


def solution(path: Path, noise: Tensor) -> Tensor:
    """Where the exact flow takes the noise."""
    t = torch.ones((), dtype=torch.float64)
    a, s = float(path.alpha(t)), float(path.sigma(t))
    x = noise * max(s, 1.0)
    return MEAN + STD * (x - a * MEAN) / math.sqrt(a**2 * STD**2 + s**2)


def error(sampler, path: Path) -> float:
    found = sampler(Exact(path), start(), Rng.at(1, 0, 64))
    return float((found - solution(path, start())).abs().mean())


@pytest.mark.parametrize("name", list(PATHS))
def test_a_path_goes_from_data_to_noise(name):
    path = PATHS[name]
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    assert path.alpha(t[:1]) == 1
    assert path.sigma(t[:1]) == 0
    ratio = path.sigma(t) / path.alpha(t).clamp_min(1e-9)
    assert (ratio.diff() > 0).all()
    for num_steps in (1, 2, 7, 50):
        times = path.times(num_steps)
        assert (len(times), times[0], times[-1]) == (num_steps + 1, 1, 0)
        assert (times.diff() < 0).all()


def test_spaced_times_of_the_chain_are_those_of_the_released_code():
    path = Discrete()
    steps = path.index(path.times(50)[:-1]).round().long().flip(0).tolist()
    assert steps[:5] == [0, 20, 41, 61, 82]
    assert steps[-1] == 999
    abar = path.alpha(torch.tensor([1, 500, 1000]) / 1000).square()
    torch.testing.assert_close(abar, torch.tensor([0.9999, 0.0785872, 4.03583e-5]).double(), rtol=2e-6, atol=0)


def adapted(name: str, **options: Any) -> Any:
    return partial(Scheduler, name=name, options=options)


# Order of convergence: halving the steps' size divides the error by 2^order. The paths' ends cost some of it, hence the margins.
@pytest.mark.parametrize(
    ("make", "order", "names"),
    [
        (Euler, 1, ["straight", "shifted", "trigonometric", "exploding", "discrete", "cosine"]),
        (Heun, 2, ["straight", "shifted", "trigonometric", "exploding"]),
        (Dpmpp, 2, ["exploding", "discrete", "cosine"]),
        (adapted("DDIMScheduler", timestep_spacing="trailing"), 1, ["discrete"]),
        (adapted("FlowMatchEulerDiscreteScheduler"), 1, ["straight"]),
        (adapted("FlowMatchHeunDiscreteScheduler"), 2, ["straight"]),
    ],
)
def test_order_of_convergence(make, order, names):
    for name in names:
        coarse, fine = (error(make(num_steps=n), PATHS[name]) for n in (40, 80))
        measured = math.log2(coarse / fine)
        assert measured > order - 0.25, f"{make} on {name}: order {measured:.2f}"


@pytest.mark.parametrize("name", ["straight", "trigonometric"])
def test_dopri5_has_at_least_its_order(name):
    """Over five decades of tolerance a method of order p calls the model 10^(5 / p) times as often."""
    path = PATHS[name]
    found = []
    for rtol in (1e-3, 1e-8):
        exact = Exact(path)
        x = Dopri5(rtol=rtol, atol=rtol / 10)(exact, start(), Rng.at(0, 0, 64))
        found.append((exact.calls, float((x - solution(path, start())).abs().mean())))
    (calls, coarse), (more_calls, fine) = found
    assert math.log(coarse / fine) / math.log(more_calls / calls) > 5


class Impulses:
    """A batch for num_steps steps with fresh noise: sample 0 gets none, sample 1 starts from 1, sample 2 + k gets noise 1 in step k alone."""

    def __init__(self, num_steps: int):
        self.num_steps, self.step = num_steps, 0
        self.start = torch.eye(num_steps + 2, dtype=torch.float64)[:, 1].view(-1, 1, 1, 1)

    def fork(self, word: str) -> Impulses:
        return self

    def normal(self, *shape: int) -> Tensor:
        self.step += 1
        return torch.eye(self.num_steps + 2, dtype=torch.float64)[:, 1 + self.step].view(-1, 1, 1, 1)


def law(sampler: Any, path: Path) -> tuple[float, float]:
    """Mean and standard deviation of what a sampler draws, without drawing: of Gaussian data its result is linear in every noise it is given."""
    noises = Impulses(sampler.num_steps)
    found = sampler(Exact(path), noises.start, noises)[:, 0, 0, 0]
    return float(found[0]), float((found[1:] - found[0]).square().sum().sqrt())


@pytest.mark.parametrize("name", ["straight", "trigonometric", "cosine", "exploding"])
@pytest.mark.parametrize(
    "make",
    [
        Ancestral,
        partial(Ancestral, variance="large"),
        partial(Sde, diffusion="constant", last=1e-3),
    ],
)
def test_stochastic_samplers_come_closer_to_the_data_with_order_one(make, name):
    (mean, coarse), (_, fine) = (law(make(num_steps=n), PATHS[name]) for n in (80, 160))
    assert abs(mean - MEAN) < 2e-3
    assert math.log2(abs(coarse - STD) / abs(fine - STD)) > 0.75


def test_noise_of_the_sde_changes_nothing_of_what_is_drawn():
    for scale in (0.0, 0.5, 1.0):
        mean, std = law(Sde(num_steps=400, last=1e-3, scale=scale), Straight())
        assert abs(mean - MEAN) < 1e-3
        assert abs(std - STD) < 3e-3


@pytest.mark.parametrize("name", list(PATHS))
@pytest.mark.parametrize("make", [Euler, Heun, Dpmpp])
def test_every_path_is_solved(make, name):
    assert error(make(num_steps=200), PATHS[name]) < 0.01


def test_higher_orders_need_fewer_steps():
    assert error(Heun(num_steps=20), Straight()) < error(Euler(num_steps=40), Straight()) / 3
    assert error(Dpmpp(num_steps=40), Straight()) < error(Euler(num_steps=40), Straight()) / 3


def test_a_straight_flow_lands_in_one_step():
    target = torch.full((4, 1, 2, 2), 0.3, dtype=torch.float64)

    def predict(x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return target, (x_t - (1 - t) * target) / t

    torch.testing.assert_close(
        Euler(num_steps=1)(Predictor(Straight(), predict), start(4)[..., :2, :2], Rng.at(0, 0, 4)), target
    )


@pytest.mark.parametrize("name", list(PATHS))
def test_dopri5_is_as_exact_as_it_is_asked_to_be(name):
    path = PATHS[name]
    loose, strict = (Exact(path), Exact(path))
    found = Dopri5(rtol=1e-3)(loose, start(), Rng.at(0, 0, 64))
    assert float((found - solution(path, start())).abs().max()) < 1e-2
    found = Dopri5(rtol=1e-7, atol=1e-9)(strict, start(), Rng.at(0, 0, 64))
    assert float((found - solution(path, start())).abs().max()) < 1e-3
    assert loose.calls < strict.calls < 2000


def test_dopri5_says_when_its_steps_are_used_up():
    with pytest.raises(GenkitError, match="3 steps did not reach"):
        Dopri5(rtol=1e-9, num_steps=3)(Exact(Straight()), start(), Rng.at(0, 0, 64))


SMALL, LARGE = Ancestral(num_steps=200), Ancestral(num_steps=200, variance="large")


@pytest.mark.parametrize(
    ("sampler", "name"),
    [(s, n) for s in (SMALL, LARGE) for n in ("straight", "discrete", "exploding")]
    + [(Sde(num_steps=200), "straight")],
)
def test_stochastic_samplers_draw_from_the_data(sampler, name):
    noise = Rng.at(0, 0, 4096).normal(1, 1, 1).double()
    found = sampler(Exact(PATHS[name]), noise, Rng.at(1, 0, 4096))
    assert abs(float(found.mean()) - MEAN) < 0.03
    assert abs(float(found.std()) - STD) < 0.03


SAMPLERS = [
    Euler(num_steps=5),
    Heun(num_steps=5),
    Dpmpp(num_steps=5),
    Ancestral(num_steps=5),
    Sde(num_steps=5),
    Dopri5(),
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: type(s).__name__)
def test_a_sample_does_not_depend_on_its_batch(sampler):
    whole = sampler(Exact(Straight()), start(8), Rng.at(1, 0, 8))
    alone = sampler(Exact(Straight()), start(8)[5:6], Rng.at(1, 5, 1))
    torch.testing.assert_close(whole[5:6], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: type(s).__name__)
def test_steps_are_shown(sampler):
    seen: list[int] = []
    sampler(Exact(Straight()), start(2), Rng.at(1, 0, 2), lambda step, total, x: seen.append(step))
    assert seen == list(range(len(seen)))
    assert seen


def test_learned_variances_lie_between_the_two_others():
    class Learned(Exact):
        def __init__(self, fraction: float):
            super().__init__(Discrete())
            self.fraction = fraction

        def __call__(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
            return (*super().__call__(x_t, t), torch.full_like(x_t, self.fraction))

    def draw(fraction: float | None, variance: str) -> Tensor:
        predict = Exact(Discrete()) if fraction is None else Learned(fraction)
        return Ancestral(num_steps=20, variance=variance)(predict, start(4), Rng.at(1, 0, 4))

    torch.testing.assert_close(draw(0.0, "learned"), draw(None, "small"))
    torch.testing.assert_close(draw(1.0, "learned"), draw(None, "large"))
    with pytest.raises(UsageError, match="this model has no variances"):
        draw(None, "learned")


@pytest.mark.parametrize("make", [Euler, Heun, Dpmpp, Ancestral, Sde, Dopri5])
def test_no_steps_are_refused(make):
    with pytest.raises(UsageError, match=r"sampler.num_steps=0 must be at least"):
        make(num_steps=0)
