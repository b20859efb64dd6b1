"""The masked generator: backbone, objective and sampler."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from genkit.backbones.masked import Masked as Backbone
from genkit.errors import UsageError
from genkit.guidance import Guidance, guide
from genkit.interfaces import Layout
from genkit.nn.layout import dense_layout
from genkit.objectives.dropping import drop
from genkit.objectives.masked import Masked as Objective
from genkit.rng import Rng
from genkit.samplers.masked import Masked as Sampler
from genkit.samplers.unmasking import gamma

S = 11


def backbone(*, num_levels: int = 1, grid: tuple[int, ...] = (3, 4), random: bool = True, **options: Any) -> Backbone:
    """Small, and away from its initialisation, where logits are zero and blocks the identity."""
    torch.manual_seed(0)
    options = {"dim": 16, "depth": 2, "mixer": {"type": "attention", "num_heads": 2}, **options}
    model = Backbone(codebook_size=S, num_levels=num_levels, num_classes=4, grid=grid, **options)
    if random:
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def random_ids(batch: int, num_levels: int = 1, grid: tuple[int, ...] = (3, 4)) -> Tensor:
    return Rng.at(0, 0, batch).integers(S, num_levels, *grid)


LABELS = torch.tensor([0, 1, 2, 3, -1, 0])
LAYOUT = dense_layout((3, 4))


# Backbone


@pytest.mark.parametrize(("num_levels", "grid"), [(1, (3, 4)), (3, (3, 4)), (2, (5,)), (1, (2, 3, 2))])
def test_logits_have_the_shape_of_the_ids(num_levels, grid):
    model = backbone(num_levels=num_levels, grid=grid)
    logits = model(random_ids(2, num_levels, grid), None, {"label": LABELS[:2]}, dense_layout(grid))
    assert logits.shape == (2, num_levels, *grid, S)


def test_first_loss_is_the_logarithm_of_the_codebook_size():
    losses = Objective(label_smoothing=0.0)(
        backbone(random=False), random_ids(4), {"label": LABELS[:4]}, LAYOUT, Rng.at(0, 0, 4)
    )
    torch.testing.assert_close(losses["nll"], torch.full((4,), math.log(S)))


@pytest.mark.parametrize("num_levels", [1, 3])
def test_logits_at_positions_equal_those_of_the_full_pass(num_levels):
    model, ids, cond = backbone(num_levels=num_levels), random_ids(3, num_levels), {"label": LABELS[:3]}
    positions = torch.tensor([0, 5, 11, 12, 30, 35])
    full = model(ids, None, cond, LAYOUT)  # [B, Q, Y, X, S]
    chosen = full.flatten(2, 3).transpose(1, 2).flatten(0, 1)[positions]  # [P, Q, S]
    torch.testing.assert_close(model(ids, None, cond, LAYOUT, positions=positions), chosen, atol=1e-5, rtol=1e-5)


def test_label_minus_one_is_the_null_class_and_labels_matter():
    model, ids = backbone(), random_ids(1)
    null = model(ids, None, {"label": torch.tensor([-1])}, LAYOUT)
    torch.testing.assert_close(null, model(ids, None, {}, LAYOUT))
    others = [model(ids, None, {"label": torch.tensor([label])}, LAYOUT) for label in range(4)]
    for a, b in zip([null, *others], [*others, null], strict=True):
        assert (a - b).abs().max() > 1e-3


def test_masked_positions_are_told_apart():
    """With everything masked only positions differ: without them every token would get the same distribution."""
    for positions in ("learned", "sincos"):
        model = backbone(positions=positions)
        logits = model(torch.full((1, 1, 3, 4), S), None, {}, LAYOUT).flatten(0, -2)
        assert torch.pdist(logits).min() > 1e-3


def test_another_grid_needs_positions_that_fit():
    ids = random_ids(2, grid=(6, 8))
    assert backbone(positions="sincos")(ids, None, {}, dense_layout((6, 8))).shape == (2, 1, 6, 8, S)
    with pytest.raises(UsageError, match=r"grid of \(3, 4\), found \(6, 8\)"):
        backbone()(ids, None, {}, dense_layout((6, 8)))


def test_tokens_given_by_coordinates_alone_find_their_positions():
    model, ids = backbone(), random_ids(2)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    shuffled = Layout(coords=LAYOUT.coords[:, order], grid=None)
    expected = model(ids, None, {}, LAYOUT).flatten(2, 3)[:, :, order]
    torch.testing.assert_close(model(ids.flatten(2)[:, :, order], None, {}, shuffled), expected, atol=1e-5, rtol=1e-5)


def test_checkpointed_gradients_are_the_same():
    gradients = []
    for checkpointed in (False, True):
        model = backbone().train()
        if checkpointed:
            model.enable_gradient_checkpointing()
        loss = Objective()(model, random_ids(4), {"label": LABELS[:4]}, LAYOUT, Rng.at(0, 0, 4))["nll"].mean()
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_every_parameter_learns_under_distributed_training():
    """DDP waits for ever for a parameter without a gradient, and the objective must see through its wrapper."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = DistributedDataParallel(backbone())
        loss = Objective()(model, random_ids(4), {"label": LABELS[:4]}, LAYOUT, Rng.at(0, 0, 4))["nll"].mean()
        loss.backward()
        assert [name for name, p in model.named_parameters() if p.grad is None] == []
    finally:
        torch.distributed.destroy_process_group()


