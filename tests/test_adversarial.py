"""Adversarial and perceptual losses, and the scaling of latents that training stores with a tokenizer."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from genkit import registry, training
from genkit.errors import GenkitError, UsageError
from genkit.nn.latents import LatentStats
from genkit.nn.lpips import HEADS, TRUNK
from genkit.nn.patchgan import PatchDiscriminator, check_sides
from genkit.nn.perceptual import FeatureDistance
from genkit.objectives.adversarial import Adversarial, gradient_penalty, hinge, lecam
from genkit.objectives.reconstruction import Reconstruction, perceptual_distance
from genkit.pipeline import open_run
from genkit.rng import Rng
from genkit.training import Stopped, train
from tests.test_training import assert_close, assert_same, finish, start
from tests.tiny import TOKENIZER

OBJECTIVE: dict[str, Any] = {
    "type": "adversarial", "perceptual": 0.1, "width": 8, "depth": 2, "start_step": 2, "lecam": 0.1, "r1": 0.1, "r1_every": 2,
}  # fmt: skip
CONFIG = {**TOKENIZER, "name": "gan", "objective": OBJECTIVE}


def tokenizer() -> Any:
    torch.manual_seed(0)
    return registry.build("tokenizer", TOKENIZER["tokenizer"], image_channels=1).train()


def objective(**options: Any) -> Adversarial:
    torch.manual_seed(1)
    made = Adversarial(**{"perceptual": 0.0, "width": 8, "depth": 2, **options})
    made.prepare((1, 28, 28), "cpu")
    return made


def images(count: int = 4) -> Tensor:
    return Rng.at(0, 0, count).uniform(1, 28, 28) * 2 - 1


def call(made: Reconstruction, model: Any, x: Tensor) -> dict[str, Tensor]:
    return made(model, x, {}, None, Rng(range(len(x))))


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack([value.mean() for name, value in losses.items() if name[0] != "_"]).sum()


# The losses against their equations


def test_hinge_is_half_of_what_is_missing_on_both_sides() -> None:
    of_real, of_fake = torch.tensor([[2.0, 0.5], [-1.0, 1.0]]), torch.tensor([[-3.0, 0.0], [1.0, -1.0]])
    torch.testing.assert_close(hinge(of_real, of_fake), torch.tensor([0.5 * (0.25 + 0.5), 0.5 * (1.0 + 1.0)]))


def test_lecam_penalises_only_logits_beyond_the_other_mean() -> None:
    found = lecam(torch.tensor([1.0, -2.0]), torch.tensor([0.0, 3.0]), torch.tensor(2.0), torch.tensor(-1.0))
    torch.testing.assert_close(found, torch.tensor((2.0**2 + 0) / 2 + (2.0**2 + 0) / 2))


def test_gradient_penalty_of_a_linear_judge_is_its_squared_weight() -> None:
    weight = torch.tensor([[1.0, 2.0], [3.0, -1.0]], requires_grad=True)
    x = torch.randn(5, 2, 2, requires_grad=True)
    penalty = gradient_penalty((x * weight).sum((1, 2)), x)
    torch.testing.assert_close(penalty.detach(), torch.tensor(15.0))
    penalty.backward()
    torch.testing.assert_close(weight.grad, 2 * weight.detach())


def test_adaptive_weight_makes_both_gradients_at_the_last_layer_equally_long() -> None:
    model, made, x = tokenizer(), objective(weight=1.0), images()
    lengths = {}
    for name in ("l1", "adversarial"):
        losses = call(made, model, x)
        (gradient,) = torch.autograd.grad(losses[name].mean(), model.last_layer)
        lengths[name] = gradient.norm()
    torch.testing.assert_close(lengths["adversarial"], lengths["l1"], rtol=1e-2, atol=0)
    assert float(call(objective(most=0.25), model, x)["_adversarial_weight"][0]) == 0.25, "clamped"
    assert float(call(objective(adaptive=False), model, x)["_adversarial_weight"][0]) == 1


def test_last_layer_is_what_makes_the_pixels() -> None:
    for word in registry.words("tokenizer"):
        if word == "bare" or not hasattr(registry.find("tokenizer", word), "last_layer"):
            continue  # nothing to train
        options = {"image_size": 28, "stride": 2 if word == "dqvae" else 4} if word in ("titok", "dqvae") else {}
        options |= {"patch_sizes": [1, 7]} if word in ("var_vq", "nfig") else {}
        model = registry.build("tokenizer", {"type": word, **options}, image_channels=1).eval()
        x = images(1) if model.stride <= 4 else torch.zeros(1, 1, 2 * model.stride, 2 * model.stride)
        (gradient,) = torch.autograd.grad(model(x)[0].square().sum(), model.last_layer)
        assert gradient.norm() > 0, word
        assert len(model.last_layer) <= model.stride**2 * 3, word


# What learns from what


def test_neither_side_reaches_into_the_other() -> None:
    model, made, x = tokenizer(), objective(), images()
    losses = call(made, model, x)
    before = [p.grad.clone() for p in made.discriminator.parameters()]
    assert all(p.grad is None for p in model.parameters()), "the discriminator's loss moved the tokenizer"
    total(losses).backward()
    for gradient, parameter in zip(before, made.discriminator.parameters(), strict=True):
        assert torch.equal(gradient, parameter.grad), "the tokenizer's loss moved the discriminator"
    assert any(p.grad.abs().sum() > 0 for p in model.encoder.parameters())


def test_adversary_waits_for_its_step_and_then_learns() -> None:
    model, made, x = tokenizer(), objective(start_step=2, lr=1e-3), images(16)
    found = []
    for _ in range(40):
        losses = call(made, model, x)
        found.append({name: float(value.detach().mean()) for name, value in losses.items()})
        made.after_step()
    assert ["adversarial" in losses for losses in found[:4]] == [False, False, True, True]
    assert found[-1]["_discriminator"] < 0.7 * found[2]["_discriminator"]
    assert found[-1]["_logit_image"] > found[-1]["_logit_reconstruction"]


@pytest.mark.parametrize(("option", "value"), [("lecam", 1.0), ("r1", 10.0)])
def test_penalties_hold_the_logits_together(option: str, value: float) -> None:
    def distance(**options: float) -> float:
        model, made, x = tokenizer(), objective(lr=1e-3, r1_every=2, lecam_decay=0.5, **options), images(16)
        for _ in range(40):
            losses = call(made, model, x)
            made.after_step()
        return float((losses["_logit_image"] - losses["_logit_reconstruction"]).mean())

    assert distance(**{option: value}) < 0.8 * distance()


def test_micro_batches_give_the_discriminator_the_same_step() -> None:
    x = images(8)
    whole, parts = objective(adaptive=False), objective(adaptive=False)
    model = tokenizer().eval()
    call(whole, model, x)
    for part in x.split(4):
        call(parts, model, part)
    for made in (whole, parts):
        made.after_step()
    for a, b in zip(whole.discriminator.parameters(), parts.discriminator.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(whole.means, parts.means)


def test_a_gradient_that_is_not_finite_is_dropped() -> None:
    made, x = objective(), images()
    before = [p.detach().clone() for p in made.discriminator.parameters()]
    call(made, tokenizer(), x * float("nan"))
    made.after_step()
    assert all(torch.equal(a, b) for a, b in zip(before, made.discriminator.parameters(), strict=True))
    assert made.means.isfinite().all()


# Runs


def test_stopped_adversarial_run_continues_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = train(CONFIG, out=tmp_path / "straight")
    assert {"adversarial", "discriminator", "perceptual_fashion_cnn_v1"} <= straight.history[-1].keys()
    answers = iter([0, 0, 0, 0, signal.SIGTERM])
    with monkeypatch.context() as patch:
        patch.setattr(training, "heard", lambda *_: next(answers))
        with pytest.raises(Stopped):
            train(CONFIG, out=tmp_path / "stopped")
    assert_same(straight.last, train(CONFIG, out=tmp_path / "stopped").last)


def test_two_processes_do_not_change_adversarial_training(tmp_path: Path) -> None:
    finish(start(CONFIG, tmp_path / "two", processes=2))
    one = train(CONFIG, out=tmp_path / "one")
    last = tmp_path / "two/gan/checkpoints/last"
    assert_close(one.last / "pipeline", last / "pipeline")
    own, theirs = (load_file(folder / "state/objective.safetensors") for folder in (one.last, last))
    for name in own:
        # Single weights with hardly a gradient may go either way under Adam; without shared gradients it would be 3 %.
        distance = (own[name].float() - theirs[name].float()).norm() / own[name].float().norm().clamp_min(1e-6)
        assert distance < 0.01 or not name.startswith("discriminator"), name


def test_saved_latents_have_unit_variance_by_either_weights(tmp_path: Path) -> None:
    run = train(TOKENIZER, out=tmp_path)
    dataset = registry.build("data", TOKENIZER["data"])
    x = torch.stack([dataset[i]["x"] for i in range(0, 9000, 9)])
    for ema in (True, False):
        model = open_run(run.path, ema=ema).tokenizer
        with torch.inference_mode():
            found = model.encode(x)
            z = found.z.transpose(0, 1).flatten(1)
            assert torch.equal(model.codes(found.ids), found.z)
        assert z.std(1).median() == pytest.approx(1, abs=0.1)
        assert z.mean(1).abs().median() < 0.1
        assert not torch.equal(model.latent_std, torch.ones_like(model.latent_std))


def test_latent_statistics_are_those_of_all_batches_together() -> None:
    z = torch.randn(7, 3, 2, 5) * torch.tensor([1.0, 3.0, 0.0]).view(1, 3, 1, 1) + 2
    stats = LatentStats()
    for part in z.split(3):
        stats.add(part)
    mean, std = stats.result()
    rows = z.transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean, rows.mean(1))
    torch.testing.assert_close(std[:2], rows[:2].std(1, correction=0))
    assert std[2] == pytest.approx(1e-4 * float(std[1])), "a channel that stands still can be divided by"


# Perceptual loss


@pytest.fixture
def no_lpips(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GENKIT_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("GENKIT_CACHE", str(tmp_path))


@pytest.mark.usefixtures("no_lpips")
@pytest.mark.parametrize(
    ("shape", "name"), [((1, 28, 28), "perceptual_fashion_cnn_v1"), ((3, 48, 48), "perceptual_emoji_cnn_v1")]
)
def test_loss_says_whose_features_it_compares(shape: tuple[int, int, int], name: str) -> None:
    x = Rng.at(0, 0, 2).uniform(*shape) * 2 - 1
    made = Reconstruction(perceptual=0.5)

    def shifted(images: Tensor) -> tuple[Tensor, Any]:
        return images.flip(-1).requires_grad_(), registry.build("tokenizer", {"type": "kl"}, image_channels=1).encode(
            x[:, :1]
        )

    losses = call(made, shifted, x)
    assert name in losses
    assert (losses[name] > 0).all()
    assert losses[name].requires_grad
    _, look = perceptual_distance("auto", shape)
    torch.testing.assert_close(0.5 * look(x.flip(-1), x), losses[name].detach())


@pytest.mark.usefixtures("no_lpips")
def test_features_that_do_not_fit_or_are_missing_are_one_line() -> None:
    with pytest.raises(UsageError, match=rf"{TRUNK.name} and {HEADS.name}.*perceptual=0"):
        Reconstruction(perceptual=1.0).prepare((3, 256, 256), "cpu")
    with pytest.raises(UsageError, match=r"emoji-cnn does not take images .*; fashion-cnn does"):
        Reconstruction(perceptual=1.0, features="emoji-cnn").prepare((1, 28, 28), "cpu")
    with pytest.raises(UsageError, match="choose auto, lpips"):
        Reconstruction(perceptual=1.0, features="vgg").prepare((1, 28, 28), "cpu")
    with pytest.raises(GenkitError, match="vgg16"):
        Reconstruction(perceptual=1.0, features="lpips").prepare((1, 28, 28), "cpu")


def test_feature_distance_is_zero_and_smooth_at_equal_images_and_frozen() -> None:
    body = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(8, 1)
    )
    look = FeatureDistance(body)
    look.train()
    x = torch.randn(2, 1, 8, 8)
    y = x.clone().requires_grad_()
    look(x, y).sum().backward()
    assert y.grad is not None
    assert y.grad.isfinite().all()
    assert not look.training
    assert not any(p.requires_grad for p in look.parameters())
    # By hand: directions after both convolutions.
    y = torch.randn(2, 1, 8, 8)
    unit = nn.functional.normalize
    first, second = body[0], nn.Sequential(*body[:4])
    by_hand = [(unit(f(x), dim=1) - unit(f(y), dim=1)).square().sum(1).mean((1, 2)) for f in (first, second.eval())]
    torch.testing.assert_close(look(x, y), torch.stack(by_hand).mean(0), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="begins with convolutions"):
        FeatureDistance(nn.Sequential(nn.Flatten(), nn.Conv2d(1, 1, 1)))


# The discriminator


@pytest.mark.parametrize(("depth", "field"), [(1, 16), (2, 34), (3, 70)])
def test_a_logit_sees_the_patch_it_says(depth: int, field: int) -> None:
    torch.manual_seed(0)
    network = PatchDiscriminator(image_channels=1, width=4, depth=depth)
    network.layers = nn.Sequential(
        *[m for m in network.layers if not isinstance(m, nn.GroupNorm)]
    )  # norms see everything
    x = torch.randn(1, 1, 128, 128, requires_grad=True)
    logits = network(x)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    assert x.grad is not None
    rows = x.grad[0, 0].abs().sum(1).nonzero()
    assert int(rows.max() - rows.min()) + 1 == field


def test_smallest_images_leave_one_logit() -> None:
    for depth in (1, 2, 3):
        least = 3 * 2**depth
        check_sides((least, least), depth)
        assert (
            PatchDiscriminator(image_channels=3, width=4, depth=depth)(torch.zeros(1, 3, least, least)).shape[-1] == 1
        )
        with pytest.raises(UsageError, match=f"needs {least} pixels"):
            check_sides((least, least - 1), depth)


def test_an_image_is_judged_alone() -> None:
    network = PatchDiscriminator(image_channels=1, width=8, depth=2)
    x = images(5)
    torch.testing.assert_close(network(x)[:1], network(x[:1]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{"width": 0}, {"depth": 0}, {"r1_every": 0}, {"weight": -1.0}, {"lecam": -0.1}])
def test_options_outside_their_range_are_one_line(options: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        Adversarial(**options)
