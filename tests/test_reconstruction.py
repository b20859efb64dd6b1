"""The objective that trains tokenizers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from genkit.errors import GenkitError
from genkit.interfaces import Encoded
from genkit.objectives.reconstruction import Reconstruction
from genkit.rng import Rng


class Shifted:
    """Gives images back brighter by a number per image."""

    def __init__(self, shift: Tensor, losses: dict[str, Tensor]):
        self.shift, self.losses = shift, losses

    def __call__(self, x: Tensor) -> tuple[Tensor, Encoded]:
        return x + self.shift[:, None, None, None], Encoded(x, None, self.losses)


def test_losses_are_weighted_means_per_image() -> None:
    model = Shifted(torch.tensor([0.5, -0.2, 0.0]), {"commitment": torch.tensor([1.0, 2.0, 3.0])})
    losses = Reconstruction(l1=2.0, l2=3.0, commitment=0.1)(model, torch.zeros(3, 2, 4, 4), {}, None, Rng([0, 1, 2]))
    torch.testing.assert_close(losses["l1"], torch.tensor([1.0, 0.4, 0.0]))
    torch.testing.assert_close(losses["l2"], torch.tensor([0.75, 0.12, 0.0]))
    torch.testing.assert_close(losses["commitment"], torch.tensor([0.1, 0.2, 0.3]))
    # A shift by 0.5 of a range of 2 is 20 log10(4) dB; equal images count as 100 dB, as in an evaluation.
    torch.testing.assert_close(losses["_psnr"], torch.tensor([12.0412, 20.0, 100.0]))


def test_a_continuous_tokenizer_and_one_with_its_own_losses_can_be_trained() -> None:
    x, rng = torch.zeros(2, 1, 4, 4), Rng([0, 1])
    assert set(Reconstruction()(Shifted(torch.zeros(2), {}), x, {}, None, rng)) == {"l1", "l2", "_psnr"}
    losses = Reconstruction()(Shifted(torch.zeros(2), {"entropy": torch.tensor([1.0, 2.0])}), x, {}, None, rng)
    assert losses["entropy"].tolist() == [1.0, 2.0]


def test_psnr_is_no_loss() -> None:
    shift = torch.tensor([0.5, 0.1], requires_grad=True)
    losses = Reconstruction()(Shifted(shift, {}), torch.zeros(2, 1, 4, 4), {}, None, Rng([0, 1]))
    assert not losses["_psnr"].requires_grad
    assert losses["l1"].requires_grad


def test_a_tokenizer_is_not_sampled() -> None:
    with pytest.raises(GenkitError, match="not sampled"):
        Reconstruction().predictor(None, {}, None)  # type: ignore[arg-type]
