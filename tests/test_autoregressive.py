"""Generators that draw ids in sequence: backbones, objectives, samplers, guidance."""

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from genkit.backbones.dq import DQ
from genkit.backbones.gpt import GPT
from genkit.backbones.rq import RQ
from genkit.backbones.var import VAR
from genkit.errors import UsageError
from genkit.guidance import Guidance, guide
from genkit.interfaces import Layout
from genkit.mixers.attention import KeysValues
from genkit.nn import grain as grains
from genkit.nn.grain_sequence import GrainSequence
from genkit.nn.layout import dense_layout
from genkit.nn.multiscale import ScaleQuantizer
from genkit.nn.text import bytes_of
from genkit.objectives.dropping import drop
from genkit.objectives.next_code import NextCode
from genkit.objectives.next_scale import NextScale
from genkit.objectives.next_token import NextToken
from genkit.pipeline import open_run
from genkit.rng import Rng
from genkit.samplers.autoregressive import Autoregressive
from genkit.samplers.beam import Beam
from genkit.samplers.jacobi import Jacobi
from genkit.samplers.truncation import Truncation, draw, truncate
from genkit.training import train
from tests.tiny import GENERATOR, TOKENIZER

S, GRID, SCALES = 11, (4, 4), (1, 2, 4)
LABELS = torch.tensor([0, 1, 3, -1])
ATTENTION = {"type": "attention", "num_heads": 2, "is_causal": True, "qk_norm": False, "rope_base": 100.0}
KINDS = ["gpt", "rq", "var", "dq"]


def quantizer() -> ScaleQuantizer:
    torch.manual_seed(1)
    made = ScaleQuantizer(dim=6, codebook_size=S, patch_sizes=SCALES, num_phi=2).eval()
    torch.nn.init.normal_(made.codebook.embed)
    return made


TOKENIZERS = {
    "gpt": SimpleNamespace(),
    "rq": SimpleNamespace(),
    "var": SimpleNamespace(quantizer=quantizer(), next_inputs=lambda ids: quantizer().next_inputs(ids[:, 0])),
    "dq": SimpleNamespace(num_grains=2),
}


def make(kind: str, random: bool = True, **options: Any) -> tuple[Any, Any]:
    """(backbone, objective): small, and away from the initialisation, where logits are zero."""
    torch.manual_seed(0)
    given: dict[str, Any] = {"codebook_size": S, "num_classes": 4}
    if kind == "gpt":
        options = {"dim": 16, "depth": 2, "multiple_of": 8, "mixer": {**ATTENTION, "bias": False}} | options
        model: Any = GPT(**given, num_levels=1, grid=GRID, **options)
        objective: Any = NextToken(cond_drop=0.0)
    elif kind == "rq":
        options = {"dim": 16, "depth": 2, "head_depth": 2, "mixer": ATTENTION, "head_mixer": ATTENTION} | options
        model, objective = RQ(**given, num_levels=3, grid=GRID, **options), NextToken(cond_drop=0.0)
    elif kind == "var":
        options = {"dim": 16, "depth": 2, "mixer": {"type": "scale_attention", "num_heads": 2}} | options
        model, objective = VAR(**given, channels=6, patch_sizes=SCALES, **options), NextScale(cond_drop=0.0)
    else:
        options = {"dim": 16, "position_depth": 1, "content_depth": 2, "mixer": {**ATTENTION, "rope": False}} | options
        model, objective = DQ(**given, grid=GRID, num_grains=2, **options), NextCode(cond_drop=0.0)
    if hasattr(objective, "bind"):
        objective.bind(TOKENIZERS[kind])
    if random:
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
    return model.eval(), objective


