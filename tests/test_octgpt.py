"""OctGPT: who sees whom, what a batch may change, and that finished depths can be kept."""

from __future__ import annotations

import pytest
import torch

from genkit.backbones.octgpt import Growing, OctGPT
from genkit.errors import GenkitError, UsageError
from genkit.guidance import Guidance, guide
from genkit.importers import octgpt as importer
from genkit.nn.sphere import BinarySphere
from genkit.nn.text import bytes_of
from genkit.objectives.octree_masked import OctreeMasked
from genkit.octree import build
from genkit.octree.tokens import OctreeTokens, samples_of, splits_of
from genkit.rng import Rng
from genkit.samplers.octree_masked import OctreeMasked as Sampler

SIZES = {"full_depth": 1, "code_depth": 3, "bits": 6, "dim": 24, "depth": 8, "num_heads": 2}


def tiny(**options) -> OctGPT:
    torch.manual_seed(0)
    model = OctGPT(**{**SIZES, "window": 16, "dilation": 2, "buffer": 3, "num_classes": 2, "dropout": 0.0, **options})
    with torch.no_grad():
        for parameter in model.parameters():  # larger than at the start, so that whatever is seen is felt
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def shapes(count: int = 3, seed: int = 0) -> OctreeTokens:
    random = torch.Generator().manual_seed(seed)
    sizes = [20 * (i + 1) for i in range(count)]
    points = torch.cat([torch.rand(n, 3, generator=random) * 1.6 - 0.8 for n in sizes])
    samples = torch.arange(count).repeat_interleave(torch.tensor(sizes))
    octree = build.from_points(points, samples=samples, batch_size=count, depth=3, full_depth=1)
    codes = torch.randint(0, 2, (octree.count(3), 6), generator=random)
    return OctreeTokens(octree, splits_of(octree), codes)


def logits(model: OctGPT, tokens: OctreeTokens, known: torch.Tensor, labels: list[int]) -> torch.Tensor:
    """Of all tokens, [T, 2 bits], those of split bits padded."""
    split, code = model(tokens, known, {"label": torch.tensor(labels)})
    return torch.cat([torch.nn.functional.pad(split, (0, 10)), code.flatten(1)])


def depths(tokens: OctreeTokens) -> torch.Tensor:
    return torch.cat([torch.full((tokens.octree.count(d),), d) for d in range(1, 4)])


@pytest.mark.parametrize("is_aligned", [True, False])
def test_shallow_depths_see_nothing_of_deeper_ones(is_aligned):
    model, tokens = tiny(is_aligned=is_aligned), shapes()
    known = torch.ones(len(samples_of(tokens.octree)), dtype=torch.bool)
    before = logits(model, tokens, known, [0, 1, 0])
    tokens.codes = 1 - tokens.codes
    after = logits(model, tokens, known, [0, 1, 0])
    is_code = depths(tokens) == 3
    assert torch.equal(before[~is_code], after[~is_code])
    assert (before[is_code] != after[is_code]).any()


@pytest.mark.parametrize("is_aligned", [True, False])
def test_shapes_of_a_batch_see_nothing_of_each_other(is_aligned):
    model, tokens = tiny(is_aligned=is_aligned), shapes()
    owner = samples_of(tokens.octree)
    known = torch.rand(len(owner), generator=torch.Generator().manual_seed(0)) < 0.5
    before = logits(model, tokens, known, [0, 1, 0])
    tokens.codes = torch.where((tokens.octree.samples(3) == 1)[:, None], 1 - tokens.codes, tokens.codes)
    after = logits(model, tokens, known, [0, 0, 0])
    assert torch.equal(before[owner != 1], after[owner != 1])
    assert (before[owner == 1] != after[owner == 1]).any()


