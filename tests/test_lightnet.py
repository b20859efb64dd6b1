from __future__ import annotations

import pytest
import torch

from genkit.kernels.lightnet.op import lightnet
from tests.parity import assert_agrees, gradients


@pytest.fixture(autouse=True)
def _below(monkeypatch):
    """Not through Triton's interpreter, which would be preferred and takes minutes."""
    monkeypatch.setenv("GENKIT_KERNEL", "torch")


def some(B: int, N: int, H: int, K: int, V: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)  # noqa: E731
    return {"q": draw(B, N, H, K), "g": 2 * draw(B, N, H, K), "v": draw(B, N, H, V), "k": draw(B, N, H, K)}


def causal(q, g, v, k, z, S, **options):
    o, (z, S) = lightnet(q, g, v, k, is_causal=True, state=(z, S), return_state=True, **options)
    return o, z, S


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (2, 63, 2, 5, 7), (1, 100, 1, 16, 8), (1, 130, 3, 4, 3)])
def test_both_forms_equal_the_reference(shape):
    x = some(*shape)
    B, _, H, K, V = shape
    random = torch.Generator().manual_seed(1)
    state = {"z": torch.randn(B, H, K, generator=random), "S": torch.randn(B, H, K, V, generator=random)}
    # 1e-4: the gradient of a log decay is a small difference of sums over all later tokens.
    assert_agrees(causal, "torch", x | state, rtol=1e-4)
    assert_agrees(lightnet, "torch", x)
    del x["k"]
    assert_agrees(lightnet, "torch", x, is_causal=True, rtol=1e-4)
    assert_agrees(lightnet, "torch", x)


def test_the_compiled_kernels_below_serve_as_well(monkeypatch):
    monkeypatch.setenv("GENKIT_KERNEL", "cpu")
    assert_agrees(lightnet, "torch", some(2, 63, 2, 5, 7), is_causal=True, rtol=1e-4)


def test_it_is_a_softmax_over_the_tokens_of_every_channel():
    x = some(2, 40, 2, 4, 3, torch.float64)
    for t in (1, 7, 40):
        weights = x["g"][:, :t].softmax(1) * x["k"][:, :t]  # [B, t, H, K]
        S = torch.einsum("bnhk,bnhv->bhkv", weights, x["v"][:, :t])
        expected = 0.5 * torch.einsum("bhk,bhkv->bhv", x["q"][:, t - 1], S)
        torch.testing.assert_close(lightnet(**x, is_causal=True)[:, t - 1], expected)
        whole = lightnet(*(x[name][:, :t] for name in ("q", "g", "v", "k")))
        torch.testing.assert_close(whole[:, -1], expected)


def test_the_order_of_the_tokens_does_not_matter_unless_causal():
    x = some(1, 30, 2, 4, 3, torch.float64)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    mixed = {name: value[:, order] for name, value in x.items()}
    torch.testing.assert_close(lightnet(**mixed), lightnet(**x)[:, order])
    assert not torch.allclose(lightnet(**mixed, is_causal=True), lightnet(**x, is_causal=True)[:, order])


@pytest.mark.parametrize("path", ["torch", "reference"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_padding_changes_nothing(is_causal, path):
    x = some(2, 24, 2, 4, 3)
    mask = torch.ones(2, 24, dtype=torch.bool)
    mask[:, [0, 1, 9, 23]] = False
    spoilt = {name: value.masked_fill(~mask[:, :, None, None], 1e4) for name, value in x.items()}
    spoilt["q"] = x["q"]
    call = lambda **t: lightnet(**t, mask=mask, is_causal=is_causal, path=path)  # noqa: E731
    found, again = gradients(call, x), gradients(call, spoilt)
    rest = {name: value[:, mask[0]] for name, value in x.items()}
    expected = lightnet(**rest, is_causal=is_causal, path="reference")
    torch.testing.assert_close(found["out0"][:, mask[0]], expected, rtol=1e-4, atol=1e-5)
    for name in ("out0", "dq", "dg", "dv", "dk"):
        torch.testing.assert_close(again[name][:, mask[0]], found[name][:, mask[0]], rtol=1e-4, atol=1e-5)
    if is_causal:
        assert not found["out0"][:, :2].any()  # nothing to read yet
    for name in ("dg", "dv", "dk"):
        assert not found[name][:, ~mask[0]].any()
    nothing = lightnet(**x, mask=torch.zeros_like(mask), is_causal=is_causal, path=path)
    assert not nothing.any()


def test_huge_logits_do_no_harm():
    x = some(1, 50, 2, 4, 3)
    shifted = x | {"g": x["g"] + 4096}
    same = x | {"g": (x["g"] + 4096) - 4096}
    torch.testing.assert_close(
        lightnet(**shifted, is_causal=True), lightnet(**same, is_causal=True), rtol=1e-4, atol=1e-5
    )
    steep = gradients(lambda **t: lightnet(**t, is_causal=True), x | {"g": 1e4 * x["g"]})
    assert all(value.isfinite().all() for value in steep.values())


def test_a_state_can_be_handed_on():
    x = some(2, 40, 2, 4, 3)
    whole, last = lightnet(**x, is_causal=True, return_state=True)
    parts, state = [], None
    for piece in (slice(0, 17), slice(17, 18), slice(18, 40)):
        cut = {name: value[:, piece] for name, value in x.items()}
        o, state = lightnet(**cut, is_causal=True, state=state, return_state=True)
        parts.append(o)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("is_causal", [False, True])
def test_half_precision_keeps_its_sums_in_float32(is_causal):
    x = some(1, 40, 2, 4, 3, torch.bfloat16)
    found = lightnet(**x, is_causal=is_causal)
    wide = lightnet(**{name: value.float() for name, value in x.items()}, is_causal=is_causal)
    assert found.dtype == torch.bfloat16
    assert (found.float() - wide).abs().max() <= 2e-2 * wide.abs().max()


def test_what_does_not_fit_is_named():
    x = some(2, 5, 3, 4, 6)
    with pytest.raises(ValueError, match=r"lightnet: g must be \[2, 5, 3, 4\] .* got \[2, 5, 3, 2\]"):
        lightnet(x["q"], x["g"][..., :2], x["v"])
    with pytest.raises(ValueError, match=r"mask is torch\.float32 on cpu; to go with v it must be torch\.bool"):
        lightnet(**x, mask=torch.ones(2, 5))
    with pytest.raises(ValueError, match="only the causal form has a state"):
        lightnet(**x, return_state=True)


@pytest.mark.parametrize("is_causal", [False, True])
def test_compiled_equals_eager(is_causal):
    def layer(q, g, v, k):
        return lightnet(q, g.sin(), 2 * v, k, is_causal=is_causal) + 1

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = some(1, 9, 2, 4, 5)
    expected = gradients(layer, x)
    for name, value in gradients(compiled, x).items():
        torch.testing.assert_close(value, expected[name])


def test_autocast_changes_nothing():
    plain = lightnet(**some(1, 9, 2, 4, 5))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lightnet(**some(1, 9, 2, 4, 5)), plain)