def random_ids(kind: str, batch: int = 4) -> Tensor:
    """[B, Q, *grid] as the tokenizer of this generator makes them."""
    if kind == "var":
        return Rng.at(0, 0, batch).integers(S, 1, sum(p * p for p in SCALES))
    ids = Rng.at(0, 0, batch).integers(S, 3 if kind == "rq" else 1, *GRID)
    if kind == "dq":
        map_ = Rng.at(1, 0, batch).integers(2, 2, 2)
        map_[0], map_[1] = 0, 1
        ids = grains.spread(ids[:, 0], grains.expand(2 ** (1 - map_), 2))[:, None]
    return ids


def empty(predict: Any, batch: int) -> Tensor:
    return torch.full((batch, *predict.shape), -1)


def sequence_of(kind: str, predict: Any, ids: Tensor) -> Tensor:
    """In the order of drawing; of dq, of the first sample alone, since lengths differ."""
    if kind != "dq":
        return predict.to_sequence(ids)
    positions, contents = predict.sequence.encode(ids[:1])
    return torch.stack([positions, contents.clamp_min(0)], dim=-1).flatten(1)


LAYOUT = dense_layout(GRID)
each = pytest.mark.parametrize("kind", KINDS)


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


# Raster


@torch.no_grad()
@pytest.mark.parametrize("mixer", [None, {"type": "gla", "num_heads": 2}, {"type": "mamba", "state_size": 4}])
def test_an_id_does_not_change_what_comes_before_it(mixer):
    model, _ = make("gpt", **({} if mixer is None else {"mixer": mixer}))
    ids = random_ids("gpt")
    changed = ids.clone()
    changed.view(4, -1)[:, 7] = (changed.view(4, -1)[:, 7] + 1) % S
    a, b = (model(x, None, {"label": LABELS}, LAYOUT).view(4, 16, S) for x in (ids, changed))
    torch.testing.assert_close(a[:, :8], b[:, :8], atol=1e-5, rtol=1e-5)
    assert (a[:, 8:] - b[:, 8:]).abs().amax(-1).min() > 1e-5


@torch.no_grad()
@pytest.mark.parametrize("mixer", [{"type": "gla", "num_heads": 2}, {"type": "mamba", "state_size": 4}])
def test_other_causal_mixers_generate_with_a_cache(mixer):
    model, objective = make("gpt", mixer=mixer)
    predict = objective.predictor(model, {"label": LABELS}, LAYOUT)
    samples = [Autoregressive(cache=c)(predict, empty(predict, 4), Rng.at(0, 0, 4)) for c in (True, False)]
    assert torch.equal(*samples)


def test_a_mixer_that_sees_ahead_is_refused():
    with pytest.raises(UsageError, match=r"layer 0: attention sees tokens .* is_causal: true"):
        make("gpt", mixer={"type": "attention"})


@torch.no_grad()
@pytest.mark.parametrize("num_kv_heads", [None, 1])
def test_keys_and_values_take_the_memory_of_the_formula(num_kv_heads):
    """2 depth B heads N width of 4 bytes, no more: the last id is never read."""
    model, objective = make("gpt", mixer={**ATTENTION, "num_heads": 4, "num_kv_heads": num_kv_heads})
    predict, cache = objective.predictor(model, {"label": LABELS}, LAYOUT), {}
    sequence = predict.to_sequence(random_ids("gpt"))
    for done in range(16):
        predict(sequence[:, :done], cache)
        held = [value for value in cache.values() if isinstance(value, KeysValues)]
        assert sum(value.num_bytes for value in held) == 2 * 2 * 4 * (num_kv_heads or 4) * 16 * 4 * 4
    assert {value.length for value in held} == {16}


@torch.no_grad()
def test_the_token_of_the_class_has_no_place():
    """Its keys and queries are 0: every later token sees it with logit 0."""
    model, _ = make("gpt")
    other, _ = make("gpt", class_rope="identity")
    other.load_state_dict(model.state_dict())
    ids = random_ids("gpt")
    a, b = (m.next_logits(ids.flatten(1)[:, :5], {"label": LABELS}, LAYOUT, last=6) for m in (model, other))
    assert (a[:, 1:] - b[:, 1:]).abs().max() > 1e-3
    torch.testing.assert_close(a[:, 0], b[:, 0])  # alone, it sees itself whatever the logit