def test_unknown_values_are_not_read():
    model, tokens = tiny(), shapes()
    owner = samples_of(tokens.octree)
    known = torch.rand(len(owner), generator=torch.Generator().manual_seed(0)) < 0.5
    before = logits(model, tokens, known, [0, 1, -1])
    tokens.splits = torch.where(known[: len(tokens.splits)], tokens.splits, 1 - tokens.splits)
    tokens.codes = torch.where(known[len(tokens.splits) :, None], tokens.codes, 1 - tokens.codes)
    assert torch.equal(before, logits(model, tokens, known, [0, 1, -1]))


@pytest.mark.parametrize("has_shift", [True, False])
def test_a_shape_alone_and_in_a_batch_is_the_same(has_shift):
    model = tiny(has_shift=has_shift)
    tokens = shapes(3)
    owner = samples_of(tokens.octree)
    known = torch.rand(len(owner), generator=torch.Generator().manual_seed(1)) < 0.6
    together = logits(model, tokens, known, [0, 1, 0])
    random = torch.Generator().manual_seed(0)
    points = [torch.rand(20 * (i + 1), 3, generator=random) * 1.6 - 0.8 for i in range(3)]
    for i in range(3):
        octree = build.from_points(points[i], depth=3, full_depth=1)
        codes = tokens.codes[tokens.octree.samples(3) == i]
        alone = logits(model, OctreeTokens(octree, splits_of(octree), codes), known[owner == i], [[0, 1, 0][i]])
        torch.testing.assert_close(alone, together[owner == i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"positions": "table", "norm": "rms"}, {"window": 64, "dilation": 4}])
def test_kept_depths_give_the_logits_of_the_whole_sequence(options):
    model, tokens = tiny(**options), shapes()
    octree, cond = tokens.octree, {"label": torch.tensor([0, 1, -1])}
    growing, at = Growing(model, cond, build.until(octree, 1)), 0
    for d in range(1, 4):
        growing.at(build.until(octree, d))
        count = octree.count(d)
        current = tokens.codes if d == 3 else tokens.splits[at : at + count]
        for share in (0.0, 0.3, 0.9):
            known = torch.rand(count, generator=torch.Generator().manual_seed(d)) < share
            whole = torch.cat([torch.ones(at, dtype=torch.bool), known])
            if d < 3:  # the sequence ends with this depth
                x = model.embed_splits(tokens.splits[: at + count])
                places = model.places(octree, range(1, d + 1))
                expected = model.split_logits(model.decode_all(x, places, whole, cond)[at:])
            else:
                expected = model(tokens, whole, cond)[1]
            torch.testing.assert_close(growing.logits(current, known), expected, rtol=1e-4, atol=1e-5)
        growing.finish(current)
        at += count


@pytest.mark.parametrize("context", ["concat", "cross"])
def test_a_condition_of_tokens_reaches_its_own_shape_alone(context):
    model, tokens = tiny(context_dim=8, context=context, buffer=5), shapes()
    owner = samples_of(tokens.octree)
    known = torch.zeros(len(owner), dtype=torch.bool)
    words = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    before = torch.cat([x.flatten(1) for x in model(tokens, known, {"context": words})][:1])
    words[1] += 1
    after = torch.cat([x.flatten(1) for x in model(tokens, known, {"context": words})][:1])
    changed = (before != after).any(1)
    assert changed[owner[: len(before)] == 1].any()
    assert not changed[owner[: len(before)] != 1].any()
    with pytest.raises(UsageError, match=r"cond\['context'\] is missing"):
        model(tokens, known, {})
    with pytest.raises(UsageError, match="do not fit a buffer of 5"):
        model(tokens, known, {"context": torch.zeros(3, 6, 8)})


def test_the_mask_may_hold_what_is_told_and_nothing_where_nothing_is():
    plain, told = (tiny(context_dim=8, buffer=5, num_classes=0, has_told_mask=has) for has in (False, True))
    words = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    words[1], words[2, 2:] = 0, 0
    (_, _, learned), (front, _, mask) = (model.condition({"context": words}, 3) for model in (plain, told))
    assert torch.equal(learned, told.mask.expand(3, -1))
    assert torch.equal(mask[1], learned[1])
    front = front.unflatten(0, (3, 5))
    torch.testing.assert_close(mask[0] - learned[0], front[0, :4].mean(0))
    torch.testing.assert_close(mask[2] - learned[2], front[2, :2].mean(0))


