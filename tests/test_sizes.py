"""Images in sizes of their own: what size each gets, that a batch of several is each of them alone, and that little is computed for nothing."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from genkit import registry
from genkit.data import cache
from genkit.data.emoji import Emoji
from genkit.data.folder import Folder
from genkit.data.loader import batches, read_all
from genkit.data.memory import InSizes
from genkit.data.sizes import pad_batch, parse_size, within_budget
from genkit.data.tokens import Tokens
from genkit.errors import UsageError
from genkit.interfaces import Encoded
from genkit.metrics.sources import at_size
from genkit.nn.layout import padded_layout, rows_of_one_size, sizes_of
from genkit.nn.packing import Packing
from genkit.rng import Rng

SIZES = [(8, 8), (4, 12), (12, 4), (8, 4)]


def in_sizes(count: int = 6, channels: int = 3) -> InSizes:
    random = np.random.default_rng(0)
    pixels = {size: random.integers(0, 256, (count, channels, *size), dtype=np.uint8) for size in SIZES}
    return InSizes(pixels, np.arange(count) % 2, [f"k{i}" for i in range(count)], ["a", "b"], "test", (channels, 8, 8))


# Sizes


@pytest.mark.parametrize("text", ["48x64", " 48 X 64 ", (48, 64), [48, 64]])
def test_sizes_are_rows_and_columns(text):
    assert parse_size(text) == (48, 64)
    assert parse_size("48") == parse_size(48) == (48, 48)


@pytest.mark.parametrize("text", ["", "48x", "x64", "0x8", "1x2x3", "4.5", "-8", [1, 2, 3]])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UsageError, match="rows x columns"):
        parse_size(text)


@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([(256, 16), (64, 8), (32, 4)]))
def test_a_size_keeps_to_its_budget_and_nearly_to_its_shape(y, x, sides):
    side, unit = sides
    rows, columns = within_budget((y, x), side**2, unit)
    assert rows % unit == columns % unit == 0
    assert min(rows, columns) >= unit
    assert rows * columns <= side**2
    if min(y, x) >= unit:
        assert rows <= y
        assert columns <= x
        scale = min(1, side / (y * x) ** 0.5)
        if min(y * scale, x * scale) >= unit:
            assert abs(rows - y * scale) < unit + 1e-6
            assert abs(columns - x * scale) < unit + 1e-6


@pytest.mark.parametrize(
    ("size", "expected"),
    [((256, 256), (256, 256)), ((512, 512), (256, 256)), ((300, 400), (208, 288)), ((100, 60), (96, 48)), ((2000, 8), (4000, 16)), ((100_000, 100), (4096, 16))],
)  # fmt: skip
def test_sizes_of_256_pixel_training(size, expected):
    assert within_budget(size, 256**2, 16) == expected
    assert within_budget(size[::-1], 256**2, 16) == expected[::-1]


def test_a_batch_is_padded_and_cut_back():
    images = [torch.rand(3, *size) for size in SIZES]
    x, sizes = pad_batch(images)
    assert x.shape == (4, 3, 12, 12)
    assert sizes.tolist() == [list(size) for size in SIZES]
    assert torch.equal(x[1, :, :4, :12], images[1])
    assert float(x.abs().sum()) == pytest.approx(sum(float(image.sum()) for image in images), rel=1e-5)
    layout = padded_layout((12, 12), sizes)
    found = sizes_of(layout)
    assert found is not None
    assert torch.equal(found, sizes)
    assert padded_layout((8, 8), torch.full((3, 2), 8)).valid is None
    again = {size: rows.tolist() for size, rows in rows_of_one_size(torch.tensor([[8, 8], [4, 12], [8, 8]]))}
    assert again == {(8, 8): [0, 2], (4, 12): [1]}


# What is wasted


def photographs(count: int) -> np.ndarray:
    """Sizes as collections of pictures have them: common aspect ratios both ways, some panoramas, a tenth smaller than the budget. [N, 2]"""
    random = np.random.default_rng(0)
    ratios = random.choice([1, 4 / 3, 3 / 2, 16 / 9, 2.4, 3.5], count, p=[0.2, 0.3, 0.25, 0.15, 0.07, 0.03])
    ratios = np.where(random.random(count) < 0.6, ratios, 1 / ratios) * np.exp(random.normal(0, 0.05, count))
    side = np.where(random.random(count) < 0.1, random.uniform(60, 250, count), random.uniform(300, 2000, count))
    return np.stack([side / ratios**0.5, side * ratios**0.5], 1).astype(int)


def log_normal(count: int) -> np.ndarray:
    random = np.random.default_rng(1)
    return np.exp(random.normal((6, 6), 0.5, (count, 2))).astype(int)


@pytest.mark.parametrize("distribution", [photographs, log_normal])
@pytest.mark.parametrize("batch_size", [8, 64])
def test_packing_wastes_less_than_five_percent(distribution, batch_size):
    sizes = [within_budget((y, x), 256**2, 16) for y, x in distribution(512).tolist()]
    counts = torch.tensor([y * x // 256 for y, x in sizes])
    assert len(counts.unique()) > 20
    real = computed = padded = 0
    for lengths in counts.split(batch_size):
        packing = Packing.of(torch.arange(256) < lengths[:, None])
        assert len(packing.index) == int(lengths.sum())  # linear layers compute these and nothing else
        real += int(lengths.sum())
        computed += packing.num_places  # attention computes these
        padded += len(lengths) * int(lengths.max())
    waste = 1 - real / computed
    assert waste < 0.05
    assert waste < (1 - real / padded) / 3  # what padding alone would cost


# One batch of several sizes is each sample alone


def fit() -> Any:
    torch.manual_seed(0)
    model = registry.build(
        "backbone",
        registry.check("backbone", {"type": "fit", "dim": 16, "depth": 2, "num_heads": 2, "patch_size": 2}, "b"),
        channels=3,
        num_classes=2,
        grid=(8, 8),
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("objective", [{"type": "flow"}, {"type": "edm"}, {"type": "diffusion", "min_snr": 5.0}])
def test_losses_and_gradients_of_several_sizes_are_those_of_the_samples(objective):
    loss = registry.build("objective", registry.check("objective", objective, "o"))
    data, model = in_sizes(), fit()
    batch = data.__getitems__([0, 1, 6, 11])

    def losses(chosen: slice) -> torch.Tensor:
        x, sizes = batch["x"][chosen], batch["size"][chosen]
        Y, X = sizes.amax(0).tolist()
        own = x[..., :Y, :X]
        rng = Rng.at(3, chosen.start, len(x))
        return sum(loss(model, own, {"label": batch["label"][chosen]}, padded_layout((Y, X), sizes), rng).values())

    together = losses(slice(0, 4))
    grads = torch.autograd.grad(together.mean(), list(model.parameters()))
    alone = torch.cat([losses(slice(i, i + 1)) for i in range(4)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    for one, other in zip(grads, torch.autograd.grad(alone.mean(), list(model.parameters())), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_a_variance_bound_sees_no_padding():
    loss = registry.build("objective", registry.check("objective", {"type": "diffusion"}, "o"))
    x, sizes = pad_batch([torch.rand(3, *size) for size in SIZES[:2]])

    def network(x_t, k, cond, layout):
        return torch.full((len(x_t), 6, *x_t.shape[2:]), torch.nan).where(~layout.valid.view(2, 1, 8, 12), 0.1)

    found = loss(network, x, {}, padded_layout((8, 12), sizes), Rng.at(0, 0, 2))
    assert all(bool(value.isfinite().all()) for value in found.values())


# Batches of one size


@pytest.mark.parametrize("world_size", [1, 2])
def test_batches_of_one_size_see_every_sample(world_size):
    data = in_sizes(count=5)  # 5 of each size: two batches of 4 each
    seen = []
    streams = [
        batches(data, batch_size=4, seed=1, stop=32, one_size=True, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for parts in zip(*streams, strict=True):
        index = np.concatenate([part["index"].numpy() for part in parts])
        assert len(set(index % 4)) == 1
        assert parts[0]["x"].shape[2:] == SIZES[index[0] % 4]
        seen.append(index)
    assert set(np.concatenate(seen)) == set(range(20))
    assert len(seen) == 8
    entered = next(iter(batches(data, batch_size=4, seed=1, start=12, stop=32, one_size=True)))
    assert entered["index"].tolist() == seen[3].tolist()


def test_batches_of_one_size_need_sizes():
    with pytest.raises(UsageError, match="one_size_batches"):
        batches(Emoji(size=8), batch_size=4, seed=0, one_size=True)


# Datasets


def test_emoji_come_in_every_size_on_white():
    data, squares = Emoji(size=16, sizes=["16x16", "12x20"]), Emoji(size=12)
    assert len(data) == 2 * len(squares)
    assert data.info.unit == 4
    assert data.info.shape == (3, 16, 16)
    wide = data[7]["x"]
    assert wide.shape == (3, 12, 20)
    torch.testing.assert_close(wide[:, :, 4:16], squares[3]["x"])
    assert float(wide[:, :, :4].min()) == float(wide[:, :, 16:].min()) == 1
    assert data.info.fingerprint == Emoji(size=16, sizes=["16x16", "12x20"]).info.fingerprint
    assert data.info.fingerprint != Emoji(size=16, sizes=["16x16", "20x12"]).info.fingerprint
    assert Emoji(size=(12, 20))[3]["x"].equal(wide)
    for wrong in ([], ["16x16", "16"]):
        with pytest.raises(UsageError, match=r"data\.sizes"):
            Emoji(sizes=wrong)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures" / "a"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for i, (y, x) in enumerate([(40, 40), (30, 60), (60, 30), (12, 9), (20, 40)]):
        Image.fromarray(random.integers(0, 256, (y, x, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder.parent


def test_a_folder_keeps_aspect_ratios(pictures):
    data = Folder(path=str(pictures), size=32, aspect="keep", unit=4)
    assert [tuple(item["x"].shape[1:]) for item in data] == [(32, 32), (20, 44), (44, 20), (12, 8), (20, 40)]
    assert data.sizes.tolist() == [[32, 32], [20, 44], [44, 20], [12, 8], [20, 40]]
    batch = data.__getitems__([1, 3])
    assert batch["x"].shape == (2, 3, 20, 44)
    assert batch["size"].tolist() == [[20, 44], [12, 8]]
    assert data.info.unit == 4
    # The small one was only cut to whole units, hardly stretched.
    assert Folder(path=str(pictures), size=32).info.fingerprint != data.info.fingerprint
    with pytest.raises(UsageError, match=r"data\.unit=5"):
        Folder(path=str(pictures), size=32, aspect="keep", unit=5)


def test_a_folder_gives_larger_images_cropped_too(pictures):
    data = Folder(path=str(pictures), size=32, aspect="both", unit=4)
    assert len(data) == 10
    shapes = [tuple(item["x"].shape[1:]) for item in data]
    assert shapes[0:2] == [(32, 32), (32, 32)]
    assert shapes[2:4] == [(20, 44), (20, 44)]  # 30 rows: not larger than 32 along both
    assert shapes[6:8] == [(12, 8), (12, 8)]
    assert torch.equal(data[6]["x"], data[7]["x"])


def test_turned_photographs_have_the_size_they_are_shown_in(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (16, 8)).save(tmp_path / "a.jpg", exif=exif)
    data = Folder(path=str(tmp_path), size=16, aspect="keep", unit=4)
    assert data.sizes.tolist() == [[16, 8]]
    assert data[0]["x"].shape == (3, 16, 8)


def test_flips_do_not_move_padding(pictures):
    data = Folder(path=str(pictures), size=32, aspect="keep", unit=4, flip=True)
    plain, index = data.__getitems__([1, 3]), np.array([1, 3])
    for seed in range(8):
        rng = Rng.at(seed, 0, 2)
        turned = rng.fork("flip").uniform() < 0.5
        for row, turn in enumerate(turned.tolist()):
            y, x = plain["size"][row].tolist()
            found = data.fetch(index, rng)["x"][row, :, :y, :x]
            wanted = plain["x"][row, :, :y, :x]
            assert torch.equal(found, wanted.flip(-1) if turn else wanted)


def test_the_same_data_at_one_size():
    spec = registry.check("data", {"type": "emoji", "size": 16, "sizes": ["16x16", "12x20"]}, "data")
    assert at_size(spec, (8, 16)) == {**spec, "size": [8, 16], "sizes": None}
    folder = registry.check("data", {"type": "folder", "path": "x", "size": 32, "aspect": "keep"}, "data")
    assert at_size(folder, (16, 64))["aspect"] == "crop"
    fashion = registry.check("data", {"type": "fashion"}, "data")
    assert at_size(fashion, (32, 32))["size"] == 32
    with pytest.raises(UsageError, match="no images of 28x56"):
        at_size(fashion, (28, 56))


# Caches


class Halves:
    """Toy tokenizer, stride 2: the left column of each 2x2 block, so that a mirror image is not its mirror image."""

    channels, stride, codebook_size = 3, 2, 4

    def __init__(self, num_levels: int = 0):
        self.num_levels = num_levels

    def encode(self, x):
        z = x[:, :, ::2, ::2]
        ids = ((z[:, : self.num_levels] + 1) * 1.99).long() if self.num_levels else None
        return Encoded(z, ids)


@pytest.mark.parametrize("num_levels", [0, 2])
def test_a_cache_of_sizes_gives_every_sample_alone(tmp_path, num_levels):
    data, tokenizer = in_sizes(), Halves(num_levels)
    out = cache.build(tokenizer, data, tmp_path / "c", tokenizer_fingerprint="t", batch_size=5)
    tokens = Tokens(path=str(out))
    assert len(tokens) == 24
    assert tokens.info.unit == 4
    assert tokens.meta["grid"] == [4, 4]
    assert tokens.sizes.tolist() == data.sizes.tolist()
    encoded = [tokenizer.encode(data[i]["x"][None]) for i in range(24)]
    batch = tokens.__getitems__([3, 9, 22])
    for row, i in enumerate((3, 9, 22)):
        y, x = batch["size"][row].tolist()
        wanted = encoded[i].ids if num_levels else encoded[i].z
        assert torch.equal(batch[tokens.word][row, :, :y, :x], wanted[0])
        assert not batch[tokens.word][row, :, y:].any()
        assert batch["key"][row] == data.keys[i]
    z = torch.cat([e.z.flatten(2) for e in encoded], 2)
    torch.testing.assert_close(torch.tensor(tokens.meta["latent_mean"]), z.mean((0, 2)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.tensor(tokens.meta["latent_std"]), z.std((0, 2), False), atol=1e-5, rtol=1e-4)
    if num_levels:
        ids = [e.ids.flatten(2) for e in encoded]
        used = torch.cat(ids, 2)[0]
        share = np.mean([len(level.unique()) / 4 for level in used])
        assert tokens.meta["codebook_usage"] == pytest.approx(share)


@pytest.mark.parametrize("aspect", ["crop", "keep"])
def test_mirrored_images_are_cached_too(tmp_path, pictures, aspect):
    data = Folder(path=str(pictures), size=32, aspect=aspect, unit=4, flip=True)
    out = cache.find_or_build(Halves(), data, tmp_path, name="x", tokenizer_fingerprint="t")
    tokens = Tokens(path=str(out))
    assert tokens.meta["mirrored"]
    rng, index = Rng.at(0, 0, 5), np.arange(5)
    images, found = data.fetch(index, rng), tokens.fetch(index, rng)
    for row in range(5):
        y, x = images["size"][row].tolist() if aspect == "keep" else (32, 32)
        wanted = Halves().encode(images["x"][row : row + 1, :, :y, :x]).z[0]
        assert torch.equal(found["z"][row, :, : y // 2, : x // 2], wanted)
    plain = Folder(path=str(pictures), size=32, aspect=aspect, unit=4)
    assert cache.find_or_build(Halves(), plain, tmp_path, name="x", tokenizer_fingerprint="t") != out


class Stops(Halves):
    """Encodes so many batches."""

    def __init__(self, batches: int, how: Any):
        super().__init__()
        self.left, self.how = batches, how

    def encode(self, x):
        if not self.left:
            self.how()
        self.left -= 1
        return super().encode(x)


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("kind", ["one size", "several"])
def test_an_interrupted_cache_continues(tmp_path, kind):
    data: Any = in_sizes() if kind == "several" else Emoji(size=8)
    size = 4 if kind == "several" else 200
    whole = cache.build(Halves(), data, tmp_path / "whole", tokenizer_fingerprint="t", batch_size=size)
    per_batch = 4 if kind == "several" else 1
    with pytest.raises(KeyboardInterrupt):
        cache.build(Stops(2 * per_batch, interrupt), data, tmp_path / "c", tokenizer_fingerprint="t", batch_size=size)
    (left,) = tmp_path.glob(".c.*")
    with (left / "z.npy").open("ab") as file, (left / "journal.jsonl").open("ab") as journal:
        file.write(b"what came after the last line")
        journal.write(b'{"next": 99')
    seen = []
    out = cache.build(
        Halves(),
        data,
        tmp_path / "c",
        tokenizer_fingerprint="t",
        batch_size=size,
        progress=lambda n, total: seen.append(n),
    )
    assert seen[0] == 3 * size
    for name in sorted(path.name for path in whole.iterdir()):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "whole"]


def test_a_killed_cache_continues_and_another_one_does_not_take_it(tmp_path):
    data = in_sizes()
    pid = os.fork()
    if pid == 0:
        killed = Stops(8, lambda: os.kill(os.getpid(), signal.SIGKILL))
        cache.build(killed, data, tmp_path / "c", tokenizer_fingerprint="t", batch_size=4)
    os.waitpid(pid, 0)
    seen: list[int] = []
    cache.build(
        Halves(),
        data,
        tmp_path / "c",
        tokenizer_fingerprint="t",
        batch_size=4,
        progress=lambda n, total: seen.append(n),
    )
    assert seen[0] == 12
    pid = os.fork()
    if pid == 0:
        killed = Stops(8, lambda: os.kill(os.getpid(), signal.SIGKILL))
        cache.build(killed, data, tmp_path / "d", tokenizer_fingerprint="t", batch_size=4)
    os.waitpid(pid, 0)
    seen.clear()
    cache.build(
        Halves(),
        data,
        tmp_path / "d",
        tokenizer_fingerprint="u",
        batch_size=4,
        progress=lambda n, total: seen.append(n),
    )
    assert seen[0] == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "d"]


def test_sides_that_the_stride_does_not_divide_are_refused(tmp_path):
    tokenizer = Halves()
    tokenizer.stride = 8
    with pytest.raises(UsageError, match=r"stride 8 does not divide; set data\.unit"):
        cache.build(tokenizer, in_sizes(), tmp_path / "c", tokenizer_fingerprint="t")


def test_read_all_may_begin_anywhere():
    found = [batch["index"].tolist() for batch in read_all(in_sizes(), 10, first=7)]
    assert found == [list(range(7, 17)), list(range(17, 24))]


# The whole way


@pytest.mark.parametrize("kind", ["vq", "kl"])
@pytest.mark.parametrize("one_size", [False, True])
def test_latents_of_any_tokenizer_in_several_sizes(tmp_path, monkeypatch, kind, one_size):
    """Codes of ids are looked up where an objective of latents finds ids in the cache; the run draws a size it never saw."""
    from genkit import AutoPipeline, train

    monkeypatch.chdir(tmp_path)
    shape = {"stride": 4, "width": 8, "num_blocks": 1, "channels": 2}
    common = {"log": {"num_images": 2}, "train": {"num_samples": 8, "batch_size": 4, "precision": "fp32"}}
    tokenizer: dict[str, Any] = {
        "name": "tokens",
        "data": {"type": "emoji", "size": 16},
        "tokenizer": {"type": kind, **shape, **({"codebook_size": 8} if kind == "vq" else {})},
        "objective": {"type": "reconstruction"},
        **common,
    }
    train(tokenizer, device="cpu")
    backbone: dict[str, Any] = {"type": "fit", "dim": 16, "depth": 1, "num_heads": 2, "patch_size": 1}
    if one_size:  # a scan would carry padding into what is real
        backbone = {"type": "dit", "dim": 16, "depth": 1, "mixer": {"type": "mamba"}, "patch_size": 1}
    generator = {
        "name": "gen",
        "data": {"type": "emoji", "size": 16, "sizes": ["16x16", "8x24", "24x8"]},
        "tokenizer": {"from": "runs/tokens"},
        "backbone": backbone,
        "objective": {"type": "flow"},
        "sampler": {"type": "euler", "num_steps": 2},
        **common,
        "train": {**common["train"], "one_size_batches": one_size},
    }
    run = train(generator, device="cpu")
    assert np.isfinite(run.metrics["velocity"])
    pipe = AutoPipeline.from_pretrained(run.path, device="cpu")
    size = (12, 20)
    images = pipe.generate(torch.tensor([0, 1]), [5, 6], size=size)
    assert images.shape == (2, 3, *size)
    alone = pipe.generate(torch.tensor([1]), [6], size=size)
    torch.testing.assert_close(images[1:], alone, atol=1e-4, rtol=0)
