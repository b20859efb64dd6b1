"""Reuse across the steps of a sampler: what is kept, when it is refreshed, whom it serves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from genkit import config, registry
from genkit.backbones.dimsum import DiMSUM
from genkit.backbones.dit import DiT
from genkit.backbones.fit import FiT
from genkit.errors import UsageError
from genkit.fitting import check_reuse
from genkit.guidance import Guidance, guide
from genkit.interfaces import BLOCKS, Layout
from genkit.nn import attend as attending
from genkit.nn.layout import dense_layout
from genkit.nn.through import through
from genkit.objectives.flow import Flow
from genkit.pipeline import GeneratorPipeline
from genkit.reuse.calls import Carried, Schedule, check_schedule
from genkit.reuse.rettention import Rettention
from genkit.reuse.skip_blocks import Added, SkipBlocks
from genkit.rng import Rng
from genkit.samplers.euler import Euler
from genkit.samplers.heun import Heun
from genkit.tokenizers.pixels import Pixels

GRID = (8, 8)
LAYOUT = dense_layout(GRID)
LABELS = torch.tensor([0, 2, 1])
GUIDED = Guidance(2.0)


def lively(model: Any, std: float = 0.1) -> Any:
    """Away from its initialisation, where it returns 0."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model.eval().requires_grad_(False)


def dit(depth: int = 4, mixer: Any = None, **options: Any) -> DiT:
    mixer = mixer or {"type": "attention", "num_heads": 2}
    return lively(DiT(channels=2, num_classes=3, grid=GRID, dim=16, depth=depth, patch_size=1, mixer=mixer, **options))


def fit() -> FiT:
    return lively(FiT(channels=2, num_classes=3, grid=GRID, dim=16, depth=3, num_heads=2, patch_size=1))


def dimsum() -> DiMSUM:
    return lively(
        DiMSUM(channels=2, num_classes=3, grid=GRID, dim=32, depth=3, patch_size=1, attention_every=1, num_heads=2, fusion_heads=2)
    )  # fmt: skip


BACKBONES = {"dit": dit, "fit": fit, "dimsum": dimsum}


def draw(
    model: Any,
    seeds: Any = (0, 1, 2),
    labels: Tensor = LABELS,
    guidance: Guidance = GUIDED,
    steps: int = 8,
    **options: Any,
) -> Tensor:
    rng = Rng(list(seeds))
    predict = guide(Flow(), model, {"label": labels}, LAYOUT, guidance, **options)
    return Euler(num_steps=steps)(predict, rng.fork("start").normal(2, *GRID), rng)


# --- when


def test_published_schedules():
    """Steps of the released processors: plain ones first, then full ones at every fifth."""
    for plain, total in ((5, 20), (10, 50), (15, 50)):
        schedule = Schedule(plain, 5)
        words = [schedule.what(step) for step in range(total)]
        assert [i for i, word in enumerate(words) if word == "plain"] == list(range(plain))
        assert [i for i, word in enumerate(words) if word == "full"] == list(range(plain, total, 5))
    few = [
        Schedule(5, 5, most=3).what(step) for step in range(40)
    ]  # the processor for PixArt, had it more than 20 steps
    assert [i for i, word in enumerate(few) if word == "full"] == [5, 10, 15]
    with pytest.raises(UsageError, match=r"reuse.refreshes=0 must be at least 1"):
        check_schedule("rettention", 5, 5, most=0)


class Spy(torch.nn.Module):
    """Notes what it is called with; half of its input is its velocity."""

    heeds = (BLOCKS,)

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, str]] = []

    def forward(self, x: Tensor, t: Any, cond: Any, layout: Any, cache: Any = None) -> Tensor:
        self.seen.append((len(x), cache["what"]))
        return x / 2


class Note:
    def cache(self, what: str, t: Any) -> dict[str, str]:
        return {"what": what}


def test_a_guided_batch_and_a_plain_one_keep_their_own_and_nothing_stale_is_used():
    spy = Spy()
    carried = Carried(spy, Schedule(1, 4), Note)
    draw(carried, guidance=Guidance(2.0, interval=(0.3, 0.7)), steps=10)
    # t = 1, .9, .8 are plain batches of 3; .7 .. .3 guided ones of 6; then plain again: the full call at step 5 was a guided one.
    assert spy.seen == [
        (3, "plain"), (3, "full"), (3, "reuse"),
        (6, "full"), (6, "reuse"), (6, "full"), (6, "reuse"), (6, "reuse"),
        (3, "full"), (3, "full"),
    ]  # fmt: skip


