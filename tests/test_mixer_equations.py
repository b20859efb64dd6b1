"""What each mixer is, against an independent form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from genkit.backbones.masked import Masked
from genkit.mixers.s5 import hippo
from genkit.nn.layout import dense_layout
from genkit.nn.rope import rope_table, rotate
from genkit.nn.scan_orders import scan_order
from tests.mixing import DIM, GRID, make, tokens

pytestmark = pytest.mark.usefixtures("paths_of_users")


def test_window_attends_within_windows_and_nowhere_else():
    grid = (5, 4)
    for layer, cells in ((0, lambda n: n // 2), (1, lambda n: (n + 1) // 2)):
        mixer, layout, x = make("window", {"size": 2}, layer), dense_layout(grid), tokens(grid, batch=1)
        jacobian = torch.autograd.functional.jacobian(lambda x, m=mixer, g=layout: m(x, g).sum(-1)[0], x)
        sees = jacobian[:, 0].abs().sum(-1) > 0  # [N, N]
        y, x_ = layout.coords[0].long().unbind(-1)
        cell = torch.stack([cells(y), cells(x_)], dim=-1)
        assert torch.equal(sees, (cell[:, None] == cell[None]).all(-1)), layer


def test_one_window_with_relative_bias_is_attention():
    mixer, x = make("window", {"size": 4}), tokens((4, 4))
    q, k, v = mixer.qkv(x).unflatten(-1, (3, 4, 8)).unbind(2)
    scores = torch.einsum("bihk,bjhk->bhij", mixer.q_norm(q), mixer.k_norm(k)) / 8**0.5
    coords = dense_layout((4, 4)).coords[0].long()
    offset = coords[:, None] - coords[None] + 3  # [N, N, 2]
    scores = scores + mixer.bias[:, offset[..., 0] * 7 + offset[..., 1]]
    expected = mixer.proj(torch.einsum("bhij,bjhk->bihk", scores.softmax(-1), v).flatten(2))
    torch.testing.assert_close(mixer(x, dense_layout((4, 4))), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("word", "options"), [("axial", {}), ("block_sparse", {"reach": 9, "tile": 3})])
def test_with_nothing_left_out_it_is_plain_attention(word, options):
    mixer, attention = make(word, options), make("attention")
    attention.load_state_dict(mixer.state_dict())
    for grid in [(11,)] if word == "axial" else [(11,), GRID, (2, 3, 4)]:
        x, layout = tokens(grid), dense_layout(grid)
        torch.testing.assert_close(mixer(x, layout), attention(x, layout), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("axis", [0, 1])
def test_axial_sees_its_line(axis):
    mixer, layout, x = (
        make("axial", {"combine": "alternate"}, layer=axis),
        dense_layout((4, 3)),
        tokens((4, 3), batch=1),
    )
    jacobian = torch.autograd.functional.jacobian(lambda x: mixer(x, layout).sum(-1)[0], x)
    coords = layout.coords[0]
    same = (coords[:, None] == coords[None])[..., 1 - axis]
    assert torch.equal(jacobian[:, 0].abs().sum(-1) > 0, same)


def test_rmt_on_one_row_is_the_same_whole_and_decomposed():
    whole, decomposed = make("rmt"), make("rmt", {"form": "decomposed"})
    decomposed.load_state_dict(whole.state_dict())
    for grid in ((1, 9), (9, 1)):
        x, layout = tokens(grid), dense_layout(grid)
        torch.testing.assert_close(whole(x, layout), decomposed(x, layout), atol=1e-6, rtol=1e-5)
    assert (whole(tokens(), dense_layout(GRID)) - decomposed(tokens(), dense_layout(GRID))).abs().max() > 1e-3


def test_rmt_equals_its_equation():
    mixer, x, layout = make("rmt", {"num_heads": 2, "first": 3.0, "spread": 5.0}), tokens(), dense_layout(GRID)
    q, k, v = mixer.qkv(x).unflatten(-1, (3, 2, 16)).unbind(2)
    rates = 10_000.0 ** (-torch.arange(8) / 7)
    turn = torch.polar(torch.ones(35, 8), torch.arange(35).unsqueeze(1) * rates).unsqueeze(1)  # [N, 1, K / 2]
    q, k = (torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (-1, 2))) * turn).flatten(-2) for y in (q, k))
    gamma = torch.tensor([1 - 2**-3.0, 1 - 2**-5.5])
    distance = torch.cdist(layout.coords, layout.coords, p=1)  # [1, N, N]
    scores = torch.einsum("bihk,bjhk->bhij", q, k) / 4 + distance.unsqueeze(1) * gamma.log().view(1, 2, 1, 1)
    mixed = torch.einsum("bhij,bjhk->bihk", scores.softmax(-1), v).flatten(2)
    image = v.flatten(2).transpose(1, 2).unflatten(2, GRID)
    expected = mixer.proj(mixed + mixer.local(image).flatten(2).transpose(1, 2))
    torch.testing.assert_close(mixer(x, layout), expected, atol=1e-5, rtol=1e-5)


def test_hornet_of_order_two_by_hand():
    mixer, x = make("hornet", {"order": 2, "scale": 0.5, "kernel_size": 3}), tokens()
    p, q = mixer.proj_in(x).split([16, 48], dim=-1)
    q = 0.5 * mixer.conv(q.transpose(1, 2).unflatten(2, GRID)).flatten(2).transpose(1, 2)
    expected = mixer.proj_out(mixer.widen[0](p * q[..., :16]) * q[..., 16:])
    torch.testing.assert_close(mixer(x, dense_layout(GRID)), expected)


def test_hornet_has_the_published_widths():
    mixer = make("hornet", {"order": 5}, dim=64)
    assert mixer.widths == [4, 8, 16, 32, 64]
    assert sum(mixer.widths) + mixer.widths[0] == 128


@pytest.mark.parametrize("grid", [(4, 3), (5, 6), (1, 4)])
def test_rpe_fft_equals_the_sum(grid):
    mixer, x, layout = make("rpe_fft", {"size": (5, 6)}).double(), tokens(grid).double(), dense_layout(grid)
    q, k, v = mixer.qkv(x).unflatten(-1, (3, 4, 8)).unbind(2)
    q = mixer.features(nn.functional.normalize(q, dim=-1) * mixer.temperature)
    k = mixer.features(nn.functional.normalize(k, dim=-1))
    coords = layout.coords[0].long()
    offset = coords[None] - coords[:, None]  # [i, j] = j - i
    weights = torch.einsum("bihr,bjhr->bhij", q, k) * mixer.bias[:, offset[..., 0] + 4, offset[..., 1] + 5].exp()
    weights = weights / weights.sum(-1, keepdim=True)
    expected = mixer.proj(torch.einsum("bhij,bjhk->bihk", weights, v).flatten(2))
    torch.testing.assert_close(mixer(x, layout), expected)


def test_rpe_fft_approaches_softmax_attention_with_many_features():
    mixer, x, layout = make("rpe_fft", {"size": (4, 4), "num_features": 4096}), tokens((4, 4)), dense_layout((4, 4))
    q, k, v = mixer.qkv(x).unflatten(-1, (3, 4, 8)).unbind(2)
    q, k = nn.functional.normalize(q, dim=-1) * mixer.temperature, nn.functional.normalize(k, dim=-1)
    coords = layout.coords[0].long()
    offset = coords[None] - coords[:, None] + 3
    scores = torch.einsum("bihk,bjhk->bhij", q, k) + mixer.bias[:, offset[..., 0], offset[..., 1]]
    expected = mixer.proj(torch.einsum("bhij,bjhk->bihk", scores.softmax(-1), v).flatten(2))
    assert (mixer(x, layout) - expected).abs().max() < 0.1 * expected.abs().max()


def test_topk_that_keeps_all_is_channel_attention():
    mixer, x = make("topk", {"num_heads": 32}), tokens()  # one channel per head: each map keeps it
    v = mixer.conv(mixer.qkv(x).transpose(1, 2).unflatten(2, GRID)).flatten(2).transpose(1, 2)[..., 64:]
    torch.testing.assert_close(mixer(x, dense_layout(GRID)), mixer.proj(v * mixer.mixture.sum()), atol=1e-5, rtol=1e-5)


def test_topk_keeps_the_published_shares():
    mixer, x = make("topk", {"num_heads": 1}), tokens()
    qkv = mixer.conv(mixer.qkv(x).transpose(1, 2).unflatten(2, GRID)).flatten(2)  # [B, 3 D, N]
    q, k, v = qkv.chunk(3, dim=1)
    scores = nn.functional.normalize(q, dim=-1) @ nn.functional.normalize(k, dim=-1).mT * mixer.temperature[0]
    expected = torch.zeros_like(v)
    for share, count in zip(mixer.mixture, (16, 21, 24, 25), strict=True):
        threshold = scores.topk(count, dim=-1).values[..., -1:]
        expected = expected + share * scores.masked_fill(scores < threshold, -math.inf).softmax(-1) @ v
    torch.testing.assert_close(mixer(x, dense_layout(GRID)), mixer.proj(expected.mT), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("word", ["lightnet", "aaren"])
def test_softmax_over_tokens_equals_its_definition(word):
    mixer, x, layout = make(word, {"positions": None} if word == "lightnet" else {}), tokens(), dense_layout(GRID)
    if word == "aaren":
        k, v = mixer.kv(x).unflatten(-1, (2, 4, 8)).unbind(2)
        scores = (k * mixer.query).sum(-1) / 8**0.5  # [B, N, H]
        past = torch.ones(35, 35, dtype=torch.bool).tril()
        weights = scores.mT.unsqueeze(2).masked_fill(~past, -math.inf).softmax(-1)  # [B, H, N, N]
        expected = mixer.proj(torch.einsum("bhij,bjhk->bihk", weights, v).flatten(2))
    else:
        q, g, v = (proj(x).unflatten(-1, (4, 8)) for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        state = torch.einsum("bnhk,bnhv->bhkv", g.softmax(1), v)
        o = torch.einsum("bnhk,bhkv->bnhv", nn.functional.silu(q), state).flatten(2) / 8**0.5
        expected = mixer.o_proj(mixer.norm(o) * nn.functional.silu(mixer.g_proj(x)))
    torch.testing.assert_close(mixer(x, layout), expected, atol=1e-5, rtol=1e-4)


def test_lightnet_without_positions_does_not_know_the_order():
    mixer, x, layout = make("lightnet", {"positions": None}), tokens(), dense_layout(GRID)
    order = torch.randperm(35, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mixer(x[:, order], layout), mixer(x, layout)[:, order], atol=1e-5, rtol=1e-5)
    with_positions = make("lightnet")
    assert (with_positions(x[:, order], layout) - with_positions(x, layout)[:, order]).abs().max() > 1e-3


@pytest.mark.parametrize("positions", ["rotary", "cosine", None])
def test_lightnet_causal_and_not_agree_on_the_last_token(positions):
    causal = make("lightnet", {"positions": positions, "is_causal": True})
    whole = make("lightnet", {"positions": positions})
    whole.load_state_dict(causal.state_dict())
    x, layout = tokens(), dense_layout(GRID)
    torch.testing.assert_close(causal(x, layout)[:, -1], whole(x, layout)[:, -1], atol=1e-5, rtol=1e-4)


def test_retention_equals_its_matrix():
    mixer, x, layout = make("retention", {"num_heads": 2}), tokens(), dense_layout(GRID)
    q, k, v = mixer.qkv(x).unflatten(-1, (3, 2, 16)).unbind(2)
    table = rope_table(layout.coords, 16, 100.0)
    scores = torch.einsum("bihk,bjhk->bhij", rotate(q, table), rotate(k, table)) / 4
    gamma = torch.tensor([1 - 2**-5.0, 1 - 2**-6.0]).view(1, 2, 1, 1)
    steps = torch.arange(35)
    age = steps[:, None] - steps
    o = torch.einsum("bhij,bjhv->bihv", scores * torch.where(age >= 0, gamma**age, 0.0), v)
    gate = nn.functional.silu(mixer.g_proj(x)).unflatten(-1, (2, 16))
    torch.testing.assert_close(mixer(x, layout), mixer.o_proj((mixer.norm(o) * gate).flatten(2)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("is_bidirectional", [False, True])
def test_s5_equals_its_recurrence(is_bidirectional):
    mixer, x = make("s5", {"state_size": 6, "is_bidirectional": is_bidirectional}), tokens((9,))
    eigenvalues, B, C = (torch.view_as_complex(p) for p in (mixer.eigenvalues, mixer.B, mixer.C))
    decay = (mixer.log_step.exp() * eigenvalues).exp()
    B = ((decay - 1) / eigenvalues).unsqueeze(-1) * B

    def run(x: Tensor, C: Tensor) -> Tensor:
        state, out = torch.zeros(2, 6, dtype=torch.complex64), []
        for u in x.unbind(1):
            state = decay * state + u.to(B.dtype) @ B.mT
            out.append(2 * (state @ C.mT).real)
        return torch.stack(out, dim=1)

    y = run(x, C[:, :6]) + mixer.skip * x
    if is_bidirectional:
        y = y + run(x.flip(1), C[:, 6:]).flip(1)
    expected = nn.functional.glu(mixer.proj(nn.functional.gelu(y, approximate="tanh")), dim=-1)
    torch.testing.assert_close(mixer(x, dense_layout((9,))), expected, atol=1e-5, rtol=1e-4)


def test_s5_starts_at_the_published_eigenvalues():
    eigenvalues, vectors = hippo(8)
    root = (2 * torch.arange(8) + 1.0).sqrt()
    legs = -(root[:, None] * root).tril(-1) - torch.diag(torch.arange(8) + 1.0)  # HiPPO-LegS
    normal = legs + root[:, None] * root / 2  # plus p p^T, p = root / sqrt(2)
    rebuilt = vectors @ torch.diag(eigenvalues) @ vectors.mH
    torch.testing.assert_close(rebuilt.real, normal, atol=1e-4, rtol=1e-4)
    assert (eigenvalues[:4].imag > 0).all()


@pytest.mark.parametrize("size", [(4,), (3, 5), (7, 5)])
def test_long_convolution_equals_a_convolution(size):
    grid = GRID if len(size) == 2 else (35,)
    mixer, x = make("longconv", {"size": size}), tokens(grid)
    image = x.transpose(1, 2).unflatten(2, grid)  # [B, D, *grid]
    weight = mixer.kernel.movedim(-1, 0).unsqueeze(1).flip(tuple(range(2, 2 + len(size))))
    convolve = nn.functional.conv2d if len(size) == 2 else nn.functional.conv1d
    mixed = convolve(image, weight, padding=[s - 1 for s in size], groups=DIM).flatten(2).transpose(1, 2)
    expected = nn.functional.glu(mixer.proj(nn.functional.gelu(mixed + mixer.skip * x)), dim=-1)
    torch.testing.assert_close(mixer(x, dense_layout(grid)), expected, atol=1e-5, rtol=1e-4)


def test_vssd_with_the_sign_turned_keeps_only_the_skip():
    """y = D x + S^T C and y' = D x - S^T C: their mean is the skip alone."""
    mixer, x, layout = make("vssd"), tokens(), dense_layout(GRID)
    mixer.norm = nn.Identity()
    plain = mixer(x, layout)
    mixer.sign = make("vssd", {"is_positive": False}).sign
    turned = mixer(x, layout)
    mixer.A_log.data.fill_(-torch.inf)
    torch.testing.assert_close((plain + turned) / 2, mixer(x, layout), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain, turned)


