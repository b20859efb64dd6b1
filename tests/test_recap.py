"""Light steps that reuse the context of full ones, in every masked generator."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from genkit.backbones.bert import Bert
from genkit.backbones.mage import MAGE
from genkit.backbones.mar import MAR
from genkit.backbones.masked import Masked as MaskedBackbone
from genkit.backbones.octgpt import OctGPT
from genkit.backbones.uvit import UViT
from genkit.errors import UsageError
from genkit.fitting import check_reuse
from genkit.guidance import Guidance, guide
from genkit.interfaces import Cache
from genkit.nn.context import Context, rows_of
from genkit.nn.layout import dense_layout
from genkit.nn.patch import patchify
from genkit.objectives.mar import MAR as MAROjective
from genkit.objectives.masked import Masked as Objective
from genkit.objectives.octree_masked import OctreeMasked
from genkit.octree.tokens import OctreeTokens
from genkit.reuse.recap import Recap
from genkit.rng import Rng
from genkit.samplers.mar import MAR as MARSampler
from genkit.samplers.masked import Masked as Sampler
from genkit.samplers.octree_masked import OctreeMasked as OctreeSampler

GRID, N, S = (4, 4), 16, 9
LAYOUT = dense_layout(GRID)
LABELS = torch.tensor([0, 1, 2, -1, 3])
IDS: dict[str, Any] = {"codebook_size": S, "num_classes": 4, "grid": GRID, "dim": 16, "depth": 2}
MAKERS: dict[str, Any] = {
    "masked": lambda Q: MaskedBackbone(**IDS, num_levels=Q, mixer={"type": "attention", "num_heads": 2}),
    "masked, sincos": lambda Q: MaskedBackbone(
        **IDS, num_levels=Q, positions="sincos", mixer={"type": "attention", "num_heads": 2, "rope": False}
    ),
    "bert": lambda Q: Bert(**IDS, num_levels=Q, num_heads=2),
    "uvit": lambda Q: UViT(**IDS, num_levels=Q, num_heads=2),
    "uvit, linear": lambda Q: UViT(**IDS, num_levels=Q, num_heads=2, head="linear", embed_norm="none"),
    "mage": lambda Q: MAGE(**IDS, num_levels=Q, num_heads=2, decoder_dim=24, decoder_depth=1),
}


def network(name: str, num_levels: int = 1) -> Any:
    torch.manual_seed(0)
    model = MAKERS[name](num_levels)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    return model.eval()


def predictor(name: str, strength: float = 1.0, num_levels: int = 1, labels: Tensor = LABELS, weak: Any = None) -> Any:
    guidance = Guidance(strength, "linear")
    return guide(Objective(), network(name, num_levels), {"label": labels}, LAYOUT, guidance, weak)


def partly_known(batch: int, num_levels: int = 1) -> tuple[Tensor, Tensor]:
    ids = Rng.at(1, 0, batch).integers(S, num_levels, *GRID)
    return ids, (Rng.at(2, 0, batch).uniform(1, *GRID) < 0.5).expand_as(ids)


@pytest.mark.parametrize("num_levels", [1, 2])
@pytest.mark.parametrize("strength", [1.0, 2.5])
@pytest.mark.parametrize("keeps_condition", [False, True])
@pytest.mark.parametrize("name", MAKERS)
@torch.no_grad()
def test_a_light_pass_over_the_same_tokens_gives_what_the_full_one_gave(name, keeps_condition, strength, num_levels):
    predict, (ids, known) = predictor(name, strength, num_levels), partly_known(5, num_levels)
    cache: Cache = {"context": Context(keeps_condition=keeps_condition)}
    full = predict(ids, known, cache)
    torch.testing.assert_close(full, predict(ids, known, None), atol=1e-5, rtol=1e-5)
    chosen = Rng.at(3, 0, 5).order(N)[:, :6]
    cache["context"].chosen = chosen
    cache["known"] = known.flatten(1).float().mean(1)
    place = chosen.unsqueeze(1).expand(-1, num_levels, -1)
    own, own_known = ids.flatten(2).gather(2, place), known.flatten(2).gather(2, place)
    expected = full.flatten(2, 3).gather(2, place.unsqueeze(-1).expand(-1, -1, -1, S))
    for _ in range(2):  # a second light pass of the group, too
        light = predict(own, own_known, cache)
        torch.testing.assert_close(light, expected, atol=1e-5, rtol=1e-5)
    changed = predict((own + 1) % S, torch.ones_like(own_known), cache)
    assert (changed - expected).abs().max() > 1e-3, "the tokens of the group are seen"


@torch.no_grad()
def test_what_fills_up_a_row_is_seen_by_nobody():
    for name in MAKERS:
        predict, (ids, known) = predictor(name), partly_known(5)
        cache: Cache = {"context": Context()}
        predict(ids, known, cache)
        chosen = Rng.at(3, 0, 5).order(N)[:, :6]
        place = chosen.unsqueeze(1)
        own, own_known = ids.flatten(2).gather(2, place), known.flatten(2).gather(2, place)
        cache["context"].chosen = chosen
        cache["context"].used = torch.arange(6).expand(5, -1) < 4
        padded = predict(own, own_known, cache)[:, :, :4]
        other = own.clone()
        other[:, :, 4:] = (own[:, :, 4:] + 1) % S
        assert torch.equal(predict(other, own_known, cache)[:, :, :4], padded)
        cache["context"].chosen, cache["context"].used = chosen[:, :4], None
        predict(ids, known, {**cache, "context": (fresh := Context())})
        fresh.chosen = chosen[:, :4]
        alone = predict(own[:, :, :4], own_known[:, :, :4], {"context": fresh})
        torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_mar_reuses_encoder_and_decoder():
    torch.manual_seed(0)
    model = MAR(
        channels=3, num_classes=4, grid=GRID, dim=16, depth=2, num_heads=2, decoder_dim=24, buffer_size=3, head_width=8
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    model.eval()
    cond = {"label": LABELS}
    tokens = patchify(Rng.at(1, 0, 5).normal(3, *GRID), (1, 1))
    order = Rng.at(3, 0, 5).order(N)
    for visible in (torch.full((5,), 7), torch.tensor([0, 3, 7, 9, 2])):
        known = torch.zeros(5, N, dtype=torch.bool).scatter(1, order, torch.arange(N) < visible[:, None])
        chosen = rows_of(order, visible[:, None] + torch.arange(6))  # none of them is known
        for keeps_condition in (False, True):
            context = Context(keeps_condition=keeps_condition)
            full = model(tokens, None, cond, LAYOUT, {"context": context}, known=known)
            torch.testing.assert_close(full, model(tokens, None, cond, LAYOUT, None, known=known), atol=1e-5, rtol=1e-5)
            context.chosen = chosen
            own = rows_of(tokens, chosen)
            light = model(own, None, cond, LAYOUT, {"context": context}, known=torch.zeros(5, 6, dtype=torch.bool))
            torch.testing.assert_close(light, rows_of(full, chosen), atol=1e-5, rtol=1e-5)
            some = torch.arange(6).expand(5, -1) < 2
            after = model(own, None, cond, LAYOUT, {"context": context}, known=some)
            assert (after - light).abs().max() > 1e-3
            # With a single decoder layer and all of it recomputed, only the encoder's context would be stale.
            again = model(own, None, cond, LAYOUT, {"context": context}, known=some)
            torch.testing.assert_close(again, after)


def test_groups_are_counted_as_in_the_paper():
    """(steps, leading full ones) -> (full, light) of its table of settings."""
    for (steps, alone), (full, light) in {
        (32, 12): (22, 10),
        (24, 10): (17, 7),
        (20, 10): (15, 5),
        (16, 8): (12, 4),
        (16, 0): (8, 8),
        (96, 48): (72, 24),
    }.items():
        groups = Recap(full_steps=alone).groups(steps)
        assert (len(groups), sum(groups) - len(groups)) == (full, light)
        assert sum(groups) == steps
    assert Recap(light=3).groups(10) == [4, 4, 2]
    assert Recap(full_steps=9, light=3).groups(4) == [1, 1, 1, 1]


class Counted:
    def __init__(self, predict: Any):
        self.predict, self.full, self.light = predict, 0, 0

    def __call__(self, ids: Tensor, known: Tensor, cache: Any) -> Tensor:
        is_light = cache is not None and "context" in cache and cache["context"].is_light
        self.full, self.light = self.full + (not is_light), self.light + is_light
        return self.predict(ids, known, cache)


@pytest.mark.parametrize("num_levels", [1, 2])
@pytest.mark.parametrize("name", ["masked", "uvit", "mage"])
@torch.no_grad()
def test_sampling_with_reuse_fills_everything_with_fewer_full_passes(name, num_levels):
    holes = torch.full((5, num_levels, *GRID), -1)
    predict = Counted(predictor(name, 2.0, num_levels))
    states: list[Tensor] = []
    out = Sampler(num_steps=8, reuse=Recap(full_steps=2, light=2))(
        predict, holes, Rng.at(0, 0, 5), lambda step, total, ids: states.append(ids)
    )
    assert (predict.full, predict.light) == (4, 4)
    assert out.min() >= 0
    assert out.max() < S
    left = [int((ids < 0).flatten(2).any(1)[0].sum()) for ids in states]
    assert left == [int(n) for n in Sampler(num_steps=8).counts(torch.tensor([N]))[:, 0]]
    for a, b in itertools.pairwise(states):
        assert torch.equal(a[a >= 0], b[a >= 0])
    part = Sampler(num_steps=8, reuse=Recap(full_steps=2, light=2))(
        predictor(name, 2.0, num_levels, LABELS[1:3]), holes[:2], Rng.at(0, 1, 2)
    )
    assert torch.equal(out[1:3], part)


@pytest.mark.parametrize("name", ["masked", "uvit"])
@torch.no_grad()
def test_switched_off_it_is_plain_sampling_to_the_bit(name):
    predict, holes = predictor(name, 2.0), torch.full((5, 1, *GRID), -1)
    plain = Sampler(num_steps=6)(predict, holes, Rng.at(0, 0, 5))
    for off in (Recap(light=0), Recap(full_steps=6, light=3)):
        assert torch.equal(Sampler(num_steps=6, reuse=off)(predict, holes, Rng.at(0, 0, 5)), plain)
    on = Sampler(num_steps=6, reuse=Recap(light=2))(predict, holes, Rng.at(0, 0, 5))
    assert not torch.equal(on, plain)


def shallow(num_levels: int) -> MaskedBackbone:
    """One layer: what tokens offer to others does not depend on these, so that nothing that is kept ages."""
    torch.manual_seed(0)
    model = MaskedBackbone(**{**IDS, "depth": 1}, num_levels=num_levels, mixer={"type": "attention", "num_heads": 2})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


@pytest.mark.parametrize("confidence", ["log_prob", "logit"])
@pytest.mark.parametrize("num_levels", [1, 2])
@torch.no_grad()
def test_light_steps_that_choose_among_all_that_is_open_are_full_ones_where_nothing_ages(num_levels, confidence):
    predict = guide(Objective(), shallow(num_levels), {"label": LABELS}, LAYOUT, Guidance(2.0, "linear"))
    ids, _ = partly_known(5, num_levels)
    open_at = torch.arange(N).view(GRID) < torch.tensor([3, 16, 9, 16, 12]).view(5, 1, 1, 1)
    start = torch.where(open_at, -1, ids)
    how: dict[str, Any] = {"num_steps": 8, "confidence": confidence, "softmax_end": 0.6}

    def draw(reuse: Any) -> Tensor:
        return Sampler(**how, reuse=reuse)(predict, start, Rng.at(0, 0, 5))

    plain = draw(None)
    for full_steps in (0, 1):
        anew = Recap(full_steps=full_steps, light=3, choice="anew", spare=100)
        assert torch.equal(draw(anew), plain)
        assert not torch.equal(draw(Recap(full_steps=full_steps, light=3)), plain), (
            "the order of the full step is another"
        )
        assert not torch.equal(draw(Recap(full_steps=full_steps, light=3, choice="anew", spare=0)), plain)


@pytest.mark.parametrize("spare", [0.0, 0.5, 2.0])
@torch.no_grad()
def test_spare_tokens_leave_the_counts_and_every_sample_as_they_are(spare):
    ids, _ = partly_known(3)
    open_at = torch.arange(N).view(GRID) < torch.tensor([3, 16, 9]).view(3, 1, 1, 1)
    start = torch.where(open_at, -1, ids)
    states: list[Tensor] = []
    sampler = Sampler(num_steps=7, reuse=Recap(full_steps=1, light=2, choice="anew", spare=spare))
    out = sampler(
        predictor("uvit", 2.0, labels=LABELS[:3]), start, Rng.at(0, 0, 3), lambda i, n, ids: states.append(ids)
    )
    assert torch.equal(out[~open_at], ids[~open_at])
    left = torch.stack([(ids < 0).flatten(1).sum(1) for ids in states])
    assert torch.equal(left, sampler.counts(torch.tensor([3, 16, 9])))
    for a, b in itertools.pairwise(states):
        assert torch.equal(a[a >= 0], b[a >= 0])
    for i in range(3):
        alone = sampler(predictor("uvit", 2.0, labels=LABELS[i : i + 1]), start[i : i + 1], Rng.at(0, i, 1))
        assert torch.equal(out[i : i + 1], alone)


@torch.no_grad()
def test_switched_off_mar_is_plain_too():
    torch.manual_seed(0)
    model = MAR(channels=3, num_classes=4, grid=GRID, dim=16, depth=1, num_heads=2, buffer_size=2, head_width=8).eval()
    predict: Any = guide(MAROjective(), model, {"label": LABELS}, LAYOUT, Guidance(2.0))
    holes = torch.full((5, 3, *GRID), torch.nan)
    plain = MARSampler(num_steps=6, head_steps=2)(predict, holes, Rng.at(0, 0, 5))
    off = MARSampler(num_steps=6, head_steps=2, reuse=Recap(full_steps=6))(predict, holes, Rng.at(0, 0, 5))
    assert torch.equal(off, plain)


@torch.no_grad()
def test_uneven_batches_are_what_their_samples_are_alone():
    ids, _ = partly_known(3)
    open_at = torch.arange(N).view(GRID) < torch.tensor([3, 16, 9]).view(3, 1, 1, 1)
    start = torch.where(open_at, -1, ids)
    sampler = Sampler(num_steps=5, reuse=Recap(light=3))
    out = sampler(predictor("bert", 2.0, labels=LABELS[:3]), start, Rng.at(0, 0, 3))
    assert torch.equal(out[~open_at], ids[~open_at])
    for i in range(3):
        alone = sampler(predictor("bert", 2.0, labels=LABELS[i : i + 1]), start[i : i + 1], Rng.at(0, i, 1))
        assert torch.equal(out[i : i + 1], alone)


@torch.no_grad()
def test_a_worse_model_keeps_a_context_of_its_own():
    weak = network("uvit, linear")
    predict = predictor("uvit", 2.0, weak=weak)
    ids, known = partly_known(5)
    cache: Cache = {"context": Context()}
    full = predict(ids, known, cache)
    chosen = Rng.at(3, 0, 5).order(N)[:, :6]
    cache["context"].chosen, cache["known"] = chosen, known.flatten(1).float().mean(1)
    place = chosen.unsqueeze(1)
    light = predict(ids.flatten(2).gather(2, place), known.flatten(2).gather(2, place), cache)
    expected = full.flatten(2, 3).gather(2, place.unsqueeze(-1).expand(-1, -1, -1, S))
    torch.testing.assert_close(light, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_what_is_kept_is_as_large_as_the_formula_says():
    context = Context()
    ids, known = partly_known(5)
    predictor("uvit")(ids, known, {"context": context})
    assert (
        context.num_bytes == 5 * 2 * 3 * (N + 1) * 16 * 4
    )  # batch, keys and values, layers, tokens with the class, width, bytes


def test_tokens_must_meet_by_attention_alone():
    torch.manual_seed(0)
    mixers = [{"type": "attention", "num_heads": 2}, {"type": "window", "num_heads": 2, "size": 2}]
    model = MaskedBackbone(**IDS, num_levels=1, mixer=mixers).eval()
    predict = Objective().predictor(model, {"label": LABELS}, LAYOUT)
    with pytest.raises(UsageError, match=r"reuse\.type=recap needs attention in every layer, found Window"):
        Sampler(num_steps=4, reuse=Recap())(predict, torch.full((5, 1, *GRID), -1), Rng.at(0, 0, 5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"full_steps": -1}, "sampler.reuse.full_steps=-1"),
        ({"light": -1}, "sampler.reuse.light=-1"),
        ({"head_steps": 0}, "sampler.reuse.head_steps=0"),
        ({"choice": "anew", "spare": -0.5}, "sampler.reuse.spare=-0.5"),
        ({"spare": 0.5}, "spare=0.5 leaves a choice to light steps"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        Recap(**options)


@pytest.mark.parametrize("sampler", [MARSampler, OctreeSampler])
def test_samplers_of_random_order_refuse_a_choice(sampler):
    with pytest.raises(UsageError, match=r"sampler\.reuse\.choice=anew is for sampler\.type=masked"):
        sampler(reuse=Recap(choice="anew"))


# Octrees


def tree_model(**options: Any) -> OctGPT:
    torch.manual_seed(0)
    sizes = {"full_depth": 1, "code_depth": 3, "bits": 6, "dim": 24, "depth": 4, "num_heads": 2, "num_classes": 4}
    model = OctGPT(**{**sizes, "window": 16, "dilation": 2, "buffer": 3, "dropout": 0.0, **options}).eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.08)
    return model


def growing(model: OctGPT, labels: Tensor, strength: float = 1.0) -> Any:
    return guide(OctreeMasked(), model, {"label": labels}, LAYOUT, Guidance(strength))


TREES = [{"depth": 8}, {"window": 64, "dilation": 4}, {"has_shift": False, "norm": "rms", "positions": "table"}]


@pytest.mark.parametrize("keeps_condition", [False, True])
@pytest.mark.parametrize("options", TREES)
@torch.no_grad()
def test_a_light_pass_over_nodes_of_an_octree_gives_what_the_full_one_gave(options, keeps_condition):
    predict = growing(tree_model(**options), LABELS[2:4], 2.0)
    predict.begin(predict.start())
    random = torch.Generator().manual_seed(0)
    for depth in range(1, 4):
        n = len(predict.samples)
        shape = (n, predict.bits) if predict.bits else (n,)
        values = torch.randint(0, 2, shape, generator=random)
        for share in (0.0, 0.4):
            known = torch.rand(n, generator=random) < share
            full = predict.logits(values, known)
            chosen = (torch.rand(n, generator=random) < 0.2).nonzero().squeeze(1)
            for _ in range(2):  # a second light pass of the group, too
                light = predict.light(values, known, chosen, keeps_condition)
                torch.testing.assert_close(light, full[chosen], atol=1e-4, rtol=1e-4)
            # What has become known is seen by those that are computed with it, as in a full pass if all are.
            more = known.clone()
            more[chosen[::2]] = True
            other = predict.light(values, more, chosen, keeps_condition)
            assert (other - light).abs().max() > 1e-3
            if not keeps_condition:
                everyone = predict.light(values, more, torch.arange(n), keeps_condition)
                torch.testing.assert_close(everyone, predict.logits(values, more), atol=1e-4, rtol=1e-4)
        predict.finish(values)
        assert depth < 3 or predict.result().codes.shape == shape


@torch.no_grad()
def test_octrees_without_light_steps_are_plain_to_the_bit_and_with_them_the_same_in_any_batch():
    model = tree_model()

    def draw(rows: slice, reuse: Any = None, calls: list[str] | None = None) -> OctreeTokens:
        predict = growing(model, LABELS[:3][rows], 1.5)
        if calls is not None:
            full, light = predict.logits, predict.light
            predict.logits = lambda *given: calls.append("logits") or full(*given)
            predict.light = lambda *given: calls.append("light") or light(*given)
        sampler = OctreeSampler(num_steps=[3, 5, 6], temperature=[1.0, 1.0, 0.7], reuse=reuse)
        return sampler(predict, predict.start(), Rng.at(0, 0, 3)[rows])

    calls: list[str] = []
    plain = draw(slice(0, 3), None, calls)
    assert calls.count("logits") == len(calls) == 14
    for off in (Recap(light=0), Recap(full_steps=6, light=3)):
        found = draw(slice(0, 3), off)
        assert torch.equal(found.splits, plain.splits)
        assert torch.equal(found.codes, plain.codes)
    calls.clear()
    on = Recap(full_steps=1, light=1)
    together = draw(slice(0, 3), on, calls)
    # Of three steps one by itself, then one full and one light; of five 1 + 2 + 2; of six 1 + 2 + 2 + 1.
    pair = ["logits", "light"]
    assert calls == ["logits", *pair, "logits", *pair, *pair, "logits", *pair, *pair, "logits"]
    assert not torch.equal(together.codes, plain.codes)
    owner = together.samples
    for i in range(3):
        alone = draw(slice(i, i + 1), on)
        assert torch.equal(alone.splits, together.splits[owner[: len(together.splits)] == i])
        assert torch.equal(alone.codes, together.codes[owner[len(together.splits) :] == i])


def test_a_recipe_of_octrees_may_have_light_steps():
    section = {"type": "octree_masked", "reuse": {"type": "recap", "light": 1}}
    check_reuse(section, {"type": "octree_masked"})
    with pytest.raises(UsageError, match="serves latents"):
        check_reuse(section | {"reuse": {"type": "skip_blocks"}}, {"type": "octree_masked"})
