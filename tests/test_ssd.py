from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from genkit.errors import UsageError
from genkit.kernels.gla.op import gla
from genkit.kernels.ssd.op import ssd
from tests.parity import assert_agrees, gradients

FAST = ["cpu", "torch"]
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (2, 7, 3, 3, 5, 6),
    (1, 63, 4, 2, 16, 40),
    (2, 130, 2, 1, 33, 70),
    (1, 100, 2, 2, 64, 130),
]


def some(B: int, N: int, H: int, G: int, K: int, V: int, strength: float = 1.0) -> dict[str, Tensor]:
    """Gates of log-sigmoid times strength."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    return {
        "q": normal(B, N, G, K),
        "k": normal(B, N, G, K),
        "v": normal(B, N, H, V),
        "g": logsigmoid(normal(B, N, H)) * strength,
        "initial_state": normal(B, H, K, V),
    }


def steps(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1))


def test_the_reference_by_hand():
    q, k, v = (
        torch.tensor([[2.0, 1.0], [1.0, 3.0]]),
        torch.tensor([[1.0, 2.0], [0.5, 1.0]]),
        torch.tensor([[1.0], [4.0]]),
    )
    o, state = ssd(
        *(x[None, :, None] for x in (q, k, v)),
        torch.tensor([0.5, 0.25]).log()[None, :, None],
        dt=torch.tensor([2.0, 0.5])[None, :, None],
        skip=torch.tensor([10.0]),
        initial_state=torch.tensor([2.0, 4.0])[None, None, :, None],
        return_state=True,
        path="reference",
    )
    # S_1 = (0.5 * 2 + 2, 0.5 * 4 + 4) = (3, 6), o_1 = 6 + 6 + 10; S_2 = (0.75 + 1, 1.5 + 2), o_2 = 1.75 + 10.5 + 40
    torch.testing.assert_close(o.flatten(), torch.tensor([22.0, 52.25]))
    torch.testing.assert_close(state.flatten(), torch.tensor([1.75, 3.5]))


@pytest.mark.parametrize("path", FAST)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_path_equals_the_reference(path, reverse, shape):
    assert_agrees(ssd, path, some(*shape), reverse=reverse, return_state=True)


@pytest.mark.parametrize("path", FAST)
def test_step_sizes_skip_and_scale(path):
    inputs: dict[str, Tensor | None] = {**some(2, 70, 4, 2, 24, 20), "initial_state": None}
    inputs |= {"dt": steps(2, 70, 4), "skip": steps(4)}
    assert_agrees(ssd, path, inputs, scale=0.3)


@pytest.mark.parametrize("path", FAST)
@pytest.mark.parametrize("strength", [0.0, 1 / 16, 16.0])
def test_weak_and_strong_gates(path, strength):
    # Strong: a chunk of 64 decays by exp(-800). Gradients of gates are then differences of much larger numbers.
    assert_agrees(ssd, path, some(1, 150, 2, 2, 32, 32, strength), rtol=1e-4, return_state=True)


@pytest.mark.parametrize("reverse", [False, True])
def test_triton_equals_the_reference(reverse, monkeypatch):
    module = pytest.importorskip("genkit.kernels.ssd.triton")
    monkeypatch.setattr(module, "_EVERY", 16)  # several anchors
    inputs = some(1, 37, 2, 1, 5, 6, 4.0)
    inputs["g"][:, 4] = -torch.inf
    assert_agrees(ssd, "triton", inputs, reverse=reverse, return_state=True)


@pytest.mark.parametrize("path", FAST)
def test_gates_that_close(path):
    inputs = some(1, 70, 2, 1, 16, 16)
    inputs["g"][:, 4::9] = -500.0
    inputs["g"][:, 5::9, 1] = -torch.inf
    assert_agrees(ssd, path, inputs, rtol=1e-4, return_state=True)


@pytest.mark.parametrize("path", FAST)
def test_equal_channels_of_gla(path):
    x = some(1, 70, 3, 3, 16, 20)
    expected = gla(**x | {"g": x["g"][..., None].expand_as(x["q"])}, scale=1.0, path="reference")
    torch.testing.assert_close(ssd(**x, path=path), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", FAST)
def test_token_by_token_is_the_whole(path):
    x = some(2, 9, 2, 1, 20, 24)
    whole, last = ssd(**x, return_state=True, path=path)
    state, out = x["initial_state"], []
    for t in range(9):
        o, state = ssd(
            **{name: x[name][:, t : t + 1] for name in "qkvg"}, initial_state=state, return_state=True, path=path
        )
        out.append(o)
    torch.testing.assert_close(torch.cat(out, 1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", FAST)
def test_reversed_is_flipped(path):
    x = some(1, 75, 2, 2, 8, 8)
    flipped = {name: value if name == "initial_state" else value.flip(1) for name, value in x.items()}
    torch.testing.assert_close(
        ssd(**x, reverse=True, path=path), ssd(**flipped, path=path).flip(1), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("path", FAST)
def test_nan_stays_with_its_head_and_its_future(path):
    x = some(1, 80, 2, 1, 8, 8)
    clean = ssd(**x, path=path)
    x["v"][0, 41, 0, 3] = torch.nan
    o = ssd(**x, path=path)
    assert o[0, 41:, 0, 3].isnan().all()
    torch.testing.assert_close(o[0, :, 1], clean[0, :, 1])
    if path == "cpu":  # the chunked form multiplies what lies ahead by zero
        torch.testing.assert_close(o[0, :41, 0], clean[0, :41, 0])


@pytest.mark.parametrize("path", FAST)
def test_strided_inputs(path):
    x = some(2, 20, 4, 2, 8, 12)
    strided = {name: value.transpose(1, 2).contiguous().transpose(1, 2) for name, value in x.items()}
    assert not strided["q"].is_contiguous()
    for name, value in gradients(lambda **y: ssd(**y, path=path), strided).items():
        torch.testing.assert_close(value, gradients(lambda **y: ssd(**y, path=path), x)[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("path", ["cpu", "torch", "reference"])
def test_half_precision_is_computed_in_single(path):
    x = some(1, 70, 2, 1, 16, 16) | {"dt": steps(1, 70, 2), "skip": torch.ones(2)}
    half = {name: value.bfloat16() if name in "qkv" else value for name, value in x.items()}
    o, state = ssd(**half, return_state=True, path=path)
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    exact, exact_state = ssd(
        **{name: value.float() for name, value in half.items()}, return_state=True, path="reference"
    )
    torch.testing.assert_close(state, exact_state, rtol=1e-2, atol=1e-2)  # v dt is rounded to bfloat16
    torch.testing.assert_close(o.float(), exact, rtol=3e-2, atol=1e-1)
    assert gradients(lambda **y: ssd(**y, path=path), half)["dq"].dtype == torch.bfloat16


def test_more_threads_than_heads_cut_the_columns():
    x = some(1, 67, 1, 1, 140, 150)
    before = torch.get_num_threads()
    expected = gradients(lambda **y: ssd(**y, return_state=True, path="cpu"), x)
    try:
        torch.set_num_threads(4)
        found = gradients(lambda **y: ssd(**y, return_state=True, path="cpu"), x)
    finally:
        torch.set_num_threads(before)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-4)


def test_what_does_not_fit_is_named():
    x = some(1, 5, 4, 2, 4, 6)
    with pytest.raises(ValueError, match=r"ssd: k must be \[1, 5, 2, 4\] to go with q and v, got \[1, 5, 2, 3\]"):
        ssd(x["q"], x["k"][..., :3], x["v"], x["g"])
    with pytest.raises(ValueError, match=r"ssd: q must be \[1, 5, 'G', 'K'\], G a divisor of 3"):
        ssd(x["q"], x["k"], x["v"][:, :, :3], x["g"][:, :, :3])
    with pytest.raises(ValueError, match=r"ssd: dt must be \[1, 5, 4\]"):
        ssd(**x, dt=x["g"][:, :4])
    with pytest.raises(UsageError, match="ssd: the path cpu cannot run: it computes in float32"):
        ssd(**{name: value.double() for name, value in x.items()}, path="cpu")


@pytest.mark.parametrize("groups", [1, 2])
def test_opcheck(groups):
    from genkit.kernels.ssd import cpu

    x = [value.requires_grad_() for value in some(1, 6, 2, groups, 5, 7).values()]
    torch.library.opcheck(cpu._forward, (*x, 0.5, False))
    o, state = cpu._forward(*x, 0.5, False)
    torch.library.opcheck(cpu._backward, (*(y.detach() for y in (*x, o, state)), 0.5, True))


def test_compiled_equals_eager():
    x = some(1, 70, 2, 1, 8, 8) | {"dt": steps(1, 70, 2), "skip": torch.ones(2)}

    def f(**y: Tensor) -> tuple[Tensor, ...]:
        return ssd(**y, return_state=True, path="cpu")  # type: ignore[return-value]

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    expected = gradients(f, x)
    for name, value in gradients(compiled, x).items():
        torch.testing.assert_close(value, expected[name])
