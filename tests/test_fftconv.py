from __future__ import annotations

import pytest
import torch

from genkit.kernels.fftconv.op import fftconv
from genkit.kernels.fftconv.torch import _smooth
from genkit.kernels.linrec.op import linrec
from tests.parity import assert_agrees, gradients


def some(grid: tuple[int, ...], lengths: tuple[int, ...], B: int = 2, D: int = 3) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return {"u": torch.randn(B, *grid, D, generator=random), "kernel": torch.randn(*lengths, D, generator=random)}


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(
    ("grid", "lengths"),
    [((1,), (1,)), ((63,), (63,)), ((100,), (7,)), ((7,), (100,)), ((130,), (129,)), ((50,), (2,)), ((9, 7), (9, 7)), ((5, 8), (3, 12)), ((6, 1), (1, 4))],
)  # fmt: skip
def test_it_is_the_sum(grid, lengths, is_causal):
    assert_agrees(fftconv, "torch", some(grid, lengths), is_causal=is_causal)


def test_the_sum_by_hand():
    u = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1)
    kernel = torch.tensor([10.0, 100.0, 1000.0]).view(3, 1)
    for path in ("torch", "reference"):
        causal = fftconv(u, kernel, path=path).flatten()
        torch.testing.assert_close(causal, torch.tensor([10.0, 120.0, 1230.0]), rtol=1e-5, atol=1e-3)
        centred = fftconv(u, kernel, is_causal=False, path=path).flatten()
        torch.testing.assert_close(centred, torch.tensor([120.0, 1230.0, 2300.0]), rtol=1e-5, atol=1e-3)


def test_a_causal_kernel_does_not_see_the_future():
    x = some((40,), (40,))
    late = x["u"].clone()
    late[:, 25:] = 100
    difference = (fftconv(late, x["kernel"]) - fftconv(x["u"], x["kernel"])).abs()
    assert difference[:, :25].max() < 1e-2 * difference[:, 25:].max() * 1e-2


def test_a_geometric_kernel_is_a_recurrence():
    x = some((200,), (200,))
    decay = torch.tensor([0.9, -0.5, 0.99])
    kernel = decay ** torch.arange(200)[:, None]
    torch.testing.assert_close(fftconv(x["u"], kernel), linrec(decay, x["u"], path="reference"), rtol=1e-4, atol=1e-4)


def test_lengths_have_small_factors_and_are_the_least():
    def is_smooth(n: int) -> bool:
        for factor in (2, 3, 5):
            while n % factor == 0:
                n //= factor
        return n == 1

    for least in range(1, 600):
        found = _smooth(least)
        assert found == next(n for n in range(max(2, least), 2 * least + 2) if n % 2 == 0 and is_smooth(n))


def test_half_precision_is_computed_in_float32():
    x = {name: value.bfloat16() for name, value in some((60,), (60,)).items()}
    wide = fftconv(x["u"].float(), x["kernel"].float())
    assert torch.equal(fftconv(**x), wide.bfloat16())


def test_what_does_not_fit_is_named():
    x = some((10,), (4,))
    with pytest.raises(ValueError, match=r"kernel must be \[L, D\] with D=3 to go with u \[2, 10, 3\], got \[4, 2\]"):
        fftconv(x["u"], x["kernel"][:, :2])
    with pytest.raises(ValueError, match=r"u must be \[B, N, D\] or \[B, Y, X, D\], real, no size 0, got \[2, 0, 3\]"):
        fftconv(x["u"][:, :0], x["kernel"])
    with pytest.raises(ValueError, match=r"kernel is torch\.float64 on cpu, u is torch\.float32 on cpu"):
        fftconv(x["u"], x["kernel"].double())


def test_compiled_equals_eager():
    compiled = torch.compile(
        lambda u, kernel: fftconv(2 * u, kernel, path="torch") + 1, backend="aot_eager", fullgraph=True
    )
    x = some((20,), (20,))
    expected = gradients(lambda u, kernel: fftconv(2 * u, kernel, path="torch") + 1, x)
    for name, value in gradients(compiled, x).items():
        torch.testing.assert_close(value, expected[name])
