"""MAGE: its importer and its forward pass against the formula written out, and what the encoder is spared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm

from genkit.backbones.mage import MAGE
from genkit.backbones.uvit import UViT
from genkit.errors import GenkitError, UsageError
from genkit.importers.mage import CLASS_ROWS, NO_CLASS, convert
from genkit.nn.layout import dense_layout
from genkit.objectives.masked import Masked as Objective
from genkit.rng import Rng

K, SIDE, DIM, OUT = 80, 3, 16, 24
N = SIDE**2
LAYOUT = dense_layout((SIDE, SIDE))
HEADS: dict[str, Any] = {"num_heads": 2, "decoder_num_heads": 4}


def released() -> dict[str, Tensor]:
    """Random weights under the names of the released code."""
    g = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}

    def add(name: str, *shape: int) -> None:
        state[name] = torch.randn(*shape, generator=g) * 0.2

    def add_linear(name: str, out: int, dim: int) -> None:
        add(f"{name}.weight", out, dim)
        add(f"{name}.bias", out)

    def add_norm(name: str, dim: int) -> None:
        add(f"{name}.weight", dim)
        add(f"{name}.bias", dim)

    add("token_emb.word_embeddings.weight", K + CLASS_ROWS + 1, DIM)
    add("token_emb.position_embeddings.weight", N + 1, DIM)
    state["token_emb.position_ids"] = torch.arange(N + 1)[None]
    add_norm("token_emb.LayerNorm", DIM)
    for prefix, dim, depth in (("blocks", DIM, 2), ("decoder_blocks", OUT, 1)):
        for i in range(depth):
            add_norm(f"{prefix}.{i}.norm1", dim)
            add_norm(f"{prefix}.{i}.norm2", dim)
            add_linear(f"{prefix}.{i}.attn.qkv", 3 * dim, dim)
            add_linear(f"{prefix}.{i}.attn.proj", dim, dim)
            add_linear(f"{prefix}.{i}.mlp.fc1", 4 * dim, dim)
            add_linear(f"{prefix}.{i}.mlp.fc2", dim, 4 * dim)
    add_norm("norm", DIM)
    add_norm("decoder_norm", OUT)
    add_linear("decoder_embed", OUT, DIM)
    add("decoder_pos_embed_learned", 1, N + 1, OUT)
    add_linear("mlm_layer.fc", DIM, OUT)
    add_norm("mlm_layer.ln", DIM)
    add("mlm_layer.bias", 1, 1, K + CLASS_ROWS + 1)
    for name in ("cls_token", "mask_token", "pos_embed", "decoder_pos_embed", "patch_embed.proj.weight", "vqgan.x"):
        add(name, 1)
    return state


def written_out(state: dict[str, Tensor], ids: Tensor, is_masked: Tensor, dropped: Tensor) -> Tensor:
    """Logits [B, N, K] by the released equations, one sample at a time."""

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name: str, x: Tensor, eps: float = 1e-6) -> Tensor:
        return layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def block(name: str, x: Tensor, heads: int) -> Tensor:
        q, k, v = (
            y.unflatten(-1, (heads, -1)).transpose(0, 1)
            for y in linear(f"{name}.attn.qkv", norm(f"{name}.norm1", x)).chunk(3, -1)
        )
        attended = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        x = x + linear(f"{name}.attn.proj", attended.transpose(0, 1).flatten(1))
        return x + linear(f"{name}.mlp.fc2", gelu(linear(f"{name}.mlp.fc1", norm(f"{name}.norm2", x))))

    words, found = state["token_emb.word_embeddings.weight"], []
    for i in range(len(ids)):
        rows = torch.cat([torch.tensor([K + NO_CLASS]), torch.where(is_masked[i], K + CLASS_ROWS, ids[i])])
        x = norm("token_emb.LayerNorm", words[rows] + state["token_emb.position_embeddings.weight"])
        stays = torch.cat([torch.tensor([True]), ~dropped[i]])
        x = x[stays]
        for layer in range(2):
            x = block(f"blocks.{layer}", x, 2)
        encoded = linear("decoder_embed", norm("norm", x))
        full = encoded[:1].repeat(N + 1, 1)
        full[stays] = encoded
        full[1:][is_masked[i]] = encoded[0]
        x = norm("decoder_norm", block("decoder_blocks.0", full + state["decoder_pos_embed_learned"][0], 4))
        x = norm("mlm_layer.ln", gelu(linear("mlm_layer.fc", x)), 1e-5)
        found.append((x @ words.T + state["mlm_layer.bias"][0])[1:, :K])
    return torch.stack(found)


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """(ids, masked, dropped) [B, N]: three of the masked ones are dropped."""
    rank = Rng.at(2, 0, 3).order(N)
    return Rng.at(1, 0, 3).integers(K, N), rank < torch.tensor([[4], [6], [9]]), rank < 3


@torch.no_grad()
def test_imported_weights_give_what_the_equations_give():
    state, (ids, is_masked, dropped) = released(), batch()
    network = convert(state, HEADS)
    x = torch.where(is_masked, K, ids).view(3, 1, SIDE, SIDE)
    for own in (torch.zeros_like(dropped), dropped):
        got = network(x, None, {}, LAYOUT, dropped=own if own.any() else None).flatten(1, -2)
        torch.testing.assert_close(got, written_out(state, ids, is_masked, own), atol=2e-5, rtol=1e-4)


def test_every_key_is_needed_and_known():
    state = released()
    with pytest.raises(GenkitError, match=r"unknown: extra\.weight"):
        convert({**state, "extra.weight": torch.zeros(1)}, HEADS)
    for lost in ("norm.weight", "mlm_layer.bias", "decoder_blocks.0.mlp.fc1.bias"):
        with pytest.raises(GenkitError, match="missing"):
            convert({key: value for key, value in state.items() if key != lost}, HEADS)
    with pytest.raises(UsageError, match="no published network has a width of 16; give a --config with num_heads"):
        convert(state)


def test_training_drops_masked_tokens_alone_and_as_many_of_each_sample():
    network, target = convert(released(), HEADS), Rng.at(1, 0, 6).integers(K, 1, SIDE, SIDE)
    seen: list[Tensor] = []

    class Watched(torch.nn.Module):
        drops_tokens = True

        def forward(self, x: Tensor, *others: Any, dropped: Tensor, **options: Any) -> Tensor:
            assert ((x == K).flatten(1) | ~dropped).all()
            seen.append(dropped.sum(1))
            return network(x, *others, dropped=dropped, **options)

    watched: Any = Watched()
    watched.config = type("Config", (), {"codebook_size": K})
    objective = Objective(schedule="normal", min_masked=0.5, dropped=0.5)
    losses = objective(watched, target, {}, LAYOUT, Rng.at(0, 0, 6))
    assert seen[0].tolist() == [5] * 6
    part = objective(watched, target[2:4], {}, LAYOUT, Rng.at(0, 2, 2))
    torch.testing.assert_close(losses["nll"][2:4], part["nll"], atol=1e-5, rtol=1e-5)


def test_what_cannot_be_dropped_is_refused():
    with pytest.raises(UsageError, match=r"objective\.dropped=0\.5 must not be above objective\.min_masked=0\.2"):
        Objective(min_masked=0.2, dropped=0.5)
    from genkit.backbones.bert import Bert

    plain = Bert(codebook_size=K, num_levels=1, num_classes=0, grid=(SIDE, SIDE), dim=16, depth=1)
    target = Rng.at(1, 0, 2).integers(K, 1, SIDE, SIDE)
    with pytest.raises(UsageError, match="needs a backbone with an encoder, such as mage"):
        Objective(min_masked=0.5, dropped=0.5)(plain, target, {}, LAYOUT, Rng.at(0, 0, 2))


@pytest.mark.parametrize("maker", [MAGE, UViT])
def test_the_head_teaches_the_vectors_it_is_tied_to_unless_detached(maker):
    sizes: dict[str, Any] = {"codebook_size": K, "num_levels": 1, "num_classes": 2, "grid": (SIDE, SIDE), "dim": DIM}
    ids = torch.full((2, 1, SIDE, SIDE), K)  # all masked: nothing but the head looks at the vectors of ids
    for head, is_taught in (("tied_detached", False), ("tied", True)):
        model = maker(**sizes, num_heads=2, depth=2, dropout=0.0, head=head)
        model(ids, None, {"label": torch.tensor([0, 1])}, LAYOUT).square().sum().backward()
        gradient = model.sequence.embed.table.weight.grad
        assert bool(gradient[:K].any()) == is_taught
        assert gradient[K].any()


def test_positions_of_the_decoder_begin_as_large_as_asked():
    sizes: dict[str, Any] = {"codebook_size": K, "num_levels": 1, "num_classes": 0, "grid": (16, 16), "dim": DIM}
    for asked in ({}, {"position_std": 0.5}):
        model = MAGE(**sizes, num_heads=2, depth=1, decoder_depth=1, **asked)
        assert float(model.decoder_positions.detach().std()) == pytest.approx(asked.get("position_std", 0.02), rel=0.1)
    with pytest.raises(UsageError, match=r"backbone\.position_std=0 must be positive"):
        MAGE(**sizes, num_heads=2, position_std=0)
