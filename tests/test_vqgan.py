"""VQGAN and KL autoencoders: sizes of the papers, what their networks compute, what their latents mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genkit import config as configs
from genkit import registry
from genkit.errors import UsageError
from genkit.nn.gaussian import Gaussian
from genkit.nn.taming import Attention, Double, Halve, ResBlock
from genkit.recipes import FOLDER
from genkit.tokenizers.kl import KL
from genkit.tokenizers.klgan import KLGAN
from genkit.tokenizers.maskgit_vqgan import MaskgitVQGAN
from genkit.tokenizers.vqgan import VQGAN

NETWORK: dict[str, Any] = {"widths": (8, 12, 16), "num_blocks": 1, "attention": (2,), "norm_groups": 4}
TINY: dict[str, Any] = {
    "vqgan": VQGAN(image_channels=3, **NETWORK, neck=6, channels=5, codebook_size=12),
    "vqgan cosine": VQGAN(image_channels=1, **NETWORK, neck=6, channels=5, codebook_size=12, cosine=True),
    "maskgit": MaskgitVQGAN(image_channels=3, widths=(32, 64, 32), num_blocks=1, channels=5, codebook_size=12),
    "kl": KL(image_channels=3, stride=4, width=16, num_blocks=1, channels=5),
    "klgan": KLGAN(image_channels=1, **NETWORK, neck=6, channels=5),
}


def images(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(params=TINY)
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A fresh copy with random weights, also where layers begin at zero, and a codebook made of a batch."""
    model = type(TINY[request.param])(**{k: v for k, v in TINY[request.param].config.items() if k[0] != "_"})
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else parameter.data.add_(
            0.1 * torch.randn_like(parameter)
        )
    if model.codebook_size:
        model.train()(images(4, model.image_channels, 16, 8))
        model.quantizer.codebook.after_step()
    return model.eval()


# --- sizes


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameter_counts_of_the_taming_paper() -> None:
    with torch.device("meta"):
        model = VQGAN(image_channels=3)
    projections = count(model.encoder.project) + count(model.decoder.project)
    assert count(model.encoder) - count(model.encoder.project) == 29_298_176
    assert count(model.decoder) - count(model.decoder.project) == 42_449_795
    assert projections == 131_584
    assert model.quantizer.codebook.embed.numel() == 1024 * 256


@pytest.mark.parametrize(
    ("widths", "attention", "expected"),
    [((128, 128, 256, 256, 512), (4,), 71_883_403), ((128, 256, 256, 512), (3,), 70_109_835)],
    ids=["VQ-16", "VQ-8"],
)
def test_parameter_counts_of_llamagen(widths: tuple[int, ...], attention: tuple[int, ...], expected: int) -> None:
    with torch.device("meta"):
        model = VQGAN(
            image_channels=3, widths=widths, attention=attention, channels=8, codebook_size=16_384, cosine=True
        )
    assert sum(p.numel() for n, p in model.named_parameters() if "codebook" not in n) + 16_384 * 8 == expected


def test_parameter_count_of_the_first_stage_of_stable_diffusion() -> None:
    with torch.device("meta"):
        assert count(KLGAN(image_channels=3)) == 83_653_863


@pytest.mark.parametrize("name", ["vqgan-f16", "maskgit-vqgan-f16", "kl-f8", "kl-folder"])
def test_recipes_at_full_size_can_be_built(name: str) -> None:
    spec = configs.load(FOLDER / f"{name}.yaml")["tokenizer"]
    with torch.device("meta"):
        model = registry.build("tokenizer", spec, image_channels=3)
    assert count(model) > 10_000_000
    assert 256 % model.stride == 0


# --- networks


def test_halving_pads_at_the_right_and_at_the_bottom() -> None:
    half = Halve(1)
    nn.init.zeros_(half.bias)
    nn.init.zeros_(half.weight)
    half.weight.data[0, 0, 2, 2] = 1.0  # reads the place two further down and right
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert half(x).flatten().tolist() == [10.0, 0.0, 0.0, 0.0]


