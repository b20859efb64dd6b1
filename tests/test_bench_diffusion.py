"""Both sides of the diffusion suite do the same."""

from __future__ import annotations

import os
from types import ModuleType

import pytest
import torch

from genkit import bench


@pytest.fixture(scope="module")
def suite() -> ModuleType:
    return bench.module("diffusion")


def test_networks_and_pipelines_of_both_sides_agree(suite: ModuleType) -> None:
    ours, peer = suite.models(**suite.SMALL)
    with suite.packed(ours):
        torch.testing.assert_close(suite.forward(ours, 2)(), suite.peer_forward(peer, 2)(), atol=1e-5, rtol=1e-5)
    exact, expected = suite.sampling(ours, 2)(), suite.peer_sampling(peer, 2)()
    torch.testing.assert_close(exact, expected, atol=1e-4, rtol=1e-4)
    reused = suite.sampling(ours, 2, suite.SkipBlocks(**suite.REUSE))()
    assert 0 < (reused - exact).abs().max() < 0.05


def test_training_steps_learn_the_same_task(suite: ModuleType) -> None:
    for make in (suite.our_step, suite.plain_step):
        step = make(2, suite.SMALL)
        losses = [float(step()) for _ in range(20)]
        assert sum(losses[-5:]) < sum(losses[:5]), losses  # noise is foretold better than at first


def test_the_reference_scan_gives_the_same_and_the_order_ends(
    suite: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GENKIT_KERNEL", raising=False)
    network = suite.dimsum(8, dim=32, depth=2)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    call = suite.forward(network, 1, (8, 8))
    torch.testing.assert_close(call(), suite.with_kernel("reference", call)(), atol=1e-5, rtol=1e-5)
    assert "GENKIT_KERNEL" not in os.environ