@torch.no_grad()
def test_positions_matter_along_both_axes():
    model, _ = make("gpt")
    ids = torch.zeros(1, 14, dtype=torch.int64)
    swapped = Layout(coords=LAYOUT.coords.flip(-1), grid=GRID)
    a, b = (model.next_logits(ids, {}, layout) for layout in (LAYOUT, swapped))
    assert (a - b).abs().max() > 1e-4


@torch.no_grad()
def test_given_ids_are_kept_and_read_at_once():
    model, objective = make("gpt")
    predict = objective.predictor(model, {"label": LABELS}, LAYOUT)
    start, ids = empty(predict, 4), random_ids("gpt")
    start[:, :, :2], start[:, :, 3, 3] = ids[:, :, :2], ids[:, :, 3, 3]
    calls = []

    def counting(ids: Tensor, cache: Any) -> Tensor:
        calls.append(ids.shape[1])
        return predict(ids, cache)

    wrapped = SimpleNamespace(**{name: getattr(predict, name) for name in ("counts", "shape", "codebook_size")})
    wrapped.to_sequence, wrapped.to_ids, wrapped.is_over = predict.to_sequence, predict.to_ids, predict.is_over
    sampler = Autoregressive()
    out = sampler(_Calls(wrapped, counting), start, Rng.at(0, 0, 4))  # type: ignore[arg-type]
    assert torch.equal(out[start >= 0], start[start >= 0])
    assert calls[0] == 8
    assert out.min() >= 0


class _Calls:
    def __init__(self, like: Any, call: Any):
        self.__dict__.update(vars(like))
        self.call = call

    def __call__(self, ids: Tensor, cache: Any = None) -> Tensor:
        return self.call(ids, cache)


@pytest.mark.parametrize("sampler", [Autoregressive(), Beam(num_beams=2), Jacobi()])
def test_given_ids_outside_the_codebook_are_refused(sampler):
    model, objective = make("gpt")
    predict = objective.predictor(model, {"label": LABELS}, LAYOUT)
    start = empty(predict, 4)
    start[0, 0, 0, 0] = S
    with pytest.raises(UsageError, match="id 11 of a codebook of 11"):
        sampler(predict, start, Rng.at(0, 0, 4))


def test_on_step_sees_the_holes():
    model, objective = make("gpt")
    predict = objective.predictor(model, {"label": LABELS}, LAYOUT)
    shown: list[tuple[int, int, int]] = []
    with torch.no_grad():
        Autoregressive()(
            predict, empty(predict, 4), Rng.at(0, 0, 4), lambda i, n, ids: shown.append((i, n, int((ids[0] < 0).sum())))
        )
    assert shown == [(i, 16, 15 - i) for i in range(16)]


# Truncation


LOGITS = torch.randn(5, 3, 40, generator=torch.Generator().manual_seed(3)) * 2


def test_truncations_keep_what_they_say():
    p = LOGITS.softmax(-1)
    kept = truncate(LOGITS, Truncation(top_k=7)).isfinite()
    assert (kept.sum(-1) == 7).all()
    assert torch.equal(kept, p >= p.topk(7).values[..., -1:])
    kept = truncate(LOGITS, Truncation(top_p=0.7)).isfinite()
    smallest = p.masked_fill(~kept, 2).amin(-1)
    share = (p * kept).sum(-1)
    assert (share > 0.7).all()
    assert (share - smallest <= 0.7 + 1e-6).all()
    kept = truncate(LOGITS, Truncation(min_p=0.2)).isfinite()
    assert torch.equal(kept, p >= 0.2 * p.amax(-1, keepdim=True))
    assert torch.equal(truncate(LOGITS, Truncation()), LOGITS)
    torch.testing.assert_close(truncate(LOGITS, Truncation(temperature=0.5)), LOGITS * 2)


