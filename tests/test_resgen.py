"""ResGen: residual ids by way of the sum of their codes."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from genkit import registry
from genkit.backbones.resgen import ResGen as Backbone
from genkit.errors import UsageError
from genkit.guidance import Guidance, guide
from genkit.nn.layout import dense_layout
from genkit.nn.mixture import Mixture, nucleus
from genkit.objectives.resgen import Codes
from genkit.objectives.resgen import ResGen as Objective
from genkit.rng import Rng
from genkit.samplers.resgen import ResGen as Sampler
from genkit.samplers.resgen import deepest

GRID, Q, S, C = (3, 4), 3, 8, 5
LAYOUT = dense_layout(GRID)
LABELS = torch.tensor([0, 1, 2, 3, -1, 0])


def codes() -> Codes:
    """Levels so much finer than the one before that a sum tells its ids."""
    tables = torch.randn(Q, S, C, generator=torch.Generator().manual_seed(0)) * 0.05 ** torch.arange(Q).view(-1, 1, 1)
    power = tables.var(dim=1, correction=0).mean(-1).flip(0).cumsum(0)
    return Codes(tables, torch.cat([torch.ones(1), power.sqrt()]))


def objective(**options: Any) -> Objective:
    found = Objective(**options)
    found.codes = codes()
    return found


def backbone(random: bool = True, **options: Any) -> Backbone:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "dim": 16,
        "depth": 2,
        "components": 6,
        "rank": 3,
        "mixer": {"type": "attention", "num_heads": 2},
    }
    model = Backbone(channels=C, num_levels=Q, num_classes=4, grid=GRID, **sizes | options)
    if random:
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def random_ids(batch: int) -> Tensor:
    return Rng.at(1, 0, batch).integers(S, Q, *GRID)


def mixture(K: int = 4, r: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Mixture, Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = ((2, 3, K), (2, 3, K, r), (2, 3, C), (2, 3, C), (2, 3), (r, C))
    parts = [torch.randn(*shape, generator=g, dtype=dtype) * 0.5 for shape in shapes]
    return Mixture(*parts), torch.randn(2, 3, C, generator=g, dtype=dtype)


# The mixture


def test_log_prob_is_that_of_torch_and_low_rank_means_are_explicit_ones():
    m, z = mixture()
    means = m.shift.unsqueeze(-2) + m.log_scale.exp().unsqueeze(-2) * (m.low @ m.basis)  # [..., K, C]
    normal = torch.distributions.Independent(
        torch.distributions.Normal(means, m.log_sigma.exp()[..., None, None].expand_as(means)), 1
    )
    peer = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(logits=m.logits), normal)
    torch.testing.assert_close(m.log_prob(z), peer.log_prob(z))


def test_the_bound_is_below_and_tight_with_exact_responsibilities():
    m, z = mixture()
    leaves = [m.logits.requires_grad_(), m.low.requires_grad_(), m.log_sigma.requires_grad_()]
    exact = torch.autograd.grad(m.log_prob(z).sum(), leaves)
    tight = torch.autograd.grad(m.bound(z, free=False).sum(), leaves)
    torch.testing.assert_close(m.bound(z, free=False), m.log_prob(z))
    torch.testing.assert_close(exact, tight)
    assert (m.bound(z) < m.log_prob(z)).all()


def test_draws_have_the_mean_and_deviation_of_their_component():
    m, _ = mixture(dtype=torch.float32)
    many = Mixture(
        *(p[:1, :1].expand(1, 20000, *p.shape[2:]) for p in (m.logits, m.low, m.shift, m.log_scale, m.log_sigma)),
        m.basis,
    )
    rng = Rng.at(0, 0, 1)
    z, component = many.draw(rng.uniform(20000), rng.normal(20000, C), 1.0, 0.5)
    weights = torch.nn.functional.one_hot(component[0], 4).float().mean(0)
    torch.testing.assert_close(weights, m.logits[0, 0].softmax(-1), atol=0.02, rtol=0)
    mean = m.shift[0, 0] + m.log_scale[0, 0].exp() * (m.low[0, 0, 1] @ m.basis)
    own = z[component == 1]
    torch.testing.assert_close(own.mean(0), mean, atol=0.03, rtol=0)
    torch.testing.assert_close(own.std(0), (0.5 * m.log_sigma[0, 0].exp()).expand(C), atol=0.03, rtol=0)


def test_a_nucleus_is_the_fewest_that_suffice():
    kept = nucleus(torch.tensor([0.5, 0.15, 0.3, 0.05]).log(), 0.8).isfinite()
    assert kept.tolist() == [True, False, True, False]
    assert nucleus(torch.tensor([0.5, 0.15, 0.3, 0.05]).log(), 0.01).isfinite().tolist() == [True, False, False, False]


# Masks and codes


def test_masks_are_multivariate_hypergeometric():
    """Counts per place follow numpy's draws of the same number of cells."""
    B, N, levels = 4000, 3, 4
    rng = Rng.at(0, 0, B)
    masked = Objective(schedule="linear").draw_mask(N, levels, rng)
    total = ((1 - rng.fork("ratio").uniform()) * N * levels).ceil().clamp(1, N * levels).long()
    assert torch.equal(masked.sum(1), total)
    assert masked.min() >= 0
    assert masked.max() <= levels
    some = total == 6
    peer = np.random.default_rng(0).multivariate_hypergeometric([levels] * N, 6, size=20000, method="marginals")
    expected = np.bincount(peer[:, 0], minlength=levels + 1) / 20000
    found = torch.bincount(masked[some][:, 0], minlength=levels + 1) / int(some.sum())
    assert np.abs(found.numpy() - expected).max() < 0.08


