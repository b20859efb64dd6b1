"""Attention, rotary positions and layouts."""

import pytest
import torch
from torch import Tensor, nn

from genkit.errors import UsageError
from genkit.interfaces import Layout
from genkit.mixers.attention import Attention
from genkit.nn.layout import dense_layout
from genkit.nn.rope import rope_table, rotate


def attention(**options) -> Attention:
    torch.manual_seed(0)
    return Attention(dim=24, layer=0, num_heads=2, **options)


def tokens(num_tokens: int, batch: int = 3) -> Tensor:
    return torch.randn(batch, num_tokens, 24, generator=torch.Generator().manual_seed(1))


def test_dense_layout_is_row_major():
    layout = dense_layout((2, 3))
    assert layout.coords.tolist() == [[[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]]
    assert layout.grid == (2, 3)
    assert dense_layout((2, 3)) is layout


def test_attention_equals_torch_multihead_attention():
    ours = attention(qk_norm=False, rope=False)
    theirs = nn.MultiheadAttention(24, 2, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.qkv.weight)
        theirs.in_proj_bias.copy_(ours.qkv.bias.normal_())
        theirs.out_proj.weight.copy_(ours.proj.weight)
        theirs.out_proj.bias.copy_(ours.proj.bias)
    x = tokens(9)
    torch.testing.assert_close(ours(x, dense_layout((9,))), theirs(x, x, x)[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("grid", [(7,), (3, 5), (2, 3, 2)])
def test_sample_does_not_depend_on_its_batch(grid):
    mixer, layout = attention(), dense_layout(grid)
    x = tokens(layout.coords.shape[1])
    torch.testing.assert_close(mixer(x, layout)[1:2], mixer(x[1:2], layout), atol=1e-6, rtol=1e-5)


def test_padding_does_not_reach_valid_tokens():
    mixer, full = attention(), dense_layout((3, 3))
    x = tokens(9)
    valid = torch.ones(3, 9, dtype=torch.bool)
    valid[1, 6:] = False
    padded = Layout(coords=full.coords, grid=None, valid=valid)
    changed = torch.where(valid.unsqueeze(-1), x, 100.0)
    torch.testing.assert_close(mixer(x, padded)[valid], mixer(changed, padded)[valid])
    alone = Layout(coords=full.coords[:, :6], grid=None)
    torch.testing.assert_close(mixer(x, padded)[1:2, :6], mixer(x[1:2, :6], alone), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("grid", [(6,), (4, 5), (3, 4, 2)])
def test_rotation_makes_scores_depend_on_distance_alone(grid):
    coords = dense_layout(grid).coords
    shift = torch.tensor([3.0, 5.0, 2.0][: len(grid)])
    q, k = torch.randn(2, 1, coords.shape[1], 2, 12, generator=torch.Generator().manual_seed(2)).unbind()

    def scores(coords: Tensor) -> Tensor:
        table = rope_table(coords, 12, 100.0)
        return torch.einsum("bnhk,bmhk->bhnm", rotate(q, table), rotate(k, table))

    torch.testing.assert_close(scores(coords), scores(coords + shift), atol=1e-4, rtol=1e-4)
    moved = torch.cat([coords[:, :1] + shift, coords[:, 1:]], dim=1)
    assert (scores(coords) - scores(moved)).abs().max() > 0.1


def test_every_axis_turns():
    coords = torch.eye(3).unsqueeze(0)  # one step along each axis
    x = torch.ones(1, 3, 1, 12)
    turned = rotate(x, rope_table(coords, 12, 100.0))[0, :, 0]
    assert torch.pdist(turned).min() > 0.1
    torch.testing.assert_close(turned.square().sum(-1), x[0, :, 0].square().sum(-1))


def test_rotation_matches_complex_multiplication():
    coords = dense_layout((3, 4)).coords
    x = torch.randn(2, 12, 3, 16, generator=torch.Generator().manual_seed(3))
    freqs = 100.0 ** -(torch.arange(4) / 4)
    angles = torch.cat([coords[0, :, :1] * freqs, coords[0, :, 1:] * freqs], dim=-1)
    expected = torch.complex(x[..., :8], x[..., 8:]) * torch.polar(torch.ones(12, 8), angles).unsqueeze(1)
    found = rotate(x, rope_table(coords, 16, 100.0))
    torch.testing.assert_close(found, torch.cat([expected.real, expected.imag], dim=-1))


def test_table_is_made_once_per_layout():
    layout = dense_layout((5, 5))
    assert rope_table(layout.coords, 8, 100.0)[0] is rope_table(layout.coords, 8, 100.0)[0]
    assert rope_table(layout.coords, 8, 50.0)[0] is not rope_table(layout.coords, 8, 100.0)[0]


def test_layout_first_used_in_inference_mode_can_train():
    mixer = attention()
    with torch.inference_mode():
        layout = dense_layout((2, 11))
        mixer(tokens(22), layout)
    mixer(tokens(22), layout).sum().backward()
    assert mixer.qkv.weight.grad is not None


def test_positions_matter_only_with_rope():
    x, order = tokens(12), torch.randperm(12, generator=torch.Generator().manual_seed(4))
    layout = dense_layout((3, 4))
    without, with_rope = attention(rope=False), attention()
    torch.testing.assert_close(without(x[:, order], layout), without(x, layout)[:, order], atol=1e-6, rtol=1e-5)
    assert (with_rope(x[:, order], layout) - with_rope(x, layout)[:, order]).abs().max() > 1e-3


def test_wrong_widths_are_refused():
    with pytest.raises(UsageError, match="num_heads=5 does not divide the width dim=24"):
        Attention(dim=24, layer=0, num_heads=5)
    with pytest.raises(UsageError, match="head width"):
        Attention(dim=24, layer=0, num_heads=12)(tokens(4), dense_layout((2, 2)))


def test_attention_runs_in_bf16_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        out = attention()(tokens(4), dense_layout((2, 2)))
    assert torch.isfinite(out).all()


def test_attention_sees_distances_and_not_places():
    mixer, layout, x = attention(), dense_layout((3, 4)), tokens(12)
    moved = Layout(coords=layout.coords + torch.tensor([5.0, 2.0]), grid=None)
    torch.testing.assert_close(mixer(x, moved), mixer(x, layout), atol=1e-5, rtol=1e-4)


def test_causal_attention_equals_attention_under_a_mask():
    ours = attention(is_causal=True)
    both_ways = attention()
    x, layout = tokens(7), dense_layout((7,))
    table = rope_table(layout.coords, 12, 100.0)
    q, k, v = ours.qkv(x).unflatten(-1, (3, 2, 12)).unbind(2)
    q, k = rotate(ours.q_norm(q), table), rotate(ours.k_norm(k), table)
    scores = torch.einsum("bihk,bjhk->bhij", q, k) / 12**0.5
    scores = scores.masked_fill(~torch.ones(7, 7, dtype=torch.bool).tril(), -torch.inf)
    expected = ours.proj(torch.einsum("bhij,bjhk->bihk", scores.softmax(-1), v).flatten(2))
    torch.testing.assert_close(ours(x, layout), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ours(x, layout)[:, -1], both_ways(x, layout)[:, -1], atol=1e-6, rtol=1e-5)


def test_causal_padding_does_not_reach_valid_tokens():
    mixer, full = attention(is_causal=True), dense_layout((9,))
    x, valid = tokens(9), torch.ones(3, 9, dtype=torch.bool)
    valid[1, :4] = False  # padded in front, as prompts are
    out = mixer(x, Layout(coords=full.coords, grid=None, valid=valid))
    alone = mixer(x[1:2, 4:], Layout(coords=full.coords[:, 4:], grid=None))
    torch.testing.assert_close(out[1:2, 4:], alone, atol=1e-6, rtol=1e-5)
    out[valid].sum().backward()
    assert mixer.qkv.weight.grad.isfinite().all()


def steps(mixer: Attention, x: Tensor, cache: dict, first: int = 1) -> Tensor:
    """x token by token behind the first ones."""
    layout, out = dense_layout((x.shape[1],)), []
    for start, end in [(0, first), *((n, n + 1) for n in range(first, x.shape[1]))]:
        out.append(mixer(x[:, start:end], Layout(coords=layout.coords[:, start:end], grid=None), cache))
    return torch.cat(out, dim=1)


@torch.no_grad()
def test_keys_and_values_are_written_once_where_room_was_made():
    mixer, cache, x = attention(is_causal=True), {"num_tokens": 9}, tokens(9)
    layout = dense_layout((9,))
    places = set()
    for n in range(9):
        mixer(x[:, n : n + 1], Layout(coords=layout.coords[:, n : n + 1], grid=None), cache)
        places.add(cache[0].keys.data_ptr())
    assert len(places) == 1
    assert cache[0].keys.shape == (3, 2, 9, 12)
    held, short = cache[0].keys.clone(), {"num_tokens": 2}
    torch.testing.assert_close(steps(mixer, x, short), mixer(x, dense_layout((9,))), atol=1e-6, rtol=1e-5)
    assert short[0].keys.shape[2] < 18
    torch.testing.assert_close(short[0].keys[:, :, :9], held)


@torch.no_grad()
def test_two_layers_share_a_cache_without_meeting():
    one, other = Attention(dim=24, layer=0, num_heads=2, is_causal=True), Attention(dim=24, layer=1, is_causal=True)
    cache: dict = {}
    for _ in range(2):
        one(tokens(1), Layout(coords=torch.zeros(1, 1, 1), grid=None), cache)
    other(tokens(1), Layout(coords=torch.zeros(1, 1, 1), grid=None), cache)
    assert (cache[0].length, cache[1].length) == (2, 1)


@torch.no_grad()
def test_padding_stays_padding_behind_a_cache():
    mixer, x, layout, cache = attention(is_causal=True), tokens(9), dense_layout((9,)), {}
    valid = torch.ones(3, 9, dtype=torch.bool)
    valid[1, :3], valid[2, :1] = False, False
    parts = []
    for start, end in ((0, 4), (4, 5), (5, 8), (8, 9)):
        own = valid[:, :end] if start == 0 else None  # what comes later is real
        parts.append(mixer(x[:, start:end], Layout(coords=layout.coords[:, start:end], grid=None, valid=own), cache))
    expected = mixer(x, Layout(coords=layout.coords, grid=None, valid=valid))
    torch.testing.assert_close(torch.cat(parts, 1)[valid], expected[valid], atol=1e-6, rtol=1e-5)
    cache[0].select(torch.tensor([1, 0, 2]))
    assert cache[0].valid.tolist()[0] == [False] * 3 + [True]


@torch.no_grad()
def test_several_tokens_at_once_behind_a_cache():
    mixer, x, layout, cache = attention(is_causal=True), tokens(12), dense_layout((12,)), {}
    parts = [
        mixer(x[:, a:b], Layout(coords=layout.coords[:, a:b], grid=None), cache) for a, b in ((0, 3), (3, 8), (8, 12))
    ]
    torch.testing.assert_close(torch.cat(parts, 1), mixer(x, layout), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("grid", [(6,), (2, 3), (2, 2, 2)])
@torch.no_grad()
def test_generation_on_grids_of_any_number_of_axes(grid):
    mixer, layout = attention(is_causal=True), dense_layout(grid)
    x, cache = tokens(layout.coords.shape[1]), {}
    parts = [
        mixer(x[:, n : n + 1], Layout(coords=layout.coords[:, n : n + 1], grid=None), cache) for n in range(x.shape[1])
    ]
    torch.testing.assert_close(torch.cat(parts, 1), mixer(x, layout), atol=1e-6, rtol=1e-5)
