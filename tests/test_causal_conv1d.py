from __future__ import annotations

import pytest
import torch
from torch import Tensor

from genkit.errors import UsageError
from genkit.kernels.causal_conv1d.op import causal_conv1d
from tests.parity import assert_agrees, gradients

PATHS = ["cpu", "torch"]


def some(B: int, N: int, D: int, K: int, has_bias: bool = True) -> dict[str, Tensor | None]:
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    return {
        "x": normal(B, N, D),
        "weight": normal(D, K),
        "bias": normal(D) if has_bias else None,
        "initial_state": normal(B, K - 1, D),
    }


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 2), (2, 63, 100, 4), (3, 7, 130, 3), (1, 3, 12, 8, False), (2, 300, 33, 5), (1, 9, 7, 6), (1, 9, 7, 7)],
)
def test_every_path_equals_the_reference(path, reverse, activation, shape):
    assert_agrees(causal_conv1d, path, some(*shape), activation=activation, reverse=reverse, return_state=True)


@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 20, 18, 4), (1, 3, 5, 8, False)])
@pytest.mark.parametrize("reverse", [False, True])
def test_triton_equals_the_reference(shape, reverse):
    pytest.importorskip("triton")
    activation = None if reverse else "silu"
    assert_agrees(causal_conv1d, "triton", some(*shape), activation=activation, reverse=reverse, return_state=True)


@pytest.mark.parametrize("path", [*PATHS, "reference"])
def test_it_is_the_convolution_of_torch(path):
    x = some(2, 50, 12, 4)
    layer = torch.nn.Conv1d(12, 12, 4, groups=12, padding=3)
    with torch.no_grad():
        layer.weight.copy_(x["weight"][:, None])
        layer.bias.copy_(x["bias"])
        expected = torch.nn.functional.silu(layer(x["x"].mT)[..., :50]).mT
    got = causal_conv1d(x["x"], x["weight"], x["bias"], "silu", path=path)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("size", [1, 2, 17])
def test_a_state_can_be_handed_on(path, reverse, size):
    """size 1 is how a sequence is generated."""
    x = some(2, 34, 18, 4)
    options = {"activation": "silu", "reverse": reverse, "return_state": True, "path": path}
    whole, last = causal_conv1d(**x, **options)
    parts = list(x["x"].split(size, 1))
    state, found = x["initial_state"], []
    for part in reversed(parts) if reverse else parts:
        y, state = causal_conv1d(part, x["weight"], x["bias"], initial_state=state, **options)
        found.append(y)
    torch.testing.assert_close(torch.cat(found[::-1] if reverse else found, 1), whole, rtol=1e-6, atol=1e-6)
    assert torch.equal(state, last)


@pytest.mark.parametrize("path", PATHS)
def test_reverse_is_the_convolution_of_the_flipped_sequence(path):
    x = some(1, 45, 20, 3)
    flipped = {**x, "x": x["x"].flip(1), "initial_state": x["initial_state"].flip(1)}
    expected = causal_conv1d(**flipped, path=path).flip(1)
    torch.testing.assert_close(causal_conv1d(**x, reverse=True, path=path), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_a_number_reaches_those_who_see_it(path, value):
    x = some(1, 20, 19, 4)
    x["x"][0, 9, 17] = value
    got = causal_conv1d(**x, path=path)
    bad = ~got.isfinite()
    assert bad[0, 9:13, 17].all()
    assert bad.sum() == 4


def test_half_precision_is_computed_in_single():
    x = {k: v.bfloat16() for k, v in some(1, 20, 33, 4).items()}
    wide = {k: v.float() for k, v in x.items()}
    for path in PATHS:
        got, state = causal_conv1d(**x, return_state=True, path=path)
        assert got.dtype == state.dtype == torch.bfloat16
        assert torch.equal(got, causal_conv1d(**wide, path=path).bfloat16())


def test_layout_in_memory_does_not_matter():
    x = some(2, 30, 24, 4)
    strided = {k: v.transpose(0, -1).contiguous().transpose(0, -1) for k, v in x.items()}
    for path in PATHS:
        expected = gradients(lambda **k: causal_conv1d(**k, path=path), x)  # noqa: B023
        got = gradients(lambda **k: causal_conv1d(**k, path=path), strided)  # noqa: B023
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-5)


BAD = {
    "x": (lambda x: x["x"][0], r"x must be \[B, N, D\]"),
    "weight": (lambda x: x["weight"][:, :1], r"weight must be \[4, K\] to go with x, with K of 2 to 8, got \[4, 1\]"),
    "bias": (lambda x: x["bias"][:2], r"bias must be \[4\] to go with x, got \[2\]"),
    "initial_state": (
        lambda x: x["initial_state"][:, 1:],
        r"initial_state must be \[2, 2, 4\] to go with x, got \[2, 1, 4\]",
    ),
    "activation": (lambda x: "gelu", "activation must be None or 'silu', got 'gelu'"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_named(name):
    x = some(2, 5, 4, 3)
    make, message = BAD[name]
    with pytest.raises(ValueError, match=f"causal_conv1d: {message}"):
        causal_conv1d(**{**x, name: make(x)})


def test_the_compiled_path_says_what_it_does_not_take():
    x = {k: v.double() for k, v in some(2, 5, 4, 3).items()}
    with pytest.raises(UsageError, match="causal_conv1d: the path cpu cannot run: it computes in float32"):
        causal_conv1d(**x, path="cpu")


@pytest.mark.parametrize("has_bias", [False, True])
def test_opcheck(has_bias):
    from genkit.kernels.causal_conv1d import cpu

    x = some(1, 37, 20, 3, has_bias)
    leaves = [v.requires_grad_() if v is not None else None for v in x.values()]
    torch.library.opcheck(cpu._forward, (*leaves, True, False))
    inputs = [v.detach() if v is not None else None for v in leaves]
    torch.library.opcheck(cpu._backward, (*inputs, inputs[0], True, False))


def test_compiled_equals_eager():
    x = some(1, 37, 20, 3)

    def run(**k: Tensor) -> tuple[Tensor, ...]:
        return causal_conv1d(**k, activation="silu", return_state=True, path="cpu")

    expected = gradients(run, x)
    got = gradients(torch.compile(run, backend="aot_eager", fullgraph=True), x)
    for name, value in expected.items():
        assert torch.equal(got[name], value), name