def test_ties_at_the_edge_of_top_k_stay():
    kept = truncate(torch.tensor([1.0, 3.0, 1.0, 0.0]), Truncation(top_k=2)).isfinite()
    assert kept.tolist() == [True, True, True, False]


def test_draws_follow_the_distribution():
    u = (torch.arange(4000) + 0.5) / 4000
    ids = draw(LOGITS[0, :1].expand(4000, -1), u, Truncation())
    frequency = torch.bincount(ids, minlength=40) / 4000
    assert (frequency - LOGITS[0, 0].softmax(-1)).abs().max() < 2 / 4000
    assert torch.equal(draw(LOGITS, torch.rand(5, 3), Truncation(top_k=1)), LOGITS.argmax(-1))
    assert torch.equal(draw(LOGITS, torch.rand(5, 3), Truncation(temperature=0)), LOGITS.argmax(-1))


@pytest.mark.parametrize(
    "options", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"min_p": 2.0}, {"top_k": []}]
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(UsageError, match=f"sampler.{next(iter(options))}"):
        Autoregressive(**options)


# Beams and parallel decoding


@torch.no_grad()
def all_sequences(predict: Any, length: int) -> tuple[Tensor, Tensor]:
    """Every sequence of a row of ids and its log-likelihood [B, S^length]."""
    every = torch.tensor(list(itertools.product(range(predict.codebook_size), repeat=length)))
    many, B = predict.repeated(len(every)), 2
    total = torch.zeros(B * len(every))
    for step in range(length):
        log_p = many(every[:, :step].repeat(B, 1))[:, 0].log_softmax(-1)
        total += log_p.gather(1, every[:, step].repeat(B).unsqueeze(1))[:, 0]
    return every, total.view(B, -1)


def searched(guidance: float = 1.0) -> Any:
    model, objective = make("gpt", random=True)
    row = dense_layout((1, 3))
    return guide(objective, model, {"label": LABELS[:2]}, row, Guidance(guidance))


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_beam_as_wide_as_all_sequences_finds_them_in_order(guidance):
    predict = searched(guidance)
    every, likelihood = all_sequences(predict, 3)
    found, values = Beam(num_beams=S**3).search(predict, torch.full((2, 3), -1))
    best = likelihood.sort(dim=1, descending=True)
    torch.testing.assert_close(values, best.values, atol=1e-4, rtol=1e-5)
    assert torch.equal(found[:, :20], every[best.indices[:, :20]])


@torch.no_grad()
def test_groups_without_penalty_are_all_the_plain_beam_and_the_first_always_is():
    predict, given = searched(), torch.full((2, 3), -1)
    plain, _ = Beam(num_beams=2).search(predict, given)
    same, _ = Beam(num_beams=6, num_groups=3, diversity=0.0).search(predict, given)
    for g in range(3):
        assert torch.equal(same[:, 2 * g : 2 * g + 2], plain)
    diverse, values = Beam(num_beams=6, num_groups=3, diversity=1.0).search(predict, given)
    assert torch.equal(diverse[:, :2], plain)
    assert not torch.equal(diverse[:, 2:4], plain)
    every, likelihood = all_sequences(predict, 3)
    index = (diverse * torch.tensor([S**2, S, 1])).sum(-1)
    torch.testing.assert_close(values, likelihood.gather(1, index), atol=1e-4, rtol=1e-5)  # penalties do not count
    assert torch.equal(every[index], diverse)


@torch.no_grad()
def test_strong_diversity_keeps_groups_of_one_apart_at_every_step():
    found, _ = Beam(num_beams=8, num_groups=8, diversity=1e6).search(searched(), torch.full((2, 3), -1))
    for sample in found:
        assert all(len(set(sample[:, step].tolist())) == 8 for step in range(3))


