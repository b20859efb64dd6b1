"""Truncated draws from logits."""

import pytest
import torch

from genkit.errors import UsageError
from genkit.samplers.autoregressive import Autoregressive
from genkit.samplers.truncation import Truncation, draw, truncate

LOGITS = torch.randn(5, 3, 40, generator=torch.Generator().manual_seed(3)) * 2


def test_truncations_keep_what_they_say():
    p = LOGITS.softmax(-1)
    kept = truncate(LOGITS, Truncation(top_k=7)).isfinite()
    assert (kept.sum(-1) == 7).all()
    assert torch.equal(kept, p >= p.topk(7).values[..., -1:])
    kept = truncate(LOGITS, Truncation(top_p=0.7)).isfinite()
    smallest = p.masked_fill(~kept, 2).amin(-1)
    share = (p * kept).sum(-1)
    assert (share > 0.7).all()
    assert (share - smallest <= 0.7 + 1e-6).all()
    kept = truncate(LOGITS, Truncation(min_p=0.2)).isfinite()
    assert torch.equal(kept, p >= 0.2 * p.amax(-1, keepdim=True))
    assert torch.equal(truncate(LOGITS, Truncation()), LOGITS)
    torch.testing.assert_close(truncate(LOGITS, Truncation(temperature=0.5)), LOGITS * 2)


def test_ties_at_the_edge_of_top_k_stay():
    kept = truncate(torch.tensor([1.0, 3.0, 1.0, 0.0]), Truncation(top_k=2)).isfinite()
    assert kept.tolist() == [True, True, True, False]


def test_draws_follow_the_distribution():
    u = (torch.arange(4000) + 0.5) / 4000
    ids = draw(LOGITS[0, :1].expand(4000, -1), u, Truncation())
    frequency = torch.bincount(ids, minlength=40) / 4000
    assert (frequency - LOGITS[0, 0].softmax(-1)).abs().max() < 2 / 4000
    assert torch.equal(draw(LOGITS, torch.rand(5, 3), Truncation(top_k=1)), LOGITS.argmax(-1))
    assert torch.equal(draw(LOGITS, torch.rand(5, 3), Truncation(temperature=0)), LOGITS.argmax(-1))


@pytest.mark.parametrize(
    "options", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"min_p": 2.0}, {"top_k": []}]
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(UsageError, match=f"sampler.{next(iter(options))}"):
        Autoregressive(**options)
