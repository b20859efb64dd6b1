"""Quantisers and the tokenizers made of them: parity with vector-quantize-pytorch, identities, memory, several processes."""

from __future__ import annotations

import importlib.util
import math
import multiprocessing
import socket
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from genkit import registry
from genkit.errors import GenkitError, UsageError
from genkit.importers import vector_quantize_pytorch_fixed as fixed
from genkit.importers import vector_quantize_pytorch_tables as tables
from genkit.kernels.nearest_code import chunked
from genkit.nn import index_backprop
from genkit.nn.binary import BinaryQuantizer
from genkit.nn.codebook import Codebook, normalise
from genkit.nn.index_backprop import IndexBackpropQuantizer
from genkit.nn.quantize import Quantizer
from genkit.nn.scalar import ScalarQuantizer, bound
from genkit.nn.straight_through import rotation, straight_through
from genkit.nn.usage import Usage
from genkit.tokenizers.fsq import FSQ
from genkit.tokenizers.ibq import IBQ
from genkit.tokenizers.lfq import LFQ
from genkit.tokenizers.rvq import RVQ
from genkit.tokenizers.vq import VQ

HERE = Path(__file__).parent


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def after_step(module: nn.Module) -> None:
    for part in module.modules():
        if hasattr(part, "after_step"):
            part.after_step()