@torch.no_grad()
def test_beams_keep_given_ids_and_one_beam_is_greedy():
    predict = searched()
    start = torch.full((2, 1, 1, 3), -1)
    start[:, 0, 0, 1] = 5
    assert (Beam(num_beams=3)(predict, start, Rng.at(0, 0, 2))[:, 0, 0, 1] == 5).all()
    start[:] = -1
    greedy = Autoregressive(temperature=0.0)(predict, start, Rng.at(0, 0, 2))
    assert torch.equal(Beam(num_beams=1)(predict, start, Rng.at(0, 0, 2)), greedy)
    picked = Beam(num_beams=3, pick="any")(predict, start, Rng.at(0, 0, 2))
    assert torch.equal(picked[1:], Beam(num_beams=3, pick="any")(predict, start, Rng.at(0, 0, 2))[1:])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dq", "rq"])
def test_beams_follow_other_sequences(kind):
    model, objective = make(kind)
    predict = objective.predictor(model, {"label": LABELS[:2]}, LAYOUT)
    given = torch.full((2, len(predict.counts)), -1)
    _, low = Beam(num_beams=1).search(predict, given)
    many, high = Beam(num_beams=4).search(predict, given)
    assert (high.amax(1) >= low[:, 0] - 1e-4).all()
    assert predict.to_ids(many[:, 0]).min() >= 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 4, "num_groups": 3}, "sampler.num_groups=3 must divide"),
        ({"diversity": -1.0}, "sampler.diversity"),
        ({"temperature": 0.0}, "sampler.temperature"),
    ],
)
def test_beam_refuses_wrong_options(options, message):
    with pytest.raises(UsageError, match=message):
        Beam(**options)


def test_beams_and_guesses_refuse_scales():
    model, objective = make("var")
    predict = objective.predictor(model, {"label": LABELS}, LAYOUT)
    for sampler in (Beam(), Jacobi()):
        with pytest.raises(UsageError, match="this generator"):
            sampler(predict, empty(predict, 4), Rng.at(0, 0, 4))


@torch.no_grad()
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 3, "temperature": 0.5}])
@pytest.mark.parametrize("window", [1, 5, 40])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_parallel_decoding_gives_the_ids_of_drawing_one_by_one(options, window, guidance):
    model, objective = make("gpt")
    predict = guide(objective, model, {"label": LABELS}, LAYOUT, Guidance(guidance, "cosine"))
    start = empty(predict, 4)
    start[:, 0, 0, :2], start[:, 0, 2, 1] = 4, 6
    parallel = Jacobi(window=window, **options)
    expected = Autoregressive(**options)(predict, start, Rng.at(0, 0, 4))
    assert torch.equal(parallel(predict, start, Rng.at(0, 0, 4)), expected)
    assert parallel.calls <= 14
    if window == 1:
        assert parallel.calls == 14


@torch.no_grad()
def test_parallel_decoding_needs_fewer_calls_where_guesses_hold():
    model, objective = make("gpt", random=False)
    torch.nn.init.normal_(model.head.weight)
    torch.nn.init.zeros_(model.embed.table.weight)  # what comes does not depend on what came
    predict = objective.predictor(model, {"label": LABELS}, LAYOUT)
    parallel = Jacobi(window=8, temperature=0.0)
    parallel(predict, empty(predict, 4), Rng.at(0, 0, 4))
    assert parallel.calls < 8


def test_parallel_decoding_refuses_mixers_that_cannot_take_back():
    model, objective = make("gpt", mixer={"type": "gla", "num_heads": 2})
    predict = objective.predictor(model, {"label": LABELS}, LAYOUT)
    with torch.no_grad(), pytest.raises(UsageError, match="only attention can"):
        Jacobi()(predict, empty(predict, 4), Rng.at(0, 0, 4))


# Neighbours and texts


