"""The codebook against vector-quantize-pytorch: updates while training, imported weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from genkit.errors import GenkitError, UsageError
from genkit.importers.vector_quantize_pytorch_tables import import_vector_quantize

PEER_OPTIONS = {
    "plain": {"dim": 6, "codebook_size": 17},
    "cosine": {"dim": 6, "codebook_size": 17, "use_cosine_sim": True},
    "narrow": {"dim": 6, "codebook_size": 17, "codebook_dim": 3},
    "narrow cosine": {"dim": 6, "codebook_size": 17, "codebook_dim": 3, "use_cosine_sim": True},
    "heads": {"dim": 6, "codebook_size": 17, "codebook_dim": 3, "heads": 2, "separate_codebook_per_head": True},
    "projected heads": {"dim": 6, "codebook_size": 17, "heads": 2, "separate_codebook_per_head": True},
    "heads on one table": {"dim": 6, "codebook_size": 17, "codebook_dim": 2, "heads": 3},
    "norm": {"dim": 6, "codebook_size": 17, "codebook_dim": 3, "layernorm_after_project_in": True},
}


def peer_of(options: dict[str, object]) -> nn.Module:
    peer = pytest.importorskip("vector_quantize_pytorch")
    torch.manual_seed(0)
    return peer.VectorQuantize(**options, decay=0.9, rotation_trick=False)


@pytest.mark.parametrize("name", PEER_OPTIONS)
def test_training_updates_equal_those_of_vector_quantize_pytorch(name: str) -> None:
    options = PEER_OPTIONS[name]
    peer = peer_of(options).train()
    ours = import_vector_quantize({**options, "decay": 0.9}, peer.state_dict()).quantizer.train()
    for step in range(4):
        x = torch.randn(2, 11, 6, generator=torch.Generator().manual_seed(step))
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        codes, ids, loss = peer(a)
        found = ours(b)
        assert torch.equal(found.ids.squeeze(-1) if ids.ndim == 2 else found.ids, ids)
        torch.testing.assert_close(found.codes, codes, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(found.losses["commitment"].mean(), loss.squeeze(), atol=1e-6, rtol=1e-5)
        (codes.pow(3).sum() + loss.sum()).backward()
        (found.codes.pow(3).sum() + found.losses["commitment"].mean()).backward()
        torch.testing.assert_close(b.grad, a.grad, atol=1e-5, rtol=1e-5)
        ours.codebook.after_step()
        torch.testing.assert_close(ours.codebook.embed, peer._codebook.embed, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.codebook.cluster_size, peer._codebook.cluster_size, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        ({"accept_image_fmap": True}, (2, 6, 3, 4)),
        ({"accept_3d_fmap": True}, (2, 6, 2, 3, 2)),
        ({"channel_last": False}, (2, 6, 5)),
        ({}, (4, 6)),
        ({"accept_image_fmap": True, "heads": 2, "codebook_dim": 3, "separate_codebook_per_head": True}, (2, 6, 3, 4)),
    ],
)
def test_imported_quantiser_keeps_the_layout_it_was_built_for(
    layout: dict[str, object], shape: tuple[int, ...]
) -> None:
    options = {"dim": 6, "codebook_size": 17} | layout
    peer = peer_of(options).eval()
    imported = import_vector_quantize(options, peer.state_dict())
    x = torch.randn(shape)
    codes, ids, _ = peer(x)
    assert torch.equal(imported.quantize(x)[1], ids)
    torch.testing.assert_close(imported.quantize(x)[0], codes)
    torch.testing.assert_close(imported.decode(ids), codes)


def test_importer_names_what_does_not_fit() -> None:
    options = {"dim": 6, "codebook_size": 17, "codebook_dim": 3}
    weights = peer_of(options).state_dict()
    with pytest.raises(GenkitError, match=r"unknown: more, project_mid\.weight"):
        import_vector_quantize(options, weights | {"project_mid.weight": torch.ones(1), "more": torch.ones(1)})
    with pytest.raises(GenkitError, match=r"missing: _codebook\.embed_avg, project_in\.bias"):
        import_vector_quantize(
            options, {k: v for k, v in weights.items() if k not in ("_codebook.embed_avg", "project_in.bias")}
        )
    with pytest.raises(GenkitError, match=r"unknown: project_in\.bias, .*project_out\.weight"):
        import_vector_quantize({"dim": 3, "codebook_size": 17}, weights)
    with pytest.raises(GenkitError, match=r"another shape: .*codebook\.embed \(\[1, 17, 3\], expected \[1, 18, 3\]\)"):
        import_vector_quantize(options | {"codebook_size": 18}, weights)
    with pytest.raises(UsageError, match=r"affine_param=True.*cannot be imported"):
        import_vector_quantize(options | {"affine_param": True}, weights)
    with pytest.raises(UsageError, match="did you mean 'heads'"):
        import_vector_quantize(options | {"head": 2}, weights)
    with pytest.raises(UsageError, match="lack codebook_size"):
        import_vector_quantize({"dim": 3}, weights)