def test_model_survives_saving(tmp_path):
    model = backbone(
        mixer=[{"type": "attention", "num_heads": 2}, {"type": "attention", "num_heads": 4, "rope": False}]
    )
    model.save_pretrained(tmp_path)
    again = Backbone.from_pretrained(tmp_path).eval()
    ids = random_ids(2)
    assert torch.equal(model(ids, None, {}, LAYOUT), again(ids, None, {}, LAYOUT))
    assert again.blocks[1].mixer.num_heads == 4


# Objective


SCHEDULES = ["cosine", "arccos", "linear", "square", "cubic", "sqrt", "pow2.5", "log", "exp"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_fall_from_one_to_zero(schedule):
    r = torch.linspace(0, 1, 33, dtype=torch.float64)
    masked = gamma(r, schedule, 64)
    assert abs(float(masked[0]) - 1) < (0.02 if schedule == "exp" else 1e-9)  # 1 - 1 / 64: a token is left over
    assert masked[-1].abs() < 1e-6
    assert (masked.diff() <= 0).all()
    assert (masked.diff()[2:] < 0).all() or schedule == "exp"


def test_schedules_are_those_of_the_paper():
    """Values of google-research/maskgit libml/mask_schedule.py at r = 1/4 of 64 tokens."""
    r = torch.tensor(0.25, dtype=torch.float64)
    expected = {
        "cosine": 0.9238795325,
        "linear": 0.75,
        "square": 0.9375,
        "cubic": 0.984375,
        "sqrt": 0.5,
        "pow2.5": 0.96875,
        "log": 1 / 3,
        "exp": 1 - 64**-0.75,
        "arccos": 2 / math.pi * math.acos(0.25),
    }
    assert {name: float(gamma(r, name, 64)) for name in SCHEDULES} == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("schedule", ["coisne", "pow", "pow0", "pow-1"])
def test_unknown_schedules_are_refused(schedule):
    for part, key in ((Sampler, "sampler.schedule"), (Objective, "objective.schedule")):
        with pytest.raises(UsageError, match=f"{key}={schedule} is not a schedule; known: cosine"):
            part(schedule=schedule)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "arccos"])
def test_masked_counts_follow_the_schedule(schedule):
    rng = Rng.at(0, 0, 3000)
    counts = Objective(schedule=schedule).draw_mask(40, None, rng).sum(1)
    expected = (gamma(rng.fork("ratio").uniform(), schedule) * 40).ceil().clamp_min(1).long()
    assert torch.equal(counts, expected)
    assert counts.min() >= 1