def test_deepest_levels_are_masked():
    assert deepest(torch.tensor([[0, 1, 3]]), 3)[0].T.tolist() == [[False] * 3, [False, False, True], [True] * 3]


def test_codes_of_a_tokenizer_add_up_to_its_latents():
    for options in ({}, {"num_groups": 2}, {"codebook_dim": 3}):
        torch.manual_seed(0)
        spec = {
            "type": "rvq",
            "stride": 2,
            "width": 8,
            "num_blocks": 1,
            "channels": 6,
            "codebook_size": S,
            "num_levels": 4,
        }
        tokenizer = registry.build("tokenizer", spec | options, image_channels=1).eval()
        torch.nn.init.normal_(tokenizer.quantizer.codebook.embed)
        ids = Rng.at(0, 0, 2).integers(S, 4, *GRID)
        found = Codes.of(tokenizer)
        known, rest = found.sums(ids.flatten(2), torch.full((2, 12), 2))
        bias = tokenizer.quantizer.codes(torch.full((1, 1, 1, 4), -1)).view(-1)
        total = (known + rest + bias).mT.unflatten(2, GRID)
        torch.testing.assert_close(tokenizer.scale(total), tokenizer.codes(ids), atol=1e-5, rtol=1e-5)
        coarse = torch.where(deepest(torch.full((2, 12), 2), 4), -1, ids.flatten(2))
        expected = tokenizer.quantizer.codes(coarse.transpose(1, 2)) - bias
        torch.testing.assert_close(known, expected, atol=1e-5, rtol=1e-5)


def test_tokenizers_whose_codes_do_not_add_up_are_refused():
    for spec in ({"type": "kl", "width": 8, "num_blocks": 1}, {"type": "fsq", "width": 8, "num_blocks": 1}):
        tokenizer = registry.build("tokenizer", spec, image_channels=1)
        with pytest.raises(UsageError, match="needs a tokenizer whose codes come from codebooks"):
            Objective().bind(tokenizer)


# Objective


@pytest.mark.parametrize("loss", ["nll", "bound"])
def test_first_loss_is_that_of_a_normal_and_belongs_to_the_sample(loss):
    fresh = objective(loss=loss)(backbone(random=False), random_ids(6), {"label": LABELS}, LAYOUT, Rng.at(0, 0, 6))
    assert abs(float(fresh["nll"].detach().mean()) - 0.5 * math.log(2 * math.pi * math.e)) < 0.7
    model = backbone()
    full = objective(loss=loss)(model, random_ids(6), {"label": LABELS}, LAYOUT, Rng.at(3, 0, 6))["nll"]
    part = objective(loss=loss)(model, random_ids(6)[2:4], {"label": LABELS[2:4]}, LAYOUT, Rng.at(3, 2, 2))["nll"]
    torch.testing.assert_close(full[2:4], part, atol=1e-5, rtol=1e-5)


def test_what_is_masked_is_not_seen():
    model, ids = backbone(), random_ids(2)
    known = ~deepest(Rng.at(0, 0, 2).integers(Q + 1, 12), Q).view(2, Q, *GRID)
    predict = objective().predictor(model, {"label": LABELS[:2]}, LAYOUT)
    a, b = predict(ids, known, None), predict(torch.where(known, ids, -1), known, None)
    assert torch.equal(a.logits, b.logits)
    assert torch.equal(a.shift, b.shift)
    assert not torch.equal(a.logits, predict(ids, torch.zeros_like(known), None).logits)


# Sampler


