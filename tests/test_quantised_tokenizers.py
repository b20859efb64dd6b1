"""Tokenizers made of quantisers: ids and latents, saving, training, levels, mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from genkit import registry
from genkit.errors import UsageError
from genkit.tokenizers.fsq import FSQ
from genkit.tokenizers.ibq import IBQ
from genkit.tokenizers.lfq import LFQ
from genkit.tokenizers.rvq import RVQ
from genkit.tokenizers.vq import VQ
from tests.quantising import after_step

TINY: dict[str, dict[str, Any]] = {
    "vq": {"channels": 8, "codebook_size": 16},
    "rvq": {"channels": 8, "codebook_size": 16, "num_levels": 4, "num_groups": 2},
    "fsq": {"levels": [5, 4, 3], "channels": 8},
    "lfq": {"codebook_size": 16, "channels": 8},
    "bsq": {"codebook_size": 16, "channels": 8},
    "ibq": {"channels": 8, "codebook_size": 16, "codebook_dim": 4},
}
VARIANTS = [(word, {}) for word in TINY] + [
    ("vq", {"update": "gradient", "gradient": "rotation"}),
    ("vq", {"update": "gradient", "cosine": True, "codebook_dim": 3}),
    ("rvq", {"is_shared": True, "num_groups": 1}),
    ("rvq", {"min_levels": 2, "gradient": "rotation"}),
    ("rvq", {"update": "gradient", "cosine": True, "codebook_dim": 3}),
    ("fsq", {"channels": None}),
    ("fsq", {"levels": [2, 2, 3], "num_levels": 3}),
    ("lfq", {"channels": None, "num_levels": 2, "bit_order": "little"}),
]


def images(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def build(word: str, **options: Any) -> Any:
    torch.manual_seed(0)
    spec = {"type": word, "width": 16, "num_blocks": 1} | TINY[word] | options
    return registry.build("tokenizer", registry.check("tokenizer", spec, "tokenizer"), image_channels=1)


@pytest.fixture(params=VARIANTS, ids=[f"{word} {options}" for word, options in VARIANTS])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    word, options = request.param
    model = build(word, **options).train()
    model(images(4, 1, 12, 20))
    after_step(model)
    return model.eval()


@torch.no_grad()
def test_ids_and_latents_say_the_same(tokenizer: Any) -> None:
    x = images(3, 1, 12, 20)
    for _ in range(2):
        encoded = tokenizer.encode(x)
        assert encoded.ids.dtype == torch.int64
        assert encoded.ids.shape == (3, tokenizer.num_levels, 3, 5)
        assert 0 <= encoded.ids.min() <= encoded.ids.max() < tokenizer.codebook_size
        assert torch.equal(tokenizer.codes(encoded.ids), encoded.z)
        assert torch.equal(tokenizer.decode(encoded.z), tokenizer(x)[0])
        assert all(value.shape == (3,) for value in encoded.losses.values())
        torch.testing.assert_close(tokenizer.encode(x[1:2]).z, encoded.z[1:2])
        tokenizer.set_latent_stats(
            torch.linspace(-1, 1, tokenizer.channels), torch.linspace(0.5, 2, tokenizer.channels)
        )


def test_gradient_reaches_every_parameter(tokenizer: Any) -> None:
    tokenizer.train()
    for convolution in (m for m in tokenizer.modules() if isinstance(m, nn.Conv2d)):
        nn.init.normal_(convolution.weight, std=0.1)  # at their initial zero some stop the gradient of what lies before
    reconstruction, encoded = tokenizer(images(2, 1, 8, 8))
    (reconstruction.square().mean() + sum(value.mean() for value in encoded.losses.values())).backward()
    for name, parameter in tokenizer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@torch.no_grad()
def test_saved_tokenizer_gives_the_same_images(tokenizer: Any, tmp_path: Path) -> None:
    x = images(2, 1, 8, 8)
    tokenizer.save_pretrained(tmp_path)
    made = type(tokenizer)
    for loaded in (made.from_pretrained(tmp_path), made.from_pretrained(tmp_path, low_cpu_mem_usage=False)):
        assert torch.equal(loaded.eval()(x)[0], tokenizer(x)[0])
        ids = tokenizer.encode(x).ids
        assert torch.equal(loaded.codes(ids), tokenizer.codes(ids))


def test_use_of_codes_is_reported(tokenizer: Any) -> None:
    tokenizer.train()(images(2, 1, 8, 8))
    after_step(tokenizer)
    reports = [module.stats() for module in tokenizer.modules() if hasattr(module, "stats")]
    assert len(reports) == 1
    assert {"usage", "perplexity", "dead"} <= reports[0].keys()
    assert 0 < reports[0]["usage"] <= 1


@pytest.mark.parametrize("word", TINY)
def test_a_few_steps_bring_the_images_closer(word: str) -> None:
    model = build(word).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    x = images(16, 1, 2, 2).repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    errors = []
    for _ in range(60):
        reconstruction, encoded = model(x)
        error = (reconstruction - x).square().mean()
        losses = {"commitment": torch.zeros(1)} | encoded.losses
        optimizer.zero_grad()
        (error + 0.25 * losses.pop("commitment").mean() + sum(v.mean() for v in losses.values())).backward()
        optimizer.step()
        after_step(model)
        errors.append(error.item())
    assert errors[-1] < max(0.5 * errors[0], 1e-3)  # 64 places, and some quantisers tell them all apart at once


@torch.no_grad()
def test_only_a_tokenizer_trained_for_it_reads_fewer_levels() -> None:
    ids = torch.randint(16, (1, 4, 3, 3), generator=torch.Generator().manual_seed(0))
    fewer = ids.index_fill(1, torch.tensor([2, 3]), -1)
    with pytest.raises(UsageError, match="from 0 on"):
        build("rvq").codes(fewer)
    model = build("rvq", min_levels=2)
    assert not torch.equal(model.codes(fewer), model.codes(ids))
    with pytest.raises(UsageError, match="16 codes"):
        model.codes(fewer - 1)


@pytest.mark.parametrize(
    ("word", "options", "message"),
    [
        ("vq", {"codebook_size": 0}, "codebook_size=0"),
        ("vq", {"codebook_dim": 0}, "at least 1"),
        ("vq", {"decay": 1.0}, r"decay=1\.0"),
        ("vq", {"restart": -0.1}, r"restart=-0\.1"),
        ("vq", {"stride": 3}, "power of two"),
        ("vq", {"channels": 0}, r"tokenizer\.channels=0"),
        ("rvq", {"num_levels": 0}, r"num_levels=0"),
        ("rvq", {"num_groups": 0}, r"num_groups=0"),
        ("rvq", {"num_groups": 3}, r"tokenizer\.channels=8 is no multiple of tokenizer\.num_groups=3"),
        ("rvq", {"num_levels": 3}, r"tokenizer\.num_levels=3 is no multiple"),
        ("rvq", {"min_levels": 1}, r"tokenizer\.min_levels=1 is no multiple"),
        ("rvq", {"min_levels": 6}, r"min_levels=6 must be in 1\.\.4"),
        ("fsq", {"levels": [5, 1]}, r"levels=\[5, 1\]"),
        ("fsq", {"levels": []}, "must list"),
        ("fsq", {"levels": [2, 3], "symmetric": False}, "symmetric"),
        ("fsq", {"levels": [1], "num_levels": 2}, r"levels=\[1\]"),
        ("fsq", {"num_levels": 0}, "num_levels=0"),
        ("lfq", {"codebook_size": 500}, "500 is not a power of two; 256 is one"),
        ("lfq", {"codebook_size": 0, "channels": None}, "power of two"),
        ("bsq", {"codebook_size": 3}, "power of two"),
        ("ibq", {"codebook_size": 0}, "codebook_size=0"),
    ],
)
def test_mistakes_are_told_in_one_line(word: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as told:
        build(word, **options)
    assert "\n" not in str(told.value)


def test_tokenizers_are_their_classes() -> None:
    assert [registry.find("tokenizer", word) for word in ("vq", "rvq", "fsq", "lfq", "ibq")] == [VQ, RVQ, FSQ, LFQ, IBQ]