def test_doubling_repeats_places_before_it_convolves() -> None:
    double = Double(1)
    nn.init.dirac_(double.weight)
    nn.init.zeros_(double.bias)
    x = torch.tensor([[[[1.0, 2.0]]]])
    assert double(x).tolist() == [[[[1, 1, 2, 2], [1, 1, 2, 2]]]]


def test_attention_is_the_softmax_over_all_places() -> None:
    torch.manual_seed(0)
    layer, x = Attention(8, 2), torch.randn(2, 8, 3, 5)
    q, k, v = layer.qkv(layer.norm(x)).flatten(2).chunk(3, dim=1)  # [B, C, N]
    mixed = v @ torch.softmax(q.mT @ k / 8**0.5, dim=-1).mT
    torch.testing.assert_close(layer(x), x + layer.out(mixed.reshape(x.shape)))


def test_shortcut_is_a_convolution_only_where_the_width_changes() -> None:
    assert isinstance(ResBlock(8, 8, 4).shortcut, nn.Identity)
    assert isinstance(ResBlock(8, 12, 4).shortcut, nn.Conv2d)


@pytest.mark.parametrize("size", [(4, 4), (8, 20), (28, 28)])
def test_any_multiple_of_the_stride_is_a_size(tokenizer: Any, size: tuple[int, int]) -> None:
    x = images(2, tokenizer.image_channels, *size)
    reconstruction, encoded = tokenizer(x)
    assert reconstruction.shape == x.shape
    assert encoded.z.shape == (2, 5, size[0] // 4, size[1] // 4)
    with pytest.raises(UsageError, match="stride 4; nearest sizes that do"):
        tokenizer.encode(images(2, tokenizer.image_channels, size[0], size[1] + 1))


def test_an_image_is_encoded_alike_in_any_batch(tokenizer: Any) -> None:
    x = images(5, tokenizer.image_channels, 8, 12)
    torch.testing.assert_close(tokenizer.encode(x[3:4]).z, tokenizer.encode(x).z[3:4], atol=1e-4, rtol=1e-4)


def test_gradient_reaches_every_parameter(tokenizer: Any) -> None:
    tokenizer.train()
    reconstruction, encoded = tokenizer(images(2, tokenizer.image_channels, 8, 8))
    (reconstruction.square().mean() + sum(loss.mean() for loss in encoded.losses.values())).backward()
    for name, parameter in tokenizer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_saved_tokenizer_gives_the_same_images(tokenizer: Any, tmp_path: Path) -> None:
    x = images(2, tokenizer.image_channels, 8, 8)
    tokenizer.set_latent_stats(torch.linspace(-1, 1, 5), torch.linspace(0.5, 2, 5))
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path, low_cpu_mem_usage=False).eval()
    # Not bit for bit: what is loaded lies in memory in another order, and so is summed in another order.
    torch.testing.assert_close(loaded(x)[0], tokenizer(x)[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": (8, 10)}, r"widths=\[8, 10\] must be multiples of 4"),
        ({"widths": ()}, "must be multiples"),
        ({"attention": (3,)}, "names level 3, but the levels are 0 to 2"),
        ({"decoder_attention": (-1,)}, "names level -1"),
        ({"stem": 6}, "stem=6 must be a multiple of 4"),
        ({"num_blocks": 0}, "num_blocks=0 must be at least 1"),
    ],
)
@pytest.mark.parametrize("cls", [VQGAN, KLGAN])
def test_sizes_that_do_not_fit_are_told(cls: type, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        cls(image_channels=1, **NETWORK | options)


# --- codes


@pytest.mark.parametrize("tokenizer", ["vqgan", "vqgan cosine", "maskgit"], indirect=True)
def test_ids_and_latents_say_the_same(tokenizer: Any) -> None:
    x = images(3, tokenizer.image_channels, 12, 20)
    for _ in range(2):
        encoded = tokenizer.encode(x)
        assert encoded.ids.shape == (3, 1, 3, 5)
        assert torch.equal(tokenizer.codes(encoded.ids), encoded.z)
        assert torch.equal(tokenizer.decode(encoded.z), tokenizer(x)[0])
        tokenizer.set_latent_stats(torch.linspace(-1, 1, 5), torch.linspace(0.5, 2, 5))


def test_cosine_codes_have_length_one() -> None:
    model = TINY["vqgan cosine"].eval()
    codes = model.codes(torch.arange(12).reshape(1, 1, 3, 4))
    torch.testing.assert_close(codes.norm(dim=1), torch.ones(1, 3, 4))


def test_maskgit_reads_and_writes_pixels_between_0_and_1() -> None:
    """Inside, black is 0 as is the padding: a black image gives the same everywhere, borders included."""
    model = TINY["maskgit"].eval()
    h = model.encoder(torch.full((1, 3, 16, 16), -1.0))
    torch.testing.assert_close(h, h[:, :, :1, :1].expand_as(h))
    nn.init.zeros_(model.decoder.conv_out.weight)
    nn.init.constant_(model.decoder.conv_out.bias, 0.75)
    assert torch.equal(model.decode(torch.zeros(1, 5, 2, 2)), torch.full((1, 3, 8, 8), 0.5))


# --- Gaussian latents


def test_divergence_is_that_of_torch_distributions() -> None:
    mean, logvar = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    posterior = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0, 1)).flatten(1).sum(1)
    torch.testing.assert_close(Gaussian(mean, logvar).kl(), expected)


