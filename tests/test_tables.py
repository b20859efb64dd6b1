"""Tables of codes: residual levels, dropping them, gradients, what several processes learn."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from genkit.nn.binary import BinaryQuantizer
from genkit.nn.codebook import Codebook, normalise
from genkit.nn.quantize import Quantizer
from genkit.nn.usage import Usage
from tests.quantising import after_step, randn
from tests.two_processes import run_two

# Residual tables


def test_gradient_of_residuals_passes_once_and_commitment_acts_on_every_level() -> None:
    quantizer = Quantizer(dim=4, codebook_size=9, depth=3)
    z, weight = randn(2, 5, 4).requires_grad_(), randn(2, 5, 4, seed=1)
    found = quantizer(z)
    (found.codes * weight).sum().backward(retain_graph=True)
    assert torch.equal(z.grad, weight)
    z.grad = None
    found.losses["commitment"].sum().backward()
    left, expected = z.detach(), torch.zeros(2, 5, 4)
    for level in range(3):
        left = left - quantizer.codebook.codes(found.ids[..., level].reshape(1, -1), level).view(2, 5, 4)
        expected += 2 * left / (3 * 20)
    torch.testing.assert_close(z.grad, expected)


def test_every_level_takes_the_code_nearest_to_what_is_left() -> None:
    quantizer = Quantizer(dim=6, codebook_size=9, codebook_dim=3, num_heads=2, depth=2).eval()
    z = randn(1, 20, 6)
    ids = quantizer(z).ids
    assert ids.shape == (1, 20, 4)
    for head in range(2):
        left = z[0, :, 3 * head : 3 * head + 3]
        for level in range(2):
            table = quantizer.codebook.embed[2 * level + head]
            nearest = torch.cdist(left, table).argmin(1)
            assert torch.equal(ids[0, :, 2 * level + head], nearest)
            left = left - table[nearest]


@pytest.mark.parametrize("is_shared", [False, True])
def test_error_falls_with_every_level(is_shared: bool) -> None:
    quantizer = Quantizer(dim=4, codebook_size=32, depth=4, is_shared_by_levels=is_shared, decay=0.8, restart=0.1)
    z = randn(8, 60, 4)
    for _ in range(15):
        quantizer.train()(z)
        quantizer.codebook.after_step()
    ids = quantizer.eval()(z).ids
    errors = []
    for used in range(5):
        kept = ids.masked_fill(torch.arange(4) >= used, -1)
        errors.append((quantizer.codes(kept) - z).square().mean().item())
    assert errors[0] == pytest.approx(z.square().mean().item())
    assert all(later < 0.75 * earlier for earlier, later in pairwise(errors))


def test_a_shared_table_learns_from_all_levels_at_once() -> None:
    quantizer = Quantizer(dim=3, codebook_size=8, depth=2, is_shared_by_levels=True, decay=0.5).train()
    quantizer.codebook.set_codes(randn(1, 8, 3, seed=1))
    alone = Codebook(codebook_size=8, dim=3, decay=0.5).train()
    alone.set_codes(randn(1, 8, 3, seed=1))
    z = randn(1, 30, 3)
    found = quantizer(z)
    quantizer.codebook.after_step()
    left = z - alone.codes(found.ids[..., 0])
    alone(torch.cat([z, left], dim=1))
    alone.after_step()
    torch.testing.assert_close(quantizer.codebook.embed, alone.embed)
    torch.testing.assert_close(quantizer.codebook.cluster_size, alone.cluster_size)
    assert quantizer.codebook.recent.shape == (2, 8)  # use is counted for each level


@pytest.mark.parametrize(
    "options",
    [
        {"depth": 3},
        {"depth": 3, "is_shared_by_levels": True},
        {"depth": 2, "num_heads": 2, "codebook_dim": 2},
        {"depth": 3, "min_depth": 1},
        {"update": "gradient"},
    ],
    ids=str,
)
def test_micro_batches_of_residuals_add_up_to_the_batch(options: dict[str, Any]) -> None:
    z = randn(6, 10, 4)
    whole, parts = (Quantizer(dim=4, codebook_size=8, restart=0.4, **options).train() for _ in range(2))
    for quantizer in (whole, parts):
        quantizer.codebook.set_codes(randn(*whole.codebook.embed.shape, seed=1))
    for _ in range(4):
        whole(z)
        for part in z.split(2):
            parts(part)
        whole.codebook.after_step()
        parts.codebook.after_step()
        torch.testing.assert_close(parts.codebook.embed, whole.codebook.embed, atol=1e-6, rtol=1e-5)


def test_first_batch_is_clustered_level_by_level() -> None:
    z = randn(4, 100, 4)
    quantizer = Quantizer(dim=4, codebook_size=16, depth=3, min_depth=1).train()
    found = quantizer(z)
    assert bool(quantizer.codebook.initialised)
    left = z.reshape(1, -1, 4)
    for level in range(3):
        codes = quantizer.codebook.codes(found.ids[..., level].reshape(1, -1), level)
        # Where Lloyd's iterations end, every code is about the mean of its rows.
        assert (left - codes).square().mean() < 0.5 * left.square().mean()
        left = left - codes


def dropped(quantizer: Quantizer, steps: int, batches: int = 1) -> list[list[int]]:
    """The number of levels used in every micro-batch of some steps."""
    used = []
    for _ in range(steps):
        found = [quantizer(randn(2, 3, 4)) for _ in range(batches)]
        used.append([int((f.ids[0, 0] >= 0).sum()) for f in found])
        quantizer.codebook.after_step()
    return used


def test_levels_left_out_are_one_draw_per_step() -> None:
    options = {"dim": 4, "codebook_size": 8, "depth": 5, "min_depth": 2}
    torch.manual_seed(0)
    quantizer = Quantizer(**options).train()
    used = dropped(quantizer, 40, batches=2)
    assert all(first == second for first, second in used)
    assert used[0] == [5, 5]  # the first batch makes the codes of all levels
    assert {first for first, _ in used} == {2, 3, 4, 5}
    state = {name: value.clone() for name, value in quantizer.state_dict().items()}
    expected = dropped(quantizer, 10)
    torch.manual_seed(99)
    resumed = Quantizer(**options).train()
    resumed.load_state_dict(state)
    assert dropped(resumed, 10) == expected
    assert dropped(quantizer.eval(), 5) == [[5]] * 5


def test_levels_left_out_add_nothing_and_learn_nothing() -> None:
    quantizer = Quantizer(dim=4, codebook_size=8, depth=3, min_depth=1, decay=0.5, restart=0.3).train()
    quantizer.codebook.set_codes(randn(3, 8, 4, seed=1))
    for _ in range(12):
        before = quantizer.codebook.embed.clone(), quantizer.codebook.recent.clone()
        found = quantizer(randn(2, 6, 4))
        assert torch.equal(quantizer.codes(found.ids), found.codes)
        used = int((found.ids[0, 0] >= 0).sum())
        quantizer.codebook.after_step()
        for level in range(3):
            changed = not torch.allclose(quantizer.codebook.embed[level], before[0][level], atol=1e-4)
            assert changed == (level < used)
            assert (not torch.equal(quantizer.codebook.recent[level], before[1][level])) == (level < used)


def test_use_is_reported_of_every_level() -> None:
    quantizer = Quantizer(dim=4, codebook_size=8, depth=2).train()
    for seed in range(3):
        quantizer(randn(4, 50, 4, seed=seed))
        quantizer.codebook.after_step()
    stats = quantizer.codebook.stats()
    assert stats.keys() == {"usage", "perplexity", "dead", "usage_0", "usage_1"}
    assert stats["usage"] == pytest.approx((stats["usage_0"] + stats["usage_1"]) / 2) == 1.0


def test_use_is_forgotten() -> None:
    use = Usage(num_levels=1, codebook_size=4, decay=0.5).train()
    for ids in ([[0, 1]], [[1, 2]], [[2, 2]], [[2, 2]], [[2, 3]]):
        use.count(torch.tensor(ids))
        use.after_step()
    assert use.stats() == {"usage": 0.5, "perplexity": pytest.approx(use.stats()["perplexity"]), "dead": 2.0}
    use = Usage(num_levels=1, codebook_size=4, decay=0.0)
    use.count(torch.tensor([[3]]))
    use.after_step()
    assert use.stats()["usage"] == 0.25


# Tables trained by gradient


@pytest.mark.parametrize("cosine", [False, True])
def test_codebook_loss_pulls_codes_and_commitment_pulls_vectors(cosine: bool) -> None:
    quantizer = Quantizer(dim=3, codebook_size=8, update="gradient", cosine=cosine).train()
    quantizer.codebook.set_codes(randn(1, 8, 3, seed=1))
    z = randn(2, 7, 3).requires_grad_()
    found = quantizer(z)
    found.losses["codebook"].sum().backward()
    assert z.grad is None
    table = quantizer.codebook.embed.detach()[0].clone().requires_grad_()
    codes = (normalise(table) if cosine else table)[found.ids.squeeze(-1)]
    target = normalise(z.detach()) if cosine else z.detach()
    (codes - target).square().flatten(1).mean(1).sum().backward()
    torch.testing.assert_close(quantizer.codebook.embed.grad[0], table.grad)
    torch.testing.assert_close(found.codes, codes)
    quantizer.zero_grad()
    quantizer(z).losses["commitment"].sum().backward()
    assert quantizer.codebook.embed.grad is None
    assert z.grad is not None


def test_a_table_trained_by_gradient_fits_its_data() -> None:
    torch.manual_seed(0)
    quantizer = Quantizer(dim=4, codebook_size=16, depth=2, update="gradient", restart=0.1).train()
    assert [name for name, _ in quantizer.named_parameters()] == ["codebook.embed"]
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.03)
    quantizer.codebook.set_codes(randn(2, 16, 4, seed=1))
    z = randn(8, 40, 4)
    first = quantizer(z).losses["commitment"].mean().item()
    for _ in range(60):
        optimizer.zero_grad()
        quantizer(z).losses["codebook"].mean().backward()
        optimizer.step()
        quantizer.codebook.after_step()
    assert quantizer(z).losses["commitment"].mean().item() < 0.7 * first
    assert quantizer.codebook.stats()["usage"] > 0.9


def test_dead_codes_of_a_table_trained_by_gradient_restart() -> None:
    quantizer = Quantizer(dim=2, codebook_size=8, update="gradient", decay=0.0, restart=0.5).train()
    quantizer.codebook.set_codes(torch.cat([torch.zeros(1, 1, 2), torch.full((1, 7, 2), 100.0)], dim=1))
    rows = randn(1, 30, 2)
    quantizer(rows)
    quantizer.codebook.after_step()
    assert (quantizer.codebook.embed[0, 1:, None] == rows[0]).all(-1).any(1).all()
    before = quantizer.codebook.embed.detach().clone()
    quantizer(torch.full((1, 30, 2), float("nan")))
    quantizer.codebook.after_step()
    assert torch.equal(quantizer.codebook.embed, before)


# Several processes


def _train(quantizer: nn.Module, batches: list[Tensor]) -> nn.Module:
    quantizer.train()
    for rows in batches:
        quantizer(rows[None])
        after_step(quantizer)
    return quantizer


def _quantizers() -> dict[str, Quantizer]:
    common = {"dim": 4, "codebook_size": 12, "decay": 0.5, "restart": 0.4}
    return {
        "levels": Quantizer(**common, depth=3),
        "shared": Quantizer(**common, depth=3, is_shared_by_levels=True),
        "groups and dropout": Quantizer(**common, depth=2, num_heads=2, codebook_dim=2, min_depth=1),
        "gradient": Quantizer(**common, depth=2, update="gradient"),
    }


def _binary() -> tuple[BinaryQuantizer, Tensor]:
    return BinaryQuantizer(dim=4, codebook_size=16, temperature=1.0).train(), randn(2, 35, 4, seed=9)


def _learn(rank: int, share: list[Tensor]) -> dict[str, np.ndarray]:
    found = {}
    for name, quantizer in _quantizers().items():
        _train(quantizer, share)
        found[name] = quantizer.codebook.embed.detach().numpy()
        found[f"{name} use"] = quantizer.codebook.recent.numpy()
    binary, rows = _binary()
    z = rows[rank : rank + 1].clone().requires_grad_()
    loss = binary(z).losses["entropy"].mean()
    loss.backward()
    return found | {"entropy": loss.detach().numpy(), "entropy gradient": z.grad.numpy()}


def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    batches = [randn(70, 4, seed=i) for i in range(5)]
    first, second = run_two(_learn, batches, tmp_path)
    for name, quantizer in _quantizers().items():
        alone = _train(quantizer, batches)
        for key, value in ((name, alone.codebook.embed), (f"{name} use", alone.codebook.recent)):
            assert np.array_equal(first[key], second[key]), key
            np.testing.assert_allclose(first[key], value.detach().numpy(), atol=1e-5, rtol=1e-5, err_msg=key)
    binary, rows = _binary()
    z = rows.clone().requires_grad_()
    loss = binary(z).losses["entropy"].mean()
    loss.backward()
    assert (first["entropy"] + second["entropy"]) / 2 == pytest.approx(loss.item(), abs=1e-6)
    # Processes average the gradients of their weights, so that a share's own gradient counts half.
    both = torch.from_numpy(np.concatenate([first["entropy gradient"], second["entropy gradient"]]))
    torch.testing.assert_close(both / 2, z.grad, atol=1e-7, rtol=1e-5)
