"""Scales and frequency bands: residuals of coarse to fine, what a generator sees."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genkit.errors import UsageError
from genkit.nn.frequency import FrequencyBands, radius
from genkit.nn.multiscale import ScaleQuantizer, nearest_ticks
from tests.quantising import after_step
from tests.structured import SCALES, make

# Scales


@torch.no_grad()
def test_each_scale_codes_what_those_before_left_over() -> None:
    model = make("scales")
    quantizer = model.quantizer.eval()
    features = torch.randn(2, 8, 4, 4)
    found = quantizer(features)
    left = features
    for k, ids in enumerate(quantizer.split(found.ids)):
        rows = F.adaptive_avg_pool2d(left, SCALES[k]).permute(0, 2, 3, 1).reshape(-1, 8)
        assert torch.equal(torch.cdist(rows, quantizer.codebook.embed[0]).argmin(1), ids.flatten())
        codes = quantizer.codebook.embed[0][ids].permute(0, 3, 1, 2)
        conv = quantizer.phi[nearest_ticks(4, 4)[k]]
        codes = codes if k == 3 else F.interpolate(codes, size=(4, 4), mode="bicubic")
        left = left - (0.5 * codes + 0.5 * conv(codes))
    torch.testing.assert_close(features - left, found.codes, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_what_a_generator_sees_while_sampling_is_what_it_saw_while_training() -> None:
    model = make("scales")
    quantizer = model.quantizer.eval()
    for conv in quantizer.phi:
        nn.init.normal_(conv.weight, std=0.2)
    ids = torch.randint(24, (2, 1, quantizer.num_tokens))
    forced = model.next_inputs(ids)
    total, seen = torch.zeros(2, 8, 4, 4), []
    for k, of_scale in enumerate(quantizer.split(ids[:, 0])):
        total, following = quantizer.add_scale(total, of_scale.flatten(1), k)
        seen.append(following.flatten(2).mT)
    assert torch.equal(torch.cat(seen[:-1], dim=1), forced)
    assert torch.equal(total, model.codes(ids))


def test_the_next_input_of_a_scale_knows_nothing_of_that_scale() -> None:
    model = make("scales")
    ids = torch.randint(24, (1, 1, 30))
    changed = ids.clone()
    changed[..., 5:] = (changed[..., 5:] + 1) % 24  # the 3x3 scale and the last one
    before, after = model.next_inputs(ids), model.next_inputs(changed)
    assert torch.equal(before[:, :13], after[:, :13])  # inputs of the 2x2 and the 3x3 scale
    assert not torch.equal(before[:, 13:], after[:, 13:])


def test_convolutions_are_shared_as_in_var() -> None:
    assert nearest_ticks(10, 4) == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    assert nearest_ticks(5, 5) == [0, 1, 2, 3, 4]
    assert nearest_ticks(6, 1) == [0] * 6
    assert nearest_ticks(1, 4) == [0]


@torch.no_grad()
def test_the_first_scales_alone_give_a_coarse_image() -> None:
    model = make("scales").eval()
    ids = torch.randint(24, (2, 1, 30))
    assert torch.equal(model.codes(ids[..., :5]), model.quantizer.sums(ids[:, 0])[1])
    with pytest.raises(
        UsageError, match=r"6 ids per image are no whole number of scales; scales end after \[1, 5, 14, 30\]"
    ):
        model.codes(ids[..., :6])


def test_micro_batches_teach_the_shared_table_as_one_batch() -> None:
    torch.manual_seed(0)
    features = torch.randn(6, 4, 3, 3)
    quantizers = [ScaleQuantizer(dim=4, codebook_size=16, patch_sizes=(1, 2, 3), restart=0.4).train() for _ in range(2)]
    table = torch.randn(1, 16, 4)
    for quantizer in quantizers:
        quantizer.codebook.set_codes(table)
    for _ in range(3):
        quantizers[0](features)
        for part in features.split(2):
            quantizers[1](part)
        for quantizer in quantizers:
            after_step(quantizer)
    torch.testing.assert_close(quantizers[0].codebook.embed, quantizers[1].codebook.embed)
    assert quantizers[0].codebook.recent.sum(1).gt(0).all()


def test_a_constant_image_needs_only_the_first_scale() -> None:
    quantizer = ScaleQuantizer(dim=2, codebook_size=2, patch_sizes=(1, 2, 4)).eval()
    quantizer.codebook.set_codes(torch.tensor([[[1.0, -2.0], [0.0, 0.0]]]))
    found = quantizer(torch.tensor([1.0, -2.0]).view(1, 2, 1, 1).expand(1, 2, 4, 4))
    assert found.ids.tolist() == [[0, *[1] * 20]]
    assert found.losses["commitment"].item() == pytest.approx(0, abs=1e-10)


def test_direction_decides_and_length_stays() -> None:
    quantizer = ScaleQuantizer(dim=2, codebook_size=2, patch_sizes=(1,), phi_ratio=0.0, cosine=True).eval()
    quantizer.codebook.set_codes(torch.tensor([[[5.0, 0.0], [0.0, 0.1]]]))
    found = quantizer(torch.tensor([0.3, 0.2]).view(1, 2, 1, 1))
    assert found.ids.tolist() == [[0]]
    assert found.codes.flatten().tolist() == [5.0, 0.0]


# Bands


@pytest.mark.parametrize("patch_sizes", [(1, 2, 3, 4), (1, 2, 3, 5, 7), (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), (1,)])
def test_bands_add_up_to_the_whole(patch_sizes: tuple[int, ...]) -> None:
    bands = FrequencyBands(patch_sizes)
    assert torch.equal(bands.masks.sum(0), torch.ones_like(bands.masks[0]))
    x = torch.randn(2, 3, patch_sizes[-1], patch_sizes[-1])
    torch.testing.assert_close(bands(x).sum(0), x, atol=1e-5, rtol=1e-5)


def test_the_mean_lies_in_the_first_band_and_a_wave_in_one_band() -> None:
    sizes = (1, 2, 4, 8, 16)
    bands = FrequencyBands(sizes)
    constant = bands(torch.full((1, 1, 16, 16), 3.0))
    torch.testing.assert_close(constant[0], torch.full((1, 1, 16, 16), 3.0))
    limits = torch.tensor([p * p for p in sizes]).cumsum(0) / sum(p * p for p in sizes)
    for frequency in range(1, 9):
        wave = torch.cos(2 * math.pi * frequency / 16 * torch.arange(16.0)).expand(1, 1, 16, 16)
        energy = bands(wave).square().flatten(1).sum(1)
        expected = int((radius(16)[0, frequency] > limits).sum())
        assert energy.argmax() == expected
        assert energy[expected] / energy.sum() > 0.999


@torch.no_grad()
def test_what_a_band_could_not_say_is_handed_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer = ScaleQuantizer(dim=3, codebook_size=4, patch_sizes=(1, 2, 4), phi_ratio=0.0, by_frequency=True).eval()
    features = torch.randn(2, 3, 4, 4)
    # A codebook that can say everything: every vector is its own code, and the ids are kept to hand it back.
    said: list[Tensor] = []

    def nearest(x: Tensor, k: int) -> Tensor:
        said.append(x)
        return torch.zeros(len(x), *x.shape[2:], dtype=torch.int64)

    monkeypatch.setattr(quantizer, "_nearest", nearest)
    monkeypatch.setattr(quantizer, "_lift", lambda ids, k: quantizer._enlarge(said[-1], k))
    torch.testing.assert_close(quantizer(features).codes, features, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_first_stages_hold_the_low_frequencies() -> None:
    """Without rounding, the sum after stage k misses only what lies above the limit of band k."""
    sizes = (1, 2, 4, 8)
    bands = FrequencyBands(sizes)
    partial = bands(torch.randn(2, 3, 8, 8)).cumsum(0)
    limits = torch.tensor([p * p for p in sizes]).cumsum(0) / sum(p * p for p in sizes)
    for k in range(3):
        spectrum = torch.fft.rfft2(partial[k]).abs()
        assert spectrum[..., radius(8) > limits[k] + 1e-6].max() < 1e-4
