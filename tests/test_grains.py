"""Tokens of varying density, and tokens without a grid."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from genkit.errors import GenkitError, UsageError
from genkit.nn import grain
from genkit.tokenizers.dqvae import DQVAE
from genkit.tokenizers.titok import TiTok
from tests.structured import KINDS, SMALL, images, make

# Grains


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


# Tokens without a grid


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
