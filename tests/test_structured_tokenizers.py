"""Tokenizers whose ids have a structure (scales, frequency bands, rows of tokens, grains): what holds for all of them, and the sizes of their recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from genkit import config, registry
from genkit.errors import UsageError
from genkit.tokenizers.dqvae import DQVAE
from genkit.tokenizers.nfig import NFIG
from genkit.tokenizers.titok import TiTok
from genkit.tokenizers.var_vq import VarVq
from tests.quantising import after_step
from tests.structured import KINDS, images, make


@pytest.fixture(params=KINDS, scope="module")
def tokenizer(request: pytest.FixtureRequest) -> Any:
    model = make(request.param).train()
    with torch.no_grad():
        for seed in range(2):
            model(images(16, 3, model.image_size, model.image_size) * (1 - 0.1 * seed))
            after_step(model)
    return model.eval()


# The contract


@torch.no_grad()
def test_ids_say_all_that_z_says(tokenizer: Any) -> None:
    x = images(3, 3, tokenizer.image_size, tokenizer.image_size)
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
    x = images(4, 3, tokenizer.image_size, tokenizer.image_size)
    whole, alone = tokenizer.encode(x), tokenizer.encode(x[2:3])
    assert whole.ids is not None
    assert alone.ids is not None
    assert torch.equal(whole.ids[2:3], alone.ids)
    torch.testing.assert_close(whole.z[2:3], alone.z, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_latent_statistics_leave_images_and_ids_alone(tokenizer: Any) -> None:
    x = images(4, 3, tokenizer.image_size, tokenizer.image_size)
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
    x = images(2, 3, tokenizer.image_size, tokenizer.image_size)
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
    reconstruction, encoded = model(images(4, 3, model.image_size, model.image_size))
    loss = reconstruction.square().mean() + sum(v.mean() for n, v in encoded.losses.items() if n[0] != "_")
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("kind", ["scales", "bands", "tokens", "two grains"])
def test_a_few_steps_make_reconstructions_better(kind: str) -> None:
    model = make(kind).train()
    x = F.avg_pool2d(images(16, 3, 4 * model.image_size, 4 * model.image_size), 4) * 2
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    errors = []
    for _ in range(15):
        reconstruction, encoded = model(x)
        error = (reconstruction - x).square().mean()
        total = error + sum(v.mean() for n, v in encoded.losses.items() if n[0] != "_")
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        after_step(model)
        errors.append(error.item())
    assert errors[-1] < 0.8 * errors[1]


def test_mistakes_are_told_in_one_line(tokenizer: Any) -> None:
    n = tokenizer.image_size
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
        (VarVq, {"patch_sizes": (1, 3, 2)}, "must rise"),
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


# Recipes


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