class Oracle:
    """Knows the ids: a mixture of one component at their sum, with hardly any deviation."""

    def __init__(self, ids: Tensor):
        self.ids, self.codes = ids.flatten(2), codes()
        self.seen: list[Tensor] = []

    def __call__(self, ids: Tensor, known: Tensor, cache: Any) -> Mixture:
        assert torch.equal(ids[known], self.ids.view_as(ids)[known])
        num_masked = (~known.flatten(2)).sum(1)
        assert torch.equal(known.flatten(2), ~deepest(num_masked, Q)), "a mask is a suffix in depth"
        self.seen.append(num_masked)
        rest = self.codes.sums(self.ids, num_masked)[1] / self.codes.std[num_masked].unsqueeze(-1)
        B, N = num_masked.shape
        return Mixture(
            torch.zeros(B, N, 1),
            torch.zeros(B, N, 1, 1),
            rest,
            torch.zeros(B, N, C),
            torch.full((B, N), -9.0),
            torch.zeros(1, C),
            self.codes,
        )


@pytest.mark.parametrize("schedule", ["cosine", "linear", "pow2.5"])
@pytest.mark.parametrize("num_steps", [1, 4, 36])
@pytest.mark.parametrize("confidence", ["tokens", "density", "component", "random"])
def test_an_oracle_is_followed_exactly(schedule, num_steps, confidence):
    ids = random_ids(3)
    predict = Oracle(ids)
    sampler = Sampler(num_steps=num_steps, schedule=schedule, confidence=confidence)
    out = sampler(predict, torch.full_like(ids, -1), Rng.at(0, 0, 3))
    assert torch.equal(out, ids)
    total = [int(n.sum(1)[0]) for n in predict.seen]
    assert total[0] == Q * 12
    assert all(a > b for a, b in itertools.pairwise(total))
    assert all((b <= a).all() for a, b in itertools.pairwise(predict.seen))


def test_coarse_ids_settle_first_and_what_is_given_stays():
    ids = random_ids(3)
    start = ids.clone()
    start[:, 1:] = -1  # coarse levels are given
    start[1, 0, 0] = -1
    out = Sampler(num_steps=4)(Oracle(ids), start, Rng.at(0, 0, 3))
    assert torch.equal(out, ids)


def test_sample_does_not_depend_on_its_batch():
    model, sampler = backbone(), Sampler(num_steps=5)

    def draw(first: int, count: int) -> Tensor:
        cond = {"label": LABELS[first : first + count]}
        predict = guide(objective(), model, cond, LAYOUT, Guidance(2.0, "linear"))
        return sampler(predict, torch.full((count, Q, *GRID), -1), Rng.at(0, first, count))

    with torch.no_grad():
        full = draw(0, 6)
        assert torch.equal(full[1:4], draw(1, 3))
    assert len(full.unique(dim=0)) > 1
    assert full.min() >= 0
    assert full.max() < S


def test_guidance_is_on_the_weights():
    model, ids = backbone(), random_ids(2)
    known = torch.zeros(2, Q, *GRID, dtype=torch.bool)
    cond = {"label": LABELS[:2]}
    plain, null = (objective().predictor(model, c, LAYOUT)(ids, known, None) for c in (cond, {}))
    guided: Any = guide(objective(), model, cond, LAYOUT, Guidance(3.0))(ids, known, None)
    torch.testing.assert_close(guided.logits, null.logits + 3 * (plain.logits - null.logits), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(guided.shift, plain.shift, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "sampler.num_steps=0"),
        ({"top_p": 0.0}, "sampler.top_p=0.0"),
        ({"temperature": -1.0}, "sampler.temperature=-1.0"),
        ({"schedule": "x"}, "sampler.schedule=x is not a schedule"),
    ],
)
def test_sampler_refuses_wrong_options(options, message):
    with pytest.raises(UsageError, match=message):
        Sampler(**options)


def test_more_steps_than_ids_are_refused():
    with pytest.raises(UsageError, match=r"sampler\.num_steps=37, but a sample has 36"):
        Sampler(num_steps=37)(Oracle(random_ids(1)), torch.full((1, Q, *GRID), -1), Rng.at(0, 0, 1))


def test_resgen_learns_classes():
    torch.manual_seed(0)
    label = torch.arange(32) % 4
    target = ((label + torch.arange(Q)[:, None]) % S).T[:, :, None, None].expand(32, Q, *GRID)
    model, own = backbone(random=False, dim=32, depth=1), objective()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(80):
        loss = own(model.train(), target, {"label": label}, LAYOUT, Rng.at(0, 32 * step, 32))["nll"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    predict = guide(own, model.eval(), {"label": label}, LAYOUT, Guidance())
    with torch.no_grad():
        out = Sampler(num_steps=8, temperature=0.0)(predict, torch.full_like(target, -1), Rng.at(1, 0, 32))
    assert (out == target)[:, 0].float().mean() > 0.75  # by chance 1 / 8
