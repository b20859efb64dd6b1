"""Linear layers by weights laid out for the processor."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from genkit.nn import packed as module
from genkit.nn.mlp import MLP
from genkit.nn.packed import Packed, multiplied, packed


def network() -> nn.Sequential:
    torch.manual_seed(0)
    tanh, exact = (MLP(dim=24, mlp_ratio=2, approximate=kind) for kind in ("tanh", "none"))
    return nn.Sequential(nn.Linear(20, 24), tanh, exact, nn.Linear(24, 7, bias=False)).eval()


@pytest.fixture
def needed():
    if not module.is_available():
        pytest.skip("this torch has no such operations")


@pytest.mark.parametrize("shape", [(64, 20), (1, 20), (0, 20), (3, 40, 20), (2, 5, 33, 20)])
def test_results_are_the_same_to_rounding(needed, shape):
    net, x = network(), torch.randn(*shape)
    with torch.no_grad():
        plain = net(x)
        with packed(net, None):
            torch.testing.assert_close(net(x), plain, atol=1e-5, rtol=1e-5)
            assert isinstance(net[0].forward, Packed)
            assert net[0].forward.weight is not None
            # Not contiguous, and another number of rows.
            turned = x.transpose(0, -2)
            torch.testing.assert_close(net(turned), plain.transpose(0, -2), atol=1e-5, rtol=1e-5)
        assert torch.equal(net(x), plain)
    assert "forward" not in vars(net[0])


def test_weights_may_change_between_two_blocks(needed):
    net, x = network(), torch.randn(100, 20)
    with torch.no_grad():
        with packed(net):
            net(x)
        for parameter in net.parameters():
            parameter.data.mul_(2)  # which torch's version counters do not see
        plain = net(x)
        with packed(net):
            torch.testing.assert_close(net(x), plain, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("change", [lambda x: x.double(), lambda x: x.bfloat16()])
def test_where_the_path_is_closed_everything_is_as_always(change):
    net, x = network(), change(torch.randn(64, 20))
    net = net.to(x.dtype)
    with torch.no_grad():
        plain = net(x)
        with packed(net):
            assert torch.equal(net(x), plain)


def test_gradients_flow_as_always():
    net, x = network(), torch.randn(100, 20)
    plain = torch.autograd.grad(net(x).sum(), list(net.parameters()))
    with packed(net), packed(net):
        inside = torch.autograd.grad(net(x).sum(), list(net.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))


@pytest.mark.parametrize("shape", [(64, 20), (3, 40, 20), (2, 5, 33, 20)])
@pytest.mark.parametrize("frozen", ["nothing", "weights", "input"])
def test_products_have_the_gradients_of_linear_layers(needed, shape, frozen):
    net, x = network().requires_grad_(frozen != "weights"), torch.randn(*shape, requires_grad=frozen != "input")
    asked = [*(p for p in net.parameters() if p.requires_grad), *([x] if x.requires_grad else [])]
    out = net(x)
    weight = torch.randn_like(out)
    plain = torch.autograd.grad((out * weight).sum(), asked)
    with multiplied(net):
        turned = net(x.transpose(0, -2).contiguous().transpose(0, -2))  # not contiguous
        assert type(turned.grad_fn).__name__ != type(out.grad_fn).__name__
        torch.testing.assert_close(turned, out, atol=1e-5, rtol=1e-5)
        found = torch.autograd.grad((turned * weight).sum(), asked)
    for a, b in zip(plain, found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_products_follow_weights_that_change(needed):
    net, x = network(), torch.randn(100, 20)
    with torch.no_grad(), multiplied(net):
        net(x)
        for parameter in net.parameters():
            parameter.data.mul_(2)
        inside = net(x)
    torch.testing.assert_close(inside, net(x), atol=1e-4, rtol=1e-5)


def test_a_build_without_the_operations_is_noticed(monkeypatch):
    module.is_available.cache_clear()

    def missing(*_):
        raise AttributeError("no such operation")

    monkeypatch.setattr(Packed, "__call__", missing)
    try:
        assert not module.is_available()
        net = network()
        with packed(net):
            assert "forward" not in vars(net[0])
    finally:
        module.is_available.cache_clear()


def test_to_ask_draws_nothing():
    module.is_available.cache_clear()
    before = torch.get_rng_state()
    module.is_available()
    assert torch.equal(before, torch.get_rng_state())


def test_networks_are_restored_after_an_error():
    net = network()
    with pytest.raises(RuntimeError), packed(net):
        raise RuntimeError
    assert "forward" not in vars(net[0])


def test_asking_in_inference_mode():
    module.is_available.cache_clear()
    try:
        with torch.inference_mode():
            asked = module.is_available()
    finally:
        module.is_available.cache_clear()
    assert asked == module.is_available()
