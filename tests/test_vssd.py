from __future__ import annotations

import pytest
import torch
from torch import Tensor

from genkit.kernels.vssd.op import vssd
from tests.parity import assert_agrees, gradients


def some(B: int, N: int, H: int, G: int, K: int, V: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    return {
        "q": normal(B, N, G, K),
        "k": normal(B, N, G, K),
        "v": normal(B, N, H, V),
        "weight": normal(B, N, H).abs(),
        "skip": normal(H),
    }


def test_the_reference_by_hand():
    one = torch.ones(1, 2, 1, 1)
    o = vssd(
        torch.tensor([1.0, 2.0])[None, :, None, None],
        one,
        torch.tensor([3.0, 5.0])[None, :, None, None],
        torch.tensor([2.0, 1.0])[None, :, None],
        skip=torch.tensor([10.0]),
        path="reference",
    )
    torch.testing.assert_close(o.flatten(), torch.tensor([11.0 + 30, 22.0 + 50]))  # S = 2 * 3 + 5


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1, 1), (2, 63, 4, 2, 7, 12), (1, 100, 3, 1, 16, 5), (2, 9, 2, 2, 5, 6)])
def test_the_products_equal_the_reference(shape):
    assert_agrees(vssd, "torch", some(*shape))


@pytest.mark.parametrize("path", ["torch", "reference"])
def test_padding_is_as_if_it_were_not_there(path):
    x = some(2, 12, 2, 1, 4, 5)
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[1, 9:] = False
    short = {name: value if name == "skip" else value[1:, :9] for name, value in x.items()}
    x["v"][1, 10] = torch.nan
    x["k"][1, 11] = torch.inf
    o = vssd(**x, valid=valid, path=path)
    torch.testing.assert_close(o[1:, :9], vssd(**short, path=path), rtol=1e-5, atol=1e-5)
    assert (o[1, 9:] == 0).all()
    found = gradients(lambda **y: vssd(**y, valid=valid, path=path), x)
    assert all(value.isfinite().all() for value in found.values())
    assert (found["dv"][1, 9:] == 0).all()


def test_the_order_of_tokens_does_not_matter():
    x = some(1, 30, 4, 2, 6, 8)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(2))
    shuffled = {name: value if name == "skip" else value[:, order] for name, value in x.items()}
    torch.testing.assert_close(vssd(**shuffled), vssd(**x)[:, order], rtol=1e-5, atol=1e-5)


def test_half_precision_sums_in_single():
    x = some(1, 3000, 1, 1, 1, 1)
    half = {name: torch.ones_like(value).bfloat16() for name, value in x.items()}
    assert vssd(**half)[0, 0, 0, 0] == 3008  # 3001, the nearest of bfloat16; a sum in bfloat16 would stop at 256


def test_what_does_not_fit_is_named():
    x = some(1, 5, 4, 2, 4, 6)
    with pytest.raises(ValueError, match=r"vssd: weight must be \[1, 5, 4\] to go with q and v, got \[1, 5, 3\]"):
        vssd(**x | {"weight": x["weight"][..., :3]})
    with pytest.raises(ValueError, match=r"vssd: valid must be torch.bool on cpu"):
        vssd(**x, valid=torch.ones(1, 5))
    with pytest.raises(ValueError, match=r"vssd: q must be \[1, 5, 'G', 'K'\], G a divisor of 3"):
        vssd(**x | {"v": x["v"][:, :, :3]})


def test_compiled_equals_eager():
    x = some(1, 9, 2, 1, 4, 5)
    compiled = torch.compile(vssd, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**x), vssd(**x))