def test_samples_have_the_mean_and_the_spread_of_the_posterior() -> None:
    torch.manual_seed(0)
    drawn = Gaussian(torch.full((1, 1, 200, 200), 3.0), torch.full((1, 1, 200, 200), 2.0)).sample()
    assert drawn.mean().item() == pytest.approx(3.0, abs=0.05)
    assert drawn.std().item() == pytest.approx(torch.tensor(1.0).exp().item(), abs=0.05)


def test_variances_without_bounds_stay_finite() -> None:
    posterior = Gaussian.from_moments(torch.cat([torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 1e4)], dim=1))
    assert posterior.kl().isfinite().all()
    assert posterior.sample().isfinite().all()


@pytest.mark.parametrize(("cls", "options"), [(KL, {"width": 16}), (KLGAN, {**NETWORK, "neck": None})])
def test_continuous_latents_are_means_in_evaluation_and_samples_in_training(cls: type, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = cls(image_channels=1, **options, channels=3, kl_weight=0.5).eval()
    assert (model.num_levels, model.codebook_size) == (0, 0)
    x = images(2, 1, 8, 16)
    encoded = model.encode(x)
    moments = Gaussian.from_moments(model.encoder(x))
    torch.testing.assert_close(encoded.z, moments.mean)
    assert encoded.ids is None
    # In nats per number of the image, so that the weight does not depend on its size.
    torch.testing.assert_close(encoded.losses["kl"], 0.5 * moments.kl() / (8 * 16))
    model.train()
    drawn = torch.stack([model.encode(x).z for _ in range(2)])
    assert not torch.equal(drawn[0], drawn[1])
    spread = (drawn - moments.mean) / (0.5 * moments.logvar).exp()
    assert 0.5 < spread.std().item() < 1.5
    with pytest.raises(UsageError, match="has no ids"):
        model.codes(torch.zeros(1, 1, 2, 2, dtype=torch.int64))


def test_a_heavy_weight_pulls_the_posterior_to_the_standard_normal() -> None:
    torch.manual_seed(0)
    model = KL(image_channels=1, width=16, num_blocks=1, channels=2, kl_weight=1.0).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    x = images(8, 1, 8, 8)
    divergences = []
    for _ in range(40):
        loss = model.encode(x).losses["kl"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        divergences.append(loss.item())
    assert divergences[-1] < 0.2 * divergences[0]


def test_a_few_steps_bring_the_images_closer() -> None:
    torch.manual_seed(0)
    x = F.interpolate(images(4, 1, 2, 2), scale_factor=2)
    model = VQGAN(
        image_channels=1, **NETWORK | {"widths": (8, 16), "attention": ()}, channels=8, codebook_size=16
    ).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    errors = []
    for _ in range(80):
        reconstruction, encoded = model(x)
        error = (reconstruction - x).square().mean()
        optimizer.zero_grad()
        (error + 0.25 * encoded.losses["commitment"].mean()).backward()
        optimizer.step()
        model.quantizer.codebook.after_step()
        errors.append(error.item())
    assert errors[-1] < 0.3 * errors[0]
