"""Quantisers without tables: finite scalars and bits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from genkit.errors import UsageError
from genkit.nn.binary import BinaryQuantizer
from genkit.nn.codebook import normalise
from genkit.nn.scalar import ScalarQuantizer, bound
from genkit.nn.straight_through import straight_through
from tests.quantising import Largest, randn

# Finite scalars


@given(levels=st.lists(st.integers(2, 9), min_size=1, max_size=4), is_symmetric=st.booleans())
@settings(max_examples=40, deadline=None)
def test_every_id_is_a_code_and_every_code_its_own_id(levels: list[int], is_symmetric: bool) -> None:
    is_symmetric = is_symmetric or 2 in levels
    quantizer = ScalarQuantizer(dim=len(levels), levels=levels, is_symmetric=is_symmetric).eval()
    ids = torch.arange(quantizer.codebook_size)[None, :, None]
    codes = quantizer.codes(ids)
    assert len(codes[0].unique(dim=0)) == quantizer.codebook_size
    assert codes.abs().max() <= 1
    if is_symmetric:
        assert torch.allclose(codes.mean(1), torch.zeros(len(levels)), atol=1e-6)
        assert all(codes[0, :, i].unique().allclose(torch.linspace(-1, 1, n), atol=1e-6) for i, n in enumerate(levels))
    # Codes as the network would make them: beyond what a tanh can reach for the outermost.
    z = torch.atanh(codes.clamp(-0.9999, 0.9999))
    if is_symmetric:
        assert torch.equal(quantizer(z).ids, ids)
    extreme = quantizer(torch.stack([torch.full((len(levels),), v) for v in (-20.0, 20.0)])[None])
    assert extreme.ids.flatten().tolist() == [0, quantizer.codebook_size - 1]


@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (3, 7), (16,)])
def test_rounding_in_one_step_is_the_equation_written_out(levels: tuple[int, ...]) -> None:
    quantizer = ScalarQuantizer(dim=len(levels), levels=levels)
    z = (2 * torch.randn(3, 7, len(levels))).requires_grad_()
    found = quantizer(z)
    counts = torch.tensor(levels)
    bounded = bound(z, counts)
    written = straight_through(bounded / (counts // 2), bounded.detach().round() / (counts // 2))
    assert torch.equal(found.codes, written)
    gradient = torch.randn_like(written)
    (ours,) = torch.autograd.grad(found.codes, z, gradient)
    (theirs,) = torch.autograd.grad(written, z, gradient)
    torch.testing.assert_close(ours, theirs)


def test_residual_steps_of_scalars_get_finer() -> None:
    quantizer = ScalarQuantizer(dim=3, levels=[5, 5, 5], depth=3, is_symmetric=True, is_clamped=True).eval()
    z = torch.rand(1, 200, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ids = quantizer(z).ids
    assert torch.equal(quantizer.codes(ids), quantizer(z).codes)
    errors = [
        (quantizer.codes(ids.masked_fill(torch.arange(3) > step, -1)) - z).abs().max().item() for step in range(3)
    ]
    assert errors == pytest.approx([0.25, 0.05, 0.01], rel=0.1)


def test_a_list_of_levels_must_make_sense() -> None:
    for options, message in (
        ({"levels": []}, "must list"),
        ({"levels": [5, 1]}, r"levels=\[5, 1\]"),
        ({"levels": [5, 2]}, "symmetric"),
        ({"levels": [5, 5], "depth": 2}, "symmetric"),
    ):
        with pytest.raises(UsageError, match=message):
            ScalarQuantizer(dim=2, **options)


# Binary


def dense_entropies(z: Tensor, codes: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(mean entropy of the rows [N, d], entropy of their mean) of the softmax over all codes, in double precision."""
    p = (2 / temperature * z.double() @ codes.double().T).softmax(-1)
    mean = p.mean(0)
    return -torch.special.xlogy(p, p).sum(1).mean(), -torch.special.xlogy(mean, mean).sum()


