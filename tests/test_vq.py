"""The VQ tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from genkit.errors import UsageError
from genkit.nn.conv import Decoder, Encoder, patch_transform
from genkit.nn.quantize import Quantizer
from genkit.tokenizers.vq import VQ

TINY = {"image_channels": 1, "width": 16, "num_blocks": 1, "channels": 8, "codebook_size": 12}


def images(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(params=[{}, {"codebook_dim": 3, "cosine": True}], ids=["plain", "cosine"])
def tokenizer(request: pytest.FixtureRequest) -> VQ:
    torch.manual_seed(0)
    model = VQ(**TINY | request.param).train()
    model(images(4, 1, 12, 20))
    model.quantizer.codebook.after_step()
    return model.eval()


def test_ids_and_latents_say_the_same(tokenizer: VQ) -> None:
    x = images(3, 1, 12, 20)
    for _ in range(2):
        encoded = tokenizer.encode(x)
        assert encoded.ids is not None
        assert encoded.ids.dtype == torch.int64
        assert encoded.ids.shape == (3, 1, 3, 5)
        assert encoded.z.shape == (3, 8, 3, 5)
        assert torch.equal(tokenizer.codes(encoded.ids), encoded.z)
        assert torch.equal(tokenizer.decode(encoded.z), tokenizer(x)[0])
        tokenizer.set_latent_stats(torch.linspace(-1, 1, 8), torch.linspace(0.5, 2, 8))


def test_every_code_is_its_own_nearest(tokenizer: VQ) -> None:
    codebook = tokenizer.quantizer.codebook
    assert torch.equal(codebook(codebook.embed)[1], torch.arange(12)[None])


def test_latent_statistics_scale_z_and_leave_images_alone(tokenizer: VQ) -> None:
    x = images(8, 1, 12, 20)
    z, image = tokenizer.encode(x).z, tokenizer(x)[0]
    rows = z.transpose(0, 1).flatten(1)
    tokenizer.set_latent_stats(rows.mean(1), rows.std(1) + 1e-3)
    scaled = tokenizer.encode(x).z.transpose(0, 1).flatten(1)
    torch.testing.assert_close(scaled.mean(1), torch.zeros(8), atol=1e-3, rtol=0)
    torch.testing.assert_close(tokenizer(x)[0], image, atol=1e-5, rtol=1e-5)
    with pytest.raises(UsageError, match="above 0"):
        tokenizer.set_latent_stats(torch.zeros(8), torch.zeros(8))
    with pytest.raises(UsageError, match=r"expected \[8\]"):
        tokenizer.set_latent_stats(torch.zeros(7), torch.ones(7))


def test_gradient_reaches_every_parameter() -> None:
    torch.manual_seed(0)
    model = VQ(**TINY | {"codebook_dim": 3}).train()
    for convolution in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
        nn.init.normal_(convolution.weight, std=0.1)  # at their initial zero some stop the gradient of what lies before
    reconstruction, encoded = model(images(2, 1, 8, 8))
    (reconstruction.square().mean() + encoded.losses["commitment"].mean()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_gradient_passes_straight_through() -> None:
    quantizer = Quantizer(dim=4, codebook_size=9)
    z = torch.randn(2, 5, 4, requires_grad=True)
    weight = torch.randn(2, 5, 4)
    (quantizer(z).codes * weight).sum().backward()
    assert torch.equal(z.grad, weight)


@pytest.mark.parametrize(("stride", "side"), [(1, 3), (2, 6), (4, 4), (8, 24), (16, 32)])
def test_any_power_of_two_is_a_stride(stride: int, side: int) -> None:
    model = VQ(**TINY | {"stride": stride, "image_channels": 3}).eval()
    x = images(1, 3, side, 2 * side)
    reconstruction, encoded = model(x)
    assert reconstruction.shape == x.shape
    assert encoded.ids is not None
    assert encoded.ids.shape == (1, 1, side // stride, 2 * side // stride)


def test_mistakes_are_told_in_one_line(tokenizer: VQ) -> None:
    with pytest.raises(UsageError, match="30x29 do not fit stride 4; nearest sizes that do: 28x28 or 32x32"):
        tokenizer.encode(images(1, 1, 30, 29))
    with pytest.raises(UsageError, match="3x8 do not fit stride 4; nearest sizes that do: 4x8"):
        tokenizer.encode(images(1, 1, 3, 8))
    with pytest.raises(UsageError, match=r"\[2, 3, 8, 8\], but this tokenizer was made for \[B, 1, Y, X\]"):
        tokenizer.encode(images(2, 3, 8, 8))
    for wrong in (-1, 12):
        with pytest.raises(UsageError, match=r"the codebook has 12 codes"):
            tokenizer.codes(torch.full((1, 1, 2, 2), wrong))
    with pytest.raises(UsageError, match=r"expected \[B, 1, Y, X\]"):
        tokenizer.codes(torch.zeros(1, 2, 2, dtype=torch.int64))
    for options, message in (
        ({"stride": 3}, "power of two"),
        ({"width": 0}, "at least 1"),
        ({"decay": 1.0}, r"\[0, 1\)"),
    ):
        with pytest.raises(UsageError, match=message):
            VQ(**TINY | options)


def test_saved_tokenizer_gives_the_same_images(tokenizer: VQ, tmp_path: Path) -> None:
    x = images(2, 1, 8, 8)
    tokenizer.set_latent_stats(torch.linspace(-1, 1, 8), torch.linspace(0.5, 2, 8))
    tokenizer.save_pretrained(tmp_path)
    for loaded in (VQ.from_pretrained(tmp_path), VQ.from_pretrained(tmp_path, low_cpu_mem_usage=False)):
        assert torch.equal(loaded.eval()(x)[0], tokenizer(x)[0])


@pytest.mark.parametrize(("stride", "image_channels"), [(1, 1), (4, 1), (4, 3), (8, 2)])
def test_patch_transform_gives_patches_back(stride: int, image_channels: int) -> None:
    full = stride**2 * image_channels
    whole = patch_transform(stride, image_channels, full + 3)
    torch.testing.assert_close(whole[:full].T @ whole[:full], torch.eye(full), atol=1e-6, rtol=0)
    assert not whole[full:].any()
    # The first rows are the mean of each colour, and a narrower transform holds the first rows of a wider one.
    patch = torch.rand(image_channels, stride, stride)
    means = stride * patch.mean((1, 2))
    torch.testing.assert_close((whole @ patch.flatten())[:image_channels], means)
    assert torch.equal(patch_transform(stride, image_channels, 2 * image_channels), whole[: 2 * image_channels])


def test_an_untrained_network_is_a_patch_codec() -> None:
    shape = {"image_channels": 3, "channels": 48, "stride": 4, "width": 16, "num_blocks": 1}
    x = images(2, 3, 8, 12)
    torch.testing.assert_close(Decoder(**shape)(Encoder(**shape)(x)), x, atol=1e-5, rtol=0)


def test_a_few_steps_bring_the_images_closer() -> None:
    torch.manual_seed(0)
    model = VQ(**TINY | {"codebook_size": 32}).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    x = images(16, 1, 2, 2).repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    errors = []
    for _ in range(60):
        reconstruction, encoded = model(x)
        error = (reconstruction - x).square().mean()
        optimizer.zero_grad()
        (error + 0.25 * encoded.losses["commitment"].mean()).backward()
        optimizer.step()
        model.quantizer.codebook.after_step()
        errors.append(error.item())
    assert errors[-1] < 0.2 * errors[0]
    assert model.quantizer.codebook.stats()["usage"] > 0.9


def test_modules_to_update_are_found_by_walking() -> None:
    found = [name for name, module in VQ(**TINY).named_modules() if hasattr(module, "after_step")]
    assert found == ["quantizer.codebook"]
