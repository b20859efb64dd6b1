"""Dropout: the share it drops, the mean it keeps, what is off in eval mode."""

import pytest
import torch

from genkit.errors import UsageError
from genkit.nn.dropout import Dropout


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_share_and_mean(rate):
    torch.manual_seed(0)
    y = Dropout(rate)(torch.ones(333, 1001))
    share = (y == 0).double().mean().item()
    assert share == pytest.approx(rate, abs=5 * (rate * (1 - rate) / y.numel()) ** 0.5 + 2**-16)
    assert y.max().item() == pytest.approx(1 / (1 - rate), rel=1e-3)
    rows = (y == 0).double().mean(1)
    assert rows.std().item() == pytest.approx((rate * (1 - rate) / 1001) ** 0.5, rel=0.2)  # elements are independent


def test_every_bit_position_is_random():
    torch.manual_seed(0)
    columns = (Dropout(0.5)(torch.ones(4096, 8)) == 0).double().mean(0)  # eight neighbours share two random words
    assert (columns - 0.5).abs().max() < 0.04


def test_gradient_passes_where_values_do():
    x = torch.randn(7, 13, requires_grad=True)
    y = Dropout(0.4)(x)
    y.sum().backward()
    torch.testing.assert_close(x.grad * x.detach(), y.detach())


def test_off_in_eval_mode_and_at_rate_zero():
    x = torch.randn(5, 3)
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0)(x) is x


@pytest.mark.parametrize("rate", [1.0, -0.1])
def test_rates_out_of_range_are_refused(rate):
    with pytest.raises(UsageError, match="at least 0 and below 1"):
        Dropout(rate)