def test_every_position_is_masked_as_often():
    often = Objective(schedule="linear").draw_mask(20, None, Rng.at(0, 0, 4000)).float().mean(0)
    assert (often - often.mean()).abs().max() < 0.04


def test_min_masked_is_a_floor():
    counts = Objective(min_masked=0.5).draw_mask(40, None, Rng.at(0, 0, 500)).sum(1)
    assert counts.min() == 20
    assert counts.max() > 35


def test_padding_is_never_masked():
    valid = torch.arange(12).expand(200, 12) < torch.arange(200).remainder(12).unsqueeze(1) + 1
    masked = Objective().draw_mask(12, valid, Rng.at(0, 0, 200))
    assert not (masked & ~valid).any()
    assert masked.any(1).all()
    fully = Objective(min_masked=1.0).draw_mask(12, valid, Rng.at(0, 0, 200))
    assert torch.equal(fully, valid)


@pytest.mark.parametrize("num_levels", [1, 2])
def test_loss_is_the_mean_cross_entropy_of_the_masked_ids_alone(num_levels):
    model, target, rng = backbone(num_levels=num_levels), random_ids(5, num_levels), Rng.at(3, 0, 5)
    objective = Objective(label_smoothing=0.0, cond_drop=0.0)
    losses = objective(model, target, {"label": LABELS[:5]}, LAYOUT, rng)
    masked = objective.draw_mask(12, None, rng).view(5, 1, 3, 4).expand_as(target)
    logits = model(torch.where(masked, S, target), None, {"label": LABELS[:5]}, LAYOUT)
    nll = -logits.log_softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)
    right = (logits.argmax(-1) == target).float()
    for i in range(5):
        torch.testing.assert_close(losses["nll"][i], nll[i][masked[i]].mean())
        torch.testing.assert_close(losses["_accuracy"][i], right[i][masked[i]].mean())


def test_loss_of_a_sample_does_not_depend_on_its_batch():
    model, target, objective = backbone(), random_ids(6), Objective()
    full = objective(model, target, {"label": LABELS}, LAYOUT, Rng.at(1, 0, 6))
    part = objective(model, target[2:4], {"label": LABELS[2:4]}, LAYOUT, Rng.at(1, 2, 2))
    torch.testing.assert_close(full["nll"][2:4], part["nll"], atol=1e-5, rtol=1e-5)


def test_labels_are_dropped_with_the_given_probability():
    label = torch.arange(20000) % 4
    dropped = drop({"label": label}, 0.1, Rng.at(0, 0, 20000))["label"]
    assert abs(float((dropped == -1).float().mean()) - 0.1) < 0.01
    assert torch.equal(dropped[dropped >= 0], label[dropped >= 0])
    assert torch.equal(drop({"label": label}, 0.0, Rng.at(0, 0, 20000))["label"], label)


def test_predictor_ignores_unknown_ids():
    model, ids = backbone(), random_ids(3)
    known = Rng.at(9, 0, 3).uniform(1, 3, 4) < 0.5
    predict = Objective().predictor(model, {"label": LABELS[:3]}, LAYOUT)
    assert torch.equal(predict(ids, known, None), predict(torch.where(known, ids, -1), known, None))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"cond_drop": 1.5}, "objective.cond_drop=1.5"), ({"min_masked": -0.1}, "objective.min_masked=-0.1")],
)
def test_fractions_out_of_range_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        Objective(**options)


# Sampler


