"""Tokenizers whose ids have a structure: scales, frequency bands, rows of tokens, grains."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from genkit import config, registry
from genkit.errors import GenkitError, UsageError
from genkit.importers import dqvae as import_dqvae
from genkit.importers import titok as import_titok
from genkit.importers import var_vqvae as import_var
from genkit.importers.names import source_of
from genkit.nn import grain
from genkit.nn.frequency import FrequencyBands, radius
from genkit.nn.grid_tokenizer import GridTokenizer
from genkit.nn.multiscale import ScaleQuantizer, nearest_ticks
from genkit.tokenizers.dqvae import DQVAE
from genkit.tokenizers.nfig import NFIG
from genkit.tokenizers.titok import TiTok
from genkit.tokenizers.var_vq import VarVq

HERE = Path(__file__).parent
SCALES = (1, 2, 3, 4)
SMALL = {"width": 32, "num_blocks": 1, "channels": 8, "codebook_size": 24}
KINDS: dict[str, tuple[type[GridTokenizer], dict[str, Any]]] = {
    "scales": (VarVq, SMALL | {"patch_sizes": SCALES}),
    "scales by direction": (VarVq, SMALL | {"patch_sizes": SCALES, "cosine": True, "num_phi": 1}),
    "deep scales": (VarVq, SMALL | {"patch_sizes": SCALES, "stride": 2, "widths": (32, 64)}),
    "bands": (NFIG, SMALL | {"patch_sizes": SCALES}),
    "tokens": (TiTok, {"image_size": 16, "num_tokens": 5, "dim": 24, "depth": 2, "channels": 6, "codebook_size": 24}),
    "two grains": (DQVAE, SMALL | {"image_size": 16, "stride": 2}),
    "three grains": (DQVAE, SMALL | {"image_size": 16, "stride": 2, "num_grains": 3, "targets": (0.3, 0.3)}),
    "entropy": (DQVAE, SMALL | {"image_size": 16, "stride": 2, "router": "entropy", "thresholds": (1.5,)}),
    "deep grains": (
        DQVAE,
        SMALL
        | {
            "image_size": 16,
            "stride": 2,
            "widths": (32, 32, 64),
            "attention": (2,),
            "feature_channels": 16,
            "positions": "waves+tables",
        },
    ),
}


def images(*shape: int) -> Tensor:
    """Blocks of noise and of grey: routers find something to choose."""
    x = torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    x[..., : shape[-1] // 2] *= 0.05
    return x


def step(model: nn.Module) -> None:
    modules: list[Any] = list(model.modules())
    for module in modules:
        if hasattr(module, "after_step"):
            module.after_step()


def make(kind: str) -> Any:
    torch.manual_seed(0)
    cls, options = KINDS[kind]
    return cls(image_channels=3, **options)


def side(model: Any) -> int:
    return model.image_size


@pytest.fixture(params=KINDS, scope="module")
def tokenizer(request: pytest.FixtureRequest) -> Any:
    model = make(request.param).train()
    with torch.no_grad():
        for seed in range(2):
            model(images(16, 3, side(model), side(model)) * (1 - 0.1 * seed))
            step(model)
    return model.eval()


# --- the contract


@torch.no_grad()
def test_ids_say_all_that_z_says(tokenizer: Any) -> None:
    x = images(3, 3, side(tokenizer), side(tokenizer))
    encoded = tokenizer.encode(x)
    assert encoded.ids is not None
    assert encoded.ids.dtype == torch.int64
    assert encoded.ids.shape[:2] == (3, tokenizer.num_levels)
    assert encoded.z.shape[:2] == (3, tokenizer.channels)
    assert torch.equal(tokenizer.codes(encoded.ids), encoded.z)
    assert tokenizer.decode(encoded.z).shape == x.shape
    assert all(loss.shape == (3,) for loss in encoded.losses.values())


@torch.no_grad()
def test_an_image_is_coded_alike_in_any_batch(tokenizer: Any) -> None:
    x = images(4, 3, side(tokenizer), side(tokenizer))
    whole, alone = tokenizer.encode(x), tokenizer.encode(x[2:3])
    assert whole.ids is not None
    assert alone.ids is not None
    assert torch.equal(whole.ids[2:3], alone.ids)
    torch.testing.assert_close(whole.z[2:3], alone.z, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_latent_statistics_leave_images_and_ids_alone(tokenizer: Any) -> None:
    x = images(4, 3, side(tokenizer), side(tokenizer))
    before = tokenizer(x)
    channels = tokenizer.channels
    tokenizer.set_latent_stats(torch.linspace(-0.5, 0.5, channels), torch.linspace(0.5, 2, channels))
    try:
        reconstruction, encoded = tokenizer(x)
        torch.testing.assert_close(reconstruction, before[0], atol=1e-4, rtol=1e-4)
        assert torch.equal(encoded.ids, before[1].ids)
        assert torch.equal(tokenizer.codes(encoded.ids), encoded.z)
        assert not torch.allclose(encoded.z, before[1].z)
    finally:
        tokenizer.set_latent_stats(torch.zeros(channels), torch.ones(channels))


@torch.no_grad()
def test_saved_and_loaded_is_the_same(tokenizer: Any, tmp_path: Path) -> None:
    x = images(2, 3, side(tokenizer), side(tokenizer))
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path).eval()
    assert torch.equal(again.encode(x).ids, tokenizer.encode(x).ids)
    torch.testing.assert_close(again(x)[0], tokenizer(x)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_reaches_every_parameter(kind: str) -> None:
    model = make(kind).train()
    for layer in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
        if not layer.weight.any():
            nn.init.normal_(layer.weight, std=0.1)  # at their initial zero they stop the gradient of what lies before
    reconstruction, encoded = model(images(4, 3, side(model), side(model)))
    loss = reconstruction.square().mean() + sum(v.mean() for n, v in encoded.losses.items() if n[0] != "_")
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("kind", ["scales", "bands", "tokens", "two grains"])
def test_a_few_steps_make_reconstructions_better(kind: str) -> None:
    model = make(kind).train()
    x = F.avg_pool2d(images(16, 3, 4 * side(model), 4 * side(model)), 4) * 2
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    errors = []
    for _ in range(15):
        reconstruction, encoded = model(x)
        error = (reconstruction - x).square().mean()
        total = error + sum(v.mean() for n, v in encoded.losses.items() if n[0] != "_")
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        step(model)
        errors.append(error.item())
    assert errors[-1] < 0.8 * errors[1]


def test_mistakes_are_told_in_one_line(tokenizer: Any) -> None:
    n = side(tokenizer)
    ids = tokenizer.encode(images(1, 3, n, n)).ids
    assert ids is not None
    for call in (
        lambda: tokenizer.encode(torch.zeros(1, 1, n, n)),
        lambda: tokenizer.encode(torch.zeros(1, 3, n + 1, n)),
        lambda: tokenizer.encode(torch.zeros(1, 3, 4 * n, 4 * n)),
        lambda: tokenizer.codes(ids + tokenizer.codebook_size),
        lambda: tokenizer.codes(ids - tokenizer.codebook_size),
        lambda: tokenizer.codes(ids.expand(1, 2, *ids.shape[2:])),
    ):
        with pytest.raises(UsageError) as raised:
            call()
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (VarVq, {"patch_sizes": (1, 3, 3)}, "must rise"),
        (VarVq, {"patch_sizes": ()}, "must rise"),
        (VarVq, {"stride": 4, "widths": (32, 32)}, "halve the image 1 times"),
        (VarVq, {"stride": 2, "widths": (32, 33)}, "multiples"),
        (VarVq, {"stride": 3}, "power of two"),
        (VarVq, {"codebook_size": 0}, "codebook_size=0"),
        (NFIG, {"decay": 1.0}, "decay=1.0"),
        (TiTok, {"image_size": 30}, "multiple of tokenizer.stride=4"),
        (TiTok, {"dim": 30}, "numbers of heads"),
        (TiTok, {"pixel_widths": (32, 32)}, "needs tokenizer.proxy_codes"),
        (DQVAE, {"num_grains": 1}, "at least 2"),
        (DQVAE, {"image_size": 28}, "multiple of 8"),
        (DQVAE, {"router": "entropy"}, "1 rising entropies"),
        (DQVAE, {"router": "entropy", "num_grains": 3, "thresholds": (2.0, 1.0)}, "2 rising entropies"),
        (DQVAE, {"targets": (0.5, 0.6), "num_grains": 3}, "at most 1 in all"),
        (DQVAE, {"router_groups": 5}, "does not divide"),
        (DQVAE, {"widths": (32, 32)}, "regions of 2 pixels"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(cls: type, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        cls(image_channels=3, **options)


# --- scales


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
            step(quantizer)
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


# --- bands


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


# --- grains


@given(
    num_grains=st.integers(2, 3),
    regions=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    batch=st.integers(1, 3),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=40, deadline=None)
def test_packing_loses_nothing(num_grains: int, regions: tuple[int, int], batch: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    times = 2 ** (num_grains - 1)
    Y, X = (count * times for count in regions)
    grains = torch.randint(num_grains, (batch, *regions), generator=generator)
    ids = torch.randint(3, (batch, Y, X), generator=generator)
    ids = grain.spread(ids, grain.expand(2 ** (num_grains - 1 - grains), times))[:, None]
    packed = grain.pack(ids, grains, num_grains)
    assert [len(codes) for _, codes in packed] == grain.code_counts(grains).tolist()
    again, found = grain.unpack(packed, (Y, X), num_grains)
    assert torch.equal(again, ids)
    assert torch.equal(found, grains)
    # The map read off the ids is no finer than the one they were made with, and packs them as well.
    coarsest = grain.grain_of(ids[:, 0], num_grains)
    assert (coarsest <= grains).all()
    assert torch.equal(grain.unpack(grain.pack(ids, coarsest, num_grains), (Y, X), num_grains)[0], ids)


def test_packed_codes_stand_coarse_to_fine_in_row_order() -> None:
    grains = torch.tensor([[[1, 0]]])
    ids = torch.tensor([[[[1, 2, 7, 7], [3, 4, 7, 7]]]])
    ((positions, codes),) = grain.pack(ids, grains)
    assert positions.tolist() == [2, 0, 1, 4, 5]
    assert codes.tolist() == [7, 1, 2, 3, 4]
    with pytest.raises(GenkitError, match="ids differ within a cell"):
        grain.pack(ids, torch.zeros_like(grains))


@pytest.mark.parametrize("positions", [[0, 0], [0, 5], [1, 2], [0], [0, 8], [-1, 2], [0, 1, 4, 2]])
def test_packed_positions_that_cover_no_grid_are_refused(positions: list[int]) -> None:
    with pytest.raises(GenkitError, match="packed positions"):
        grain.unpack([(torch.tensor(positions), torch.zeros(len(positions), dtype=torch.int64))], (2, 4))


def test_every_code_weighs_the_same_whatever_it_covers() -> None:
    weights = grain.mask_weights(torch.tensor([[[0, 1, 2]]]), 3)
    assert weights.unfold(2, 4, 4).sum((1, 3)).tolist() == [[1.0, 4.0, 16.0]]


def test_entropy_is_zero_for_one_grey_and_largest_for_all() -> None:
    flat = torch.full((1, 3, 8, 8), 1.0)
    assert grain.entropy(flat, 8).item() == pytest.approx(0, abs=1e-5)
    all_greys = torch.linspace(-1, 1, 32).repeat(2).view(1, 1, 8, 8)
    assert grain.entropy(all_greys, 8).item() == pytest.approx(math.log(32), abs=1e-4)
    noise = torch.rand(1, 3, 32, 32) * 2 - 1
    assert grain.entropy(noise, 16).shape == (1, 2, 2)


def test_a_measured_threshold_divides_the_regions_as_asked() -> None:
    x = images(20, 3, 32, 32) * torch.rand(20, 1, 1, 1)
    threshold = grain.entropy_threshold(x, 8, fine_ratio=0.25)
    assert (grain.entropy(x, 8) > threshold).float().mean().item() == pytest.approx(0.25, abs=0.01)
    model = DQVAE(image_channels=3, **SMALL | {"router": "entropy", "thresholds": (threshold,)}).eval()
    assert model.grain(x).float().mean().item() == pytest.approx(0.25, abs=0.01)


@torch.no_grad()
def test_flat_regions_are_coded_by_one_id_and_noise_by_many() -> None:
    model = DQVAE(
        image_channels=1, **SMALL | {"image_size": 16, "stride": 2, "router": "entropy", "thresholds": (1.0,)}
    ).eval()
    x = torch.full((1, 1, 16, 16), -1.0)
    x[..., 8:] = torch.rand(1, 1, 16, 8) * 2 - 1
    expected = torch.tensor([[[0, 0, 1, 1]] * 4])
    assert torch.equal(model.grain(x), expected)
    encoded = model.encode(x)
    assert encoded.ids is not None
    assert encoded.losses["_codes"].tolist() == [8 + 4 * 8] == model.num_codes(x).tolist()
    assert torch.equal(encoded.ids[..., ::2, :4], encoded.ids[..., 1::2, :4])
    packed = model.pack(encoded.ids, model.grain(x))
    assert torch.equal(model.codes(model.unpack(packed, (8, 8))[0]), encoded.z)


def with_shares(model: DQVAE, *shares: float) -> Tensor:
    """Gates of 10 x 10 regions with these shares of grains 1, 2, ..."""
    grains = torch.zeros(100, dtype=torch.int64)
    first = 0
    for g, share in enumerate(shares, start=1):
        grains[first : first + round(100 * share)] = g
        first += round(100 * share)
    return F.one_hot(grains.view(1, 10, 10), model.num_grains).permute(0, 3, 1, 2).float()


def test_budget_is_that_of_the_released_code() -> None:
    two = make("two grains")
    assert isinstance(two, DQVAE)
    for share in (0.0, 0.2, 0.5, 1.0):
        assert two._budget(with_shares(two, share)).item() == pytest.approx(2 * 10 * (share - 0.5) ** 2, abs=1e-5)
    three = make("three grains")
    assert isinstance(three, DQVAE)
    assert three._budget(with_shares(three, 0.5, 0.1)).item() == pytest.approx(0.2**2 + 10 * 0.2**2, abs=1e-5)


def test_budget_pushes_the_router_towards_the_target() -> None:
    torch.manual_seed(0)
    model = DQVAE(image_channels=1, **SMALL | {"image_size": 16, "stride": 2, "targets": (0.25,)}).train()
    x = images(16, 1, 16, 16)
    optimizer = torch.optim.Adam(model.choose.parameters(), lr=2e-2)
    for _ in range(40):
        optimizer.zero_grad()
        model.encode(x).losses["budget"].mean().backward()
        optimizer.step()
    with torch.no_grad():
        shares = torch.stack([model.look(x)[1][:, 1].mean() for _ in range(5)])  # as drawn in training
    assert shares.mean().item() == pytest.approx(0.25, abs=0.05)


def test_a_coarse_region_takes_the_coarse_features() -> None:
    model = make("two grains").eval()
    assert isinstance(model, DQVAE)
    coarse, fine = torch.full((1, 8, 4, 4), -1.0), torch.full((1, 8, 8, 8), 2.0)
    gate = torch.zeros(1, 2, 4, 4)
    gate[:, 1, 0, 3] = 1
    merged = model.merge([coarse, fine], gate)
    assert (merged[..., :2, 6:] == 2).all()
    assert merged.sum() == 8 * (4 * 2 - 60)


# --- tokens without a grid


def test_proxy_codes_end_in_logits_and_need_a_decoder_for_images() -> None:
    options = KINDS["tokens"][1] | {"proxy_codes": 20}
    first = TiTok(image_channels=3, **options).eval()
    z = first.encode(images(2, 3, 16, 16)).z
    assert first.proxy_logits(z).shape == (2, 20, 4, 4)
    with pytest.raises(GenkitError, match="no decoder for them"):
        first.decode(z)
    second = TiTok(image_channels=3, **options, pixel_widths=(32, 32, 64), pixel_blocks=1, pixel_channels=6).eval()
    assert second.decode(z).shape == (2, 3, 16, 16)
    with pytest.raises(UsageError, match="decodes to pixels"):
        make("tokens").proxy_logits(z)


def test_proxy_codes_are_mixed_by_their_probabilities() -> None:
    options = KINDS["tokens"][1] | {
        "proxy_codes": 20,
        "pixel_widths": (32, 32, 64),
        "pixel_blocks": 1,
        "pixel_channels": 6,
    }
    model = TiTok(image_channels=3, **options).eval()
    logits = torch.full((1, 20, 4, 4), -1e4)
    logits[:, 7] = 0
    model.head.forward = lambda h: logits
    assert model.pixels is not None
    expected = model.pixels(model.proxy_table.weight[7].view(1, 6, 1, 1).expand(1, 6, 4, 4))
    torch.testing.assert_close(model.decode(torch.zeros(1, 6, 5)), expected)


# --- official weights


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    sys.path.insert(0, str(HERE))
    try:
        import golden
        import golden_structured
    finally:
        sys.path.remove(str(HERE))
    golden_structured.golden = golden
    return golden_structured


IMPORTERS = {"var_vqvae": import_var, "titok": import_titok, "dqvae": import_dqvae}


@pytest.mark.parametrize("system", IMPORTERS)
@torch.no_grad()
def test_official_outputs_are_reproduced(runner: ModuleType, system: str) -> None:
    case = runner.golden.load(HERE / "golden" / f"{system}.safetensors")
    got = getattr(runner, f"run_{system}")(case)
    for name, expected in case.outputs.items():
        assert runner.golden.compare(expected, got[name], case.tolerance)[2] == "ok", name


@pytest.mark.parametrize("system", IMPORTERS)
def test_importers_name_missing_and_unknown_keys_together(runner: ModuleType, system: str) -> None:
    case = runner.golden.load(HERE / "golden" / f"{system}.safetensors")
    gone = next(key for key in case.weights if key.endswith(("mid.block_1.norm1.bias", "transformer.1.ln_1.bias")))
    weights = {key: value for key, value in case.weights.items() if key != gone} | {"surplus.weight": torch.ones(1)}
    with pytest.raises(GenkitError) as raised:
        IMPORTERS[system].convert(weights, case.config)
    assert "\n" not in str(raised.value)
    assert f"missing: {gone}" in str(raised.value)
    assert "unknown: surplus.weight" in str(raised.value)


@pytest.mark.parametrize("system", IMPORTERS)
def test_other_weights_are_refused(system: str) -> None:
    with pytest.raises(GenkitError, match="these weights are not those of"):
        IMPORTERS[system].convert({"weight": torch.ones(3, 3)})


def exported(model: nn.Module, rules: Any) -> dict[str, Tensor]:
    """Our weights under their names."""
    state: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        theirs = source_of(key, rules)
        value = value.squeeze(0) if key.endswith("codebook.embed") else value
        parts = value.chunk(len(theirs)) if theirs else ()
        state |= dict(zip(theirs, parts, strict=True))
    return state


@pytest.mark.parametrize(
    ("options", "phi", "official"),
    [
        ({"num_phi": 1}, "quantize.quant_resi.qresi.{1}", {}),
        ({"num_phi": 3, "stem": 32}, "quantize.quant_resi.qresi_ls.{0}.{1}", {"quant_resi": -0.5}),
        ({"num_phi": 4, "cosine": True}, "quantize.quant_resi.{0}.{1}", {"using_znorm": True}),
        ({"phi_ratio": 0.0, "latent_kernel": 1}, "", {"quant_resi": 0}),
        ({"phi_ratio": 0.25, "num_blocks": 2}, "quantize.quant_resi.qresi_ls.{0}.{1}", {"quant_resi": 0.25}),
    ],
)
@torch.no_grad()
def test_every_kind_of_var_tokenizer_is_recognised_by_its_weights(
    options: dict[str, Any], phi: str, official: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    made = VarVq(image_channels=3, **SMALL | {"patch_sizes": SCALES, "stride": 2, "widths": (64, 32)} | options).eval()
    for conv in made.quantizer.phi:
        nn.init.normal_(conv.weight, std=0.2)  # so that another one in its place would show
    state = exported(made, import_var.rules(2, phi))
    again = import_var.convert(state, {"v_patch_nums": list(SCALES), **official})
    x = images(2, 3, 8, 8)
    assert torch.equal(again.encode(x).ids, made.encode(x).ids)
    torch.testing.assert_close(again(x)[0], made(x)[0])


@pytest.mark.parametrize(
    ("options", "official"),
    [
        ({"cosine": False}, {"model": {"vq_model": {"use_l2_norm": False, "num_heads": 4}}}),
        (
            {"num_heads": 2, "decoder_dim": 12, "decoder_depth": 1, "decoder_heads": 2, "decoder_stride": 8},
            {"num_heads": 2},
        ),
        ({"dim": 128, "num_heads": 2}, {}),
        ({"proxy_codes": 20, "pixel_widths": (32, 64, 64), "pixel_blocks": 1, "pixel_channels": 6}, {"num_heads": 4}),
    ],
)
@torch.no_grad()
def test_every_kind_of_titok_is_recognised_by_its_weights(options: dict[str, Any], official: dict[str, Any]) -> None:
    torch.manual_seed(0)
    made = TiTok(image_channels=3, **KINDS["tokens"][1] | options).eval()
    state = exported(made, import_titok.rules(len(options.get("pixel_widths", ()))))
    again = import_titok.convert(state, official)
    x = images(2, 3, 16, 16)
    assert torch.equal(again.encode(x).ids, made.encode(x).ids)
    torch.testing.assert_close(again(x)[0], made(x)[0])


@pytest.mark.parametrize(
    ("options", "official"),
    [
        ({"router": "feature", "router_groups": 4}, {"encoderconfig": {"router": {"normalization_type": "group-4"}}}),
        ({"router": "feature", "router_groups": 0, "router_is_deep": False, "stem": 32}, {}),
        (
            {"router": "entropy", "thresholds": (2.4626,), "positions": "waves"},
            {"fine_grain_ratito": 0.25, "latent_size": 8},
        ),
        (
            {
                "router": "feature",
                "router_groups": 2,
                "num_grains": 3,
                "targets": (0.3, 0.3),
                "stride": 1,
                "image_size": 8,
            },
            {"norm": "group-2"},
        ),
        (
            {"router": "entropy", "thresholds": (1.0,), "decoder_widths": (32, 32), "attention": (1, 2)},
            {"threshold": 1.0},
        ),
    ],
)
@torch.no_grad()
def test_every_kind_of_dqvae_is_recognised_by_its_weights(options: dict[str, Any], official: dict[str, Any]) -> None:
    torch.manual_seed(0)
    made = DQVAE(image_channels=3, **KINDS["deep grains"][1] | {"widths": (64, 32, 64)} | options).eval()
    grains = ("coarse", "median", "fine") if made.num_grains == 3 else ("coarse", "fine")
    waves = "decoder.position_bias" if options.get("positions") == "waves" else "decoder.position_bias_fourier"
    state = exported(
        made, import_dqvae.rules(3 - made.num_grains + 1, grains, waves, options.get("router_is_deep", True))
    )
    table = state["quantize.codebook.weight"]
    state["quantize.codebook.weight"] = torch.cat([table, torch.zeros(1, table.shape[1])])  # with their row of padding
    again = import_dqvae.convert(state, official)
    x = images(2, 3, made.image_size, made.image_size)
    assert torch.equal(again.grain(x), made.grain(x))
    assert torch.equal(again.encode(x).ids, made.encode(x).ids)
    torch.testing.assert_close(again(x)[0], made(x)[0])


@torch.no_grad()
def test_an_imported_tokenizer_can_be_trained_on(runner: ModuleType, tmp_path: Path) -> None:
    case = runner.golden.load(HERE / "golden" / "var_vqvae.safetensors")
    tokenizer = import_var.convert(case.weights, case.config).train()
    before = tokenizer.quantizer.codebook.embed.clone()
    tokenizer(case.inputs["image"])
    step(tokenizer)
    moved = (tokenizer.quantizer.codebook.embed - before).norm() / before.norm()
    assert 0 < moved < 0.2  # follows the data, is not clustered anew


# --- recipes


def on_meta(recipe: str) -> Any:
    loaded = config.load(str(Path(config.__file__).parent / "configs" / f"{recipe}.yaml"))
    with torch.device("meta"):
        return registry.build("tokenizer", loaded["tokenizer"], image_channels=3)


def count(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def test_recipes_at_paper_scale_have_the_size_of_the_papers() -> None:
    var = on_meta("var-vq-f16")
    assert count(var) + var.codebook_size * var.channels == 108_948_355  # VAR: 108.95 M
    assert var.quantizer.num_tokens == 680
    dqvae = on_meta("dqvae-f8")
    assert round(count(dqvae.encoder, dqvae.choose) / 1e6, 2) == 33.31  # as instantiated from the released code
    assert round(count(dqvae.decoder, dqvae.place) / 1e6, 2) == 14.40
    nfig = on_meta("nfig-f16")
    assert nfig.quantizer.num_tokens == 680
    assert 108e6 < count(nfig) < 109e6
    titok = on_meta("titok-l32")
    assert titok.num_tokens == 32
    assert 300e6 < count(titok.encoder) < 305e6  # ViT-L