def test_calls_are_counted_not_steps():
    spy = Spy()
    predict = guide(Flow(), Carried(spy, Schedule(1, 3), Note), {}, LAYOUT, Guidance())
    Heun(num_steps=3)(predict, torch.randn(2, 1, *GRID), Rng([0, 1]))
    assert [what for _, what in spy.seen] == ["plain", "full", "reuse", "reuse", "full"]


@pytest.mark.parametrize("make", list(BACKBONES))
@pytest.mark.parametrize("kind", [Rettention(density=0.2, full_steps=2, period=3), SkipBlocks(full_steps=2)])
def test_every_sample_is_the_same_in_any_batch_and_from_run_to_run(make, kind):
    model = BACKBONES[make]()
    whole = draw(kind.start(model))
    assert torch.equal(whole, draw(kind.start(model)))
    alone = draw(kind.start(model), seeds=[1], labels=LABELS[1:2])
    torch.testing.assert_close(whole[1:2], alone, atol=1e-5, rtol=1e-5)
    assert (whole - draw(model)).abs().max() > 1e-4  # and it is not plain sampling


@pytest.mark.parametrize("kind", [Rettention(density=0.2, full_steps=2, period=3), SkipBlocks(full_steps=2)])
def test_both_halves_of_guidance_keep_their_own(kind):
    """As if the labelled and the unlabelled model were two, each with a memory of its own."""
    model = dit()
    with_label, without = kind.start(model), kind.start(model)
    predictors = [
        Flow().predictor(carried, {"label": label}, LAYOUT)
        for carried, label in ((with_label, LABELS), (without, torch.full_like(LABELS, -1)))
    ]
    rng = Rng([0, 1, 2])

    class Two:
        path = Flow().path

        def __call__(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, ...]:
            strong, weak = (predict(x_t, t) for predict in predictors)
            return tuple(torch.lerp(w, s, 2.0) for w, s in zip(weak, strong, strict=True))

    apart = Euler(num_steps=8)(Two(), rng.fork("start").normal(2, *GRID), rng)
    torch.testing.assert_close(draw(kind.start(model)), apart, atol=1e-5, rtol=1e-5)


# --- statistics of attention


def test_full_steps_are_full_attention():
    model = dit()
    torch.testing.assert_close(draw(Rettention(period=1).start(model)), draw(model), atol=1e-5, rtol=1e-5)


def test_with_all_tokens_nothing_is_lost():
    """The ratio is 1, the residual 0, whatever is added to the ratio."""
    model = fit()
    kind = Rettention(density=1, pattern="window", full_steps=1, period=100)
    torch.testing.assert_close(draw(kind.start(model)), draw(model), atol=1e-5, rtol=1e-5)