def test_captions_are_read_dropped_and_guided_away_from():
    model, tokens = tiny(num_classes=0, text_length=6, buffer=6, embed_std=0.5), shapes()
    owner = samples_of(tokens.octree)
    known = torch.zeros(len(owner), dtype=torch.bool)
    text = bytes_of(["chair", "a mug", ""], 6)
    before = model(tokens, known, {"text": text})[0]
    after = model(tokens, known, {"text": bytes_of(["chair", "a car", ""], 6)})[0]
    changed = (before != after).any(1)
    assert owner[: len(before)][changed].unique().tolist() == [1]
    told = []
    objective = OctreeMasked(cond_drop=1.0)
    objective(
        lambda x, known, cond: told.append(cond) or model(x, known, cond), tokens, {"text": text}, None, Rng.at(0, 0, 3)
    )
    assert not told[0]["text"].any()
    plain, guided = (objective.guided(model, {"text": text}, Guidance(strength)) for strength in (1.0, 3.0))
    for grow in (plain, guided):
        grow.begin(grow.start())
    values, known = torch.full((len(plain.samples),), -1), torch.zeros(len(plain.samples), dtype=torch.bool)
    moved = (plain.logits(values, known) != guided.logits(values, known)).any(1)
    assert plain.samples[moved].unique().tolist() == [0, 1], "a shape without a caption is guided nowhere"
    with pytest.raises(UsageError, match="one or the other"):
        tiny(text_length=6, context_dim=8)


def test_training_reaches_every_parameter_and_depends_on_no_batch_mate():
    model, tokens, objective = tiny().train(), shapes(), OctreeMasked(cond_drop=0.5)
    rng = Rng.at(0, 0, 3)
    losses = objective(model, tokens, {"label": torch.tensor([0, 1, 0])}, None, rng)
    assert {name: value.shape for name, value in losses.items() if name[0] != "_"} == {"split": (3,), "code": (3,)}
    sum(value.mean() for name, value in losses.items() if name[0] != "_").backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_sampling_is_the_same_for_any_batch_and_respects_the_steps():
    model, objective = tiny(), OctreeMasked()
    sampler = Sampler(num_steps=[3, 4, 5], temperature=[1.0, 1.0, 0.7])
    labels = torch.tensor([0, 1, -1])

    def draw(rows: slice) -> OctreeTokens:
        predict = objective.predictor(model, {"label": labels[rows]}, None)
        return sampler(predict, predict.start(), Rng([5, 6, 7])[rows])

    together = draw(slice(0, 3))
    assert together.octree.depth == 3
    for i in range(3):
        alone = draw(slice(i, i + 1))
        owner = samples_of(together.octree)
        assert torch.equal(alone.splits, together.splits[owner[: len(together.splits)] == i])
        assert torch.equal(alone.codes, together.codes[together.octree.samples(3) == i])


def test_every_token_is_revealed_once_and_finished_depths_are_computed_once():
    model, objective = tiny(), OctreeMasked()
    predict = objective.predictor(model, {"label": torch.tensor([0, 1])}, None)
    seen: list[tuple[int, int]] = []
    original = predict.logits

    def watched(values, known):
        seen.append((len(known), int(known.sum())))
        return original(values, known)

    predict.logits = watched
    calls: list[int] = []
    model.decoder.register_forward_hook(lambda module, arguments, out: calls.append(len(arguments[0])))
    found = Sampler(num_steps=[2, 3, 4], temperature=[1.0] * 3, remask=0.0)(predict, predict.start(), Rng([0, 1]))
    counts = [found.octree.count(d) for d in (1, 2, 3)]
    assert [n for n, _ in seen] == [counts[0]] * 2 + [counts[1]] * 3 + [counts[2]] * 4
    for d, steps in ((0, 2), (1, 3), (2, 4)):
        known = [k for n, k in seen if n == counts[d]][:steps]
        assert known[0] == 0
        assert known == sorted(known)
    # What a call computes is the present depth alone; a depth is put away in one more call.
    assert max(calls) <= max(*counts, counts[0] + 2 * model.buffer)


