"""Sets of images in folders, zips, arrays and datasets: equal wherever they lie, read ahead, hashed, converted, labelled."""

import hashlib
import io
import json
import threading
import time
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from genkit.data.folder import Folder
from genkit.data.memory import to_float
from genkit.errors import GenkitError
from genkit.metrics import arrays, features, image_files, sources
from genkit.metrics.statistics import FeatureSums
from tests.picture_files import SIDE, folder_of, in_order, named, pixels_of, png, png16, zip_of

# The same images in four places


@pytest.mark.parametrize("channels", [1, 3])
def test_folder_zip_and_npz_of_the_same_images_are_equal(tmp_path, channels):
    pixels = pixels_of(20, channels)
    members = named(pixels)
    ordered, labels = in_order(pixels)
    np.savez(tmp_path / "nyxc.npz", arr_0=ordered, arr_1=labels)
    np.savez_compressed(tmp_path / "ncyx.npz", arr_0=ordered.transpose(0, 3, 1, 2), label=labels)
    np.savez(tmp_path / "fortran.npz", arr_0=np.asfortranarray(ordered), label=labels.astype(np.uint8))
    sets = [
        sources.from_folder(folder_of(tmp_path / "folder", members)),
        sources.from_zip(zip_of(tmp_path / "deflated.zip", members)),
        sources.from_zip(zip_of(tmp_path / "stored.ZIP", members, zipfile.ZIP_STORED)),
        *(sources.from_npz(tmp_path / f"{name}.npz") for name in ("nyxc", "ncyx", "fortran")),
    ]
    expected = to_float(torch.from_numpy(ordered.transpose(0, 3, 1, 2)))
    for images in sets:
        assert (images.shape, images.count, images.has_labels) == ((channels, SIDE, SIDE), 20, True)
        x, label = images.read(0, 20)
        assert torch.equal(x, expected)
        assert label.tolist() == labels.tolist()
        assert images.notes == ()
        x, label = images.take([7, 0, 19])
        assert torch.equal(x, expected[[7, 0, 19]])
        assert label.tolist() == labels[[7, 0, 19]].tolist()
    assert len({images.sha for images in sets[:3]}) == 1
    assert len({images.sha for images in sets[3:]}) == 1


def test_features_do_not_depend_on_where_images_lie(tmp_path):
    pixels = pixels_of(12)
    ordered, _ = in_order(pixels)
    np.savez(tmp_path / "a.npz", arr_0=ordered)
    folder_of(tmp_path / "folder", named(pixels))
    zip_of(tmp_path / "a.zip", named(pixels))
    net = features.load("fashion-cnn")
    found = []
    for word in ("folder", "a.zip", "a.npz"):
        images, sums = sources.find(str(tmp_path / word)), FeatureSums(net.dim)
        for start in range(0, 12, 5):
            sums.update(features.ImageBatch(images.read(start, min(start + 5, 12))[0]).features(net))
        found.append(sums.moments())
    for other in found[1:]:
        assert torch.equal(other.mu, found[0].mu)
        assert torch.equal(other.sigma, found[0].sigma)


def test_npz_that_is_not_compressed_is_mapped_and_never_loaded_whole(tmp_path):
    pixels = pixels_of(9, 3)
    np.savez(tmp_path / "a.npz", arr_0=pixels)
    np.savez_compressed(tmp_path / "b.npz", arr_0=pixels)
    stored, packed = (arrays.Npz(tmp_path / name).map("arr_0") for name in ("a.npz", "b.npz"))
    assert isinstance(stored, np.memmap)
    assert not isinstance(packed, np.memmap)
    assert np.array_equal(stored, packed)
    grey = tmp_path / "grey.npz"
    np.savez(grey, arr_0=pixels[..., 0])
    assert sources.from_npz(grey).shape == (1, SIDE, SIDE)


# Reading ahead


def test_any_order_of_reads_gives_what_plain_reading_gives(tmp_path):
    pixels = pixels_of(23)
    images = sources.from_folder(folder_of(tmp_path, named(pixels)))
    ordered, labels = in_order(pixels)
    expected = to_float(torch.from_numpy(ordered.transpose(0, 3, 1, 2)))
    calls = [
        (0, 5),
        (5, 10),
        (10, 15),
        (3, 9),
        (9, 15),
        (15, 15),
        (15, 23),
        (20, 40),
        (0, 23),
        (22, 23),
        (23, 30),
        (0, 1),
    ]
    for first, last in calls:
        x, label = images.read(first, last)
        assert torch.equal(x, expected[first:last]), (first, last)
        assert label.tolist() == labels[first:last].tolist()


class Watched:
    """Files of a zip, with the names that were asked for."""

    def __init__(self, monkeypatch):
        self.asked = []
        plain = image_files._unpack
        monkeypatch.setattr(
            image_files, "_unpack", lambda archive, info: self.asked.append(info.filename) or plain(archive, info)
        )


def until(true, seconds=10.0):
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return true()


