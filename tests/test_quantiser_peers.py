"""Quantisers against vector-quantize-pytorch: imported weights and training do what the original does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from genkit.errors import GenkitError, UsageError
from genkit.importers import vector_quantize_pytorch_fixed as fixed
from genkit.importers import vector_quantize_pytorch_tables as tables
from genkit.nn.quantize import Quantizer
from tests import golden, golden_quantisers
from tests.quantising import randn

HERE = Path(__file__).parent


@pytest.mark.parametrize("cosine", [False, True])
def test_rotation_in_training_equals_vector_quantize_pytorch(cosine: bool) -> None:
    peer_class = pytest.importorskip("vector_quantize_pytorch").VectorQuantize
    torch.manual_seed(0)
    options = {"dim": 6, "codebook_size": 17, "use_cosine_sim": cosine}
    peer = peer_class(**options, decay=0.9, rotation_trick=True).train()
    ours = Quantizer(dim=6, codebook_size=17, cosine=cosine, gradient="rotation", decay=0.9).train()
    ours.load_state_dict(
        {
            **ours.state_dict(),
            **tables.import_vector_quantize(options, peer.state_dict()).quantizer.state_dict(),
        }
    )
    a, b = randn(2, 11, 6).requires_grad_(), randn(2, 11, 6).requires_grad_()
    codes, _, loss = peer(a)
    found = ours(b)
    torch.testing.assert_close(found.codes, codes, atol=1e-6, rtol=1e-5)
    (codes.pow(3).sum() + loss.sum()).backward()
    (found.codes.pow(3).sum() + found.losses["commitment"].mean()).backward()
    torch.testing.assert_close(b.grad, a.grad, atol=1e-5, rtol=1e-5)


RESIDUAL = {
    "plain": {"dim": 6, "codebook_size": 17, "num_quantizers": 3},
    "narrow": {"dim": 6, "codebook_size": 17, "num_quantizers": 3, "codebook_dim": 4},
    "cosine": {"dim": 6, "codebook_size": 17, "num_quantizers": 3, "use_cosine_sim": True},
    "shared": {"dim": 6, "codebook_size": 17, "num_quantizers": 3, "shared_codebook": True},
    "sizes in a list": {"dim": 6, "codebook_size": (9, 9)},
    "dropout": {"dim": 6, "codebook_size": 17, "num_quantizers": 3, "quantize_dropout": True},
    "clustered": {"dim": 6, "codebook_size": 17, "num_quantizers": 2, "kmeans_init": True},
    "learned": {"dim": 6, "codebook_size": 9, "num_quantizers": 2, "learnable_codebook": True, "ema_update": False},
}
GROUPED = {
    "plain": {"dim": 6, "codebook_size": 17, "num_quantizers": 2, "groups": 3},
    "narrow": {"dim": 6, "codebook_size": 17, "num_quantizers": 2, "groups": 2, "codebook_dim": 2},
    "shared": {"dim": 6, "codebook_size": 17, "num_quantizers": 2, "groups": 2, "shared_codebook": True},
    "one group": {"dim": 6, "codebook_size": 17, "num_quantizers": 2},
}
FSQS = {
    "plain": {"levels": [8, 5, 4]},
    "tuple": {"levels": (7, 5)},
    "projected": {"levels": [8, 5, 3], "dim": 7},
    "no bias": {"levels": [8, 5, 3], "dim": 7, "projection_has_bias": False},
    "symmetric with two": {"levels": [2, 5, 4], "preserve_symmetry": True},
    "clamped": {"levels": [8, 5, 4], "bound_hard_clamp": True},
    "symmetric clamped": {"levels": [2, 5, 4], "preserve_symmetry": True, "bound_hard_clamp": True},
    "several": {"levels": [8, 5, 4], "num_codebooks": 2},
    "several, projected": {"levels": [8, 5], "num_codebooks": 3, "dim": 10},
    "axis kept": {"levels": [8, 5, 4], "keep_num_codebooks_dim": True},
    "turned": {"levels": [5, 5, 5], "orthogonal_rotation": True, "num_codebooks": 2},
    "turned, projected": {"levels": [5, 5, 5], "orthogonal_rotation": True, "dim": 8},
}
RESIDUAL_FSQS = {
    "plain": {"levels": [5, 5, 5], "num_quantizers": 3},
    "projected": {"dim": 8, "levels": [8, 5, 3], "num_quantizers": 2},
    "two levels": {"levels": [2, 5], "num_quantizers": 2},
    "tanh": {"levels": [5, 5, 5], "num_quantizers": 2, "bound_hard_clamp": False},
    "soft": {"levels": [5, 5], "num_quantizers": 2, "bound_hard_clamp": False, "soft_clamp_input_value": [1.5, 2.0]},
    "dropout": {"levels": [5, 5, 5], "num_quantizers": 3, "quantize_dropout": True},
}
LFQS = {
    "plain": {"codebook_size": 64},
    "by dim": {"dim": 5},
    "projected": {"codebook_size": 64, "dim": 9},
    "no bias": {"codebook_size": 64, "dim": 9, "projection_has_bias": False},
    "projected to itself": {"codebook_size": 64, "dim": 6, "has_projections": True},
    "scaled": {"codebook_size": 64, "codebook_scale": 0.5},
    "spherical": {"codebook_size": 64, "spherical": True},
    "spherical scaled": {"codebook_size": 64, "dim": 9, "spherical": True, "codebook_scale": 2.0},
    "several": {"codebook_size": 16, "num_codebooks": 3},
    "axis kept": {"codebook_size": 16, "keep_num_codebooks_dim": True},
    "soft": {"codebook_size": 64, "soft_clamp_input_value": 3.0},
    "cosine": {"codebook_size": 64, "dim": 9, "cosine_sim_project_in": True},
    "turned": {"codebook_size": 16, "orthogonal_rotation": True, "num_codebooks": 2},
    "turned, projected": {"codebook_size": 64, "dim": 9, "orthogonal_rotation": True},
    "turned, cosine": {"codebook_size": 64, "dim": 9, "orthogonal_rotation": True, "cosine_sim_project_in": True},
}
RESIDUAL_LFQS = {
    "plain": {"dim": 6, "codebook_size": 64, "num_quantizers": 3},
    "projected": {"dim": 9, "codebook_size": 64, "num_quantizers": 2},
    "soft": {"dim": 6, "codebook_size": 64, "num_quantizers": 2, "soft_clamp_input_value": 4.0},
}
IMPORTS: list[tuple[str, Callable[..., tables.Imported], str, dict[str, Any]]] = [
    (kind, importer, name, options)
    for kind, importer, variants in (
        ("ResidualVQ", tables.import_residual_vq, RESIDUAL),
        ("GroupedResidualVQ", tables.import_grouped_residual_vq, GROUPED),
        ("FSQ", fixed.import_fsq, FSQS),
        ("ResidualFSQ", fixed.import_residual_fsq, RESIDUAL_FSQS),
        (
            "GroupedResidualFSQ",
            fixed.import_grouped_residual_fsq,
            {"projected": {"dim": 8, "groups": 2, "levels": [5, 5, 5], "num_quantizers": 2}},
        ),
        ("LFQ", fixed.import_lfq, LFQS),
        ("ResidualLFQ", fixed.import_residual_lfq, RESIDUAL_LFQS),
        (
            "GroupedResidualLFQ",
            fixed.import_grouped_residual_lfq,
            {"projected": {"dim": 8, "groups": 2, "codebook_size": 8, "num_quantizers": 2}},
        ),
    )
    for name, options in variants.items()
]


def make_peer(kind: str, options: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return getattr(pytest.importorskip("vector_quantize_pytorch"), kind)(**options).eval()


def width_of(kind: str, options: dict[str, Any]) -> int:
    if "dim" in options:
        return options["dim"]
    d = len(options["levels"]) if "levels" in options else options["codebook_size"].bit_length() - 1
    return d * options.get("num_codebooks", 1)


@pytest.mark.parametrize(("kind", "importer", "name", "options"), IMPORTS, ids=[f"{i[0]} {i[2]}" for i in IMPORTS])
def test_imported_quantiser_does_what_the_original_does(
    kind: str, importer: Callable[..., tables.Imported], name: str, options: dict[str, Any]
) -> None:
    peer = make_peer(kind, options)
    x = randn(2, 30, width_of(kind, options))
    with torch.no_grad():
        peer.train()(x)
        peer.eval()
        imported = importer(options, peer.state_dict())
        codes, ids, *_ = peer(x)
        got, got_ids = imported.quantize(x)
        assert got_ids.shape == ids.shape
        assert torch.equal(got_ids, ids.long())
        torch.testing.assert_close(got, codes, atol=1e-5, rtol=1e-5)
        decode = peer.indices_to_codes if hasattr(peer, "indices_to_codes") else peer.get_output_from_indices
        torch.testing.assert_close(imported.decode(got_ids), decode(ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "options"), [("FSQ", {"levels": [8, 5, 4]}), ("LFQ", {"codebook_size": 8})])
@pytest.mark.parametrize("layout", [{}, {"channel_first": True}, {"num_codebooks": 2}])
def test_images_come_channels_first(kind: str, options: dict[str, Any], layout: dict[str, Any]) -> None:
    options = options | layout
    peer = make_peer(kind, options)
    imported = (fixed.import_fsq if kind == "FSQ" else fixed.import_lfq)(options, peer.state_dict())
    width = width_of(kind, options)
    shapes = [(2, width, 4, 5)] + ([(2, width, 7)] if layout.get("channel_first") else [(2, 7, width)])
    for shape in shapes:
        codes, ids, *_ = peer(randn(*shape))
        got, got_ids = imported.quantize(randn(*shape))
        assert torch.equal(got_ids, ids.long())
        torch.testing.assert_close(got, codes)
        torch.testing.assert_close(imported.decode(got_ids), peer.indices_to_codes(ids))


@pytest.mark.parametrize(
    ("kind", "importer", "options"),
    [(kind, importer, options) for kind, importer, name, options in IMPORTS if name in ("narrow", "projected")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_importers_name_every_key_that_does_not_fit(
    kind: str, importer: Callable[..., tables.Imported], options: dict[str, Any]
) -> None:
    weights = make_peer(kind, options).state_dict()
    with pytest.raises(GenkitError, match=r"unknown: zzz$"):
        importer(options, weights | {"zzz": torch.ones(1)})
    for key in weights:
        with pytest.raises(GenkitError, match=f"missing: .*{key.replace('.', chr(92) + '.')}"):
            importer(options, {name: value for name, value in weights.items() if name != key})
        if weights[key].ndim and "mask" not in key:
            with pytest.raises(GenkitError, match=f"another shape: .*{key.replace('.', chr(92) + '.')}"):
                importer(options, weights | {key: torch.ones(3, 1)})
    with pytest.raises(UsageError, match=f"{kind} has no option dimm; did you mean 'dim'"):
        importer(options | {"dimm": 2}, weights)


def test_importers_refuse_what_they_cannot_do() -> None:
    plain = RESIDUAL["plain"]
    for options, message in (
        (plain | {"implicit_neural_codebook": True}, "implicit_neural_codebook=True.*cannot be imported"),
        (plain | {"beam_size": 4}, "beam_size=4.*cannot be imported"),
        (plain | {"affine_param": True}, "affine_param=True.*cannot be imported"),
        (plain | {"codebook_size": (9, 8, 7)}, r"codebook_size=\[9, 8, 7\].*one size"),
        (plain | {"num_quantizers": None}, "lack num_quantizers"),
        (plain | {"channel_last": False}, "channel_last=False"),
        ({"dim": 6}, "lack codebook_size"),
    ):
        with pytest.raises(UsageError, match=message):
            tables.import_residual_vq(options, {})
    with pytest.raises(UsageError, match="no multiple of groups=4"):
        tables.import_grouped_residual_vq(GROUPED["plain"] | {"groups": 4}, {})
    with pytest.raises(UsageError, match=r"spherical=True.*cannot be imported"):
        fixed.import_residual_lfq(RESIDUAL_LFQS["plain"] | {"spherical": True}, {})
    with pytest.raises(UsageError, match=r"orthogonal_rotation=True.*cannot be imported"):
        fixed.import_residual_fsq(RESIDUAL_FSQS["plain"] | {"orthogonal_rotation": True}, {})
    with pytest.raises(UsageError, match="lack codebook_size or dim"):
        fixed.import_lfq({}, {})
    weights = make_peer("ResidualVQ", RESIDUAL["shared"]).state_dict()
    changed = weights | {"layers.2._codebook.embed": weights["layers.2._codebook.embed"] + 1}
    with pytest.raises(GenkitError, match=r"layers\.2\._codebook\.embed differs from layers\.0"):
        tables.import_residual_vq(RESIDUAL["shared"], changed)
    weights = make_peer("LFQ", {"codebook_size": 8}).state_dict()
    with pytest.raises(GenkitError, match=r"mask is not 2\^2 \.\. 1"):
        fixed.import_lfq({"codebook_size": 8}, weights | {"mask": weights["mask"].flip(0)})


@pytest.mark.parametrize("name", ["plain", "narrow", "cosine"])
def test_residual_training_updates_equal_those_of_vector_quantize_pytorch(name: str) -> None:
    options = RESIDUAL[name] | {"decay": 0.9}
    peer = make_peer("ResidualVQ", options | {"rotation_trick": False}).train()
    ours = tables.import_residual_vq(options, peer.state_dict()).quantizer.train()
    for step in range(4):
        x = randn(2, 11, 6, seed=step)
        codes, ids, losses = peer(x)
        found = ours(x)
        assert torch.equal(found.ids, ids)
        torch.testing.assert_close(found.codes, codes, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.losses["commitment"].mean(), losses.mean(), atol=1e-6, rtol=1e-5)
        ours.codebook.after_step()
        for level, layer in enumerate(peer.layers):
            torch.testing.assert_close(ours.codebook.embed[level], layer._codebook.embed[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options", [{"levels": [8, 5, 4]}, {"levels": [8, 5], "dim": 6}, {"levels": [2, 5], "preserve_symmetry": True}]
)
def test_fsq_gradients_equal_those_of_vector_quantize_pytorch(options: dict[str, Any]) -> None:
    peer = make_peer("FSQ", options).train()
    ours = fixed.import_fsq(options, peer.state_dict()).quantizer.train()
    width = width_of("FSQ", options)
    a, b = randn(2, 30, width).requires_grad_(), randn(2, 30, width).requires_grad_()
    peer(a)[0].pow(3).sum().backward()
    ours(b).codes.pow(3).sum().backward()
    torch.testing.assert_close(b.grad, a.grad, atol=1e-6, rtol=1e-5)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, peer.get_parameter(name).grad, atol=1e-5, rtol=1e-5)


def test_lfq_losses_and_gradients_equal_those_of_vector_quantize_pytorch() -> None:
    options = {"codebook_size": 64, "dim": 9}
    weights = {"entropy_loss_weight": 0.1, "commitment_loss_weight": 0.25}
    peer = make_peer("LFQ", options | weights).train()
    ours = fixed.import_lfq(options, peer.state_dict()).quantizer.train()
    a, b = randn(2, 30, 9).mul(0.1).requires_grad_(), randn(2, 30, 9).mul(0.1).requires_grad_()
    codes, ids, loss = peer(a)
    found = ours(b)
    assert torch.equal(found.ids.squeeze(-1), ids)
    torch.testing.assert_close(found.codes, codes)
    total = (0.25 * found.losses["commitment"] + found.losses["entropy"]).mean()
    torch.testing.assert_close(total, loss, atol=1e-4, rtol=1e-3)  # the peer's logarithms stop at 1e-5
    (codes.pow(3).sum() + loss).backward()
    (found.codes.pow(3).sum() + total).backward()
    torch.testing.assert_close(b.grad, a.grad, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("system", ["rvq", "fsq", "lfq"])
def test_golden_outputs_are_reproduced(system: str) -> None:
    case = golden.load(HERE / "golden" / f"{system}.safetensors")
    with torch.no_grad():
        got = getattr(golden_quantisers, f"run_{system}")(case)
    assert got.keys() == case.outputs.keys()
    for name, expected in case.outputs.items():
        assert golden.compare(expected, got[name], 1e-6)[2] == "ok", name
