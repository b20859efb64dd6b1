"""Generators that draw ids in sequence: what holds for all of them, what does not fit, and the whole line."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from genkit.backbones.dq import DQ
from genkit.backbones.gpt import GPT
from genkit.backbones.var import VAR
from genkit.errors import UsageError
from genkit.guidance import Guidance, guide
from genkit.nn.grain_sequence import GrainSequence
from genkit.objectives.next_code import NextCode
from genkit.objectives.next_scale import NextScale
from genkit.objectives.next_token import NextToken
from genkit.pipeline import open_run
from genkit.rng import Rng
from genkit.samplers.autoregressive import Autoregressive
from genkit.training import train
from tests.sequences import ATTENTION, GRID, LABELS, LAYOUT, TOKENIZERS, S, each, empty, make, random_ids, sequence_of
from tests.tiny import GENERATOR, TOKENIZER

# All of them


@each
def test_first_loss_is_the_logarithm_of_the_codebook_size(kind):
    model, objective = make(kind, random=False)
    if kind == "var":  # its head begins small, not at zero
        torch.nn.init.zeros_(model.head.linear.weight)
    losses = objective(model, random_ids(kind), {"label": LABELS}, LAYOUT, Rng.at(0, 0, 4))
    torch.testing.assert_close(losses.get("nll", losses.get("content")), torch.full((4,), math.log(S)))


@each
@torch.no_grad()
def test_cached_equals_uncached_and_both_the_loss(kind):
    """Step by step with and without a cache; the sum of what the steps say of the ids is the loss of the one pass that trains."""
    model, objective = make(kind)
    ids = random_ids(kind)[:1] if kind == "dq" else random_ids(kind)
    cond = {"label": LABELS[: len(ids)]}
    losses = objective(model, ids, cond, LAYOUT, Rng.at(0, 0, len(ids)))
    predict = objective.predictor(model, cond, LAYOUT)
    sequence, cache, done, total = sequence_of(kind, predict, ids), {}, 0, torch.zeros(len(ids))
    for count in predict.counts:
        if done == sequence.shape[1]:
            break
        logits = predict(sequence[:, :done], cache)
        torch.testing.assert_close(logits, predict(sequence[:, :done], None), atol=1e-5, rtol=1e-5)
        answers = sequence[:, done : done + count]
        total += -logits.log_softmax(-1).gather(-1, answers.unsqueeze(-1)).sum((1, 2))
        done += count
    if kind == "dq":
        expected = (losses["content"] + losses["position"]) * losses["_codes"]
    else:
        expected = losses["nll"] * sequence.shape[1]
    torch.testing.assert_close(total, expected, atol=1e-4, rtol=1e-5)


@each
@torch.no_grad()
def test_a_cache_may_be_entered_anywhere(kind):
    model, objective = make(kind)
    predict = objective.predictor(model, {"label": LABELS[:1]}, LAYOUT)
    sequence, cache = sequence_of(kind, predict, random_ids(kind)[:1]), {}
    ends = [0, *itertools.accumulate(predict.counts)]
    for done in [ends[i] for i in (1, 2)] if kind == "var" else (4, 6, 7, 12):
        expected = predict(sequence[:, :done], None)
        torch.testing.assert_close(predict(sequence[:, :done], cache), expected, atol=1e-5, rtol=1e-5)


@each
@torch.no_grad()
def test_samples_are_whole_and_depend_on_their_stream_alone(kind):
    model, objective = make(kind)

    def sample(rows: slice, cache: bool = True) -> Tensor:
        cond = {"label": LABELS[rows]}
        predict = guide(objective, model, cond, LAYOUT, Guidance(1.5, "linear"))
        first, count = rows.start, rows.stop - rows.start
        return Autoregressive(top_p=0.95, cache=cache)(predict, empty(predict, count), Rng.at(0, first, count))

    full = sample(slice(0, 4))
    assert full.min() >= 0
    assert full.max() < S
    assert len(full.unique(dim=0)) == 4
    assert torch.equal(full[1:3], sample(slice(1, 3)))
    assert torch.equal(full, sample(slice(0, 4), cache=False))


@each
@torch.no_grad()
def test_guidance_is_the_line_through_both_predictions(kind):
    model, objective = make(kind)
    label = LABELS[:1]
    plain, null = (objective.predictor(model, {"label": y}, LAYOUT) for y in (label, label * 0 - 1))
    sequence = sequence_of(kind, plain, random_ids(kind)[:1])
    done = plain.counts[0]
    strong, weak = plain(sequence[:, :done]), null(sequence[:, :done])
    guided = guide(objective, model, {"label": label}, LAYOUT, Guidance(3.0))(sequence[:, :done])
    reachable = strong.isfinite()
    torch.testing.assert_close(guided[reachable], torch.lerp(weak, strong, 3.0)[reachable], atol=1e-4, rtol=1e-5)
    assert torch.equal(guided.isneginf(), ~reachable)
    fraction = 1 / (len(plain.counts) - 1)
    grown = guide(objective, model, {"label": label}, LAYOUT, Guidance(3.0, "linear"))(sequence[:, :done])
    expected = torch.lerp(weak, strong, 1 + 2 * fraction)
    torch.testing.assert_close(grown[reachable], expected[reachable], atol=1e-4, rtol=1e-5)
    off = guide(objective, model, {"label": label}, LAYOUT, Guidance(3.0, interval=(0.0, 0.1)))(sequence[:, :done])
    torch.testing.assert_close(off[reachable], strong[reachable], atol=1e-4, rtol=1e-5)


@each
@torch.no_grad()
def test_a_worse_model_can_guide(kind):
    model, objective = make(kind)
    worse, _ = make(kind, random=False)
    cond = {"label": LABELS}
    predict = guide(objective, model, cond, LAYOUT, Guidance(2.0), weak=worse)
    assert Autoregressive()(predict, empty(predict, 4), Rng.at(0, 0, 4)).min() >= 0


@each
def test_every_parameter_learns(kind):
    model, objective = make(kind)
    losses = objective(model.train(), random_ids(kind), {"label": LABELS}, LAYOUT, Rng.at(0, 0, 4))
    sum(value.mean() for name, value in losses.items() if name[0] != "_").backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in model.parameters())


@each
def test_models_survive_saving(kind, tmp_path):
    model, objective = make(kind)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, low_cpu_mem_usage=False).eval()
    first, second = (objective.predictor(m, {"label": LABELS}, LAYOUT) for m in (model, again))
    ids = torch.zeros(4, 0, dtype=torch.int64)
    assert torch.equal(first(ids), second(ids))


@each
def test_labels_are_dropped(kind):
    model, _ = make(kind)
    objective = {"gpt": NextToken, "rq": NextToken, "var": NextScale, "dq": NextCode}[kind](cond_drop=1.0)
    if hasattr(objective, "bind"):
        objective.bind(TOKENIZERS[kind])
    losses = [
        objective(model, random_ids(kind), {"label": y}, LAYOUT, Rng.at(0, 0, 4)) for y in (LABELS, LABELS * 0 - 1)
    ]
    torch.testing.assert_close(losses[0], losses[1])


# What does not fit


@pytest.mark.parametrize(
    ("make_part", "message"),
    [
        (
            lambda: GPT(codebook_size=S, num_levels=2, num_classes=0, grid=GRID),
            "the tokenizer makes 2; use backbone.type=rq",
        ),
        (
            lambda: VAR(channels=4, codebook_size=S, num_classes=0, patch_sizes=None),
            "needs a tokenizer that codes so: var_vq or nfig",
        ),
        (lambda: DQ(codebook_size=S, num_classes=0, grid=GRID, num_grains=None), "ids vary in density: dqvae"),
        (lambda: NextScale().bind(SimpleNamespace()), "needs a tokenizer that codes scale after scale"),
        (lambda: NextCode().bind(SimpleNamespace(num_grains=None)), "needs a tokenizer whose ids vary in density"),
        (lambda: GrainSequence((5, 4), 2), r"grid of \[5, 4\] is not filled by regions of 2x2"),
        (lambda: NextToken(cond_drop=2.0), "objective.cond_drop=2.0"),
        (
            lambda: make("gpt", mixer={**ATTENTION, "num_heads": 4, "num_kv_heads": 3}),
            "mixer.num_kv_heads=3 must divide",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(make_part, message):
    with pytest.raises(UsageError, match=message):
        make_part()


@pytest.mark.parametrize("kind", ["gpt", "dq"])
def test_ids_of_scales_are_refused_by_generators_of_grids(kind):
    model, objective = make(kind)
    with pytest.raises(UsageError, match=r"ids of \[21\] per image on a grid of \[4, 4\]"):
        objective(model, random_ids("var"), {"label": LABELS}, LAYOUT, Rng.at(0, 0, 4))


# Together


def test_a_generator_learns_classes_and_order():
    """Every class has a row of its own, repeated: sampled for the class asked for."""
    torch.manual_seed(0)
    label = torch.arange(32) % 4
    target = (2 * label.view(-1, 1, 1, 1) + torch.tensor([0, 1, 3, 2])).expand(32, 1, 4, 4).contiguous()
    model, _ = make("gpt", random=False, dim=32)
    objective = NextToken(cond_drop=0.1)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2)
    for step in range(60):
        loss = objective(model, target, {"label": label}, LAYOUT, Rng.at(0, 32 * step, 32))["nll"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    predict = guide(objective, model.eval(), {"label": label}, LAYOUT, Guidance(2.0))
    with torch.no_grad():
        out = Autoregressive()(predict, empty(predict, 32), Rng.at(1, 0, 32))
    assert (out == target).float().mean() > 0.95


def test_a_generator_is_trained_sampled_and_told_texts(tmp_path, monkeypatch):
    """The whole line: tokens, a generator with a text encoder, samples by label, by text and by name."""
    monkeypatch.chdir(tmp_path)
    train(TOKENIZER, {"train.num_samples": 32})
    mixer = {**ATTENTION, "bias": False}
    recipe = GENERATOR | {
        "name": "gpt",
        "backbone": {"type": "gpt", "dim": 16, "depth": 1, "multiple_of": 8, "mixer": mixer},
        "condition": {"type": "captions", "length": 12},
        "objective": {"type": "next_token"},
        "sampler": {"type": "autoregressive", "guidance": 2.0},
    }
    run = train(recipe, {"train.num_samples": 32})
    pipe = open_run(run.path)
    labels = torch.tensor([7, 8, -1])
    torch.nn.init.normal_(pipe.backbone.head.weight)  # two steps have not taught it much
    by_label = pipe.generate(labels, [1, 2, 3])
    assert by_label.shape == (3, 1, 28, 28)
    names = [pipe.class_names[7], pipe.class_names[8], ""]
    assert torch.equal(pipe.generate(labels, [1, 2, 3], texts=names), by_label)
    assert not torch.equal(pipe.generate(labels, [1, 2, 3], texts=["a dress", "a dress", "a dress"]), by_label)
    with pytest.raises(UsageError, match="1 captions for 3 samples"):
        pipe.generate(labels, [1, 2, 3], texts=["a dress"])
    with pytest.raises(UsageError, match="takes as many steps as its generator draws in"):
        pipe.generate(labels, [1, 2, 3], steps=5)
    with pytest.raises(UsageError, match=r"learns scales, and backbone\.type=gpt is made for next ids"):
        train(recipe | {"name": "scales", "objective": {"type": "next_scale"}, "backbone": recipe["backbone"]})
    with pytest.raises(UsageError, match=r"needs a tokenizer that codes scale after scale .*; tokenizer\.from is a vq"):
        train(
            recipe
            | {
                "name": "var",
                "condition": {"type": "label"},
                "objective": {"type": "next_scale"},
                "backbone": {"type": "var"},
            }
        )