def test_one_batch_is_decoded_ahead_and_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr("genkit.data.folder.PROBED", 1)
    names = list(named(pixels_of(30)))
    images = sources.from_zip(zip_of(tmp_path / "a.zip", named(pixels_of(30))))
    watched = Watched(monkeypatch)
    images.read(0, 4)
    assert until(lambda: set(watched.asked) == set(names[:8]))
    time.sleep(0.1)
    assert set(watched.asked) == set(names[:8])
    images.read(4, 8)
    assert until(lambda: set(watched.asked) == set(names[:12]))
    assert len(watched.asked) == 12  # nothing was decoded twice


def test_threads_end_with_the_work(tmp_path):
    before = threading.active_count()
    images = sources.from_folder(folder_of(tmp_path, named(pixels_of(40))))
    for start in range(0, 40, 10):
        images.read(start, start + 10)
    images.read(0, 3)
    del images
    assert until(lambda: threading.active_count() <= before)


def test_damaged_file_is_told_when_its_own_batch_is_read(tmp_path):
    members = named(pixels_of(9))
    broken = list(members)[7]
    members[broken] = members[broken][:60]
    images = sources.from_folder(folder_of(tmp_path, members))
    images.read(0, 4)
    with pytest.raises(GenkitError, match=f"{broken} cannot be decoded: .*; repair or remove it"):
        images.read(4, 8)
    assert images.read(8, 9)[0].shape == (1, 1, SIDE, SIDE)


# The hash


def test_hash_is_of_names_and_contents_and_reads_each_file_once(tmp_path, monkeypatch):
    members = named(pixels_of(12))
    path = zip_of(tmp_path / "a.zip", members)
    watched = Watched(monkeypatch)
    images = sources.from_zip(path)
    for start in range(0, 12, 4):
        images.read(start, start + 4)
    asked = len(watched.asked)
    sha = images.sha
    assert len(watched.asked) == asked
    assert sources.from_zip(path).sha == sha  # of a set nobody has read
    expected = hashlib.sha256()
    for name, data in members.items():
        expected.update(name.encode() + b"\0" + hashlib.sha256(data).digest())
    assert sha == expected.hexdigest()

    first, *_, last = members
    renamed = {name if name != last else "2/999.png": data for name, data in members.items()}
    changed = members | {first: png(pixels_of(1, seed=9)[0])}
    swapped = members | {first: members[last], last: members[first]}
    for number, other in enumerate((renamed, changed, swapped)):
        assert sources.from_zip(zip_of(tmp_path / f"{number}.zip", other)).sha != sha


def test_hash_of_an_npz_is_of_pixels_and_shape_whatever_the_layout(tmp_path):
    pixels = pixels_of(300, 1, 4)
    for name, array in {
        "a": pixels,
        "b": pixels[..., 0],
        "c": pixels.transpose(0, 3, 1, 2),
        "wide": pixels.reshape(300, 2, 8, 1),
    }.items():
        np.savez(tmp_path / f"{name}.npz", arr_0=array)
    shas = [sources.from_npz(tmp_path / f"{name}.npz").sha for name in ("a", "b", "c", "wide")]
    assert len(set(shas[:3])) == 1
    assert shas[3] != shas[0]


def test_a_dataset_folder_has_no_hash_of_its_pixels(tmp_path):
    folder_of(tmp_path, named(pixels_of(4)))
    assert not sources.from_dataset(Folder(path=str(tmp_path), size=SIDE), "folder").is_exact
    assert sources.find("fashion:val").is_exact
    assert sources.from_folder(tmp_path).is_exact


# What is done to images


def test_conversions_are_those_of_the_folder_dataset_and_are_counted(tmp_path):
    colour = pixels_of(40, 4)
    members = {f"{i:02d}.png": png(image[..., :3]) for i, image in enumerate(colour)}
    exif = Image.Exif()
    exif[0x0112] = 3
    buffer = io.BytesIO()
    Image.fromarray(colour[5][..., :4], "CMYK").save(buffer, format="TIFF")
    animation = io.BytesIO()
    frames = [Image.fromarray(colour[i][..., 0]) for i in range(3)]
    frames[0].save(animation, format="GIF", save_all=True, append_images=frames[1:])
    members |= {
        "00.png": png(colour[0]),
        "01.png": png(colour[1]),
        "02.png": png16(2, 3),
        "03.png": png16(0, 1),
        "04.png": png(pixels_of(1)[0]),
        "05.tif": buffer.getvalue(),
        "06.gif": animation.getvalue(),
        "07.png": png(colour[7][..., :3], exif=exif),
    }
    del members["05.png"], members["06.png"]
    for convert, name in (("P", "08.png"), ("LA", "09.png")):
        buffer = io.BytesIO()
        Image.fromarray(colour[8][..., :3]).convert(convert).save(buffer, format="PNG")
        members[name] = buffer.getvalue()
    folder_of(tmp_path, members)
    images = sources.from_folder(tmp_path)
    assert images.shape == (3, SIDE, SIDE)
    x = torch.cat([images.read(start, start + 8)[0] for start in range(0, 40, 8)])
    dataset = Folder(path=str(tmp_path), size=SIDE, channels=3)
    assert torch.equal(x, dataset.__getitems__(np.arange(40))["x"])
    notes = images.notes
    assert "2 of 40 images are RGBA: alpha was laid over white" in notes
    assert "1 of 40 images is LA: alpha was laid over white" in notes
    assert "1 of 40 images is 16-bit colour: only the high byte was kept" in notes
    assert "1 of 40 images is 16-bit grey: divided by 257" in notes
    assert "1 of 40 images is CMYK: converted to RGB" in notes
    assert "2 of 40 images are palette: colours were looked up" in notes  # a GIF is one too
    assert "1 of 40 images is animated: the first frame was taken" in notes
    assert "1 of 40 images is stored turned: set upright by their EXIF orientation" in notes
    assert any("grey among colour: repeated three times" in note for note in notes)
    images.read(0, 8)
    assert images.notes == notes  # an image that is read again is not counted again


