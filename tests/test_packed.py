"""Linear layers by weights laid out for the processor."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from genkit.nn import packed as module
from genkit.nn.mlp import MLP
from genkit.nn.packed import Packed, packed


def network() -> nn.Sequential:
    torch.manual_seed(0)
    tanh, exact = (MLP(dim=24, mlp_ratio=2, approximate=kind) for kind in ("tanh", "none"))
    return nn.Sequential(nn.Linear(20, 24), tanh, exact, nn.Linear(24, 7, bias=False)).eval()


@pytest.fixture
def needed():
    if not module.is_available():
        pytest.skip("this torch has no such operations")


@pytest.mark.parametrize("shape", [(64, 20), (3, 40, 20), (2, 5, 33, 20)])
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


@pytest.mark.parametrize("change", [lambda x: x[:63], lambda x: x.double(), lambda x: x.bfloat16()])
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


def test_networks_are_restored_after_an_error():
    net = network()
    with pytest.raises(RuntimeError), packed(net):
        raise RuntimeError
    assert "forward" not in vars(net[0])
