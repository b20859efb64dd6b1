from __future__ import annotations

import importlib

import pytest
import torch

from genkit.errors import UsageError
from genkit.kernels.aaren.op import aaren
from tests.parity import assert_agrees, gradients

PATHS = ["cpu", "torch"]


def some(B: int, N: int, H: int, V: int, strength: float = 3.0) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=random)  # noqa: E731
    return {"scores": strength * draw(B, N, H), "v": draw(B, N, H, V), "log0": draw(B, H), "mean0": draw(B, H, V)}


def with_state(scores, v, log0, mean0, **options):
    o, (log, _) = aaren(scores, v, state=(log0, mean0), return_state=True, **options)
    return o, log


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 63, 5, 7), (1, 100, 17, 8), (3, 7, 2, 130), (1, 1100, 1, 3)])
def test_every_path_equals_the_reference(path, reverse, shape):
    rtol = 1e-4 if shape[1] > 1000 else 2e-5  # dlog0 is a small difference of two sums over all tokens
    assert_agrees(with_state, path, some(*shape), rtol=rtol, reverse=reverse)


@pytest.mark.parametrize("reverse", [False, True])
def test_triton_equals_the_reference(reverse):
    assert_agrees(with_state, "triton", some(1, 37, 2, 5), reverse=reverse)


@pytest.mark.parametrize("path", ["reference", *PATHS, "triton"])
def test_it_is_the_softmax_over_every_prefix(path):
    x = some(2, 20, 3, 4)
    found = aaren(x["scores"], x["v"], path=path)
    for t in (0, 1, 7, 19):
        weights = x["scores"][:, : t + 1].softmax(1)
        torch.testing.assert_close(found[:, t], (weights[..., None] * x["v"][:, : t + 1]).sum(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", ["reference", *PATHS, "triton"])
def test_huge_scores_do_no_harm(path):
    """A shift of all scores changes nothing; scores 1e4 apart pick one token."""
    x = some(1, 37, 2, 3, strength=1.0)
    torch.testing.assert_close(
        aaren(x["scores"] + 8192, x["v"], path=path),
        aaren((x["scores"] + 8192) - 8192, x["v"], path=path),
        rtol=1e-5,
        atol=1e-5,
    )
    found = gradients(lambda scores, v: aaren(scores, v, path=path), {"scores": 1e4 * x["scores"], "v": x["v"]})
    best = x["scores"].cummax(1).indices
    torch.testing.assert_close(found["out0"], x["v"].gather(1, best[..., None].expand_as(x["v"])))
    assert all(value.isfinite().all() for value in found.values())


@pytest.mark.parametrize("path", ["reference", *PATHS, "triton"])
def test_a_score_of_minus_infinity_takes_a_token_out(path):
    x = some(1, 37, 2, 3)
    is_out = torch.zeros(37, dtype=torch.bool)
    is_out[[0, 1, 5, 20, 36]] = True
    scores = x["scores"].clone()
    scores[:, is_out] = -torch.inf
    found = gradients(lambda scores, v: aaren(scores, v, path=path), {"scores": scores, "v": x["v"]})
    expected = aaren(x["scores"][:, ~is_out], x["v"][:, ~is_out], path="reference")
    torch.testing.assert_close(found["out0"][:, ~is_out], expected, rtol=1e-5, atol=1e-5)
    assert not found["out0"][:, :2].any()  # nothing to attend to yet
    assert torch.equal(found["out0"][:, 5], found["out0"][:, 4])
    assert not found["dv"][:, is_out].any()
    assert not found["dscores"][:, is_out].any()
    assert all(value.isfinite().all() for value in found.values())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("reverse", [False, True])
def test_a_state_can_be_handed_on(path, reverse):
    x = some(2, 64, 3, 5)
    whole, last = aaren(x["scores"], x["v"], return_state=True, reverse=reverse, path=path)
    parts, state = [], None
    for piece in (slice(40, 64), slice(0, 40)) if reverse else (slice(0, 30), slice(30, 31), slice(31, 64)):
        o, state = aaren(
            x["scores"][:, piece], x["v"][:, piece], state=state, return_state=True, reverse=reverse, path=path
        )
        parts.append(o)
    torch.testing.assert_close(torch.cat(parts[::-1] if reverse else parts, 1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", ["reference", *PATHS, "triton"])
def test_half_precision_is_computed_in_float32(path):
    x = {name: value.bfloat16() for name, value in some(1, 24, 2, 6).items()}
    wide = aaren(x["scores"].float(), x["v"].float(), path="reference")
    found, (log, _) = aaren(x["scores"], x["v"], return_state=True, path=path)
    assert (found.dtype, log.dtype) == (torch.bfloat16, torch.float32)
    assert (found.float() - wide).abs().max() <= 2**-7 * wide.abs().max()


def test_what_is_not_finite_comes_back_in_its_own_head():
    """The compiled path is exact about it; the others multiply by zeros inside a block, and the same block is NaN from its start."""
    path = "cpu"
    x = some(1, 50, 4, 20)
    x["scores"][0, 20, 1] = float("nan")
    x["v"][0, 30, 2, 7] = float("inf")
    o = aaren(x["scores"], x["v"], path=path)
    assert o[0, 20:, 1].isnan().all()
    assert o[0, 30, 2, 7].isinf()
    assert o[0, :20].isfinite().all()
    assert o[0, :, [0, 3]].isfinite().all()


def test_what_does_not_fit_is_named():
    x = some(2, 5, 3, 4)
    with pytest.raises(
        ValueError, match=r"aaren: scores must be \[2, 5, 3\] to go with v \[2, 5, 3, 4\], got \[2, 5, 2\]"
    ):
        aaren(x["scores"][..., :2], x["v"])
    with pytest.raises(ValueError, match=r"no size 0, got \[2, 0, 3, 4\]"):
        aaren(x["scores"][:, :0], x["v"][:, :0])
    with pytest.raises(
        ValueError, match=r"state\[0\] is torch\.bfloat16 on cpu; to go with v it must be torch\.float32"
    ):
        aaren(x["scores"], x["v"], state=(x["log0"].bfloat16(), x["mean0"]))
    with pytest.raises(UsageError, match="aaren: the path cpu cannot run: it computes in float32"):
        aaren(x["scores"].double(), x["v"].double(), path="cpu")


@pytest.mark.parametrize("path", ["cpu", "triton"])
def test_the_operations_keep_their_promises(path):
    module = importlib.import_module(f"genkit.kernels.aaren.{path}")
    x = some(1, 7, 2, 3)
    torch.library.opcheck(module._forward, (*(value.requires_grad_() for value in x.values()), False))
    plain = [value.detach() for value in x.values()]
    if path == "cpu":
        o, keep, share, last = module._forward(*plain, False)
        backward = (plain[1], plain[3], o, keep, share, o.clone(), last.clone(), False)
    else:
        o, largest, total = module._forward(*plain, False)
        backward = (*plain, o, largest, total, o.clone(), total.clone(), False)
    torch.library.opcheck(module._backward, backward)


@pytest.mark.parametrize("path", PATHS)
def test_compiled_equals_eager(path):
    def layer(scores, v, log0, mean0):
        return aaren(scores.sin(), 2 * v, state=(log0, mean0), path=path) + 1

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = some(2, 9, 2, 5)
    expected = gradients(layer, x)
    for name, value in gradients(compiled, x).items():
        torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize("path", PATHS)
def test_autocast_changes_nothing(path):
    x = some(2, 40, 2, 5)
    plain = aaren(x["scores"], x["v"], path=path)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(aaren(x["scores"], x["v"], path=path), plain)
