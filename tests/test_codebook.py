"""The codebook: look-up, training by averages, start and restart, several processes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from genkit.kernels.nearest_code import chunked, reference
from genkit.nn.codebook import Codebook, normalise
from genkit.nn.quantize import Quantizer
from genkit.nn.usage import usage
from tests.two_processes import run_two

# Nearest code


@given(
    groups=st.integers(1, 3),
    rows=st.integers(0, 63),
    codes=st.integers(1, 20),
    dim=st.integers(1, 5),
    cosine=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_blocks_of_scores_find_what_all_distances_find(
    groups: int, rows: int, codes: int, dim: int, cosine: bool
) -> None:
    generator = torch.Generator().manual_seed(rows * 100 + codes)
    z, table = (torch.randn(groups, n, dim, generator=generator) for n in (rows, codes))
    if cosine:
        z, table = normalise(z), normalise(table)
    found, expected = (path.nearest_code(z, table, cosine=cosine) for path in (chunked, reference))
    chosen, best = (torch.gather(table, 1, ids[..., None].expand(-1, -1, dim)) for ids in (found, expected))
    # Equal distances may be ordered differently by rounding, so distances are compared, not ids.
    torch.testing.assert_close((z - chosen).norm(dim=-1), (z - best).norm(dim=-1), atol=1e-5, rtol=1e-5)


def test_rows_left_over_by_the_blocks_are_searched_too(monkeypatch: pytest.MonkeyPatch) -> None:
    z, table = torch.randn(2, 23, 4), torch.randn(2, 9, 4)
    whole = chunked.nearest_code(z, table)
    monkeypatch.setattr(chunked, "_CHUNK", 5 * 18)
    assert torch.equal(chunked.nearest_code(z, table), whole)
    monkeypatch.setattr(chunked, "_CHUNK", 1)
    assert torch.equal(chunked.nearest_code(z, table), whole)


def test_nearest_of_three_points_on_a_line() -> None:
    table = torch.tensor([[[0.0], [1.0], [3.0]]])
    z = torch.tensor([[[0.4], [0.6], [1.9], [2.1], [9.0]]])
    assert chunked.nearest_code(z, table).tolist() == reference.nearest_code(z, table).tolist() == [[0, 1, 1, 2, 2]]


# Codebook


def trained(rows: Tensor, **options: object) -> Codebook:
    """A codebook after k-means on these rows [N, d] and one update."""
    codebook = Codebook(**{"codebook_size": 6, "dim": rows.shape[1]} | options).train()  # type: ignore[arg-type]
    codebook(rows[None])
    codebook.after_step()
    return codebook


def test_without_memory_codes_are_the_means_of_their_rows() -> None:
    codebook = Codebook(codebook_size=3, dim=2, decay=0.0).train()
    codebook.set_codes(torch.tensor([[[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]]]))
    rows = torch.tensor([[[0.0, 1.0], [1.0, 0.0], [5.0, 0.0], [0.0, 6.0]]])
    codebook(rows)
    codebook.after_step()
    torch.testing.assert_close(codebook.embed[0], torch.tensor([[0.5, 0.5], [5.0, 0.0], [0.0, 6.0]]), atol=1e-4, rtol=0)


def test_a_code_unused_in_the_first_step_stays_where_it_is() -> None:
    codebook = Codebook(codebook_size=2, dim=1).train()
    codebook.set_codes(torch.tensor([[[0.0], [5.0]]]))
    codebook(torch.full((1, 100, 1), 0.1))
    codebook.after_step()
    assert codebook.embed[0, 1].item() == pytest.approx(5.0, abs=1e-3)


def test_codes_returned_are_those_before_the_update() -> None:
    codebook = trained(torch.randn(50, 2))
    before = codebook.embed.clone()
    codes, ids = codebook(torch.randn(1, 50, 2))
    assert torch.equal(codes[0], before[0, ids[0]])
    codebook.after_step()
    assert not torch.equal(codebook.embed, before)


def test_nothing_is_learned_in_evaluation() -> None:
    codebook = trained(torch.randn(50, 2)).eval()
    before = {name: value.clone() for name, value in codebook.state_dict().items()}
    codebook(torch.randn(1, 50, 2))
    codebook.after_step()
    assert all(torch.equal(value, before[name]) for name, value in codebook.state_dict().items())


def test_micro_batches_add_up_to_the_batch() -> None:
    rows = torch.randn(1, 60, 3)
    whole, parts = (Codebook(codebook_size=8, dim=3, restart=0.3).train() for _ in range(2))
    embed = torch.randn(1, 8, 3)
    for codebook in (whole, parts):
        codebook.set_codes(embed)
    for _ in range(3):
        whole(rows)
        for part in rows.split(20, dim=1):
            parts(part)
        whole.after_step()
        parts.after_step()
        torch.testing.assert_close(parts.embed, whole.embed, atol=1e-6, rtol=1e-5)


def test_kmeans_finds_separated_clusters() -> None:
    centres = 10 * torch.eye(4)
    rows = (centres[:, None] + 0.01 * torch.randn(4, 200, 4)).reshape(-1, 4)
    codebook = trained(rows, codebook_size=32, restart=0.1)
    distance = torch.cdist(rows, codebook.embed[0]).min(dim=1).values
    assert distance.max() < 0.1
    assert bool(codebook.initialised)


def test_kmeans_starts_from_fewer_rows_than_codes() -> None:
    codebook = trained(torch.randn(4, 3), codebook_size=9)
    assert torch.isfinite(codebook.embed).all()


def test_restarts_bring_dead_codes_back() -> None:
    torch.manual_seed(0)
    batches = [torch.randn(1, 256, 4) for _ in range(60)]
    perplexity = {}
    for restart in (0.0, 0.2):
        codebook = Codebook(codebook_size=64, dim=4, decay=0.9, restart=restart).train()
        codebook.set_codes(torch.randn(1, 64, 4) * 0.01 + 3)  # far from the data: a few codes take everything
        for rows in batches:
            codebook(rows)
            codebook.after_step()
        ids = torch.cat([codebook.eval()(rows)[1] for rows in batches[:10]], dim=1)
        perplexity[restart] = usage(torch.bincount(ids.flatten(), minlength=64))["perplexity"]
        assert codebook.stats()["usage"] == pytest.approx(1.0 if restart else 0.1, abs=0.2)
    assert perplexity[0.2] > 30 > 3 * perplexity[0.0]


def test_restarted_codes_are_rows_of_the_batch() -> None:
    codebook = Codebook(codebook_size=8, dim=2, decay=0.0, restart=0.5).train()
    codebook.set_codes(torch.cat([torch.zeros(1, 1, 2), torch.full((1, 7, 2), 100.0)], dim=1))
    rows = torch.randn(1, 30, 2)
    codebook(rows)
    codebook.after_step()
    fresh = codebook.embed[0, 1:]
    assert (fresh[:, None] == rows[0]).all(-1).any(1).all()
    assert len(fresh.unique(dim=0)) == 7  # without replacement
    # Counts and sums agree with the new place, or the next update would throw the code elsewhere.
    torch.testing.assert_close(codebook.embed_sum / codebook.cluster_size[..., None], codebook.embed)
    assert codebook.num_updates == 1  # the next restart draws other rows


def test_statistics_that_are_not_finite_are_dropped() -> None:
    codebook = trained(torch.randn(50, 2))
    before = codebook.embed.clone()
    codebook(torch.full((1, 5, 2), float("nan")))
    codebook.after_step()
    assert torch.equal(codebook.embed, before)
    codebook(torch.randn(1, 50, 2))
    codebook.after_step()
    assert torch.isfinite(codebook.embed).all()


def test_state_dict_carries_everything_an_update_needs() -> None:
    options = {"codebook_size": 16, "dim": 3, "restart": 0.4}
    torch.manual_seed(1)
    first = trained(torch.randn(80, 3), **options)
    second = Codebook(**options).train()  # type: ignore[arg-type]
    second.load_state_dict(first.state_dict())
    for _ in range(3):
        rows = torch.randn(1, 80, 3)
        for codebook in (first, second):
            codebook(rows)
            codebook.after_step()
        assert torch.equal(first.embed, second.embed)
    assert first.stats() == second.stats()


def test_usage_of_a_histogram() -> None:
    counted = usage(torch.tensor([5, 5, 0, 0]))
    assert counted == {"usage": 0.5, "perplexity": pytest.approx(2.0), "dead": 2.0}
    assert usage(torch.zeros(4))["usage"] == 0


def test_codes_stay_normalised_in_cosine_mode() -> None:
    codebook = Codebook(codebook_size=8, dim=3, cosine=True, restart=0.3).train()
    for _ in range(5):
        codebook(normalise(torch.randn(1, 40, 3)))
        codebook.after_step()
    torch.testing.assert_close(codebook.embed.norm(dim=-1), torch.ones(1, 8))


def test_look_up_is_float32_under_autocast() -> None:
    torch.manual_seed(0)
    quantizer = Quantizer(dim=8, codebook_size=200).eval()
    z = torch.randn(4, 30, 8)
    plain = quantizer(z)
    with torch.autocast("cpu", torch.bfloat16):
        cast = quantizer(z)
    assert torch.equal(plain.ids, cast.ids)
    assert cast.codes.dtype == cast.losses["commitment"].dtype == torch.float32


def test_quantiser_in_half_precision_still_searches_in_single() -> None:
    torch.manual_seed(0)
    quantizer = Quantizer(dim=8, codebook_size=200).eval()
    quantizer.codebook.embed.copy_(quantizer.codebook.embed.half())
    z = torch.randn(4, 30, 8).half()
    expected = quantizer(z.float()).ids
    assert torch.equal(quantizer.half()(z).ids, expected)


# Several processes


def _step(codebook: Codebook, batches: list[Tensor]) -> Codebook:
    for rows in batches:
        codebook(rows[None])
        codebook.after_step()
    return codebook


def _learn(rank: int, share: list[torch.Tensor]) -> dict[str, np.ndarray]:
    codebook = _step(Codebook(codebook_size=24, dim=4, decay=0.5, restart=0.4).train(), share)
    return {"embed": codebook.embed.numpy()}


def test_two_processes_learn_the_codebook_of_one(tmp_path: Path) -> None:
    batches = [torch.randn(70, 4, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    alone = _step(Codebook(codebook_size=24, dim=4, decay=0.5, restart=0.4).train(), batches)
    first, second = (torch.from_numpy(found["embed"]) for found in run_two(_learn, batches, tmp_path))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, alone.embed, atol=1e-5, rtol=1e-5)
