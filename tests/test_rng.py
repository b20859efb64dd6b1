"""Per-sample random streams."""

import math

import pytest
import torch

from genkit.rng import Rng, derive, philox


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known-answer vectors philox4x32 10 of Random123 (tests/kat_vectors)
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    c = [torch.tensor(word) for word in counter]
    k = [torch.tensor(word) for word in key]
    found = philox((c[0], c[1], c[2], c[3]), (k[0], k[1]))
    assert tuple(int(word) for word in found) == expected


DRAWS = {
    "uniform": lambda rng: rng.uniform(3, 5),
    "normal": lambda rng: rng.normal(7),
    "gumbel": lambda rng: rng.gumbel(2, 3),
    "integers": lambda rng: rng.integers(1000, 9),
    "order": lambda rng: rng.order(13),
    "categorical": lambda rng: rng.categorical(torch.linspace(0, 1, 6).expand(len(rng), 4, 6)),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())
def test_sample_does_not_depend_on_its_batch(draw):
    full = draw(Rng.at(3, 10, 6))
    assert torch.equal(full[2:4], draw(Rng.at(3, 12, 2)))
    assert torch.equal(full[4:5], draw(Rng.at(3, 10, 6)[4:5]))
    assert not torch.equal(full[:3], full[3:])


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())
def test_draws_streams_and_seeds_differ(draw):
    rng = Rng.at(0, 0, 4)
    assert not torch.equal(draw(rng), draw(rng))
    assert not torch.equal(draw(Rng.at(0, 0, 4).fork("a")), draw(Rng.at(0, 0, 4).fork("b")))
    assert not torch.equal(draw(Rng.at(0, 0, 4)), draw(Rng.at(1, 0, 4)))


def test_fork_is_not_shifted_by_draws_of_its_parent():
    rng = Rng.at(5, 0, 3)
    before = rng.fork("x").uniform(4)
    rng.uniform(100)
    assert torch.equal(rng.fork("x").uniform(4), before)


def test_global_generator_is_neither_read_nor_moved():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = [draw(Rng.at(1, 0, 2)) for draw in DRAWS.values()]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(9)
    assert all(torch.equal(a, draw(Rng.at(1, 0, 2))) for a, draw in zip(first, DRAWS.values(), strict=True))


def test_derived_seeds_are_distinct_and_fixed():
    seeds = {derive(seed, *numbers) for seed in range(20) for numbers in ((), (0,), (1,), (0, 0), (0, 1), (1, 0))}
    assert len(seeds) == 120
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive(1, 2, 3) == derive(1, 2, 3)


def kolmogorov_smirnov(values: torch.Tensor, cdf) -> float:
    """Largest distance between the empirical and the true distribution, times sqrt(n); above 1.95 once in 1000 times."""
    ordered = values.double().flatten().sort().values
    n = len(ordered)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    true = cdf(ordered)
    return float(torch.maximum((steps[1:] - true).max(), (true - steps[:-1]).max()) * math.sqrt(n))


def test_distributions():
    rng = Rng.at(0, 0, 200)
    assert kolmogorov_smirnov(rng.uniform(500), lambda x: x) < 1.95
    assert kolmogorov_smirnov(rng.normal(500), lambda x: torch.special.ndtr(x)) < 1.95
    assert kolmogorov_smirnov(rng.gumbel(500), lambda x: torch.exp(-torch.exp(-x))) < 1.95


def test_neighbouring_samples_are_uncorrelated():
    x = Rng.at(0, 0, 2000).normal(50)
    across = (x[1:] * x[:-1]).mean()
    along = (x[:, 1:] * x[:, :-1]).mean()
    assert across.abs() < 4 / math.sqrt(x.numel())
    assert along.abs() < 4 / math.sqrt(x.numel())


def test_uniform_stays_below_one_and_gumbel_finite_at_the_ends(monkeypatch):
    rng = Rng([0])
    ends = torch.tensor([[0, 0xFFFFFFFF, 0x80000000]])
    monkeypatch.setattr(rng, "words", lambda count: ends[:, :count])
    assert rng.uniform(3).tolist() == [[0.0, 1 - 2.0**-24, 0.5]]
    assert torch.isfinite(rng.gumbel(3)).all()
    assert torch.isfinite(rng.normal(1)).all()


def test_integers_are_uniform_and_in_range():
    drawn = Rng.at(0, 0, 100).integers(7, 700)
    counts = torch.bincount(drawn.flatten(), minlength=7)
    assert len(counts) == 7
    expected = drawn.numel() / 7
    assert float(((counts - expected) ** 2 / expected).sum()) < 22.5  # chi-square, 6 degrees of freedom, once in 1000


def test_order_is_a_permutation_with_every_place_as_likely():
    order = Rng.at(0, 0, 6000).order(5)
    assert torch.equal(order.sort(dim=1).values, torch.arange(5).expand(6000, 5))
    counts = torch.nn.functional.one_hot(order, 5).sum(0).double()  # [place, number]
    assert float(((counts - 1200) ** 2 / 1200).sum()) < 39.3  # chi-square, 16 degrees of freedom, once in 1000


def test_categorical_draws_with_the_probabilities_of_the_logits():
    p = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    drawn = Rng.at(0, 0, 400).categorical(p.log().expand(400, 100, 6))
    frequency = torch.bincount(drawn.flatten(), minlength=6) / drawn.numel()
    assert (frequency[p == 0] == 0).all()
    assert (frequency - p).abs().max() < 4 * 0.5 / math.sqrt(drawn.numel())