def module_at(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor) and value.untyped_storage().nbytes() > 8:
                self.elements = max(self.elements, value.untyped_storage().nbytes() // value.element_size())
        return out


# --- gradients that pass by


def test_rotation_returns_the_codes_and_turns_the_gradient() -> None:
    z, codes, grad = randn(7, 5).requires_grad_(), randn(7, 5, seed=1), randn(7, 5, seed=2)
    out = rotation(z, codes)
    assert torch.equal(out, codes)
    out.backward(grad)
    ratio = codes.norm(dim=1) / z.norm(dim=1)
    torch.testing.assert_close(z.grad.norm(dim=1), ratio * grad.norm(dim=1))
    # The angle between gradient and code becomes the angle between gradient and vector.
    torch.testing.assert_close(F.cosine_similarity(z.grad, z), F.cosine_similarity(grad, codes))
    # What is orthogonal to both stays where it is.
    other = torch.linalg.svd(torch.stack([z[0], codes[0]])).Vh[2]
    z.grad = None
    rotation(z, codes).backward(other.expand(7, 5).clone())
    torch.testing.assert_close(z.grad[0], ratio[0] * other)


def test_rotation_survives_zero_and_opposite_vectors() -> None:
    z = torch.tensor([[0.0, 0.0], [1.0, 2.0], [3.0, 0.0]], requires_grad=True)
    codes = torch.tensor([[1.0, 0.0], [0.0, 0.0], [-1.0, 0.0]])
    rotation(z, codes).backward(torch.ones(3, 2))
    assert z.grad.isfinite().all()
    torch.testing.assert_close(z.grad[2], torch.tensor([-1.0, 1.0]) / 3)


def test_straight_through_is_exact_where_a_sum_would_round() -> None:
    z, codes = torch.tensor([1e8], requires_grad=True), torch.tensor([0.1])
    out = straight_through(z, codes)
    assert torch.equal(out, codes)
    out.backward()
    assert z.grad == 1


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


# --- residual tables

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


# --- tables trained by gradient


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


# --- finite scalars


@given(levels=st.lists(st.integers(2, 9), min_size=1, max_size=4), is_symmetric=st.booleans())
@settings(max_examples=40, deadline=None)
def test_every_id_is_a_code_and_every_code_its_own_id(levels: list[int], is_symmetric: bool) -> None:
    is_symmetric = is_symmetric or 2 in levels
    quantizer = ScalarQuantizer(dim=len(levels), levels=levels, is_symmetric=is_symmetric).eval()
    ids = torch.arange(quantizer.codebook_size)[None, :, None]
    codes = quantizer.codes(ids)
    assert len(codes[0].unique(dim=0)) == quantizer.codebook_size
    assert codes.abs().max() <= 1
    if is_symmetric:
        assert torch.allclose(codes.mean(1), torch.zeros(len(levels)), atol=1e-6)
        assert all(codes[0, :, i].unique().allclose(torch.linspace(-1, 1, n), atol=1e-6) for i, n in enumerate(levels))
    # Codes as the network would make them: beyond what a tanh can reach for the outermost.
    z = torch.atanh(codes.clamp(-0.9999, 0.9999))
    if is_symmetric:
        assert torch.equal(quantizer(z).ids, ids)
    extreme = quantizer(torch.stack([torch.full((len(levels),), v) for v in (-20.0, 20.0)])[None])
    assert extreme.ids.flatten().tolist() == [0, quantizer.codebook_size - 1]


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


@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (3, 7), (16,)])
def test_rounding_in_one_step_is_the_equation_written_out(levels: tuple[int, ...]) -> None:
    quantizer = ScalarQuantizer(dim=len(levels), levels=levels)
    z = (2 * torch.randn(3, 7, len(levels))).requires_grad_()
    found = quantizer(z)
    counts = torch.tensor(levels)
    bounded = bound(z, counts)
    written = straight_through(bounded / (counts // 2), bounded.detach().round() / (counts // 2))
    assert torch.equal(found.codes, written)
    gradient = torch.randn_like(written)
    (ours,) = torch.autograd.grad(found.codes, z, gradient)
    (theirs,) = torch.autograd.grad(written, z, gradient)
    torch.testing.assert_close(ours, theirs)


def test_residual_steps_of_scalars_get_finer() -> None:
    quantizer = ScalarQuantizer(dim=3, levels=[5, 5, 5], depth=3, is_symmetric=True, is_clamped=True).eval()
    z = torch.rand(1, 200, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ids = quantizer(z).ids
    assert torch.equal(quantizer.codes(ids), quantizer(z).codes)
    errors = [
        (quantizer.codes(ids.masked_fill(torch.arange(3) > step, -1)) - z).abs().max().item() for step in range(3)
    ]
    assert errors == pytest.approx([0.25, 0.05, 0.01], rel=0.1)


def test_a_list_of_levels_must_make_sense() -> None:
    for options, message in (
        ({"levels": []}, "must list"),
        ({"levels": [5, 1]}, r"levels=\[5, 1\]"),
        ({"levels": [5, 2]}, "symmetric"),
        ({"levels": [5, 5], "depth": 2}, "symmetric"),
    ):
        with pytest.raises(UsageError, match=message):
            ScalarQuantizer(dim=2, **options)


# --- binary


def dense_entropies(z: Tensor, codes: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(mean entropy of the rows [N, d], entropy of their mean) of the softmax over all codes, in double precision."""
    p = (2 / temperature * z.double() @ codes.double().T).softmax(-1)
    mean = p.mean(0)
    return -torch.special.xlogy(p, p).sum(1).mean(), -torch.special.xlogy(mean, mean).sum()


@pytest.mark.parametrize("temperature", [0.5, 0.02])
@pytest.mark.parametrize(("bits", "is_spherical"), [(1, False), (2, False), (7, False), (6, True)])
def test_entropies_are_those_of_the_whole_softmax(bits: int, is_spherical: bool, temperature: float) -> None:
    options = {"entropy": 1.0, "temperature": temperature, "is_spherical": is_spherical}
    z = randn(3, 20, bits).mul(0.3).requires_grad_()
    other = z.detach().clone().requires_grad_()
    per_row = BinaryQuantizer(dim=bits, codebook_size=2**bits, diversity=0.0, **options).train()
    both = BinaryQuantizer(dim=bits, codebook_size=2**bits, diversity=0.7, **options).train()
    codes = both.codes(torch.arange(2**bits)[None, :, None])[0]
    rows = normalise(other) if is_spherical else other
    of_rows, of_mean = dense_entropies(rows.reshape(-1, bits), codes, temperature)
    torch.testing.assert_close(per_row(z).losses["entropy"].mean(), of_rows.float(), atol=1e-5, rtol=1e-4)
    ours = both(z).losses["entropy"].mean()
    torch.testing.assert_close(ours, (of_rows - 0.7 * of_mean).float(), atol=1e-5, rtol=1e-4)
    ours.backward()
    (of_rows - 0.7 * of_mean).backward()
    torch.testing.assert_close(z.grad, other.grad, atol=1e-5, rtol=1e-3)


def test_entropy_of_every_image_is_its_own() -> None:
    quantizer = BinaryQuantizer(dim=4, codebook_size=16, diversity=0.0, temperature=1.0).train()
    z = randn(3, 5, 4)
    torch.testing.assert_close(quantizer(z).losses["entropy"][1:2], quantizer(z[1:2]).losses["entropy"])


def test_groups_of_bits_are_added_up() -> None:
    z = randn(2, 50, 6)
    whole, halves = (
        BinaryQuantizer(dim=6, codebook_size=64, entropy=1.0, temperature=1.0, group_bits=bits).train()
        for bits in (6, 3)
    )
    separate = BinaryQuantizer(dim=3, codebook_size=8, entropy=1.0, temperature=1.0).train()
    got = halves(z).losses["entropy"].mean()
    assert got < whole(z).losses["entropy"].mean()  # the joint entropy is below the sum of its parts
    parts = sum(separate(part).losses["entropy"].mean() for part in z.split(3, dim=-1))
    torch.testing.assert_close(got, parts)


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


def test_bits_are_the_signs_in_the_order_asked_for() -> None:
    z = torch.tensor([[[3.0, -1.0, 0.0, 0.5]]])
    for order, expected in (("big", 0b1001), ("little", 0b1001), ("big", 0b1001)):
        assert BinaryQuantizer(dim=4, codebook_size=16, bit_order=order)(z).ids.item() == expected  # type: ignore[arg-type]
    z = torch.tensor([[[3.0, 1.0, -2.0, -0.5]]])
    for order, expected in (("big", 0b1100), ("little", 0b0011)):
        quantizer = BinaryQuantizer(dim=4, codebook_size=16, bit_order=order)  # type: ignore[arg-type]
        assert quantizer(z).ids.item() == expected
        assert torch.equal(quantizer.codes(torch.full((1, 1, 1), expected)), torch.sign(z))


def test_spherical_codes_have_length_one_and_the_gradient_of_the_paper() -> None:
    quantizer = BinaryQuantizer(dim=18, codebook_size=2**18, is_spherical=True).eval()
    z = normalise(randn(2, 5, 18)).requires_grad_()
    codes = quantizer(z).codes
    torch.testing.assert_close(codes.norm(dim=-1), torch.ones(2, 5))
    grad = randn(2, 5, 18, seed=1)
    grad = grad - (grad * z.detach()).sum(-1, keepdim=True) * z.detach()  # what normalising lets pass
    codes.backward(grad)
    torch.testing.assert_close(z.grad, grad / math.sqrt(18), atol=1e-6, rtol=1e-5)


def test_no_tensor_is_as_wide_as_the_codebook() -> None:
    quantizer = BinaryQuantizer(dim=16, codebook_size=2**16).train()
    z = randn(4, 256, 16).requires_grad_()
    with Largest() as largest:
        found = quantizer(z)
        (found.codes.sum() + found.losses["entropy"].sum()).backward()
    assert largest.elements <= 1024 * 2**8  # and not 1,024 x 2^16


def test_binary_sizes_must_make_sense() -> None:
    for options, message in (
        ({"codebook_size": 48}, "48 is not a power of two; 32 is one"),
        ({"codebook_size": 1}, "not a power of two"),
        ({"codebook_size": -8}, "not a power of two"),
        ({"codebook_size": 16, "group_bits": 19}, r"1\.\.18"),
        ({"codebook_size": 16, "temperature": 0.0}, "above 0"),
    ):
        with pytest.raises(UsageError, match=message):
            BinaryQuantizer(dim=4, **options)


# --- index backpropagation


def dense_ibq(z: Tensor, table: Tensor, beta: float, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(codes, commitment, codebook loss, entropy loss) of rows [N, d], all at once: the specification."""
    logits = z @ table.T
    soft = logits.softmax(-1)
    hard = F.one_hot(logits.argmax(-1), len(table)).float()
    codes, plain = (hard + soft - soft.detach()) @ table, hard @ table
    codebook = (codes - z).square().mean() + beta * (plain - z.detach()).square().mean()
    p = (logits / temperature).softmax(-1)
    mean = p.mean(0)
    entropies = -(p * p.clamp_min(1e-30).log()).sum(1).mean() + (mean * mean.clamp_min(1e-30).log()).sum()
    return codes, (plain.detach() - z).square().mean(), codebook, entropies


@pytest.mark.parametrize("chunk", [2**22, 9 * 5])
def test_ibq_equals_its_definition_in_values_and_gradients(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_backprop, "_CHUNK", chunk)
    quantizer = IndexBackpropQuantizer(dim=4, codebook_size=9, entropy=1.0, temperature=0.3).train()
    quantizer.codebook.set_codes(randn(1, 9, 4, seed=1))
    z, other = (randn(3, 11, 4).requires_grad_() for _ in range(2))
    table = quantizer.codebook.embed[0].detach().clone().requires_grad_()
    codes, *losses = dense_ibq(other.reshape(-1, 4), table, 0.25, 0.3)
    found = quantizer(z)
    torch.testing.assert_close(found.codes.reshape(-1, 4), codes)
    for name, expected in zip(("commitment", "codebook", "entropy"), losses, strict=True):
        torch.testing.assert_close(found.losses[name].mean(), expected)
    (found.codes.pow(3).sum() + sum(value.mean() for value in found.losses.values())).backward()
    (codes.pow(3).sum() + sum(losses)).backward()
    torch.testing.assert_close(z.grad, other.grad)
    torch.testing.assert_close(quantizer.codebook.embed.grad[0], table.grad)
    assert (quantizer.codebook.embed.grad[0].abs().sum(1) > 0).all()  # every code learns


def test_codes_of_ibq_start_with_one_length() -> None:
    # Bright and dark vectors differ in length; without it the longest few codes are the nearest of all by dot product.
    quantizer = IndexBackpropQuantizer(dim=4, codebook_size=64, restart=0.2).train()
    rows = randn(1, 600, 4) * torch.linspace(0.1, 10, 600)[:, None]
    assert len(quantizer(rows).ids.unique()) > 48
    lengths = quantizer.codebook.embed[0].norm(dim=1)
    torch.testing.assert_close(lengths, lengths[:1].expand(64))
    for _ in range(3):
        quantizer.codebook.after_step()
        quantizer(rows)
    torch.testing.assert_close(quantizer.codebook.embed[0].norm(dim=1), lengths)


def test_ibq_holds_a_block_of_the_softmax_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_backprop, "_CHUNK", 2**14)
    monkeypatch.setattr(chunked, "_CHUNK", 2**14)
    quantizer = IndexBackpropQuantizer(dim=4, codebook_size=512).train()
    quantizer.codebook.set_codes(randn(1, 512, 4, seed=1))
    z = randn(4, 64, 4).requires_grad_()
    with Largest() as largest:
        found = quantizer(z)
        (found.codes.sum() + sum(value.sum() for value in found.losses.values())).backward()
    assert largest.elements <= 2**14  # and not 256 x 512


# --- look-up of many codes


@pytest.mark.parametrize("depth", [1, 3])
def test_look_up_among_16k_codes_holds_a_block_of_scores_at_a_time(depth: int) -> None:
    quantizer = Quantizer(dim=4, codebook_size=16384, depth=depth).train()
    quantizer.codebook.set_codes(randn(depth, 16384, 4))
    with Largest() as largest:
        found = quantizer(randn(4, 256, 4, seed=1).requires_grad_())
        (found.codes.sum() + found.losses["commitment"].sum()).backward()
        quantizer.codebook.after_step()
    assert largest.elements <= chunked._CHUNK  # and not 1,024 x 16,384


# --- several processes


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


def _worker(rank: int, port: int, batches: list[np.ndarray], out: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(rank)  # other initial codes per process: they may not matter
    share = [torch.from_numpy(rows[:30] if rank == 0 else rows[30:]) for rows in batches]
    found = {}
    for name, quantizer in _quantizers().items():
        _train(quantizer, share)
        found[name] = quantizer.codebook.embed.detach().numpy()
        found[f"{name} use"] = quantizer.codebook.recent.numpy()
    binary, rows = _binary()
    z = rows[rank : rank + 1].clone().requires_grad_()
    loss = binary(z).losses["entropy"].mean()
    loss.backward()
    found["entropy"], found["entropy gradient"] = loss.detach().numpy(), z.grad.numpy()
    np.savez(out / f"{rank}.npz", **found)
    torch.distributed.destroy_process_group()


def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    batches = [randn(70, 4, seed=i) for i in range(5)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    arrays = [rows.numpy() for rows in batches]
    workers = [context.Process(target=_worker, args=(rank, port, arrays, tmp_path)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    first, second = (np.load(tmp_path / f"{rank}.npz") for rank in range(2))
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


# --- tokenizers

TINY: dict[str, dict[str, Any]] = {
    "vq": {"channels": 8, "codebook_size": 16},
    "rvq": {"channels": 8, "codebook_size": 16, "num_levels": 4, "num_groups": 2},
    "fsq": {"levels": [5, 4, 3], "channels": 8},
    "lfq": {"codebook_size": 16, "channels": 8},
    "bsq": {"codebook_size": 16, "channels": 8},
    "ibq": {"channels": 8, "codebook_size": 16, "codebook_dim": 4},
}
VARIANTS = [(word, {}) for word in TINY] + [
    ("vq", {"update": "gradient", "gradient": "rotation"}),
    ("vq", {"update": "gradient", "cosine": True, "codebook_dim": 3}),
    ("rvq", {"is_shared": True, "num_groups": 1}),
    ("rvq", {"min_levels": 2, "gradient": "rotation"}),
    ("rvq", {"update": "gradient", "cosine": True, "codebook_dim": 3}),
    ("fsq", {"channels": None}),
    ("fsq", {"levels": [2, 2, 3], "num_levels": 3}),
    ("lfq", {"channels": None, "num_levels": 2, "bit_order": "little"}),
]


def images(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def build(word: str, **options: Any) -> Any:
    torch.manual_seed(0)
    spec = {"type": word, "width": 16, "num_blocks": 1} | TINY[word] | options
    return registry.build("tokenizer", registry.check("tokenizer", spec, "tokenizer"), image_channels=1)


@pytest.fixture(params=VARIANTS, ids=[f"{word} {options}" for word, options in VARIANTS])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    word, options = request.param
    model = build(word, **options).train()
    model(images(4, 1, 12, 20))
    after_step(model)
    return model.eval()


@torch.no_grad()
def test_ids_and_latents_say_the_same(tokenizer: Any) -> None:
    x = images(3, 1, 12, 20)
    for _ in range(2):
        encoded = tokenizer.encode(x)
        assert encoded.ids.dtype == torch.int64
        assert encoded.ids.shape == (3, tokenizer.num_levels, 3, 5)
        assert 0 <= encoded.ids.min() <= encoded.ids.max() < tokenizer.codebook_size
        assert torch.equal(tokenizer.codes(encoded.ids), encoded.z)
        assert torch.equal(tokenizer.decode(encoded.z), tokenizer(x)[0])
        assert all(value.shape == (3,) for value in encoded.losses.values())
        torch.testing.assert_close(tokenizer.encode(x[1:2]).z, encoded.z[1:2])
        tokenizer.set_latent_stats(
            torch.linspace(-1, 1, tokenizer.channels), torch.linspace(0.5, 2, tokenizer.channels)
        )


def test_gradient_reaches_every_parameter(tokenizer: Any) -> None:
    tokenizer.train()
    for convolution in (m for m in tokenizer.modules() if isinstance(m, nn.Conv2d)):
        nn.init.normal_(convolution.weight, std=0.1)  # at their initial zero some stop the gradient of what lies before
    reconstruction, encoded = tokenizer(images(2, 1, 8, 8))
    (reconstruction.square().mean() + sum(value.mean() for value in encoded.losses.values())).backward()
    for name, parameter in tokenizer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@torch.no_grad()
def test_saved_tokenizer_gives_the_same_images(tokenizer: Any, tmp_path: Path) -> None:
    x = images(2, 1, 8, 8)
    tokenizer.save_pretrained(tmp_path)
    made = type(tokenizer)
    for loaded in (made.from_pretrained(tmp_path), made.from_pretrained(tmp_path, low_cpu_mem_usage=False)):
        assert torch.equal(loaded.eval()(x)[0], tokenizer(x)[0])
        ids = tokenizer.encode(x).ids
        assert torch.equal(loaded.codes(ids), tokenizer.codes(ids))


def test_use_of_codes_is_reported(tokenizer: Any) -> None:
    tokenizer.train()(images(2, 1, 8, 8))
    after_step(tokenizer)
    reports = [module.stats() for module in tokenizer.modules() if hasattr(module, "stats")]
    assert len(reports) == 1
    assert {"usage", "perplexity", "dead"} <= reports[0].keys()
    assert 0 < reports[0]["usage"] <= 1


@pytest.mark.parametrize("word", TINY)
def test_a_few_steps_bring_the_images_closer(word: str) -> None:
    model = build(word).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    x = images(16, 1, 2, 2).repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    errors = []
    for _ in range(60):
        reconstruction, encoded = model(x)
        error = (reconstruction - x).square().mean()
        losses = {"commitment": torch.zeros(1)} | encoded.losses
        optimizer.zero_grad()
        (error + 0.25 * losses.pop("commitment").mean() + sum(v.mean() for v in losses.values())).backward()
        optimizer.step()
        after_step(model)
        errors.append(error.item())
    assert errors[-1] < max(0.5 * errors[0], 1e-3)  # 64 places, and some quantisers tell them all apart at once


@torch.no_grad()
def test_only_a_tokenizer_trained_for_it_reads_fewer_levels() -> None:
    ids = torch.randint(16, (1, 4, 3, 3), generator=torch.Generator().manual_seed(0))
    fewer = ids.index_fill(1, torch.tensor([2, 3]), -1)
    with pytest.raises(UsageError, match="from 0 on"):
        build("rvq").codes(fewer)
    model = build("rvq", min_levels=2)
    assert not torch.equal(model.codes(fewer), model.codes(ids))
    with pytest.raises(UsageError, match="16 codes"):
        model.codes(fewer - 1)


@pytest.mark.parametrize(
    ("word", "options", "message"),
    [
        ("vq", {"codebook_size": 0}, "codebook_size=0"),
        ("vq", {"codebook_dim": 0}, "at least 1"),
        ("vq", {"decay": 1.0}, r"decay=1\.0"),
        ("vq", {"restart": -0.1}, r"restart=-0\.1"),
        ("vq", {"stride": 3}, "power of two"),
        ("vq", {"channels": 0}, r"tokenizer\.channels=0"),
        ("rvq", {"num_levels": 0}, r"num_levels=0"),
        ("rvq", {"num_groups": 0}, r"num_groups=0"),
        ("rvq", {"num_groups": 3}, r"tokenizer\.channels=8 is no multiple of tokenizer\.num_groups=3"),
        ("rvq", {"num_levels": 3}, r"tokenizer\.num_levels=3 is no multiple"),
        ("rvq", {"min_levels": 1}, r"tokenizer\.min_levels=1 is no multiple"),
        ("rvq", {"min_levels": 6}, r"min_levels=6 must be in 1\.\.4"),
        ("fsq", {"levels": [5, 1]}, r"levels=\[5, 1\]"),
        ("fsq", {"levels": []}, "must list"),
        ("fsq", {"levels": [2, 3], "symmetric": False}, "symmetric"),
        ("fsq", {"levels": [1], "num_levels": 2}, r"levels=\[1\]"),
        ("fsq", {"num_levels": 0}, "num_levels=0"),
        ("lfq", {"codebook_size": 500}, "500 is not a power of two; 256 is one"),
        ("lfq", {"codebook_size": 0, "channels": None}, "power of two"),
        ("bsq", {"codebook_size": 3}, "power of two"),
        ("ibq", {"codebook_size": 0}, "codebook_size=0"),
    ],
)
def test_mistakes_are_told_in_one_line(word: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as told:
        build(word, **options)
    assert "\n" not in str(told.value)


def test_tokenizers_are_their_classes() -> None:
    assert [registry.find("tokenizer", word) for word in ("vq", "rvq", "fsq", "lfq", "ibq")] == [VQ, RVQ, FSQ, LFQ, IBQ]


# --- golden files and benchmarks


@pytest.mark.parametrize("system", ["rvq", "fsq", "lfq"])
def test_golden_outputs_are_reproduced(system: str) -> None:
    golden = module_at("golden_for_quantisers", HERE / "golden.py")
    runners = module_at("golden_quantisers", HERE / "golden_quantisers.py")
    case = golden.load(HERE / "golden" / f"{system}.safetensors")
    with torch.no_grad():
        got = getattr(runners, f"run_{system}")(case)
    assert got.keys() == case.outputs.keys()
    for name, expected in case.outputs.items():
        assert golden.compare(expected, got[name], 1e-6)[2] == "ok", name


@pytest.fixture(scope="module")
def suite() -> ModuleType:
    return module_at("benchmarks_tokenizers", HERE.parent / "benchmarks" / "tokenizers.py")


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
@pytest.mark.parametrize("shape", [(1, 96, 16), (2, 16, 6, 5)])
def test_both_sides_of_the_vq_benchmark_do_the_same(suite: ModuleType, shape: tuple[int, ...], gradient: str) -> None:
    x = randn(*shape).requires_grad_()
    ours, peer = suite.sides(x, 40, gradient=gradient)
    if isinstance(peer, str):
        pytest.skip(peer)
    for _ in range(3):
        codes, ids, table = ours()
        ours_grad = x.grad
        other_codes, other_ids, other_table = peer()
        assert torch.equal(ids.squeeze(-1), other_ids)
        torch.testing.assert_close(codes, other_codes, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(table, other_table, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours_grad, x.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", [(1, 96, 16), (2, 16, 6, 5)])
def test_both_sides_of_the_rvq_benchmark_do_the_same(suite: ModuleType, shape: tuple[int, ...]) -> None:
    ours, peer = suite.rvq_sides(randn(*shape).requires_grad_(), 40, depth=3)
    if isinstance(peer, str):
        pytest.skip(peer)
    for _ in range(3):
        for a, b in zip(ours(), peer(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_both_sides_of_the_benchmarks_without_tables_do_the_same(suite: ModuleType) -> None:
    for make, argument in ((suite.fsq_sides, (8, 5, 5)), (suite.lfq_sides, 64)):
        x = randn(2, 16, 6, 5).requires_grad_()
        ours, peer = make(x, argument)
        if isinstance(peer, str):
            pytest.skip(peer)
        codes, ids, *loss = ours()
        other_codes, other_ids, *other_loss = peer()
        assert torch.equal(ids.squeeze(-1), other_ids.long())
        torch.testing.assert_close(codes, other_codes)
        torch.testing.assert_close(loss, other_loss, atol=1e-4, rtol=1e-3)
