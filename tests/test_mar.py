"""MAR: continuous tokens, drawn one diffusion each."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from genkit.backbones.mar import MAR as Backbone
from genkit.errors import UsageError
from genkit.guidance import Guidance, guide
from genkit.nn.layout import dense_layout
from genkit.nn.patch import patchify
from genkit.objectives.mar import MAR as Objective
from genkit.objectives.masking import truncated_normal
from genkit.reuse.recap import Recap
from genkit.rng import Rng
from genkit.samplers.mar import MAR as Sampler

GRID = (4, 4)
LAYOUT = dense_layout(GRID)
LABELS = torch.tensor([0, 1, 2, 3, -1, 0])


def backbone(random: bool = True, **options: Any) -> Backbone:
    torch.manual_seed(0)
    sizes = {"dim": 16, "depth": 2, "num_heads": 2, "buffer_size": 3, "head_width": 16, "head_depth": 1, "dropout": 0.0}
    model = Backbone(channels=3, num_classes=4, grid=GRID, **sizes | options)
    if random:
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def latents(batch: int) -> Tensor:
    return Rng.at(5, 0, batch).normal(3, *GRID)


def holes(batch: int) -> Tensor:
    return torch.full((batch, 3, *GRID), float("nan"))


def test_what_stands_at_unknown_tokens_is_ignored():
    model, z = backbone(), patchify(latents(3), (1, 1))
    known = Rng.at(1, 0, 3).uniform(16) < 0.4
    other = torch.where(known[..., None], z, 7.0)
    cond = {"label": LABELS[:3]}
    a, b = (model(x, None, cond, LAYOUT, known=known) for x in (z, other))
    assert torch.equal(a, b)
    assert (a[0] - model(z, None, {}, LAYOUT, known=known)[0]).abs().max() > 1e-3  # the label is seen


def test_samples_with_more_known_tokens_leave_the_others_alone():
    model, z = backbone(), patchify(latents(3), (1, 1))
    known = torch.arange(16) < torch.tensor([2, 9, 16])[:, None]
    cond = {"label": LABELS[:3]}
    together = model(z, None, cond, LAYOUT, known=known)
    for i in range(3):
        alone = model(z[i : i + 1], None, {"label": LABELS[i : i + 1]}, LAYOUT, known=known[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("patch_size", [1, 2])
def test_first_loss_is_that_of_zero_noise_and_belongs_to_the_sample(patch_size):
    model, objective = backbone(random=False, patch_size=patch_size), Objective()
    losses = objective(model, latents(6), {"label": LABELS}, LAYOUT, Rng.at(2, 0, 6))
    assert abs(float(losses["mse"].detach().mean()) - 1) < 0.15
    model = backbone(patch_size=patch_size)
    full = objective(model, latents(6), {"label": LABELS}, LAYOUT, Rng.at(2, 0, 6))
    part = objective(model, latents(6)[2:4], {"label": LABELS[2:4]}, LAYOUT, Rng.at(2, 2, 2))
    for name in ("mse", "vb"):
        torch.testing.assert_close(full[name][2:4], part[name], atol=1e-5, rtol=1e-5)


def test_masked_fractions_are_the_upper_half_of_a_normal():
    fraction = truncated_normal(Rng.at(0, 0, 20000).uniform(), 1.0, 0.25, 0.7)
    assert fraction.min() >= 0.7
    assert fraction.max() <= 1
    # Of a normal cut at 1.2 deviations and folded at its mean: 1 - 0.25 (pdf(0) - pdf(1.2)) / (cdf(1.2) - cdf(0)).
    assert abs(float(fraction.mean()) - (1 - 0.25 * (0.398942 - 0.194186) / 0.384930)) < 2e-3


def sample(
    sampler: Sampler, start: Tensor, seeds: Rng, labels: Tensor, strength: float = 2.0, **options: Any
) -> Tensor:
    predict = guide(Objective(), backbone(**options), {"label": labels}, LAYOUT, Guidance(strength, "linear"))
    with torch.no_grad():
        return sampler(predict, start, seeds)


@pytest.mark.parametrize("reuse", [None, Recap(light=2)])
@pytest.mark.parametrize("patch_size", [1, 2])
def test_a_sample_is_the_same_in_any_batch(reuse, patch_size):
    sampler = Sampler(num_steps=4, head_steps=3, reuse=reuse)
    full = sample(sampler, holes(5), Rng.at(0, 0, 5), LABELS[:5], patch_size=patch_size)
    assert full.isfinite().all()
    assert full.std() > 0.1
    part = sample(sampler, holes(2), Rng.at(0, 1, 2), LABELS[1:3], patch_size=patch_size)
    torch.testing.assert_close(full[1:3], part, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("reuse", [None, Recap(full_steps=1, light=2)])
def test_what_is_known_stays_and_batches_may_be_uneven(reuse):
    z, start = latents(3), latents(3)
    start[0, :, :2] = torch.nan
    start[1] = torch.nan
    start[2, :, 0, 0] = torch.nan
    sampler = Sampler(num_steps=4, head_steps=2, reuse=reuse)
    out = sample(sampler, start, Rng.at(0, 0, 3), LABELS[:3])
    assert torch.equal(out[~start.isnan()], z[~start.isnan()])
    assert out.isfinite().all()
    for i in range(3):
        alone = sample(sampler, start[i : i + 1], Rng.at(0, i, 1), LABELS[i : i + 1])
        torch.testing.assert_close(out[i : i + 1], alone, atol=1e-4, rtol=1e-4)


def test_each_step_fills_what_the_schedule_says_and_nothing_twice():
    seen: list[Tensor] = []

    class Recorder:
        split = staticmethod(lambda z: patchify(z, (1, 1)))
        join = staticmethod(lambda tokens: tokens.transpose(1, 2).unflatten(2, GRID))

        def __call__(self, tokens: Tensor, known: Tensor, cache: Any) -> Any:
            seen.append(known.clone())
            predict = guide(Objective(), backbone(), {"label": LABELS[:2]}, LAYOUT, Guidance())
            return predict(tokens, known, None)

    with torch.no_grad():
        Sampler(num_steps=5, head_steps=1)(Recorder(), holes(2), Rng.at(0, 0, 2))
    # floor(16 cos(pi t / 10)) of 16 are left after step t
    assert [int((~known)[0].sum()) for known in seen] == [16, 15, 12, 9, 4]
    for a, b in itertools.pairwise(seen):
        assert (b >= a).all()


def test_no_noise_no_chance():
    """Of temperature 0, what is drawn depends on the noise that a token starts from alone."""
    model = backbone()
    predict = guide(Objective(), model, {"label": LABELS[:1]}, LAYOUT, Guidance())
    at = predict(patchify(latents(1), (1, 1)), torch.zeros(1, 16, dtype=torch.bool), None)
    denoise = at(torch.arange(16)[None], torch.zeros(1))
    rows = [Sampler(head_steps=4, temperature=0.0).draw(denoise, 16, 3, Rng.at(0, 0, 1), False) for _ in range(2)]
    assert torch.equal(*rows)
    noisy = Sampler(head_steps=4).draw(denoise, 16, 3, Rng.at(0, 0, 1), False)
    assert (noisy - rows[0]).abs().max() > 1e-3


def test_guidance_halves_share_their_noise():
    """With strength 1 the guided draw is the plain one."""
    model, tokens = backbone(), patchify(latents(2), (1, 1))
    known = Rng.at(1, 0, 2).uniform(16) < 0.5
    slots, fraction = torch.arange(16).expand(2, -1), torch.full((2,), 0.5)
    x_t, t = Rng.at(3, 0, 2).normal(16, 3), torch.tensor(0.4, dtype=torch.float64)
    cond = {"label": LABELS[:2]}
    plain = guide(Objective(), model, cond, LAYOUT, Guidance())(tokens, known, None)(slots, fraction)(x_t, t)
    for strength, schedule, weight in ((3.0, "constant", 3.0), (3.0, "linear", 2.0)):
        guided = guide(Objective(), model, cond, LAYOUT, Guidance(strength, schedule))
        got = guided(tokens, known, None)(slots, fraction)(x_t, t)
        null = guide(Objective(), model, {}, LAYOUT, Guidance())(tokens, known, None)(slots, fraction)(x_t, t)
        torch.testing.assert_close(got[1], null[1] + weight * (plain[1] - null[1]), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(got[2], plain[2], atol=1e-5, rtol=1e-5)


def test_mar_learns_a_mixture():
    """Tokens of two classes, +1 and -1 with noise of 0.1: a diffusion per token finds both."""
    torch.manual_seed(0)
    model = Backbone(
        channels=1,
        num_classes=2,
        grid=(2, 2),
        dim=32,
        depth=1,
        num_heads=2,
        buffer_size=2,
        head_width=32,
        head_depth=1,
        dropout=0.0,
    )
    objective = Objective(prediction="v", repeats=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    label = torch.arange(32) % 2
    layout = dense_layout((2, 2))
    for step in range(80):
        rng = Rng.at(0, 32 * step, 32)
        z = (2.0 * label - 1).view(-1, 1, 1, 1) + 0.1 * rng.fork("data").normal(1, 2, 2)
        loss = sum(v.mean() for v in objective(model, z, {"label": label}, layout, rng).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.5
    predict = guide(objective, model.eval(), {"label": label}, layout, Guidance())
    with torch.no_grad():
        out = Sampler(num_steps=2, head_steps=20)(predict, torch.full((32, 1, 2, 2), torch.nan), Rng.at(1, 0, 32))
    for c, mean in ((0, -1.0), (1, 1.0)):
        assert abs(float(out[label == c].mean()) - mean) < 0.25


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "sampler.num_steps=0"),
        ({"head_steps": 0}, "sampler.head_steps=0"),
        ({"temperature": -1.0}, "sampler.temperature=-1.0"),
        ({"schedule": "cos"}, "sampler.schedule=cos is not a schedule"),
    ],
)
def test_sampler_refuses_wrong_options(options, message):
    with pytest.raises(UsageError, match=message):
        Sampler(**options)


def test_more_steps_than_tokens_and_other_grids_are_refused():
    with pytest.raises(UsageError, match=r"sampler\.num_steps=17, but a sample has 16 tokens"):
        sample(Sampler(num_steps=17), holes(1), Rng.at(0, 0, 1), LABELS[:1])
    with pytest.raises(UsageError, match=r"positions are for 16 tokens \(\(4, 4\)\), found 9"):
        backbone()(torch.zeros(1, 9, 3), None, {}, dense_layout((3, 3)))
