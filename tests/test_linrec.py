from __future__ import annotations

import pytest
import torch

from genkit.errors import UsageError
from genkit.kernels.linrec.op import linrec
from tests.parity import assert_agrees, gradients

PATHS = ["cpu", "torch"]


def some(B: int, N: int, D: int, dtype: torch.dtype = torch.float32, decay: str = "full") -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    shape = {"full": (B, N, D), "per batch": (B, 1, D), "one": (D,)}[decay]
    a = torch.rand(shape, generator=random)
    if dtype.is_complex:
        a = torch.polar(a, 6.3 * torch.rand(shape, generator=random))
    return {
        "a": a.to(dtype),
        "b": torch.randn(B, N, D, generator=random, dtype=dtype),
        "h0": torch.randn(B, D, generator=random, dtype=dtype),
    }


@pytest.mark.parametrize("decay", ["full", "per batch", "one"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 63, 100), (1, 200, 64), (3, 7, 130), (2, 1100, 3)])
def test_every_path_equals_the_reference(path, reverse, shape, dtype, decay):
    assert_agrees(linrec, path, some(*shape, dtype, decay), reverse=reverse)


@pytest.mark.parametrize("decay", ["full", "one"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("reverse", [False, True])
def test_triton_equals_the_reference(reverse, dtype, decay):
    pytest.importorskip("triton")
    assert_agrees(linrec, "triton", some(2, 37, 5, dtype, decay), reverse=reverse)


@pytest.mark.parametrize("path", [*PATHS, "triton", "reference"])
def test_half_precision_is_computed_in_float32(path):
    x = {name: value.bfloat16() for name, value in some(1, 24, 6).items()}
    wide = linrec(*(value.float() for value in x.values()), path="reference")
    found = linrec(**x, path=path)
    assert found.dtype == torch.bfloat16
    assert (
        found.float() - wide
    ).abs().max() <= 2**-7 * wide.abs().max()  # one rounding, of the result; the interpreter cuts


def test_the_gradient_can_be_differentiated_by_the_plain_path():
    for dtype in (torch.float64, torch.complex128):
        x = {name: value.requires_grad_() for name, value in some(1, 34, 1, dtype, "per batch").items()}
        assert torch.autograd.gradcheck(
            lambda a, b, h0: linrec(a, b, h0, path="torch"), tuple(x.values()), fast_mode=True
        )
    small = tuple(value.requires_grad_() for value in some(1, 4, 2, torch.float64).values())
    assert torch.autograd.gradgradcheck(lambda a, b, h0: linrec(a, b, h0, reverse=True, path="torch"), small)


@pytest.mark.parametrize("path", PATHS)
def test_a_state_can_be_handed_on(path):
    x = some(2, 64, 33)
    whole = linrec(**x, path=path)
    half = linrec(x["a"][:, :30], x["b"][:, :30], x["h0"], path=path)
    rest = linrec(x["a"][:, 30:], x["b"][:, 30:], half[:, -1], path=path)
    torch.testing.assert_close(torch.cat([half, rest], 1), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_any_strides_will_do(path):
    x = some(2, 40, 24, torch.complex64)
    lazy = {
        "a": x["a"].conj().mT.contiguous().mT,
        "b": x["b"].flip(1)[:, ::2].repeat(1, 2, 1),
        "h0": x["h0"].T.contiguous().T,
    }
    plain = {name: value.resolve_conj().clone(memory_format=torch.contiguous_format) for name, value in lazy.items()}
    found = gradients(lambda **x: linrec(**x, path=path), lazy)
    for name, value in gradients(lambda **x: linrec(**x, path=path), plain).items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("path", PATHS)
def test_what_is_not_finite_comes_back_in_its_own_channel(path):
    x = some(1, 100, 40)
    x["b"][0, 50, 7], x["b"][0, 60, 9] = float("nan"), float("inf")
    h = linrec(**x, path=path)
    assert h[0, 50:, 7].isnan().all()
    assert h[0, 60, 9].isinf()
    h[:, :, [7, 9]] = 0
    assert h.isfinite().all()


@pytest.mark.parametrize("path", PATHS)
def test_decays_of_zero_forget_and_of_one_add_up(path):
    b = torch.ones(1, 200, 3)
    assert torch.equal(linrec(torch.ones(3), b, path=path)[0, :, 0], torch.arange(1.0, 201))
    assert torch.equal(linrec(torch.zeros(1, 200, 3), b, path=path), b)


def test_a_shared_decay_is_never_expanded(monkeypatch):
    """Nothing of the size of b is made from it: the largest new tensors of the compiled path are h, and in the backward pass db."""
    from genkit.kernels.linrec import cpu

    seen = []
    backward = cpu._backward
    monkeypatch.setattr(cpu, "_backward", lambda *args: seen.append(args[0].shape) or backward(*args))
    x = some(2, 500, 8, decay="one")
    a = x["a"].requires_grad_()
    linrec(a, x["b"], x["h0"], path="cpu").sum().backward()
    assert seen == [(1, 1, 8)]
    assert a.grad.shape == (8,)


def test_what_does_not_fit_is_named():
    x = some(2, 5, 4)
    with pytest.raises(
        ValueError, match=r"a must be \[2, 5, 4\], \[2, 1, 4\] or \[4\] to go with b \[2, 5, 4\], got \[2, 5, 3\]"
    ):
        linrec(x["a"][..., :3], x["b"])
    with pytest.raises(ValueError, match=r"h0 must be \[2, 4\] to go with b \[2, 5, 4\], got \[1, 4\]"):
        linrec(x["a"], x["b"], x["h0"][:1])
    with pytest.raises(ValueError, match=r"no size 0, got \[2, 0, 4\]"):
        linrec(x["a"][:, :0], x["b"][:, :0])
    with pytest.raises(ValueError, match=r"a is torch\.float32 on cpu, b is torch\.complex64 on cpu; they must agree"):
        linrec(x["a"], x["b"].to(torch.complex64))
    with pytest.raises(ValueError, match=r"b is torch\.int64"):
        linrec(x["a"].long(), x["b"].long())
    with pytest.raises(UsageError, match="linrec: the path cpu cannot run: it computes in float32 and complex64"):
        linrec(x["a"].double(), x["b"].double(), path="cpu")


@pytest.mark.parametrize("decay", ["full", "one"])
@pytest.mark.parametrize("path", ["cpu", "triton"])
def test_the_operations_keep_their_promises(path, decay):
    import importlib

    module = importlib.import_module(f"genkit.kernels.linrec.{path}")
    x = some(2, 7, 5, torch.complex64 if path == "cpu" else torch.float32, decay)
    a = x["a"] if decay == "full" else x["a"][None, None]
    torch.library.opcheck(
        module._forward, (a.requires_grad_(), x["b"].requires_grad_(), x["h0"].requires_grad_(), False)
    )
    torch.library.opcheck(module._backward, (a.detach(), x["b"].detach(), x["h0"].detach(), x["b"].detach(), True))


@pytest.mark.parametrize("path", PATHS)
def test_compiled_equals_eager(path):
    def layer(a, b, h0):
        return linrec(a.sigmoid(), 2 * b, h0, path=path) + 1

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = some(2, 7, 5)
    expected = gradients(layer, x)
    for name, value in gradients(compiled, x).items():
        torch.testing.assert_close(value, expected[name])
