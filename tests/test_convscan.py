from __future__ import annotations

import pytest
import torch

from genkit.kernels.convscan.op import convscan
from genkit.kernels.s5.op import s5
from genkit.nn.convs5 import ACTIVATIONS, HEADS, ConvS5Layer, hippo_eigenvalues
from tests.parity import assert_agrees


@pytest.fixture(autouse=True)
def _below(monkeypatch):
    """Not through Triton's interpreter, which would be preferred and is slow."""
    monkeypatch.setenv("GENKIT_KERNEL", "torch")


def some(B: int, D: int, F: int, Y: int, X: int, P: int, k: int, O: int = 2) -> dict[str, torch.Tensor]:  # noqa: E741
    random = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=random)  # noqa: E731
    pair = lambda *shape: torch.complex(draw(*shape), draw(*shape))  # noqa: E731
    return {
        "u": draw(B, D, F, Y, X),
        "decay": torch.polar(draw(P).sigmoid(), draw(P)),
        "B": pair(P, D, k, k),
        "C": pair(O, P, k, k),
        "state": pair(B, P, Y, X),
    }


@pytest.mark.parametrize("below", ["torch", "cpu"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1, 1, 1), (2, 3, 7, 5, 4, 6, 3), (1, 2, 40, 3, 2, 5, 3)])
def test_it_equals_the_reference(shape, below, monkeypatch):
    monkeypatch.setenv("GENKIT_KERNEL", below)
    assert_agrees(lambda **x: convscan(**x, return_state=True), "torch", some(*shape))


def test_frame_by_frame_is_the_same():
    x = some(2, 3, 6, 5, 4, 4, 3)
    whole, last = convscan(**x, return_state=True)
    state, frames = x.pop("state"), []
    for t in range(6):
        y, state = convscan(**x | {"u": x["u"][:, :, t : t + 1]}, state=state, return_state=True)
        frames.append(y)
    torch.testing.assert_close(torch.cat(frames, 2), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)


def test_kernels_of_one_pixel_are_s5_at_every_pixel():
    x = some(1, 3, 8, 2, 2, 4, 1, 3)
    y = convscan(**x)
    for row, column in ((0, 1), (1, 0)):
        at = s5(
            x["u"][..., row, column].mT,
            x["decay"],
            x["B"][..., 0, 0],
            x["C"][..., 0, 0],
            state=x["state"][..., row, column],
        )
        torch.testing.assert_close(y[..., row, column].mT, at, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_named():
    x = some(1, 3, 4, 5, 5, 4, 3)
    with pytest.raises(ValueError, match="convscan: B must end in k x k with k odd"):
        convscan(**x | {"B": x["B"][..., :2, :2]})
    with pytest.raises(ValueError, match=r"convscan: C must be \[2, 4, 3, 3\] .* got \[2, 3, 3, 3\]"):
        convscan(**x | {"C": x["C"][:, :3]})
    with pytest.raises(ValueError, match=r"convscan: u must be \[B, D, F, Y, X\]"):
        convscan(**x | {"u": x["u"][0]})


def test_a_hippo_block_of_eight():
    """The published imaginary parts; every eigenvector belongs to its eigenvalue, and with the conjugates they are a basis."""
    values, vectors = hippo_eigenvalues(8)
    expected = torch.tensor([-19.8574, -5.3542, -1.9578, -0.4275], dtype=torch.float64)
    torch.testing.assert_close(values.imag, expected, rtol=0, atol=5e-5)
    torch.testing.assert_close(values.real, torch.full((4,), -0.5, dtype=torch.float64))
    both = torch.cat([vectors, vectors.conj()], 1)
    torch.testing.assert_close(both.mH @ both, torch.eye(8, dtype=torch.complex128))
    with pytest.raises(ValueError, match="even and at least 2, got 3"):
        hippo_eigenvalues(3)


def test_a_new_layer_trains_and_remembers():
    torch.manual_seed(0)
    layer = ConvS5Layer(dim=4, state_size=8, num_blocks=2, num_groups=2)
    u = torch.randn(1, 4, 10, 5, 5, requires_grad=True)
    y, state = layer(u)
    assert y.shape == u.shape
    assert state.shape == (1, 4, 5, 5)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in layer.ssm.parameters())
    late = torch.autograd.grad(layer(u)[0][:, :, 9].sum(), u)[0]
    early = torch.autograd.grad(layer(u)[0][:, :, 0].square().sum(), u)[0]
    assert late[:, :, 0].any()  # the last frame knows the first
    assert not early[:, :, 1:].any()  # and not the other way round
    with pytest.raises(ValueError, match="state_size=8 must be a multiple of num_blocks=3"):
        ConvS5Layer(dim=4, state_size=8, num_blocks=3)