def conditioned(name: str) -> tuple[Any, dict[str, Tensor]]:
    options = {"context_dim": 5} if name == "context" else {"text_length": 12}
    model, _ = make("gpt", **options)
    given = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(4))
    texts = ["a sneaker", "a bag", "schön", "a coat that is far too long"]
    return model, {name: given if name == "context" else bytes_of(texts, 12)}


@torch.no_grad()
@pytest.mark.parametrize("name", ["context", "text"])
def test_the_context_matters_and_zeros_are_none(name):
    model, cond = conditioned(name)
    layout, objective = LAYOUT, NextToken()
    ids = random_ids("gpt").flatten(1)[:, :5]
    with_it, without = (objective.predictor(model, c, layout)(ids) for c in (cond, {}))
    assert (with_it - without).abs().amax((1, 2)).min() > 1e-3
    nothing = objective.predictor(model, {name: cond[name] * 0}, layout)(ids)
    torch.testing.assert_close(nothing, without, atol=1e-5, rtol=1e-5)
    guided = guide(objective, model, cond, layout, Guidance(3.0))(ids)
    torch.testing.assert_close(guided, torch.lerp(without, with_it, 3.0), atol=1e-4, rtol=1e-5)
    dropped = drop(cond, 1.0, Rng.at(0, 0, 4))
    assert (dropped[name] == 0).all()


@torch.no_grad()
@pytest.mark.parametrize("name", ["context", "text"])
def test_samples_with_a_context_are_the_same_by_every_way(name):
    model, cond = conditioned(name)
    predict = guide(NextToken(), model, cond, LAYOUT, Guidance(2.0))
    start = empty(predict, 4)
    expected = Autoregressive(cache=False)(predict, start, Rng.at(0, 0, 4))
    assert torch.equal(Autoregressive()(predict, start, Rng.at(0, 0, 4)), expected)
    assert torch.equal(Jacobi()(predict, start, Rng.at(0, 0, 4)), expected)
    assert Beam(num_beams=2)(predict, start, Rng.at(0, 0, 4)).min() >= 0


@torch.no_grad()
def test_the_order_of_neighbours_does_not_matter_and_their_number_may_change():
    model, cond = conditioned("context")
    ids = random_ids("gpt").flatten(1)[:, :5]
    a, b = (model.next_logits(ids, {"context": c}, LAYOUT) for c in (cond["context"], cond["context"].flip(1)))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert model.next_logits(ids, {"context": cond["context"][:, :1]}, LAYOUT).isfinite().all()
    with pytest.raises(UsageError, match=r"expected \[B, k, 5\] as in training"):
        model.next_logits(ids, {"context": torch.zeros(4, 3, 6)}, LAYOUT)


def test_the_text_encoder_learns_with_the_generator():
    model, cond = conditioned("text")
    loss = NextToken(cond_drop=0.0)(model.train(), random_ids("gpt"), cond, LAYOUT, Rng.at(0, 0, 4))["nll"].mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.told.parameters())


# Scales