def test_a_grey_set_stays_grey_and_colour_in_it_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("genkit.data.folder.PROBED", 2)
    members = {f"{i}.png": png(image) for i, image in enumerate(pixels_of(7))} | {"1.png": png(pixels_of(1, 3)[0])}
    images = sources.from_folder(folder_of(tmp_path, members))
    assert images.shape[0] == 1
    images.read(0, 7)
    assert images.notes == ("1 of 7 images is colour among grey: reduced to luma",)
    # Colour anywhere among the probed files decides, not the first file.
    (tmp_path / "3.png").write_bytes(members["1.png"])
    assert sources.from_folder(tmp_path).shape[0] == 3


def test_what_is_no_image_is_counted_and_named(tmp_path):
    members = named(pixels_of(3)) | {f"{name}.txt": b"?" for name in "abcd"} | {"grid.png": b"?", ".hidden": b"?"}
    members |= {"__MACOSX/0/x.png": b"?"}
    images = sources.from_zip(zip_of(tmp_path / "a.zip", members))
    expected = (
        "pictures called grid*, left out: 1",
        "files that are no images, left out: 4 (a.txt, b.txt, c.txt, ...)",
    )
    assert images.notes == expected
    del members["__MACOSX/0/x.png"]
    assert set(sources.from_folder(folder_of(tmp_path / "folder", members)).notes) == set(expected)


def test_images_a_dataset_cannot_decode_are_named(tmp_path):
    members = named(pixels_of(6)) | {"1/001.png": b"broken"}
    images = sources.from_dataset(Folder(path=str(folder_of(tmp_path, members)), size=SIDE), "folder train")
    assert len(images.read(0, 6)[0]) == 5
    assert images.notes == ("images of folder train that cannot be decoded, left out: 1 (1/001.png)",)


# Labels


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_labels_come_from_a_record_else_from_folders(tmp_path, kind):
    members = dict(
        sorted({f"{top}/{i}.png": png(pixels_of(1)[0]) for i, top in enumerate(("Bag", "coat", "7", "x²"))}.items())
    )

    numbers = iter(range(99))

    def open_(extra):
        path = tmp_path / str(next(numbers))
        if kind == "folder":
            return sources.from_folder(folder_of(path, members | extra), ("coat", "bag"))
        return sources.from_zip(zip_of(path.with_suffix(".zip"), members | extra), ("coat", "bag"))

    names = list(members)
    assert names == ["7/2.png", "Bag/0.png", "coat/1.png", "x²/3.png"]
    images = open_({})
    assert images.read(0, 4)[1].tolist() == [7, 1, 0, -1]
    assert not images.has_labels
    record = {"labels": [[name, 10 * i] for i, name in enumerate(names)]}
    images = open_({"dataset.json": json.dumps(record).encode()})
    assert images.read(0, 4)[1].tolist() == [0, 10, 20, 30]
    assert images.has_labels
    assert images.notes == ()
    assert open_({"dataset.json": b'{"labels": null}'}).read(0, 4)[1].tolist() == [-1] * 4
    samples = {"samples": [{"file": names[0], "label": 3}]}
    assert open_({"samples.json": json.dumps(samples).encode()}).read(0, 4)[1].tolist() == [3, -1, -1, -1]
    wrong = (
        b"[",
        b"[]",
        b'{"labels": [["a.png", [0, 1]]]}',
        b'{"labels": [["a.png"]]}',
        b"{}",
        b'{"labels": [["a.png", 1e3]]}',
    )
    for content in wrong:
        with pytest.raises(GenkitError, match=r"dataset\.json is not .*; repair or remove it") as caught:
            open_({"dataset.json": content})
        assert "\n" not in str(caught.value)


def test_labels_of_an_npz_must_be_integers_one_for_each_image(tmp_path):
    for labels in (np.zeros(3, int), np.zeros(2), np.zeros((2, 10), int)):
        np.savez(tmp_path / "a.npz", arr_0=pixels_of(2), arr_1=labels)
        with pytest.raises(GenkitError, match="2 images need as many integers as labels, but arr_1 is"):
            sources.from_npz(tmp_path / "a.npz")
