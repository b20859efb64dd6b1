from __future__ import annotations

import pytest
import torch

from genkit.kernels.fftconv.op import fftconv
from genkit.kernels.s5.op import discretise, s5
from tests.parity import assert_agrees, gradients


@pytest.fixture(autouse=True)
def _below(monkeypatch):
    """Not through Triton's interpreter, which would be preferred and is slow."""
    monkeypatch.setenv("GENKIT_KERNEL", "torch")


def some(B: int, N: int, D: int, P: int, ways: int = 1, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=random, dtype=dtype)  # noqa: E731
    number = dtype.to_complex()
    return {
        "u": draw(B, N, D),
        "decay": torch.polar(draw(P).sigmoid(), draw(P)).to(number),
        "B": torch.complex(draw(P, D), draw(P, D)),
        "C": torch.complex(draw(D, ways * P), draw(D, ways * P)),
        "skip": draw(D),
        "state": torch.complex(draw(B, P), draw(B, P)),
    }


@pytest.mark.parametrize("below", ["torch", "cpu"])
@pytest.mark.parametrize("ways", [1, 2])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 63, 5, 7), (1, 130, 4, 8)])
def test_it_equals_the_reference(shape, ways, below, monkeypatch):
    monkeypatch.setenv("GENKIT_KERNEL", below)
    call = lambda **x: s5(**x, is_bidirectional=ways == 2)  # noqa: E731
    assert_agrees(call, "torch", some(*shape, ways=ways))
    if ways == 1:
        assert_agrees(lambda **x: s5(**x, return_state=True, is_conjugate=False), "torch", some(*shape))


def test_one_channel_is_a_convolution_with_its_impulse_response():
    """S4D: the kernel of a diagonal system is 2 Re sum_p C_p decay_p^t B_p."""
    x = some(2, 90, 1, 6, dtype=torch.float64)
    del x["state"]
    powers = x["decay"][:, None] ** torch.arange(90)
    kernel = 2 * torch.einsum("op,pd,pn->no", x["C"], x["B"], powers).real
    kernel[0] += x["skip"]
    torch.testing.assert_close(s5(**x), fftconv(x["u"], kernel))


def test_discretisations_follow_the_differential_equation():
    """Both tend to x(T) = (exp(T e) - 1) / e B for a constant input, the one that holds the input exactly, the other with the square of the step."""
    e = torch.tensor([-0.5 + 2j, -1.0 + 0j, 0j], dtype=torch.complex128)
    B = torch.tensor([[1 + 1j], [2 + 0j], [1 + 0j]], dtype=torch.complex128)
    exact = torch.stack([torch.expm1(e[0]) / e[0] * B[0], torch.expm1(e[1]) / e[1] * B[1], B[2]])
    errors = {}
    for method in ("zoh", "bilinear"):
        for steps in (20, 40):
            decay, inputs = discretise(e, B, torch.full((3,), 1 / steps, dtype=torch.float64), method)
            x = torch.zeros_like(B)
            for _ in range(steps):
                x = decay[:, None] * x + inputs
            errors[method, steps] = (x - exact).abs().max()
    assert errors["zoh", 20] < 1e-12
    assert 3.8 < errors["bilinear", 20] / errors["bilinear", 40] < 4.2


def test_a_tiny_step_keeps_its_digits():
    e, B = torch.tensor([-0.5 + 3j]), torch.tensor([[1 + 0j]])
    _, inputs = discretise(e, B, torch.tensor([1e-7]))
    assert (inputs / 1e-7 - 1).abs().max() < 1e-5


def test_the_discretisation_is_differentiable_at_zero():
    e = torch.zeros(1, dtype=torch.complex128, requires_grad=True)
    B = torch.ones(1, 1, dtype=torch.complex128)
    decay, inputs = discretise(e, B, torch.ones(1, dtype=torch.float64))
    (decay.sum() + inputs.sum()).real.backward()
    assert e.grad.isfinite().all()


def test_what_does_not_fit_is_named():
    x = some(2, 5, 3, 4)
    with pytest.raises(ValueError, match=r"s5: C must be \[3, 8\] to go with u \[2, 5, 3\], got \[3, 4\]"):
        s5(**x, is_bidirectional=True)
    with pytest.raises(ValueError, match="no state to return"):
        s5(**some(2, 5, 3, 4, ways=2), is_bidirectional=True, return_state=True)
    with pytest.raises(
        ValueError, match=r"s5: B is torch\.complex128 on cpu; to go with u it must be torch\.complex64"
    ):
        s5(**x | {"B": x["B"].to(torch.complex128)})
    with pytest.raises(ValueError, match="method must be 'zoh' or 'bilinear', got 'euler'"):
        discretise(x["decay"], x["B"], torch.ones(4), "euler")


def test_compiled_equals_eager():
    layer = lambda **x: s5(**x) + 1  # noqa: E731
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = some(2, 9, 3, 4)
    expected = gradients(layer, x)
    for name, value in gradients(compiled, x).items():
        torch.testing.assert_close(value, expected[name])


def test_autocast_changes_nothing():
    plain = s5(**some(2, 9, 3, 4))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(s5(**some(2, 9, 3, 4)), plain)
