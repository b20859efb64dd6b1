"""Datasets: what they hold, how foreign images are converted, and what a user reads when something is wrong."""

from __future__ import annotations

import gzip
import json
import logging
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from genkit import registry
from genkit.data import check, emoji, fashion
from genkit.data.emoji import Emoji
from genkit.data.fashion import Fashion
from genkit.data.folder import Folder
from genkit.errors import GenkitError, UsageError
from genkit.rng import Rng


def save(path: Path, pixels: np.ndarray | Image.Image, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)


def truncated_jpeg(path: Path) -> None:
    save(path, np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    path.write_bytes(path.read_bytes()[:700])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of four 24x40 colour images, of one flat colour each, so that a sample shows which file it came from."""
    for i in range(8):
        name = f"{'cats' if i < 4 else 'dogs'}/{i}.png"
        save(tmp_path / name, np.full((24, 40, 3), 20 * i, np.uint8))
    return tmp_path


# Fashion


def test_embedded_fashion_is_split_into_9000_and_1000_disjoint_images():
    parts = {split: Fashion(source="embedded", split=split) for split in ("train", "val", "all")}
    assert {split: len(part) for split, part in parts.items()} == {"train": 9_000, "val": 1_000, "all": 10_000}
    assert parts["train"].keys + parts["val"].keys == parts["all"].keys
    assert torch.equal(parts["val"].pixels, parts["all"].pixels[9_000:])
    assert len({part.info.fingerprint for part in parts.values()}) == 3
    assert torch.bincount(parts["all"].labels).tolist() == [1_000] * 10


def test_fashion_samples_span_minus_one_to_one_exactly_and_batches_equal_samples():
    dataset = Fashion(source="embedded", split="val")
    batch = dataset.__getitems__([3, 999, 3])
    assert batch["x"].shape == (3, 1, 28, 28)
    assert batch["x"].dtype == torch.float32
    assert (batch["x"].min(), batch["x"].max()) == (-1, 1)
    assert batch["label"].dtype == batch["index"].dtype == torch.int64
    for row, index in enumerate([3, 999, 3]):
        sample = dataset[index]
        assert torch.equal(sample["x"], batch["x"][row])
        assert (sample["label"], sample["key"]) == (int(batch["label"][row]), batch["key"][row])
    assert batch["key"][1] == "t10k/09999"


def test_fashion_labels_belong_to_the_images():
    # Trousers (class 1) are narrow: they leave the left and right edges empty. Bags (class 8) do not.
    dataset = Fashion(source="embedded", split="all")
    edges = dataset.pixels[:, 0, :, [0, 1, 2, 25, 26, 27]].float().mean((1, 2))
    assert edges[dataset.labels == 1].mean() < 5 < 30 < edges[dataset.labels == 8].mean()


@pytest.mark.parametrize("size", [29, 32])
def test_fashion_size_pads_with_background(size):
    plain, padded = Fashion(source="embedded", split="val"), Fashion(source="embedded", split="val", size=size)
    before = (size - 28) // 2
    assert padded.info.shape == (1, size, size)
    assert torch.equal(padded.pixels[:, :, before : before + 28, before : before + 28], plain.pixels)
    assert padded.pixels.sum() == plain.pixels.sum()
    with pytest.raises(UsageError, match=r"data\.size=16 is smaller than the 28x28"):
        Fashion(source="embedded", size=16)


def test_fashion_without_the_full_set_uses_the_embedded_one_and_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("GENKIT_DATA", str(tmp_path))
    monkeypatch.setattr(fashion, "DEBIAN", tmp_path / "debian")
    assert len(Fashion(source="auto")) == 9_000
    assert "in the package" in Fashion(source="auto").info.source
    with pytest.raises(UsageError) as error:
        Fashion(source="full")
    assert "apt install dataset-fashion-mnist" in str(error.value)
    assert "torchvision.datasets.FashionMNIST('data', download=True)" in str(error.value)


def test_fashion_reads_a_torchvision_download_packed_or_not(tmp_path, monkeypatch):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 60_000), ("t10k", 10_000)):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(
            struct.pack(">4B3I", 0, 0, 8, 3, count, 28, 28) + bytes(count * 784)
        )
        labels = struct.pack(">4BI", 0, 0, 8, 1, count) + bytes([7]) * count
        (raw / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels, 1))
    monkeypatch.setenv("GENKIT_DATA", str(tmp_path))
    assert [len(Fashion(source="full", split=split)) for split in ("train", "val", "all")] == [60_000, 10_000, 70_000]
    dataset = Fashion(split="val")
    assert str(raw) in dataset.info.source
    assert dataset.labels.unique().tolist() == [7]
    (raw / "t10k-labels-idx1-ubyte.gz").write_bytes(b"\x1f\x8bnonsense")
    with pytest.raises(UsageError, match="not a readable IDX file"):
        Fashion(split="val")


# Folder


def test_folder_classes_are_the_first_level_subfolders(folder):
    save(folder / "dogs" / "deep" / "er.png", np.zeros((24, 40, 3), np.uint8))
    save(folder / "loose.png", np.zeros((24, 40, 3), np.uint8))
    save(folder / ".hidden" / "x.png", np.zeros((24, 40, 3), np.uint8))
    (folder / "notes.txt").write_text("no image")
    dataset = Folder(path=str(folder), size=(24, 40))
    assert dataset.info.class_names == ("cats", "dogs")
    assert dataset.keys == sorted(dataset.keys)
    labels = dict(zip(dataset.keys, dataset.labels.tolist(), strict=True))
    assert len(labels) == 10
    assert (labels["cats/0.png"], labels["dogs/deep/er.png"], labels["loose.png"]) == (0, 1, -1)


def test_folder_without_subfolders_is_unlabelled(tmp_path):
    save(tmp_path / "a.bmp", np.zeros((8, 8), np.uint8))
    dataset = Folder(path=str(tmp_path), size=8)
    assert dataset.info.class_names == ()
    assert dataset[0]["label"] == -1


def test_folder_keeps_grey_24x40_images_as_they_are(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40), dtype=np.uint8)
    save(tmp_path / "a.png", pixels)
    dataset = Folder(path=str(tmp_path), size=[24, 40])  # as a config hands it over
    assert dataset.info.shape == (1, 24, 40)
    assert torch.equal(((dataset[0]["x"] + 1) * 127.5).round(), torch.from_numpy(pixels)[None].float())


def test_folder_crops_the_centre_of_the_longer_side_without_stretching(tmp_path):
    pixels = np.zeros((40, 100, 3), np.uint8)
    pixels[:, 30:70] = 255  # the centred square, and nothing else, is white
    save(tmp_path / "wide.png", pixels)
    save(tmp_path / "tall.png", pixels.transpose(1, 0, 2))
    x = Folder(path=str(tmp_path), size=20).__getitems__([0, 1])["x"]
    assert x.shape == (2, 3, 20, 20)
    assert x.min() > 0.8  # the filter reaches one pixel over the edge; a crop off by one would be black there


def test_folder_resize_is_antialiased(tmp_path):
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    save(tmp_path / "board.png", board)
    assert (
        Folder(path=str(tmp_path), size=8)[0]["x"].abs().max() < 0.05
    )  # grey, where picking pixels would give -1 or 1


def test_folder_converts_modes_as_documented(tmp_path):
    square = np.ones((4, 4), np.uint8)
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[..., 0], rgba[:2, :, 3] = 255, 255  # upper half red, lower half transparent
    save(tmp_path / "rgba.png", rgba)
    palette = Image.fromarray(square * 3)
    palette.putpalette([0] * 9 + [0, 0, 255])
    save(tmp_path / "palette.png", palette)
    save(tmp_path / "sixteen.png", square.astype(np.uint16) * 32896)
    save(tmp_path / "cmyk.jpg", Image.new("CMYK", (4, 4)))
    save(tmp_path / "grey_alpha.png", Image.new("LA", (4, 4), (0, 0)))
    dataset = Folder(path=str(tmp_path), size=4)
    found = {key: ((dataset[i]["x"] + 1) * 127.5).round().int() for i, key in enumerate(dataset.keys)}
    assert dataset.info.shape == (3, 4, 4)
    assert found["rgba.png"][:, 0, 0].tolist() == [255, 0, 0]
    assert found["rgba.png"][:, 3, 0].tolist() == [255, 255, 255]
    assert found["palette.png"][:, 1, 1].tolist() == [0, 0, 255]
    assert found["sixteen.png"][:, 1, 1].tolist() == [128, 128, 128]
    assert found["cmyk.jpg"][:, 1, 1].tolist() == [255, 255, 255]
    assert found["grey_alpha.png"][:, 1, 1].tolist() == [255, 255, 255]
    grey = Folder(path=str(tmp_path), size=4, channels=1)
    assert grey[grey.keys.index("rgba.png")]["x"].shape == (1, 4, 4)


def test_folder_channels_are_measured_and_can_be_set(tmp_path):
    save(tmp_path / "a.png", np.zeros((4, 4), np.uint8))
    save(tmp_path / "b.png", np.zeros((4, 4), np.uint16))
    assert Folder(path=str(tmp_path), size=4).info.shape == (1, 4, 4)
    assert Folder(path=str(tmp_path), size=4, channels=3)[0]["x"].shape == (3, 4, 4)
    save(tmp_path / "c.png", np.zeros((4, 4, 3), np.uint8))
    assert Folder(path=str(tmp_path), size=4).info.shape == (3, 4, 4)


def test_folder_applies_exif_orientation(tmp_path):
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, :4] = 255  # left half white as stored
    exif = Image.Exif()
    exif[0x0112] = 3  # to be shown upside down: left becomes right
    save(tmp_path / "a.png", pixels, exif=exif)
    x = Folder(path=str(tmp_path), size=8)[0]["x"]
    assert (x[0, 0, 0], x[0, 0, 7]) == (-1, 1)


def test_folder_replaces_a_truncated_jpeg_by_the_next_good_file_and_names_it_once(folder, caplog):
    truncated_jpeg(folder / "cats" / "1b.jpg")
    (folder / "cats" / "1c.png").write_bytes(b"")
    dataset = Folder(path=str(folder), size=(24, 40))
    bad = dataset.keys.index("cats/1b.jpg")
    told: dict[str, str] = {}
    with caplog.at_level(logging.WARNING, "genkit.data"):
        for _ in range(3):
            batch = dataset.fetch([bad, 0], Rng([1, 2]))
            assert batch["key"] == ["cats/2.png", "cats/0.png"]
            assert batch["index"].tolist() == [bad + 2, 0]
            told |= batch.get("skipped", {})  # what the process behind a loader's worker learns
    assert told.keys() == dataset.skipped.keys() == {"cats/1b.jpg", "cats/1c.png"}
    assert "truncated" in dataset.skipped["cats/1b.jpg"]
    assert dataset.skipped["cats/1c.png"] == "empty file"
    assert [record.getMessage().count("1b.jpg") for record in caplog.records] == [1, 0]
    assert dataset.__getitems__(range(len(dataset)))["x"].shape[0] == 8
    with pytest.raises(GenkitError, match=r"cats/1b\.jpg cannot be decoded"):
        dataset[bad]


def test_folder_of_corrupt_files_alone_is_one_clear_error(tmp_path):
    truncated_jpeg(tmp_path / "a.jpg")
    dataset = Folder(path=str(tmp_path), size=8)
    assert dataset.__getitems__([0])["x"].shape == (0, 3, 8, 8)
    with pytest.raises(GenkitError, match="none of the 1 images"):
        dataset.fetch([0], Rng([1]))


def test_folder_flips_about_half_and_by_the_stream_of_the_sample_alone(tmp_path):
    save(tmp_path / "a.png", np.tile(np.arange(8, dtype=np.uint8) * 30, (8, 1)))
    dataset = Folder(path=str(tmp_path), size=8, flip=True)
    flipped = dataset.fetch([0] * 200, Rng(range(200)))["x"][:, 0, 0, 0] > 0
    assert 70 < flipped.sum() < 130
    alone = [dataset.fetch([0], Rng([seed]))["x"][0, 0, 0, 0] > 0 for seed in range(20)]
    assert torch.stack(alone).tolist() == flipped[:20].tolist()
    still = dataset.__getitems__([0] * 50)["x"]
    assert torch.equal(still, still[:1].expand_as(still))


def test_folder_split_takes_the_same_share_of_every_class(folder):
    parts = {s: Folder(path=str(folder), size=8, split=s, val_fraction=0.25) for s in ("train", "val", "all")}
    assert {split: len(part) for split, part in parts.items()} == {"train": 6, "val": 2, "all": 8}
    assert parts["val"].labels.tolist() == [0, 1]
    assert sorted(parts["train"].keys + parts["val"].keys) == parts["all"].keys


def test_folder_split_does_not_follow_the_order_of_the_names(tmp_path):
    for i in range(40):
        save(tmp_path / f"{i:02d}.png", np.zeros((2, 2), np.uint8))
    val = Folder(path=str(tmp_path), size=2, split="val", val_fraction=0.25).keys
    assert len(val) == 10
    assert val not in ([f"{i:02d}.png" for i in range(10)], [f"{i:02d}.png" for i in range(30, 40)])
    (tmp_path / "40.png").write_bytes((tmp_path / "00.png").read_bytes())
    later = Folder(path=str(tmp_path), size=2, split="val", val_fraction=0.25).keys
    assert len(set(val) & set(later)) >= 9  # a new file moves at most one other


def test_folder_fingerprint_follows_names_sizes_and_conversion(folder):
    def fingerprint(**options):
        return Folder(**{"path": str(folder), "size": 8, **options}).info.fingerprint

    first = fingerprint()
    assert first == fingerprint()
    assert len({first, fingerprint(size=16), fingerprint(channels=1), fingerprint(split="val", val_fraction=0.5)}) == 4
    (folder / "cats" / "0.png").rename(folder / "cats" / "00.png")
    renamed = fingerprint()
    save(folder / "cats" / "1.png", np.random.default_rng(0).integers(0, 255, (24, 40, 3), dtype=np.uint8))
    assert len({first, renamed, fingerprint()}) == 3


def test_folder_survives_a_link_to_its_own_parent(folder):
    (folder / "cats" / "loop").symlink_to(folder)
    assert len(Folder(path=str(folder), size=8)) == 8


def test_folder_mistakes_are_one_clear_line(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    cases = {
        "no such folder": {"path": str(tmp_path / "nothing")},
        "is a file": {"path": str(folder / "cats" / "0.png")},
        "has no images": {"path": str(tmp_path / "empty")},
        "val_fraction above 0": {"path": str(folder), "split": "val"},
        "leaves no image": {"path": str(folder), "split": "val", "val_fraction": 0.01},
        "val_fraction=1.5 must be": {"path": str(folder), "val_fraction": 1.5},
        "size=0 must be positive": {"path": str(folder), "size": 0},
    }
    for message, options in cases.items():
        with pytest.raises(UsageError, match=message) as error:
            Folder(**{"size": 8, **options})
        assert "\n" not in str(error.value)


def test_data_parts_can_be_named_in_a_config(folder):
    assert {"fashion", "folder", "torchvision", "emoji", "tokens", "shapes", "meshes"} == registry.words("data").keys()
    spec = registry.check("data", {"type": "folder", "path": str(folder), "size": [24, 40]}, "data")
    assert registry.build("data", spec).info.shape == (3, 24, 40)


# torchvision


def write_mnist(root: Path, count: int = 6) -> None:
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images = np.arange(count, dtype=np.uint8)[:, None, None] * np.ones((1, 28, 28), np.uint8)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(
            struct.pack(">4B3I", 0, 0, 8, 3, count, 28, 28) + images.tobytes()
        )
        labels = bytes(range(count))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">4BI", 0, 0, 8, 1, count) + labels)


def test_torchvision_set_is_read_and_resized(tmp_path):
    pytest.importorskip("torchvision")
    from genkit.data.torchvision import Torchvision

    write_mnist(tmp_path)
    dataset = Torchvision(name="MNIST", root=str(tmp_path), split="val", size=32)
    batch = dataset.__getitems__([5, 2])
    assert (dataset.info.shape, len(dataset.info.class_names)) == ((1, 32, 32), 10)
    assert batch["label"].tolist() == [5, 2]
    torch.testing.assert_close(batch["x"][:, 0, 16, 16], torch.tensor([5.0, 2.0]) / 127.5 - 1)
    assert dataset[5]["key"] == "test/000005"


def test_torchvision_set_of_many_sizes_needs_a_size(tmp_path):
    pytest.importorskip("torchvision")
    from genkit.data.torchvision import Torchvision

    root = tmp_path / "dtd" / "dtd"
    (root / "labels").mkdir(parents=True)
    for i, name in enumerate(["bumpy", "woven"]):
        save(root / "images" / name / "a.jpg", np.full((30 + i, 50, 3), 100 * i, np.uint8))
    for split in ("train1", "val1"):
        (root / "labels" / f"{split}.txt").write_text("bumpy/a.jpg\nwoven/a.jpg\n")
    dataset = Torchvision(name="DTD", root=str(tmp_path), size=16)
    batch = dataset.__getitems__(np.array([1, 0]))
    assert batch["x"].shape == (2, 3, 16, 16)
    assert batch["label"].tolist() == [1, 0]
    assert dataset.info.class_names == ("bumpy", "woven")
    with pytest.raises(UsageError, match=r"set data\.size"):
        Torchvision(name="DTD", root=str(tmp_path))


def test_torchvision_mistakes_name_the_remedy(tmp_path):
    pytest.importorskip("torchvision")
    from genkit.data.torchvision import Torchvision

    with pytest.raises(UsageError, match="did you mean 'CIFAR10'") as error:
        Torchvision(name="CIFAR_10", root=str(tmp_path))
    with pytest.raises(
        UsageError, match=r"torchvision\.datasets\.CIFAR10\('.*', train=False, download=True\)"
    ) as error:
        Torchvision(name="CIFAR10", root=str(tmp_path), split="val")
    assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match=r"SVHN\('.*', split='train', download=True\)"):
        Torchvision(name="SVHN", root=str(tmp_path))
    with pytest.raises(UsageError, match=r"use data\.type=folder"):
        Torchvision(name="ImageFolder", root=str(tmp_path))


# Emoji


@pytest.fixture(scope="module")
def font() -> Path:
    try:
        return emoji.find_font()
    except UsageError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def emoji_cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def test_emoji_are_many_colourful_and_grouped(font, emoji_cache, monkeypatch):
    monkeypatch.setenv("GENKIT_CACHE", str(emoji_cache))
    dataset = Emoji(size=24)
    assert 1_200 < len(dataset) < 1_800
    assert dataset.info.shape == (3, 24, 24)
    assert torch.bincount(dataset.labels, minlength=len(emoji.GROUPS)).min() >= 20
    assert dataset.pixels.flatten(1).unique(dim=0).shape[0] > 0.97 * len(dataset)  # a missing glyph would repeat
    by_key = {key: i for i, key in enumerate(dataset.keys)}
    names = dataset.info.class_names
    for key, name in {"1F600 grinning face": "faces", "1F34E red apple": "food", "1F408 cat": "animals"}.items():
        assert names[dataset[by_key[key]]["label"]] == name
    red, green, blue = dataset[by_key["1F34E red apple"]]["x"][:, 14, 12]
    assert red > green + 0.5
    assert red > blue + 0.5
    corner = dataset.pixels[by_key["1F34E red apple"], :, 0, 0]
    assert corner.tolist() == [255, 255, 255]
    assert not any(key.startswith("1F3FB") for key in dataset.keys)  # skin tones are parts, no pictures


def test_emoji_split_is_disjoint_and_covers_every_class(font, emoji_cache, monkeypatch):
    monkeypatch.setenv("GENKIT_CACHE", str(emoji_cache))
    parts = {split: Emoji(size=24, split=split) for split in ("train", "val", "all")}
    assert set(parts["train"].keys) | set(parts["val"].keys) == set(parts["all"].keys)
    assert not set(parts["train"].keys) & set(parts["val"].keys)
    assert len(parts["val"].labels.unique()) == len(emoji.GROUPS)


def test_emoji_are_rendered_once_and_again_when_the_cache_is_damaged(font, emoji_cache, monkeypatch):
    monkeypatch.setenv("GENKIT_CACHE", str(emoji_cache))
    first = Emoji(size=24)
    calls = []
    stored = (first.pixels.numpy(), np.zeros(len(first), np.int64))
    monkeypatch.setattr(emoji, "render", lambda path, size: calls.append(size) or stored)
    assert Emoji(size=24).info == first.info
    assert calls == []
    (cached,) = emoji_cache.glob("emoji-*.npz")
    cached.write_bytes(cached.read_bytes()[:1000])
    Emoji(size=24)
    assert calls == [24]
    assert [path.name for path in emoji_cache.iterdir()] == [cached.name]


def test_emoji_without_a_font_name_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(emoji, "FONT_FOLDERS", ())
    monkeypatch.setattr(emoji.shutil, "which", lambda name: None)
    with pytest.raises(UsageError, match="apt install fonts-noto-color-emoji"):
        Emoji()
    with pytest.raises(UsageError, match="no such file"):
        Emoji(font=str(tmp_path / "none.ttf"))
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    monkeypatch.setenv("GENKIT_CACHE", str(tmp_path))
    with pytest.raises(UsageError, match="has no 109-pixel colour bitmaps"):
        Emoji(font=str(tmp_path / "broken.ttf"))


# check


def test_check_reports_counts_sizes_corrupt_files_and_duplicates(folder):
    truncated_jpeg(folder / "dogs" / "broken.jpg")
    save(folder / "dogs" / "same.bmp", np.full((24, 40, 3), 20 * 5, np.uint8))  # the pixels of dogs/5.png
    save(folder / "top.gif", np.zeros((10, 12), np.uint8))
    before = sorted(path.stat().st_mtime_ns for path in folder.rglob("*"))
    report = check.report(str(folder))
    assert json.loads(json.dumps(report)) == report
    assert (report["files"], report["good"], report["unlabelled"]) == (11, 10, 1)
    assert report["classes"] == {"cats": 4, "dogs": 5}
    assert (report["sizes"]["min"], report["sizes"]["median"], report["sizes"]["max"]) == ([10, 12], [24, 40], [24, 40])
    assert report["sizes"]["most_common"][0] == [[24, 40], 9]
    assert report["formats"] == {"PNG": 8, "BMP": 1, "GIF": 1}
    assert [item["key"] for item in report["corrupt"]] == ["dogs/broken.jpg"]
    assert report["duplicates"] == [["dogs/5.png", "dogs/same.bmp"]]
    assert before == sorted(path.stat().st_mtime_ns for path in folder.rglob("*"))
    text = check.render(report)
    assert "10 good images of 11 files" in text
    assert "dogs/broken.jpg: image file is truncated" in text


def test_check_knows_the_embedded_set_and_refuses_nothing_to_read(tmp_path, monkeypatch):
    monkeypatch.setenv("GENKIT_DATA", str(tmp_path))
    monkeypatch.setattr(fashion, "DEBIAN", tmp_path)
    assert check.report("fashion")["classes"]["bag"] == 1_000
    with pytest.raises(UsageError, match="no such folder"):
        check.report(str(tmp_path / "nothing"))


def test_check_of_corrupt_files_alone_still_reports(tmp_path):
    truncated_jpeg(tmp_path / "a.jpg")
    report = check.report(str(tmp_path))
    assert (report["good"], len(report["corrupt"])) == (0, 1)
    assert "corrupt    1" in check.render(report)
