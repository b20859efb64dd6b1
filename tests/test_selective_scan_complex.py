"""The selective scan of complex states, against a loop of its own in the published layout."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from genkit.errors import UsageError
from genkit.kernels.selective_scan.op import selective_scan
from tests.parity import assert_agrees, gradients

PATHS = ["torch", "reference"]


def some(B: int, N: int, D: int, R: int, groups: int | None = None, plain: bool = False) -> dict[str, Tensor | None]:
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=dtype)

    maps = (B, N, R) if groups is None else (B, N, groups, R)
    return {
        "u": normal(B, N, D),
        "delta": 0.5 * normal(B, N, D),
        "A": torch.complex(-2 * torch.rand(D, R, generator=random), 3 * normal(D, R)),
        "B": normal(*maps, dtype=torch.complex64),
        "C": normal(*maps, dtype=torch.complex64),
        "D_skip": None if plain else normal(D),
        "z": None if plain else normal(B, N, D),
        "delta_bias": None if plain else normal(D),
        "initial_state": None if plain else normal(B, D, R, dtype=torch.complex64),
    }


def at(given: Tensor, b: int, t: int, d: int, D: int) -> Tensor:
    """B or C of one token and channel, [R], in any of its three forms."""
    if given.ndim == 2:
        return given[d]
    return given[b, t] if given.ndim == 3 else given[b, t, d * given.shape[2] // D]


def loop(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D_skip: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Every number for itself: of a sample, a channel and a state, from token to token; y and the last state."""
    batch, N, D = u.shape
    R = A.shape[1]
    y, last = [], []
    for b in range(batch):
        for d in range(D):
            steps = softplus(delta[b, :, d] + (0 if delta_bias is None else delta_bias[d]))
            out, own = torch.zeros(N, dtype=torch.float64), []
            for r in range(R):
                h = torch.zeros((), dtype=torch.complex128) if initial_state is None else initial_state[b, d, r]
                seen = []
                for t in range(N):
                    h = torch.exp(steps[t] * A[d, r]) * h + steps[t] * u[b, t, d] * at(B, b, t, d, D)[r]
                    read = at(C, b, t, d, D)[r]
                    seen.append(read * h + torch.conj(read) * torch.conj(h))
                out = out + torch.stack(seen).real
                own.append(h)
            out = out if D_skip is None else out + D_skip[d] * u[b, :, d]
            y.append(out if z is None else out * silu(z[b, :, d]))
            last.append(torch.stack(own))
    return torch.stack(y, 1).view(N, batch, D).transpose(0, 1), torch.stack(last).view(batch, D, R)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 7, 3, 2), (1, 6, 4, 2, 2), (2, 5, 2, 3, None, True)])
def test_values_and_gradients_are_those_of_the_loop(path, shape):
    x = some(*shape)
    double = {k: v if v is None else v.to(torch.complex128 if v.is_complex() else torch.float64) for k, v in x.items()}
    expected = gradients(loop, double)
    for inputs, rtol in ((double, 1e-10), (x, 2e-5)):
        found = gradients(partial(selective_scan, delta_softplus=True, return_state=True, path=path), inputs)
        for name, value in expected.items():
            error = (found[name].to(value) - value).abs().max() / value.abs().max().clamp_min(1e-30)
            assert error <= rtol, name


@pytest.mark.parametrize("reverse", [False, True])
def test_long_sequences_in_stretches(reverse):
    assert_agrees(selective_scan, "torch", some(1, 300, 3, 2), delta_softplus=True, reverse=reverse, return_state=True)


def test_gradients_are_those_of_small_steps():
    x = [
        v.to(torch.complex128 if v.is_complex() else torch.float64).requires_grad_() for v in some(1, 3, 2, 2).values()
    ]
    assert torch.autograd.gradcheck(lambda *k: selective_scan(*k[:8], initial_state=k[8], return_state=True), x)


@pytest.mark.parametrize("path", PATHS)
def test_without_imaginary_parts_it_is_twice_the_real_scan(path):
    x = some(2, 20, 6, 3, plain=True)
    real = {k: v.real if v is not None and v.is_complex() else v for k, v in x.items()}
    again = {k: real[k].to(torch.complex64) if k in ("A", "B", "C") else v for k, v in real.items()}
    y, state = selective_scan(**again, delta_softplus=True, return_state=True, path=path)
    expected, last = selective_scan(**real, delta_softplus=True, return_state=True, path=path)
    torch.testing.assert_close(y, 2 * expected)
    torch.testing.assert_close(state.real, last)
    assert not state.imag.any()


@pytest.mark.parametrize("path", PATHS)
def test_maps_that_are_the_same_for_all_tokens_and_half_precision(path):
    x = some(1, 9, 4, 3)
    x["B"], x["C"] = x["A"].conj().resolve_conj(), x["A"] * 1j
    half = {k: v.bfloat16() if k in ("u", "delta", "z") else v for k, v in x.items()}
    y, state = selective_scan(**half, delta_softplus=True, return_state=True, path=path)
    wide = {k: v if v is None else v.to(torch.complex128 if v.is_complex() else torch.float64) for k, v in half.items()}
    expected, last = loop(**wide)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.complex64)
    torch.testing.assert_close(y.double(), expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(state.to(last), last, rtol=1e-5, atol=1e-5)


def test_a_state_can_be_handed_on():
    x = some(2, 40, 5, 3)

    def part(a: int, b: int, state: Tensor | None) -> tuple[Tensor, Tensor]:
        own = {k: v[:, a:b] if k in ("u", "delta", "B", "C", "z") else v for k, v in x.items()}
        return selective_scan(**own | {"initial_state": state}, delta_softplus=True, return_state=True)

    whole, last = part(0, 40, x["initial_state"])
    first, state = part(0, 23, x["initial_state"])
    second, state = part(23, 40, state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"B": torch.zeros(2, 5, 3)}, "B must be torch.complex64 beside u of torch.float32 and A of torch.complex64, got torch.float32"),
        ({"A": torch.zeros(4, 3)}, "B must be torch.float32 beside u of torch.float32 and A of torch.float32, got torch.complex64"),
        ({"A": torch.zeros(4, 3, dtype=torch.complex128)}, "A must be torch.complex64"),
        ({"initial_state": torch.zeros(2, 4, 3)}, "initial_state must be torch.complex64"),
    ],
)  # fmt: skip
def test_numbers_that_do_not_go_together_are_named(change, message):
    with pytest.raises(ValueError, match=f"selective_scan: {message}"):
        selective_scan(**some(2, 5, 4, 3) | change)


@pytest.mark.parametrize("path", ["cpu", "triton"])
def test_paths_of_real_numbers_say_so(path):
    if path == "triton":
        pytest.importorskip("triton")
    with pytest.raises(UsageError, match=f"the path {path} cannot run: it computes in real numbers, A is complex"):
        selective_scan(**some(1, 2, 2, 1), path=path)