@pytest.mark.parametrize("head", ["skip", "resnet", "half_glu", "none"])
@pytest.mark.parametrize("norm", ["after", "before", "none"])
def test_every_form_of_the_layer(head, norm):
    """Frame by frame as at once, and the sum around the state space where the norm stands."""
    torch.manual_seed(0)
    options = {"state_size": 8, "kernel_size": (3, 1, 5), "activation": "swish", "excite": True, "num_groups": 2}
    layer = ConvS5Layer(dim=4, norm=norm, head=head, clip=False, **options)
    u = torch.randn(2, 4, 3, 5, 4)
    y, _ = layer(u)
    state, frames = None, []
    for t in range(3):
        frame, state = layer(u[:, :, t : t + 1], state)
        frames.append(frame)
    torch.testing.assert_close(torch.cat(frames, 2), y, rtol=1e-5, atol=1e-5)
    inner = layer.ssm(layer._normed(u) if norm == "before" else u)[0]
    torch.testing.assert_close(y, layer._normed(u + inner) if norm == "after" else u + inner)
    layer.has_skip = False
    torch.testing.assert_close(layer(u)[0], layer._normed(inner) if norm == "after" else inner)


def test_heads_are_their_formulas():
    torch.manual_seed(0)
    y, u = torch.randn(2, 8, 3, 3), torch.randn(2, 8, 3, 3)
    skip = HEADS["skip"](8, 3, 2, ACTIVATIONS["relu"], True)
    h = skip.norm(y + skip.skip(u)).relu()
    weight = skip.excite.expand(skip.excite.reduce(h.mean((2, 3))).relu()).sigmoid()
    torch.testing.assert_close(skip(y, u), h * weight[:, :, None, None])
    resnet = HEADS["resnet"](8, 3, 2, ACTIVATIONS["elu"], False)
    h = resnet.convs[0](torch.nn.functional.elu(resnet.norms[0](y)))
    h = resnet.convs[1](torch.nn.functional.elu(resnet.norms[1](h)))
    torch.testing.assert_close(resnet(y, u), torch.nn.functional.elu(y + h))
    assert HEADS["none"](8, 3, 2, ACTIVATIONS["elu"], False)(y, u) is y


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ({"head": "dense"}, "head='dense' must be one of skip, resnet, half_glu, none"),
        ({"activation": "tanh"}, "activation='tanh' must be one of gelu, relu, swish, elu"),
        ({"norm": "both"}, "norm='both' must be after, before or none"),
        ({"kernel_size": (3, 2, 3)}, "kernel_size=.* must be odd"),
    ],
)
def test_options_that_do_not_exist_are_named(option, told):
    with pytest.raises(ValueError, match=told):
        ConvS5Layer(dim=4, **{"state_size": 8, "num_groups": 2} | option)


def test_growing_states_are_clipped_where_asked():
    for clip, largest in ((True, 1.0), (False, 1.5)):
        layer = ConvS5Layer(dim=4, state_size=8, num_groups=2, clip=clip, step_range=(1, 1))
        layer.ssm.eigenvalues.data[0, 0] = 0.4
        assert layer.ssm.system()[0].abs().max() > largest - 0.1
        assert layer.ssm.system()[0].abs().max() < largest


def test_autocast_changes_nothing():
    plain = convscan(**some(1, 3, 4, 5, 5, 4, 3))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(convscan(**some(1, 3, 4, 5, 5, 4, 3)), plain)
