from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from genkit.errors import UsageError
from genkit.kernels.gla.op import gla
from tests.parity import assert_agrees, gradients

FAST = ["cpu", "torch"]
SHAPES = [(1, 1, 1, 1, 1), (2, 7, 3, 5, 6), (1, 63, 2, 16, 40), (2, 130, 2, 33, 70), (1, 100, 1, 64, 130)]


def some(B: int, N: int, H: int, K: int, V: int, strength: float = 1.0) -> dict[str, Tensor]:
    """Gates of log-sigmoid times strength."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    return {
        "q": normal(B, N, H, K),
        "k": normal(B, N, H, K),
        "v": normal(B, N, H, V),
        "g": logsigmoid(normal(B, N, H, K)) * strength,
        "initial_state": normal(B, H, K, V),
    }


def test_the_reference_by_hand():
    q, k, v = (
        torch.tensor([[2.0, 1.0], [1.0, 3.0]]),
        torch.tensor([[1.0, 2.0], [0.5, 1.0]]),
        torch.tensor([[1.0], [4.0]]),
    )
    decay = torch.tensor([[0.5, 0.25], [0.5, 1.0]])
    o, state = gla(
        *(x[None, :, None] for x in (q, k, v, decay.log())),
        scale=1.0,
        initial_state=torch.tensor([2.0, 4.0])[None, None, :, None],
        return_state=True,
        path="reference",
    )
    # S_1 = (0.5 * 2 + 1, 0.25 * 4 + 2) = (2, 3), o_1 = 2 * 2 + 3; S_2 = (0.5 * 2 + 2, 3 + 4) = (3, 7), o_2 = 3 + 21
    torch.testing.assert_close(o.flatten(), torch.tensor([7.0, 24.0]))
    torch.testing.assert_close(state.flatten(), torch.tensor([3.0, 7.0]))


@pytest.mark.parametrize("path", FAST)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_path_equals_the_reference(path, reverse, shape):
    assert_agrees(gla, path, some(*shape), reverse=reverse, return_state=True)


@pytest.mark.parametrize("path", FAST)
def test_without_state_and_with_a_scale(path):
    inputs = some(1, 70, 2, 24, 20)
    inputs["initial_state"] = None
    assert_agrees(gla, path, inputs, scale=0.3)


@pytest.mark.parametrize("path", FAST)
@pytest.mark.parametrize("strength", [0.0, 1 / 16, 16.0])
def test_weak_and_strong_gates(path, strength):
    # Strong: a chunk of 64 decays by exp(-800). Gradients of gates are then differences of much larger numbers.
    assert_agrees(gla, path, some(1, 150, 2, 32, 32, strength), rtol=1e-4, return_state=True)


@pytest.mark.parametrize("reverse", [False, True])
def test_triton_equals_the_reference(reverse, monkeypatch):
    module = pytest.importorskip("genkit.kernels.gla.triton")
    monkeypatch.setattr(module, "_EVERY", 16)  # several anchors
    inputs = some(1, 20, 1, 5, 6, 4.0)
    inputs["g"][:, 4] = -torch.inf
    assert_agrees(gla, "triton", inputs, reverse=reverse, return_state=True)


@pytest.mark.parametrize("path", FAST)
def test_gates_that_close(path):
    inputs = some(1, 70, 1, 16, 16)
    inputs["g"][:, 4::9] = -500.0
    inputs["g"][:, 5::9, :, :3] = -torch.inf
    assert_agrees(gla, path, inputs, rtol=1e-4, return_state=True)


@pytest.mark.parametrize("path", FAST)
def test_a_state_can_be_handed_on(path):
    x = some(2, 90, 2, 20, 24)
    whole, last = gla(**x, return_state=True, path=path)
    first = {name: x[name][:, :37] for name in "qkvg"}
    second = {name: x[name][:, 37:] for name in "qkvg"}
    half, state = gla(**first, initial_state=x["initial_state"], return_state=True, path=path)
    rest, end = gla(**second, initial_state=state, return_state=True, path=path)
    torch.testing.assert_close(torch.cat([half, rest], 1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(end, last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", FAST)
def test_token_by_token_is_the_whole(path):
    x = some(2, 9, 2, 20, 24)
    whole, last = gla(**x, return_state=True, path=path)
    state, out = x["initial_state"], []
    for t in range(9):
        o, state = gla(
            **{name: x[name][:, t : t + 1] for name in "qkvg"}, initial_state=state, return_state=True, path=path
        )
        out.append(o)
    torch.testing.assert_close(torch.cat(out, 1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", FAST)
def test_reversed_is_flipped(path):
    x = some(1, 75, 2, 8, 8)
    flipped = {name: value if name == "initial_state" else value.flip(1) for name, value in x.items()}
    torch.testing.assert_close(
        gla(**x, reverse=True, path=path), gla(**flipped, path=path).flip(1), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("path", FAST)
def test_nan_stays_with_its_head_and_its_future(path):
    x = some(1, 80, 2, 8, 8)
    clean = gla(**x, path=path)
    x["v"][0, 41, 0, 3] = torch.nan
    o = gla(**x, path=path)
    assert o[0, 41:, 0, 3].isnan().all()
    torch.testing.assert_close(o[0, :, 1], clean[0, :, 1])
    if path == "cpu":  # the chunked form multiplies what lies ahead by zero
        torch.testing.assert_close(o[0, :41, 0], clean[0, :41, 0])


@pytest.mark.parametrize("path", FAST)
def test_strided_inputs(path):
    x = some(2, 20, 3, 8, 12)
    strided = {name: value.transpose(1, 2).contiguous().transpose(1, 2) for name, value in x.items()}
    assert not strided["q"].is_contiguous()
    for name, value in gradients(lambda **y: gla(**y, path=path), strided).items():
        torch.testing.assert_close(value, gradients(lambda **y: gla(**y, path=path), x)[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("path", ["cpu", "torch", "reference"])
def test_half_precision_is_computed_in_single(path):
    x = some(1, 70, 2, 16, 16)
    half = {name: value if name in ("g", "initial_state") else value.bfloat16() for name, value in x.items()}
    o, state = gla(**half, return_state=True, path=path)
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    exact, exact_state = gla(
        **{name: value.float() for name, value in half.items()}, return_state=True, path="reference"
    )
    torch.testing.assert_close(state, exact_state, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(o.float(), exact, rtol=1e-2, atol=1e-2)
    assert gradients(lambda **y: gla(**y, path=path), half)["dq"].dtype == torch.bfloat16


def test_more_threads_than_heads_cut_the_columns():
    x = some(1, 67, 1, 140, 150)
    before = torch.get_num_threads()
    expected = gradients(lambda **y: gla(**y, return_state=True, path="cpu"), x)
    try:
        torch.set_num_threads(4)
        found = gradients(lambda **y: gla(**y, return_state=True, path="cpu"), x)
    finally:
        torch.set_num_threads(before)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)


def test_what_does_not_fit_is_named():
    x = some(1, 5, 2, 4, 6)
    with pytest.raises(ValueError, match=r"gla: k must be \[1, 5, 2, 4\] to go with q and v, got \[1, 5, 2, 3\]"):
        gla(x["q"], x["k"][..., :3], x["v"], x["g"])
    with pytest.raises(ValueError, match=r"gla: v must be \[B, N, H, V\]"):
        gla(x["q"][:, :0], x["k"][:, :0], x["v"][:, :0], x["g"][:, :0])
    with pytest.raises(ValueError, match="gla: initial_state must be"):
        gla(**x | {"initial_state": x["initial_state"].double()})
    with pytest.raises(UsageError, match="gla: the path cpu cannot run: it computes in float32"):
        gla(**{name: value.double() for name, value in x.items()}, path="cpu")


def test_opcheck():
    from genkit.kernels.gla import cpu

    x = [value.requires_grad_() for value in some(1, 6, 2, 5, 7).values()]
    torch.library.opcheck(cpu._forward, (*x, 0.5, False))
    o, state = cpu._forward(*x, 0.5, False)
    torch.library.opcheck(cpu._backward, (*(y.detach() for y in (*x, o, state)), 0.5, True))


def test_compiled_equals_eager():
    x = some(1, 70, 2, 8, 8)

    def f(**y: Tensor) -> tuple[Tensor, ...]:
        return gla(**y, return_state=True, path="cpu")  # type: ignore[return-value]

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    expected = gradients(f, x)
    for name, value in gradients(compiled, x).items():
        torch.testing.assert_close(value, expected[name])