def test_vssd_without_its_convolution_does_not_know_the_order():
    mixer, x, layout = make("vssd"), tokens(), dense_layout(GRID)
    with torch.no_grad():
        middle = mixer.conv2d.weight[:, :, 1, 1].clone()
        mixer.conv2d.weight.zero_()[:, :, 1, 1] = middle
    order = torch.randperm(35, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mixer(x[:, order], layout), mixer(x, layout)[:, order], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("word", ["mamba", "ssd"])
def test_a_scan_follows_its_order(word):
    """Token order.index[i] sees exactly order.index[0 .. i]."""
    mixer, layout, x = make(word, {"order": "hilbert"}), dense_layout((3, 4)), tokens((3, 4), batch=1)
    jacobian = torch.autograd.functional.jacobian(lambda x: mixer(x, layout).sum(-1)[0], x)
    order = scan_order("hilbert", (3, 4)).index
    sees = (jacobian[:, 0].abs().sum(-1) > 0)[order][:, order]
    assert torch.equal(sees, torch.ones(12, 12, dtype=torch.bool).tril())


@pytest.mark.parametrize("word", ["mamba", "ssd"])
def test_the_way_back_is_the_way_there_on_reversed_tokens(word):
    mixer, layout, x = make(word, {"is_bidirectional": True}), dense_layout((12,)), tokens((12,))
    swapped = make(word, {"is_bidirectional": True})
    state = mixer.state_dict()
    exchange = {"scans.0.": "scans.1.", "scans.1.": "scans.0."}
    swapped.load_state_dict({exchange.get(n[:8], n[:8]) + n[8:]: value for n, value in state.items()})
    torch.testing.assert_close(swapped(x.flip(1), layout).flip(1), mixer(x, layout), atol=1e-5, rtol=1e-4)


def test_mamba_scans_a_state_of_the_published_shape():
    mixer = make("mamba", dim=48)
    shapes = {name: tuple(p.shape) for name, p in mixer.named_parameters()}
    assert shapes["in_proj.weight"] == (192, 48)
    assert shapes["scans.0.conv1d.weight"] == (96, 1, 4)
    assert shapes["scans.0.x_proj.weight"] == (3 + 32, 96)
    assert shapes["scans.0.dt_proj.weight"] == (96, 3)
    assert shapes["scans.0.A_log"] == (96, 16)


def test_initial_step_sizes_survive_the_block_that_holds_the_mixer():
    model = Masked(codebook_size=4, num_levels=1, num_classes=0, grid=(2, 2), dim=DIM, depth=1, mixer={"type": "mamba"})
    scan = model.blocks[0].mixer.scans[0]
    steps = nn.functional.softplus(scan.dt_proj.bias)
    assert steps.min() > 0.9e-3
    assert steps.max() < 0.11
    assert torch.equal(scan.A_log[0].exp().round(), torch.arange(1.0, 17.0))


def test_multi_scan_in_raster_order_is_the_mixer_itself():
    mixer, inner = make("multi_scan", {"orders": "raster"}), make("gla")
    inner.load_state_dict({name[9:]: value for name, value in mixer.state_dict().items()})
    torch.testing.assert_close(mixer(tokens(), dense_layout(GRID)), inner(tokens(), dense_layout(GRID)))


def test_multi_scan_there_and_back_sees_everything():
    options = {"orders": ["raster", "reversed-raster"], "combine": "share"}
    mixer, layout, x = make("multi_scan", options), dense_layout((3, 2)), tokens((3, 2), batch=1)
    jacobian = torch.autograd.functional.jacobian(lambda x: mixer(x, layout).sum(-1)[0], x)
    assert (jacobian[:, 0].abs().sum(-1) > 0).all()


def test_block_sparse_top_follows_the_content():
    mixer, layout = make("block_sparse", {"pattern": "top", "tile": 2, "density": 0.25}), dense_layout((16, 16))
    one, other = (tokens((16, 16), batch=1, seed=seed) for seed in (1, 2))

    def chosen(x: Tensor) -> Tensor:
        q, k, _ = mixer.qkv(x).unflatten(-1, (3, 4, 8)).unbind(2)
        return mixer.choose((16, 16), q.transpose(1, 2), k.transpose(1, 2), None).dense()

    assert (chosen(one) != chosen(other)).any()
    assert mixer(one, layout).isfinite().all()