class Attending(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = registry.build("mixer", {"type": "attention", "num_heads": 2, "rope": False}, dim=8, layer=0)

    def forward(self, x: Tensor, t: Any, cond: Any, layout: Any, cache: Any = None) -> Tensor:
        return self.inner(x, layout, cache)


@pytest.mark.parametrize("carry", ["both", "residual", "none"])
@pytest.mark.parametrize(("pattern", "density"), [("band", 0.3), ("window", 0.2)])
def test_sparse_steps_follow_the_definition(pattern, density, carry):
    """Against scores written out in full, over three steps after a full one, with a padded sample."""
    torch.manual_seed(1)
    model = Attending().eval().requires_grad_(False)
    valid = torch.ones(2, 64, dtype=torch.bool)
    valid[1, 40:] = False
    layout = Layout(LAYOUT.coords, GRID, valid)
    kind = Rettention(density=density, pattern=pattern, full_steps=0, period=9, ramp=0.3, carry=carry, tile=2)
    carried = kind.start(model)
    i = torch.arange(64)
    if pattern == "band":
        reach = torch.tensor([int(64 * density) // 2, int(40 * density) // 2]).view(
            2, 1, 1, 1
        )  # by each sample's own length
        seen = (i[:, None] - i).abs() <= reach
    else:  # windows of 2x2 tiles of 2x2 tokens are moved inside; of four tiles per axis, 0.2 of all is nearest to one of them
        seen = (i[:, None] // 16 == i // 16) & (i[:, None] % 8 // 2 == i % 8 // 2)
    ratio, residual = torch.empty(0), torch.empty(0)
    for step in range(4):
        x = torch.randn(2, 64, 8)
        q, k, v = model.inner.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        q, k = model.inner.q_norm(q), model.inner.k_norm(k)
        weights = (q @ k.transpose(-1, -2) / 2).exp() * valid[:, None, None]
        some = weights * seen
        sparse = (some / some.sum(-1, keepdim=True).clamp_min(1e-30)) @ v
        if step == 0:
            ratio = some.sum(-1, keepdim=True) / weights.sum(-1, keepdim=True)
            o = (weights / weights.sum(-1, keepdim=True)) @ v
            residual = o - (ratio if carry == "both" else 1) * sparse
        elif carry == "both":
            o = ratio * sparse + residual
            ratio = (ratio + 0.3).clamp_max(1)
        else:
            o = sparse + (residual if carry == "residual" else 0)
        expected = model.inner.proj(o.transpose(1, 2).flatten(2))
        got = carried(x, None, {}, layout)
        torch.testing.assert_close(got[valid], expected[valid], atol=1e-5, rtol=1e-5)


def test_packed_samples_of_mixed_sizes_are_as_alone():
    model = fit()
    valid = torch.zeros(2, *GRID, dtype=torch.bool)
    valid[0], valid[1, :4, :6] = True, True
    mixed = Layout(LAYOUT.coords, GRID, valid.flatten(1))
    kind = Rettention(density=0.2, full_steps=0, period=9)
    together, alone = kind.start(model), kind.start(model)
    for step in range(3):
        x = torch.randn(2, 2, *GRID, generator=torch.Generator().manual_seed(step))
        t = torch.tensor(0.9 - 0.1 * step)
        both = together(x, t, {"label": LABELS[:2]}, mixed)
        one = alone(x[1:, :, :4, :6].contiguous(), t, {"label": LABELS[1:2]}, dense_layout((4, 6)))
        torch.testing.assert_close(both[1:, :, :4, :6], one, atol=1e-5, rtol=1e-5)
    with pytest.raises(UsageError, match="pattern=band"):
        Rettention(pattern="window", full_steps=0).start(model)(x, t, {"label": LABELS[:2]}, mixed)


def test_other_mixers_in_a_network_stay_as_they_are():
    model = dit(mixer=[{"type": "gla", "num_heads": 2}, {"type": "attention", "num_heads": 2}])
    assert draw(Rettention(density=0.2, full_steps=2).start(model)).isfinite().all()


# --- skipped blocks


def test_blocks_in_the_middle_run_in_full_calls_alone():
    model, ran = dit(depth=5), [0] * 5
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, i=i: ran.__setitem__(i, ran[i] + 1))
    draw(SkipBlocks(full_steps=2, period=3, first=1, last=1).start(model))
    assert ran == [8, 4, 4, 4, 8]  # calls 0, 1, 2, 5 are full


@pytest.mark.parametrize("order", [0, 1, 2])
def test_what_grows_as_a_polynomial_is_foretold(order):
    """The middle block adds a polynomial in t."""
    options = SkipBlocks(full_steps=3, period=3, order=order)
    added = Added(options)
    coefficients = torch.randn(order + 1, 4, generator=torch.Generator().manual_seed(0))

    def call(what: Any, t: float) -> Tensor:
        def run(i: int, h: Tensor) -> Tensor:
            return h + sum(c * t**k for k, c in enumerate(coefficients)) if i == 1 else 2 * h

        return through(3, torch.ones(4), run, added.cache(what, torch.tensor(t)))

    for t in (1.0, 0.9, 0.9, 0.7):  # Heun asks twice at one time
        call("full", t)
    options.last = 1
    exact = 2 * (2 * torch.ones(4) + sum(c * 0.4**k for k, c in enumerate(coefficients)))
    added.history = type(added.history)(maxlen=order + 1)
    for t in (1.0, 0.9, 0.9, 0.7):
        call("full", t)
    torch.testing.assert_close(call("reuse", 0.4), exact, atol=1e-5, rtol=1e-5)


def test_all_calls_full_is_plain_sampling_bit_for_bit():
    for make in BACKBONES.values():
        model = make()
        assert torch.equal(draw(SkipBlocks(period=1).start(model)), draw(model))


# --- whom it serves


def test_networks_that_cannot_be_served_are_named():
    with pytest.raises(
        UsageError, match=r"rettention serves full attention .* DiT has none; use reuse.type=skip_blocks"
    ):
        Rettention().start(dit(mixer={"type": "gla", "num_heads": 2}))
    far = registry.find("backbone", "fit_interleaved")(channels=2, num_classes=3, grid=(16, 16), dim=16)
    with pytest.raises(UsageError, match=r"skip_blocks serves .*dit, fit, dimsum.*FITInterleaved is none"):
        SkipBlocks().start(far)
    with pytest.raises(UsageError, match="leave none of 2 blocks"):
        draw(SkipBlocks(first=1, last=1).start(dit(depth=2)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rettention(density=0), "density=0 must be in"),
        (lambda: Rettention(ramp=-1), "ramp=-1 must not be negative"),
        (lambda: Rettention(period=0), "period=0 at least 1"),
        (lambda: SkipBlocks(full_steps=-1), "full_steps=-1 must be at least 0"),
        (lambda: SkipBlocks(first=0), "first=0 at least 1"),
        (lambda: SkipBlocks(order=-1), "order=-1"),
    ],
)
def test_options_out_of_range_are_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()


SAMPLER = {"type": "euler", "num_steps": 6, "guidance": 2.0}


def pipeline(backbone: Any = None, sampler: Any = None, names: Any = ("a", "b", "c"), objective: Any = None) -> Any:
    return GeneratorPipeline(
        Pixels(image_channels=2),
        backbone or dit(),
        objective=objective or {"type": "flow"},
        sampler=sampler or SAMPLER,
        grid=list(GRID),
        class_names=list(names),
    )


def test_a_pipeline_takes_reuse_from_its_recipe_or_a_call():
    pipe = pipeline()
    plain = pipe.generate(LABELS, [0, 1, 2])
    reuse = {"type": "skip_blocks", "full_steps": 2}
    reused = pipe.generate(LABELS, [0, 1, 2], sampler={"reuse": reuse})
    assert not torch.equal(plain, reused)
    texts = ["reuse.type=skip_blocks", "reuse.full_steps=2"]
    assert torch.equal(reused, pipe.generate(LABELS, [0, 1, 2], sampler=texts))
    own = pipeline(sampler=config.with_sampler(SAMPLER, {"reuse": reuse}))
    assert torch.equal(reused, own.generate(LABELS, [0, 1, 2]))
    assert torch.equal(plain, own.generate(LABELS, [0, 1, 2], sampler=["reuse=null"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["reuse.type=skip_block"], "did you mean 'skip_blocks'|skip_blocks"),
        (["reuse.type=skip_blocks", "reuse.density=2"], "unknown key sampler.reuse.density"),
        (["reuse.type=skip_blocks", "type=dopri5"], "sampler.type=dopri5 chooses them for each"),
        (["reuse.density=2"], "must be a mapping with a `type`"),
    ],
)
def test_changes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        pipeline().generate(LABELS, [0, 1, 2], sampler=changes)


def test_another_sampler_keeps_guidance_and_reuse():
    found = config.with_sampler({**SAMPLER, "reuse": {"type": "rettention"}}, ["type=heun"])
    assert (found["type"], found["guidance"], found["reuse"]["type"]) == ("heun", 2.0, "rettention")
    with pytest.raises(UsageError, match=r"rettention serves latents; objective.type=masked learns ids"):
        check_reuse(found, {"type": "masked"})


# --- autoguidance


def test_guidance_away_from_a_saved_worse_model(tmp_path):
    weak = dit(depth=2)
    pipeline(weak).save_pretrained(tmp_path / "weak")
    strong = dit()
    pipe = pipeline(strong)
    found = pipe.generate(LABELS, [0, 1, 2], sampler={"guidance_weak": str(tmp_path / "weak")})
    by_hand = (draw(strong, weak=weak, steps=6) / 2).clamp(-1, 1)
    torch.testing.assert_close(found, by_hand)
    # Reuse serves both models, each with its own memory; a model without classes can be guided so too.
    both = {"guidance_weak": str(tmp_path / "weak"), "reuse": {"type": "skip_blocks", "full_steps": 1, "period": 2}}
    assert not torch.equal(found, pipe.generate(LABELS, [0, 1, 2], sampler=both))
    with pytest.raises(UsageError, match="another number of classes, 3, than this model, 0"):
        pipeline(names=()).generate(torch.tensor([-1]), [0], sampler={"guidance_weak": str(tmp_path / "weak")})
    with pytest.raises(UsageError, match="another objective"):
        pipeline(objective={"type": "flow", "towards": "data"}).generate(LABELS, [0, 1, 2], sampler=both)
    with pytest.raises(UsageError, match=r"sampler\.guidance_weak=RUN"):
        pipeline(names=()).generate(torch.tensor([-1]), [0])


def test_attention_over_many_tokens_is_the_same_by_blocks(monkeypatch):
    q, k, v = (torch.randn(2, 40, 3, 8).transpose(1, 2).requires_grad_() for _ in "qkv")
    weight, found = torch.randn(2, 3, 40, 8), []
    for long in (40, 41):
        monkeypatch.setattr(attending, "LONG", long)
        out = attending.attend(q, k, v, grid=None, valid=None, cache=None)
        found.append((out, *torch.autograd.grad((out * weight).sum(), (q, k, v))))
    for blocks, plain in zip(*found, strict=True):
        torch.testing.assert_close(blocks, plain, atol=1e-5, rtol=1e-5)
