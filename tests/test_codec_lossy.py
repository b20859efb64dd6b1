"""Fewer codes and lost ids: clustered codebooks, restoration."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from genkit.codec import lost, rate
from genkit.codec.cluster import kmeans, whole_numbers
from genkit.errors import UsageError
from genkit.tokenizers.fsq import FSQ
from genkit.tokenizers.rvq import RVQ
from tests.coded import of_stripes, tokenizer

# Clustered codebooks


def test_kmeans_is_lloyds():
    rng = np.random.default_rng(0)
    vectors, scale = whole_numbers(rng.normal(size=(200, 5)).astype(np.float32))
    assert np.abs(vectors).max() == 4095
    weights = rng.integers(0, 50, 200)
    centres, labels = kmeans(vectors, weights, 12)
    distance = np.square(vectors[:, None] - centres[None]).sum(-1)  # in whole numbers, the slow way
    assert (labels == distance.argmin(1)).all()
    for k in range(12):
        members = labels == k
        mean = (vectors[members] * weights[members, None]).sum(0) / weights[members].sum()
        assert np.abs(centres[k] - mean).max() <= 0.5
    assert scale > 0


@pytest.mark.parametrize("cosine", [False, True])
def test_a_clustered_tokenizer_is_a_tokenizer(cosine):
    fine = tokenizer(cosine=cosine)
    before = {name: value.clone() for name, value in fine.state_dict().items()}
    x = torch.rand(4, 1, 16, 16) * 2 - 1
    errors = []
    for count in (2, 8, 32):
        coarse = rate.coarser(fine, count)
        encoded = coarse.encode(x)
        assert int(encoded.ids.max()) < count == coarse.codebook_size
        assert torch.equal(coarse.codes(encoded.ids), encoded.z)
        assert rate.table_checksum(coarse) == rate.table_checksum(rate.coarser(fine, count))
        rows = fine.encoder(x).permute(0, 2, 3, 1).flatten(0, 2)
        table = coarse.quantizer.codebook.embed[0]
        if cosine:
            assert torch.allclose(table.norm(dim=1), torch.ones(count))
            rows = nn.functional.normalize(rows, dim=1)
        assert torch.equal(torch.cdist(rows, table).argmin(1), encoded.ids.flatten())
        errors.append(float((rows - table[encoded.ids.flatten()]).square().mean()))
    assert errors[0] > errors[1] > errors[2]
    assert all(torch.equal(before[name], value) for name, value in fine.state_dict().items())


def test_clusters_follow_use():
    made = tokenizer()
    made.quantizer.codebook.recent.zero_()
    made.quantizer.codebook.recent[0, :8] = 1.0
    coarse = rate.coarser(made, 8)
    distance = torch.cdist(made.quantizer.codebook.embed[0, :8], coarse.quantizer.codebook.embed[0]).amin(1)
    assert float(distance.max()) < 1e-3


@pytest.mark.parametrize(
    ("made", "count", "message"),
    [
        (
            RVQ(image_channels=1, width=8, num_blocks=1, channels=8, codebook_size=16, num_levels=2),
            4,
            "RVQ has 2 levels",
        ),
        (FSQ(image_channels=1, width=8, num_blocks=1, levels=[4, 4]), 4, "FSQ has 1 levels or no table"),
        (tokenizer(), 64, "--codes 64 must be at least 2 and below the tokenizer's 64"),
        (tokenizer(), 1, "--codes 1 must be at least 2"),
    ],
)
def test_codes_that_cannot_be_clustered(made, count, message):
    with pytest.raises(UsageError, match=message):
        rate.coarser(made, count)


def test_every_tokenizer_has_vectors_for_its_codes():
    for made, axes in (
        (tokenizer(), 2),
        (RVQ(image_channels=1, width=8, num_blocks=1, channels=8, codebook_size=16, num_levels=3), 2),
        (FSQ(image_channels=1, width=8, num_blocks=1, levels=[4, 4]), 2),
    ):
        vectors = rate.code_vectors(made.eval(), axes)
        assert len(vectors) == made.num_levels
        assert all(len(np.unique(level, axis=0)) == made.codebook_size for level in vectors)


# Lost ids


def test_lost_ids_are_filled_in_by_the_generator():
    stripes = of_stripes()
    rows = torch.arange(7)[:, None].expand(7, 6)[None, None].expand(3, 1, 7, 6)
    holes = torch.from_numpy(np.stack(lost.lose(list(rows.numpy()), 0.3, 1, "none")))
    assert 0.15 < float((holes < 0).float().mean()) < 0.45
    assert torch.equal(lost.by_generator(stripes, holes), rows)
    odd = holes.clone()
    odd[holes >= 0] = 8  # what is given is kept, whatever the generator thinks of it
    assert torch.equal(lost.by_generator(stripes, odd), torch.full_like(odd, 8))


def test_lost_ids_are_copied_from_the_nearest():
    ids = np.full((2, 3, 4), -1)
    ids[0, 0, 0], ids[0, 2, 3] = 5, 7
    filled = lost.by_nearest(ids)
    assert filled[0].tolist() == [[5, 5, 5, 7], [5, 5, 7, 7], [5, 7, 7, 7]]
    assert not filled[1].any()


def test_losses_depend_on_seed_and_image_alone():
    images = [np.zeros((2, 6, 6), np.int64)] * 40
    first = lost.lose(images, 0.25, 3, "none")
    assert all((a == b).all() for a, b in zip(first[:5], lost.lose(images[:5], 0.25, 3, "none"), strict=True))
    assert any((a != b).any() for a, b in zip(first, lost.lose(images, 0.25, 4, "none"), strict=True))
    assert 0.2 < np.mean([ids < 0 for ids in first]) < 0.3
    assert all((ids[0] == ids[1]).all() for ids in first)  # a place is lost with all its levels
    for ids in lost.lose(images, 0.25, 3, "rows"):
        assert all(len(set(row)) == 1 for row in (ids[0] < 0).tolist())