def test_token_by_token_is_many_steps():
    model, objective = tiny(), OctreeMasked()
    predict = objective.predictor(model, {"label": torch.tensor([0])}, None)
    found = Sampler(num_steps=12, temperature=1.0)(predict, predict.start(), Rng([0]))
    assert (found.splits >= 0).all()
    assert ((found.codes == 0) | (found.codes == 1)).all()


def test_bits_come_back():
    sphere = BinarySphere(8).eval()
    bits = torch.randint(0, 2, (50, 8))
    codes, again, _ = sphere(sphere.codes(bits) * 3)
    assert torch.equal(again, bits)
    torch.testing.assert_close(codes, sphere.codes(bits))
    torch.testing.assert_close(codes.norm(dim=1), torch.ones(50))
    z = torch.randn(4, 8, requires_grad=True)
    grad = torch.autograd.grad(sphere(z)[0].sum(), z)[0]
    u = torch.nn.functional.normalize(z, dim=1)
    torch.testing.assert_close(grad, torch.autograd.grad(u.sum() * 8**-0.5, z)[0])
    assert (BinarySphere(8, flip=1.0).train()(z)[1] != sphere(z)[1]).any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_heads": 5}, "divisible by 6"),
        ({"depth": 3}, "must be even"),
        ({"full_depth": 4}, "must rise"),
        ({"max_depth": 1}, "1 more than max_depth 1 at most"),
        ({"num_scales": 1}, "too few"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        tiny(**options)


def test_windows_of_a_whole_batch_cannot_be_kept():
    with pytest.raises(UsageError, match="is_aligned"):
        Growing(tiny(is_aligned=False), {}, build.complete(1))


def test_a_model_without_a_class_for_any_says_so():
    with pytest.raises(UsageError, match="without a class for 'any'"):
        tiny(has_null=False).labels({"label": torch.tensor([-1])}, 1)


# Counted from the official modules built with the options of the released configs.
PUBLISHED = {
    "shapenet": ({"dim": 768, "window": 2048, "dilation": 2}, 170_291_778),
    "objaverse": (
        {
            "dim": 1152,
            "window": 1024,
            "dilation": 8,
            "norm": "rms",
            "positions": "table",
            "buffer": 77,
            "context_dim": 768,
            "context": "cross",
        },
        440_362_050,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    options, count = PUBLISHED[name]
    with torch.device("meta"):
        model = OctGPT(bits=32, full_depth=3, code_depth=6, has_null=False, **options)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_the_importer_reads_its_own_export_and_names_what_is_missing():
    from genkit.importers.names import source_of

    model = tiny(positions="table", norm="rms", num_classes=0, context_dim=8, context="cross", buffer=5)
    state = {source_of(key, importer.RULES)[0]: value for key, value in model.state_dict().items()}
    options = {"patch_size": 16, "dilation": 2, "num_heads": 2, "buffer_size": 5, "depth_low": 1, "depth_high": 3}
    again = importer.convert(state, options)
    tokens = shapes()
    known, words = torch.ones(len(samples_of(tokens.octree)), dtype=torch.bool), torch.randn(3, 4, 8)
    for a, b in zip(model(tokens, known, {"context": words}), again(tokens, known, {"context": words}), strict=True):
        assert torch.equal(a, b)
    state["encoder_ln.weights"] = state.pop("encoder_ln.weight")
    with pytest.raises(GenkitError, match=r"unknown: encoder_ln\.weights; missing: encoder_ln\.weight"):
        importer.convert(state, options)
    with pytest.raises(UsageError, match="patch_size and dilation"):
        importer.convert(state)


def test_classes_that_the_original_does_not_read_are_left_out():
    from genkit.importers.names import source_of

    options = {"patch_size": 16, "dilation": 2, "num_heads": 2, "buffer_size": 3, "depth_low": 1, "depth_high": 3}
    tokens = shapes()
    known = torch.ones(len(samples_of(tokens.octree)), dtype=torch.bool)
    context = {"context_dim": 8, "buffer": 4}
    for extra, told, cond in (({}, {"condition_type": "none"}, {}), (context, {}, {"context": torch.randn(3, 4, 8)})):
        model = tiny(num_classes=0, positions="table", **extra)
        state = {source_of(key, importer.RULES)[0]: value for key, value in model.state_dict().items()}
        state["class_emb.weight"] = torch.cat([state["class_emb.weight"], torch.randn(4, 24)])
        again = importer.convert(state, options | told | {"buffer_size": model.buffer})
        for a, b in zip(model(tokens, known, cond), again(tokens, known, cond), strict=True):
            assert torch.equal(a, b)


def test_codes_one_depth_below_the_positions():
    """Positions count halves of the nodes one depth above, which are whole nodes of the codes: theirs stand at their corners."""
    model, tokens = tiny(max_depth=2, positions="table"), shapes()
    places = model.places(tokens.octree, range(1, 4))
    assert torch.equal(places.xyz[-tokens.octree.count(3) :].long(), tokens.octree.xyz(3))
    assert int(places.xyz.max()) < 8
    known = torch.ones(len(samples_of(tokens.octree)), dtype=torch.bool)
    assert logits(model, tokens, known, [0, 1, 0]).isfinite().all()


def test_guidance_goes_from_the_model_without_classes_past_the_one_with():
    model, objective = tiny(), OctreeMasked()
    cond = {"label": torch.tensor([0, 1])}
    values, known = torch.zeros(16, dtype=torch.int64), torch.zeros(16, dtype=torch.bool)

    def first(predict):
        predict.begin(predict.start(2))
        return predict.logits(values, known)

    plain = first(objective.predictor(model, cond, None))
    null = first(objective.predictor(model, {"label": torch.tensor([-1, -1])}, None))
    assert not torch.equal(plain, null)
    for strength in (0.0, 2.5):
        guided = first(guide(objective, model, cond, None, Guidance(strength)))
        torch.testing.assert_close(guided, null + strength * (plain - null))
    torch.testing.assert_close(first(guide(objective, model, cond, None, Guidance(1.0))), plain)
    other = tiny(depth=4)
    weak = first(guide(objective, model, cond, None, Guidance(2.0), other))
    torch.testing.assert_close(weak, 2 * plain - first(objective.predictor(other, cond, None)))
    with pytest.raises(UsageError, match="guidance_schedule=linear"):
        guide(objective, model, cond, None, Guidance(2.0, schedule="linear"))


def test_masks_are_drawn_per_shape_and_as_often_as_they_should():
    objective = OctreeMasked(min_masked=0.5)
    samples = torch.arange(400).repeat_interleave(20)
    shares = objective.draw_mask(samples, 400, Rng(list(range(400)))).view(400, 20).float().mean(1)
    assert shares.min() >= 0.5
    # Half of a normal distribution around 1 with deviation 0.25, cut at two deviations: its mean is 1 - 0.25 * 0.7206.
    assert abs(float(shares.mean()) - 0.82) < 0.04
    alone = objective.draw_mask(torch.zeros(20, dtype=torch.int64), 1, Rng([7]))
    assert torch.equal(alone, objective.draw_mask(samples, 400, Rng(list(range(400))))[samples == 7])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_steps": 0}, "num_steps=0"),
        ({"num_steps": [3, 0]}, "at least 1"),
        ({"temperature": 0.0}, "must be positive"),
        ({"remask": 2.0}, "must be in"),
    ],
)
def test_samplers_that_cannot_be_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        Sampler(**options)
    predict = OctreeMasked().predictor(tiny(), {"label": torch.tensor([0])}, None)
    with pytest.raises(UsageError, match="has 2 entries for 3 depths"):
        Sampler(num_steps=[1, 2])(predict, predict.start(), Rng([0]))
