"""The quantiser and the VQ tokenizer: parity with vector-quantize-pytorch, properties, several processes."""

from __future__ import annotations

import multiprocessing
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from genkit.errors import GenkitError, UsageError
from genkit.importers.vector_quantize_pytorch_tables import import_vector_quantize
from genkit.kernels.nearest_code import chunked, reference
from genkit.nn.codebook import Codebook, normalise
from genkit.nn.conv import Decoder, Encoder, patch_transform
from genkit.nn.quantize import Quantizer
from genkit.nn.usage import usage
from genkit.tokenizers.vq import VQ

TINY = {"image_channels": 1, "width": 16, "num_blocks": 1, "channels": 8, "codebook_size": 12}


# --- nearest code


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


# --- parity with vector-quantize-pytorch

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


# --- codebook


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


# --- several processes


def _step(codebook: Codebook, batches: list[Tensor]) -> Codebook:
    for rows in batches:
        codebook(rows[None])
        codebook.after_step()
    return codebook


def _worker(rank: int, port: int, batches: list[np.ndarray], out: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    # Unequal shares, and other initial codes per rank: neither may matter.
    share = [torch.from_numpy(rows[:30] if rank == 0 else rows[30:]) for rows in batches]
    torch.manual_seed(rank)
    codebook = _step(Codebook(codebook_size=24, dim=4, decay=0.5, restart=0.4).train(), share)
    np.save(out / f"{rank}.npy", codebook.embed.numpy())
    torch.distributed.destroy_process_group()


def test_two_processes_learn_the_codebook_of_one(tmp_path: Path) -> None:
    batches = [torch.randn(70, 4, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    alone = _step(Codebook(codebook_size=24, dim=4, decay=0.5, restart=0.4).train(), batches)
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
    first, second = (torch.from_numpy(np.load(tmp_path / f"{rank}.npy")) for rank in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, alone.embed, atol=1e-5, rtol=1e-5)


# --- tokenizer


def images(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(params=[{}, {"codebook_dim": 3, "cosine": True}], ids=["plain", "cosine"])
def tokenizer(request: pytest.FixtureRequest) -> VQ:
    torch.manual_seed(0)
    model = VQ(**TINY | request.param).train()
    model(images(4, 1, 12, 20))
    model.quantizer.codebook.after_step()
    return model.eval()


def test_ids_and_latents_say_the_same(tokenizer: VQ) -> None:
    x = images(3, 1, 12, 20)
    for _ in range(2):
        encoded = tokenizer.encode(x)
        assert encoded.ids is not None
        assert encoded.ids.dtype == torch.int64
        assert encoded.ids.shape == (3, 1, 3, 5)
        assert encoded.z.shape == (3, 8, 3, 5)
        assert torch.equal(tokenizer.codes(encoded.ids), encoded.z)
        assert torch.equal(tokenizer.decode(encoded.z), tokenizer(x)[0])
        tokenizer.set_latent_stats(torch.linspace(-1, 1, 8), torch.linspace(0.5, 2, 8))


def test_every_code_is_its_own_nearest(tokenizer: VQ) -> None:
    codebook = tokenizer.quantizer.codebook
    assert torch.equal(codebook(codebook.embed)[1], torch.arange(12)[None])


def test_latent_statistics_scale_z_and_leave_images_alone(tokenizer: VQ) -> None:
    x = images(8, 1, 12, 20)
    z, image = tokenizer.encode(x).z, tokenizer(x)[0]
    rows = z.transpose(0, 1).flatten(1)
    tokenizer.set_latent_stats(rows.mean(1), rows.std(1) + 1e-3)
    scaled = tokenizer.encode(x).z.transpose(0, 1).flatten(1)
    torch.testing.assert_close(scaled.mean(1), torch.zeros(8), atol=1e-3, rtol=0)
    torch.testing.assert_close(tokenizer(x)[0], image, atol=1e-5, rtol=1e-5)
    with pytest.raises(UsageError, match="above 0"):
        tokenizer.set_latent_stats(torch.zeros(8), torch.zeros(8))
    with pytest.raises(UsageError, match=r"expected \[8\]"):
        tokenizer.set_latent_stats(torch.zeros(7), torch.ones(7))


def test_gradient_reaches_every_parameter() -> None:
    torch.manual_seed(0)
    model = VQ(**TINY | {"codebook_dim": 3}).train()
    for convolution in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
        nn.init.normal_(convolution.weight, std=0.1)  # at their initial zero some stop the gradient of what lies before
    reconstruction, encoded = model(images(2, 1, 8, 8))
    (reconstruction.square().mean() + encoded.losses["commitment"].mean()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_gradient_passes_straight_through() -> None:
    quantizer = Quantizer(dim=4, codebook_size=9)
    z = torch.randn(2, 5, 4, requires_grad=True)
    weight = torch.randn(2, 5, 4)
    (quantizer(z).codes * weight).sum().backward()
    assert torch.equal(z.grad, weight)


@pytest.mark.parametrize(("stride", "side"), [(1, 3), (2, 6), (4, 4), (8, 24), (16, 32)])
def test_any_power_of_two_is_a_stride(stride: int, side: int) -> None:
    model = VQ(**TINY | {"stride": stride, "image_channels": 3}).eval()
    x = images(1, 3, side, 2 * side)
    reconstruction, encoded = model(x)
    assert reconstruction.shape == x.shape
    assert encoded.ids is not None
    assert encoded.ids.shape == (1, 1, side // stride, 2 * side // stride)


def test_mistakes_are_told_in_one_line(tokenizer: VQ) -> None:
    with pytest.raises(UsageError, match="30x29 do not fit stride 4; nearest sizes that do: 28x28 or 32x32"):
        tokenizer.encode(images(1, 1, 30, 29))
    with pytest.raises(UsageError, match="3x8 do not fit stride 4; nearest sizes that do: 4x8"):
        tokenizer.encode(images(1, 1, 3, 8))
    with pytest.raises(UsageError, match=r"\[2, 3, 8, 8\], but this tokenizer was made for \[B, 1, Y, X\]"):
        tokenizer.encode(images(2, 3, 8, 8))
    for wrong in (-1, 12):
        with pytest.raises(UsageError, match=r"the codebook has 12 codes"):
            tokenizer.codes(torch.full((1, 1, 2, 2), wrong))
    with pytest.raises(UsageError, match=r"expected \[B, 1, Y, X\]"):
        tokenizer.codes(torch.zeros(1, 2, 2, dtype=torch.int64))
    for options, message in (
        ({"stride": 3}, "power of two"),
        ({"width": 0}, "at least 1"),
        ({"decay": 1.0}, r"\[0, 1\)"),
    ):
        with pytest.raises(UsageError, match=message):
            VQ(**TINY | options)


def test_saved_tokenizer_gives_the_same_images(tokenizer: VQ, tmp_path: Path) -> None:
    x = images(2, 1, 8, 8)
    tokenizer.set_latent_stats(torch.linspace(-1, 1, 8), torch.linspace(0.5, 2, 8))
    tokenizer.save_pretrained(tmp_path)
    for loaded in (VQ.from_pretrained(tmp_path), VQ.from_pretrained(tmp_path, low_cpu_mem_usage=False)):
        assert torch.equal(loaded.eval()(x)[0], tokenizer(x)[0])


@pytest.mark.parametrize(("stride", "image_channels"), [(1, 1), (4, 1), (4, 3), (8, 2)])
def test_patch_transform_gives_patches_back(stride: int, image_channels: int) -> None:
    full = stride**2 * image_channels
    whole = patch_transform(stride, image_channels, full + 3)
    torch.testing.assert_close(whole[:full].T @ whole[:full], torch.eye(full), atol=1e-6, rtol=0)
    assert not whole[full:].any()
    # The first rows are the mean of each colour, and a narrower transform holds the first rows of a wider one.
    patch = torch.rand(image_channels, stride, stride)
    means = stride * patch.mean((1, 2))
    torch.testing.assert_close((whole @ patch.flatten())[:image_channels], means)
    assert torch.equal(patch_transform(stride, image_channels, 2 * image_channels), whole[: 2 * image_channels])


def test_an_untrained_network_is_a_patch_codec() -> None:
    shape = {"image_channels": 3, "channels": 48, "stride": 4, "width": 16, "num_blocks": 1}
    x = images(2, 3, 8, 12)
    torch.testing.assert_close(Decoder(**shape)(Encoder(**shape)(x)), x, atol=1e-5, rtol=0)


def test_a_few_steps_bring_the_images_closer() -> None:
    torch.manual_seed(0)
    model = VQ(**TINY | {"codebook_size": 32}).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    x = images(16, 1, 2, 2).repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    errors = []
    for _ in range(60):
        reconstruction, encoded = model(x)
        error = (reconstruction - x).square().mean()
        optimizer.zero_grad()
        (error + 0.25 * encoded.losses["commitment"].mean()).backward()
        optimizer.step()
        model.quantizer.codebook.after_step()
        errors.append(error.item())
    assert errors[-1] < 0.2 * errors[0]
    assert model.quantizer.codebook.stats()["usage"] > 0.9


def test_modules_to_update_are_found_by_walking() -> None:
    found = [name for name, module in VQ(**TINY).named_modules() if hasattr(module, "after_step")]
    assert found == ["quantizer.codebook"]