@pytest.mark.parametrize("temperature", [0.5, 0.02])
@pytest.mark.parametrize(("bits", "is_spherical"), [(1, False), (2, False), (7, False), (6, True)])
def test_entropies_are_those_of_the_whole_softmax(bits: int, is_spherical: bool, temperature: float) -> None:
    options = {"entropy": 1.0, "temperature": temperature, "is_spherical": is_spherical}
    z = randn(3, 20, bits).mul(0.3).requires_grad_()
    other = z.detach().clone().requires_grad_()
    per_row = BinaryQuantizer(dim=bits, codebook_size=2**bits, diversity=0.0, **options).train()
    both = BinaryQuantizer(dim=bits, codebook_size=2**bits, diversity=0.7, **options).train()
    codes = both.codes(torch.arange(2**bits)[None, :, None])[0]
    rows = normalise(other) if is_spherical else other
    of_rows, of_mean = dense_entropies(rows.reshape(-1, bits), codes, temperature)
    torch.testing.assert_close(per_row(z).losses["entropy"].mean(), of_rows.float(), atol=1e-5, rtol=1e-4)
    ours = both(z).losses["entropy"].mean()
    torch.testing.assert_close(ours, (of_rows - 0.7 * of_mean).float(), atol=1e-5, rtol=1e-4)
    ours.backward()
    (of_rows - 0.7 * of_mean).backward()
    torch.testing.assert_close(z.grad, other.grad, atol=1e-5, rtol=1e-3)


def test_entropy_of_every_image_is_its_own() -> None:
    quantizer = BinaryQuantizer(dim=4, codebook_size=16, diversity=0.0, temperature=1.0).train()
    z = randn(3, 5, 4)
    torch.testing.assert_close(quantizer(z).losses["entropy"][1:2], quantizer(z[1:2]).losses["entropy"])


def test_groups_of_bits_are_added_up() -> None:
    z = randn(2, 50, 6)
    whole, halves = (
        BinaryQuantizer(dim=6, codebook_size=64, entropy=1.0, temperature=1.0, group_bits=bits).train()
        for bits in (6, 3)
    )
    separate = BinaryQuantizer(dim=3, codebook_size=8, entropy=1.0, temperature=1.0).train()
    got = halves(z).losses["entropy"].mean()
    assert got < whole(z).losses["entropy"].mean()  # the joint entropy is below the sum of its parts
    parts = sum(separate(part).losses["entropy"].mean() for part in z.split(3, dim=-1))
    torch.testing.assert_close(got, parts)


def test_bits_are_the_signs_in_the_order_asked_for() -> None:
    z = torch.tensor([[[3.0, -1.0, 0.0, 0.5]]])
    for order, expected in (("big", 0b1001), ("little", 0b1001), ("big", 0b1001)):
        assert BinaryQuantizer(dim=4, codebook_size=16, bit_order=order)(z).ids.item() == expected  # type: ignore[arg-type]
    z = torch.tensor([[[3.0, 1.0, -2.0, -0.5]]])
    for order, expected in (("big", 0b1100), ("little", 0b0011)):
        quantizer = BinaryQuantizer(dim=4, codebook_size=16, bit_order=order)  # type: ignore[arg-type]
        assert quantizer(z).ids.item() == expected
        assert torch.equal(quantizer.codes(torch.full((1, 1, 1), expected)), torch.sign(z))


def test_spherical_codes_have_length_one_and_the_gradient_of_the_paper() -> None:
    quantizer = BinaryQuantizer(dim=18, codebook_size=2**18, is_spherical=True).eval()
    z = normalise(randn(2, 5, 18)).requires_grad_()
    codes = quantizer(z).codes
    torch.testing.assert_close(codes.norm(dim=-1), torch.ones(2, 5))
    grad = randn(2, 5, 18, seed=1)
    grad = grad - (grad * z.detach()).sum(-1, keepdim=True) * z.detach()  # what normalising lets pass
    codes.backward(grad)
    torch.testing.assert_close(z.grad, grad / math.sqrt(18), atol=1e-6, rtol=1e-5)


def test_no_tensor_is_as_wide_as_the_codebook() -> None:
    quantizer = BinaryQuantizer(dim=16, codebook_size=2**16).train()
    z = randn(4, 256, 16).requires_grad_()
    with Largest() as largest:
        found = quantizer(z)
        (found.codes.sum() + found.losses["entropy"].sum()).backward()
    assert largest.elements <= 1024 * 2**8  # and not 1,024 x 2^16


def test_binary_sizes_must_make_sense() -> None:
    for options, message in (
        ({"codebook_size": 48}, "48 is not a power of two; 32 is one"),
        ({"codebook_size": 1}, "not a power of two"),
        ({"codebook_size": -8}, "not a power of two"),
        ({"codebook_size": 16, "group_bits": 19}, r"1\.\.18"),
        ({"codebook_size": 16, "temperature": 0.0}, "above 0"),
    ):
        with pytest.raises(UsageError, match=message):
            BinaryQuantizer(dim=4, **options)
