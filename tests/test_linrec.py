from __future__ import annotations

import pytest
import torch

from genkit.errors import UsageError
from genkit.kernels.linrec.op import linrec
from tests.parity import assert_agrees

PATHS = ["cpu"]


def some(B: int, N: int, D: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return {
        "a": torch.rand(B, N, D, generator=random),
        "b": torch.randn(B, N, D, generator=random),
        "h0": torch.randn(B, D, generator=random),
    }


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 63, 100), (1, 200, 64), (3, 7, 130)])
def test_every_path_equals_the_reference(path, reverse, shape):
    assert_agrees(linrec, path, some(*shape), reverse=reverse)


def test_a_state_can_be_handed_on():
    x = some(2, 64, 33)
    whole = linrec(**x)
    half = linrec(x["a"][:, :30], x["b"][:, :30], x["h0"])
    rest = linrec(x["a"][:, 30:], x["b"][:, 30:], half[:, -1])
    assert torch.equal(torch.cat([half, rest], 1), whole)


def test_what_does_not_fit_is_named():
    x = some(2, 5, 4)
    with pytest.raises(ValueError, match=r"linrec: a must be \[2, 5, 4\] to go with b, got \[2, 5, 3\]"):
        linrec(x["a"][..., :3], x["b"])
    with pytest.raises(UsageError, match="linrec: the path cpu cannot run: it computes in float32"):
        linrec(x["a"].double(), x["b"].double(), path="cpu")


def test_opcheck():
    from genkit.kernels.linrec import cpu

    x = some(2, 7, 20)
    torch.library.opcheck(
        cpu._forward, (x["a"].requires_grad_(), x["b"].requires_grad_(), x["h0"].requires_grad_(), False)
    )
