"""IBQ, and the look-up among many codes: definition, memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from genkit.kernels.nearest_code import chunked
from genkit.nn import index_backprop
from genkit.nn.index_backprop import IndexBackpropQuantizer
from genkit.nn.quantize import Quantizer
from tests.quantising import Largest, randn

# Index backpropagation


def dense_ibq(z: Tensor, table: Tensor, beta: float, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(codes, commitment, codebook loss, entropy loss) of rows [N, d], all at once: the specification."""
    logits = z @ table.T
    soft = logits.softmax(-1)
    hard = F.one_hot(logits.argmax(-1), len(table)).float()
    codes, plain = (hard + soft - soft.detach()) @ table, hard @ table
    codebook = (codes - z).square().mean() + beta * (plain - z.detach()).square().mean()
    p = (logits / temperature).softmax(-1)
    mean = p.mean(0)
    entropies = -(p * p.clamp_min(1e-30).log()).sum(1).mean() + (mean * mean.clamp_min(1e-30).log()).sum()
    return codes, (plain.detach() - z).square().mean(), codebook, entropies


@pytest.mark.parametrize("chunk", [2**22, 9 * 5])
def test_ibq_equals_its_definition_in_values_and_gradients(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_backprop, "_CHUNK", chunk)
    quantizer = IndexBackpropQuantizer(dim=4, codebook_size=9, entropy=1.0, temperature=0.3).train()
    quantizer.codebook.set_codes(randn(1, 9, 4, seed=1))
    z, other = (randn(3, 11, 4).requires_grad_() for _ in range(2))
    table = quantizer.codebook.embed[0].detach().clone().requires_grad_()
    codes, *losses = dense_ibq(other.reshape(-1, 4), table, 0.25, 0.3)
    found = quantizer(z)
    torch.testing.assert_close(found.codes.reshape(-1, 4), codes)
    for name, expected in zip(("commitment", "codebook", "entropy"), losses, strict=True):
        torch.testing.assert_close(found.losses[name].mean(), expected)
    (found.codes.pow(3).sum() + sum(value.mean() for value in found.losses.values())).backward()
    (codes.pow(3).sum() + sum(losses)).backward()
    torch.testing.assert_close(z.grad, other.grad)
    torch.testing.assert_close(quantizer.codebook.embed.grad[0], table.grad)
    assert (quantizer.codebook.embed.grad[0].abs().sum(1) > 0).all()  # every code learns


def test_codes_of_ibq_start_with_one_length() -> None:
    # Bright and dark vectors differ in length; without it the longest few codes are the nearest of all by dot product.
    quantizer = IndexBackpropQuantizer(dim=4, codebook_size=64, restart=0.2).train()
    rows = randn(1, 600, 4) * torch.linspace(0.1, 10, 600)[:, None]
    assert len(quantizer(rows).ids.unique()) > 48
    lengths = quantizer.codebook.embed[0].norm(dim=1)
    torch.testing.assert_close(lengths, lengths[:1].expand(64))
    for _ in range(3):
        quantizer.codebook.after_step()
        quantizer(rows)
    torch.testing.assert_close(quantizer.codebook.embed[0].norm(dim=1), lengths)


def test_ibq_holds_a_block_of_the_softmax_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_backprop, "_CHUNK", 2**14)
    monkeypatch.setattr(chunked, "_CHUNK", 2**14)
    quantizer = IndexBackpropQuantizer(dim=4, codebook_size=512).train()
    quantizer.codebook.set_codes(randn(1, 512, 4, seed=1))
    z = randn(4, 64, 4).requires_grad_()
    with Largest() as largest:
        found = quantizer(z)
        (found.codes.sum() + sum(value.sum() for value in found.losses.values())).backward()
    assert largest.elements <= 2**14  # and not 256 x 512


# Look-up of many codes


@pytest.mark.parametrize("depth", [1, 3])
def test_look_up_among_16k_codes_holds_a_block_of_scores_at_a_time(depth: int) -> None:
    quantizer = Quantizer(dim=4, codebook_size=16384, depth=depth).train()
    quantizer.codebook.set_codes(randn(depth, 16384, 4))
    with Largest() as largest:
        found = quantizer(randn(4, 256, 4, seed=1).requires_grad_())
        (found.codes.sum() + found.losses["commitment"].sum()).backward()
        quantizer.codebook.after_step()
    assert largest.elements <= chunked._CHUNK  # and not 1,024 x 16,384