@torch.no_grad()
def test_a_scale_sees_itself_and_the_coarser_ones_alone():
    model, _ = make("var")
    x = torch.randn(2, 20, 6, generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[:, 2] += 1  # of the second scale, tokens 1 .. 4
    a, b = (model(y, None, {"label": LABELS[:2]}, LAYOUT) for y in (x, changed))
    torch.testing.assert_close(a[:, :1], b[:, :1])
    assert (a[:, 1:] - b[:, 1:]).abs().amax(-1).min() > 1e-5  # its whole scale, and all finer ones


@torch.no_grad()
def test_the_last_scale_never_reaches_the_network():
    ids = random_ids("var")
    changed = ids.clone()
    changed[..., 5:] = (changed[..., 5:] + 1) % S
    shown = [TOKENIZERS["var"].next_inputs(y) for y in (ids, changed)]
    torch.testing.assert_close(*shown)


@torch.no_grad()
def test_shared_modulation_and_plain_logits():
    model, objective = make(
        "var", shared_modulation=True, mixer={"type": "scale_attention", "num_heads": 2, "cosine": False}
    )
    predict = objective.predictor(model, {"label": LABELS}, LAYOUT)
    assert Autoregressive(top_k=3)(predict, empty(predict, 4), Rng.at(0, 0, 4)).min() >= 0
    assert "blocks.0.modulation.table" in model.state_dict()


# Varying density


@pytest.mark.parametrize(("num_grains", "grid"), [(2, (4, 6)), (3, (8, 4))])
def test_sequences_of_codes_and_back(num_grains, grid):
    sequence, side = GrainSequence(grid, num_grains), 2 ** (num_grains - 1)
    map_ = Rng.at(2, 0, 9).integers(num_grains, grid[0] // side, grid[1] // side)
    map_[0], map_[1] = 0, num_grains - 1
    ids = grains.spread(Rng.at(3, 0, 9).integers(50, *grid), grains.expand(2 ** (num_grains - 1 - map_), side))[:, None]
    positions, contents = sequence.encode(ids)
    assert torch.equal(sequence.decode(positions, contents), ids)
    assert torch.equal((contents >= 0).sum(1), grains.code_counts(grains.grain_of(ids[:, 0], num_grains)))
    at = sequence.progress(positions)
    allowed = sequence.allowed(at)
    for b, row in enumerate(positions):
        length = int((row >= 0).sum())
        assert allowed[b, torch.arange(length), row[:length]].all()
        assert at.grain[b, length] == num_grains
    assert (positions.diff(dim=1)[positions[:, 1:] >= 0] > 0).all()  # coarse to fine, in order


@pytest.mark.parametrize("num_grains", [2, 3])
def test_whatever_is_allowed_ends_with_a_whole_image(num_grains):
    sequence = GrainSequence((8, 4), num_grains)
    generator = torch.Generator().manual_seed(0)
    positions = torch.zeros(40, 0, dtype=torch.int64)
    for _ in range(sequence.length):
        allowed = sequence.allowed(sequence.progress(positions))[:, -1].float()
        positions = torch.cat([positions, torch.multinomial(allowed, 1, generator=generator)], dim=1)
    assert (sequence.progress(positions).grain[:, -1] == num_grains).all()
    assert sequence.decode(positions, torch.zeros_like(positions)).min() == 0


@torch.no_grad()
def test_positions_that_follow_cost_nothing():
    """Of two grains the finer positions follow: with everything fine or everything coarse only the first ones are unsure."""
    model, objective = make("dq", random=False)
    losses = objective(model, random_ids("dq"), {"label": LABELS}, LAYOUT, Rng.at(0, 0, 4))
    # All fine: the first end out of four regions and the end. All coarse: 5, 4, 3, 2 choices and a forced end.
    assert float(losses["position"][1] * 16) == pytest.approx(math.log(5), abs=1e-5)
    coarse = float(losses["position"][0] * 4)
    assert coarse == pytest.approx(math.log(5) + math.log(4) + math.log(3) + math.log(2), abs=1e-5)


def test_part_of_an_image_cannot_be_given():
    model, objective = make("dq")
    predict = objective.predictor(model, {"label": LABELS}, LAYOUT)
    start = empty(predict, 4)
    start[0, 0, 0, 0] = 1
    with pytest.raises(UsageError, match="cannot go on from given ids"):
        Autoregressive()(predict, start, Rng.at(0, 0, 4))


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
    with pytest.raises(UsageError, match=r"tokenizer\.from is a vq"):
        train(recipe | {"name": "scales", "objective": {"type": "next_scale"}, "backbone": recipe["backbone"]})
    with pytest.raises(UsageError, match="needs a tokenizer that codes so"):
        train(
            recipe
            | {
                "name": "var",
                "condition": {"type": "label"},
                "objective": {"type": "next_scale"},
                "backbone": {"type": "var"},
            }
        )