def table(batch: int, num_levels: int = 1, num_tokens: int = 12, sharpness: float = 1.0) -> Tensor:
    """Fixed logits [B, Q, 3, N / 3, S], the same for every sample."""
    logits = torch.randn(num_levels, 3, num_tokens // 3, S, generator=torch.Generator().manual_seed(5)) * sharpness
    return logits.expand(batch, *logits.shape)


class Recorder:
    """A predictor with fixed logits that keeps what it was shown."""

    def __init__(self, logits: Tensor):
        self.logits = logits
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __call__(self, ids: Tensor, known: Tensor, cache: object) -> Tensor:
        self.seen.append((ids.clone(), known.clone()))
        return self.logits


@pytest.mark.parametrize("schedule", ["cosine", "linear", "arccos"])
@pytest.mark.parametrize("num_steps", [1, 2, 5, 12])
@pytest.mark.parametrize("num_levels", [1, 3])
def test_known_ids_never_change_and_counts_follow_the_schedule(schedule, num_steps, num_levels):
    predict = Recorder(table(4, num_levels))
    sampler = Sampler(num_steps=num_steps, schedule=schedule)
    start = torch.full((4, num_levels, 3, 4), -1)
    out = sampler(predict, start, Rng.at(0, 0, 4))
    assert out.min() >= 0
    assert out.max() < S
    left = [start.shape[2] * start.shape[3], *(int(n[0]) for n in sampler.counts(torch.full((4,), 12)))]
    assert left[-1] == 0
    revealed = [a - b for a, b in itertools.pairwise(left)]
    assert sum(revealed) == 12
    assert min(revealed) >= 1
    for (ids, known), count in zip(predict.seen, left, strict=False):
        assert ((~known).flatten(2).sum(2) == count).all()
        assert torch.equal(ids[known], out[known])


def test_counts_follow_the_paper():
    """floor(N gamma(t / T)), N = 49, T = 8, at least one left until the last step."""
    counts = Sampler(num_steps=8).counts(torch.tensor([49]))[:, 0].tolist()
    assert counts == [math.floor(49 * math.cos(t * math.pi / 16)) for t in range(1, 8)] + [0]
    assert Sampler(num_steps=4).counts(torch.tensor([2, 0]))[:, 0].tolist() == [1, 0, 0, 0]
    assert Sampler(num_steps=4).counts(torch.tensor([2, 0]))[:, 1].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("num_levels", [1, 2])
def test_inpainting_keeps_what_is_given(num_levels):
    given = random_ids(6, num_levels)
    unknown = Rng.at(4, 0, 6).uniform(num_levels, 3, 4) < torch.linspace(0, 1, 6).view(6, 1, 1, 1)
    out = Sampler(num_steps=5)(Recorder(table(6, num_levels)), torch.where(unknown, -1, given), Rng.at(0, 0, 6))
    assert torch.equal(out[~unknown], given[~unknown])
    assert out.min() >= 0


def test_sample_does_not_depend_on_its_batch():
    model, objective, sampler = backbone(), Objective(), Sampler(num_steps=4)

    def draw(first: int, count: int) -> Tensor:
        cond = {"label": LABELS[first : first + count]}
        predict = guide(objective, model, cond, LAYOUT, Guidance(2.0, "linear"))
        return sampler(predict, torch.full((count, 1, 3, 4), -1), Rng.at(0, first, count))

    with torch.no_grad():
        full = draw(0, 6)
        assert torch.equal(full[1:4], draw(1, 3))
        assert torch.equal(full[5:], draw(5, 1))
    assert len(full.unique(dim=0)) > 1


def test_one_step_without_noise_is_independent_sampling():
    logits = table(2000)
    out = Sampler(num_steps=1, temperature=0.0)(Recorder(logits), torch.full((2000, 1, 3, 4), -1), Rng.at(0, 0, 2000))
    frequency = torch.nn.functional.one_hot(out, S).float().mean(0)
    assert (frequency - logits[0].softmax(-1)).abs().max() < 4 * 0.5 / math.sqrt(2000)


def test_without_noise_the_most_confident_draws_stay():
    predict = Recorder(table(3, sharpness=2.0))
    Sampler(num_steps=6, temperature=0.0)(predict, torch.full((3, 1, 3, 4), -1), Rng.at(0, 0, 3))
    (ids, known), drawn_at = predict.seen[1], predict.logits.log_softmax(-1)
    draws = Rng.at(0, 0, 3).fork("draw").categorical(predict.logits)
    confidence = drawn_at.gather(-1, draws.unsqueeze(-1)).squeeze(-1)
    assert torch.equal(ids[known], draws[known])
    for i in range(3):
        assert confidence[i][known[i]].min() >= confidence[i][~known[i]].max()


def test_noise_changes_which_positions_come_first():
    def first_known(temperature: float) -> Tensor:
        predict = Recorder(table(50, sharpness=3.0) * torch.linspace(0.1, 3, 12).view(3, 4, 1))
        Sampler(num_steps=6, temperature=temperature)(predict, torch.full((50, 1, 3, 4), -1), Rng.at(0, 0, 50))
        return predict.seen[1][1].flatten(1)

    assert len(first_known(100.0).unique(dim=0)) > len(first_known(0.0).unique(dim=0))


def test_low_softmax_temperature_draws_the_most_likely_ids():
    predict = Recorder(table(4))
    out = Sampler(num_steps=3, softmax_temperature=1e-3)(predict, torch.full((4, 1, 3, 4), -1), Rng.at(0, 0, 4))
    assert torch.equal(out, predict.logits.argmax(-1))


def test_on_step_sees_every_step_and_the_holes():
    shown: list[tuple[int, int, int]] = []
    Sampler(num_steps=4)(
        Recorder(table(2)),
        torch.full((2, 1, 3, 4), -1),
        Rng.at(0, 0, 2),
        lambda step, total, ids: shown.append((step, total, int((ids[0] < 0).sum()))),
    )
    assert shown == [(0, 4, 11), (1, 4, 8), (2, 4, 4), (3, 4, 0)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "sampler.num_steps=0"),
        ({"temperature": -1.0}, "sampler.temperature=-1.0"),
        ({"softmax_temperature": -0.1}, "sampler.softmax_temperature=-0.1"),
        ({"softmax_end": -0.1}, "sampler.softmax_end=-0.1"),
        ({"softmax_power": 0.0}, "sampler.softmax_power=0.0"),
    ],
)
def test_sampler_refuses_wrong_options(options, message):
    with pytest.raises(UsageError, match=message):
        Sampler(**options)


def test_more_steps_than_tokens_are_refused():
    with pytest.raises(UsageError, match=r"sampler\.num_steps=13, but a sample has 12 tokens"):
        Sampler(num_steps=13)(Recorder(table(2)), torch.full((2, 1, 3, 4), -1), Rng.at(0, 0, 2))


def test_start_with_ids_outside_the_codebook_is_refused():
    with pytest.raises(UsageError, match="id 11 of a codebook of 11"):
        Sampler()(Recorder(table(2)), torch.full((2, 1, 3, 4), S), Rng.at(0, 0, 2))


# Together


def test_generator_learns_classes_and_neighbours():
    """Every class has its own pair of ids, side by side: both must be learned, and sampled for the class asked for."""
    torch.manual_seed(0)
    label = torch.arange(32) % 4
    target = (2 * label + 1).view(32, 1, 1, 1) + torch.tensor([0, 1, 0, 1]).expand(32, 1, 3, 4)
    model = backbone(random=False, dim=32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    objective = Objective(label_smoothing=0.0)
    for step in range(60):
        loss = objective(model, target, {"label": label}, LAYOUT, Rng.at(0, 32 * step, 32))["nll"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5  # the unigram entropy is ln 8 = 2.1
    predict = guide(objective, model.eval(), {"label": label}, LAYOUT, Guidance(3.0))
    with torch.no_grad():
        out = Sampler(num_steps=4)(predict, torch.full_like(target, -1), Rng.at(1, 0, 32))
    assert (out == target).float().mean() > 0.95
