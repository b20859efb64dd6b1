"""Sets of images that cannot be used: one line each, whatever bytes a file has."""

import io
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from genkit.errors import GenkitError, UsageError
from genkit.metrics import arrays, image_files, sources
from tests.picture_files import SIDE, folder_of, pixels_of, png, zip_of

# Refusals


def test_mixed_sizes_are_refused_with_what_to_do(tmp_path):
    members = {"a.png": png(pixels_of(1)[0]), "b.png": png(pixels_of(1, side=30)[0])}
    for images in (
        sources.from_folder(folder_of(tmp_path / "f", members)),
        sources.from_zip(zip_of(tmp_path / "a.zip", members)),
    ):
        with pytest.raises(
            GenkitError, match=r"mixes sizes: a.png is 1x28x28, b.png is 1x30x30 .*resize them first \(`genkit data"
        ):
            images.read(0, 2)


def test_float_images_are_refused_by_name(tmp_path):
    array = np.full((SIDE, SIDE), np.nan, np.float32)
    Image.fromarray(array).save(tmp_path / "nan.tif")
    with pytest.raises(GenkitError, match=r"nan\.tif cannot be decoded: 32-bit float pixels have no stated range"):
        sources.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("data", "message"), [(b"", "empty file"), (b"GIF89a", "cannot be decoded"), (b"hello", "its format is not known")]
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, data, message):
    for make in (
        lambda: sources.from_folder(folder_of(tmp_path / "f", {"a.png": data})),
        lambda: sources.from_zip(zip_of(tmp_path / "a.zip", {"a.png": data})),
    ):
        with pytest.raises(GenkitError, match=message) as caught:
            make()
        assert "a.png" in str(caught.value)
        assert "BytesIO" not in str(caught.value)


def test_folders_and_zips_without_images_are_wrong_usage(tmp_path):
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "a.txt").touch()
    with pytest.raises(UsageError, match="has no images"):
        sources.from_folder(tmp_path / "f")
    with pytest.raises(UsageError, match="has no images"):
        sources.from_zip(zip_of(tmp_path / "a.zip", {"a.txt": b""}))
    with pytest.raises(UsageError, match="no images besides grid"):
        sources.from_zip(zip_of(tmp_path / "a.zip", {"grid.png": b""}))


def forge(path, offset_in_central, value):
    """Overwrite four bytes of the first entry of a zip's central directory."""
    data = bytearray(path.read_bytes())
    at = data.rfind(b"PK\x01\x02")
    data[at + offset_in_central : at + offset_in_central + 4] = struct.pack("<I", value)
    path.write_bytes(data)


def test_zip_bombs_are_refused_unopened(tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "MAX_MEMBER", 10_000)
    path = zip_of(tmp_path / "a.zip", {"a.png": bytes(10_001)})
    with pytest.raises(GenkitError, match=r"a\.png would unpack to 10,001 bytes, more than the 10,000"):
        sources.from_zip(path)
    # One that lies about its size gives no more than it declares, and is found out.
    path = zip_of(tmp_path / "b.zip", {"a.png": bytes(50_000_000)})
    forge(path, 24, 9_000)
    tracemalloc.start()
    with pytest.raises(GenkitError, match=r"a\.png cannot be decoded"):
        sources.from_zip(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000
    path = zip_of(tmp_path / "c.zip", {"a.png": png(pixels_of(1)[0])}, zipfile.ZIP_BZIP2)
    with pytest.raises(GenkitError, match="a method other than stored or deflated"):
        sources.from_zip(path)


def test_encrypted_and_damaged_members_are_named(tmp_path):
    path = zip_of(tmp_path / "a.zip", {"a.png": png(pixels_of(1)[0])})
    data = bytearray(path.read_bytes())
    data[6] |= 1
    data[data.rfind(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(GenkitError, match=r"a\.png cannot be decoded: .*encrypted"):
        sources.from_zip(path)
    (tmp_path / "b.zip").write_text("hello")
    with pytest.raises(GenkitError, match="cannot be read as zip"):
        sources.from_zip(tmp_path / "b.zip")
    with pytest.raises(GenkitError, match="no such file"):
        sources.from_zip(tmp_path / "c.zip")


def test_compressed_arrays_have_a_limit(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", arr_0=np.zeros((10, 64, 64, 1), np.uint8))
    monkeypatch.setattr(arrays, "MAX_UNPACKED", 1000)
    with pytest.raises(GenkitError, match=r"arr_0 would unpack to .* save it uncompressed"):
        sources.from_npz(tmp_path / "a.npz").read(0, 1)


def test_arrays_that_would_reach_beyond_their_file_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, arr_0=np.zeros((10, 8, 8, 1), np.uint8))
    size = 128 + 99 * 64
    forge(path, 20, size)  # packed
    forge(path, 24, size)  # unpacked
    path.write_bytes(path.read_bytes().replace(b"(10, 8, 8, 1)", b"(99, 8, 8, 1)"))
    with pytest.raises(GenkitError, match="cannot be read as npz"):
        sources.from_npz(path).read(0, 99)


def test_what_nobody_can_find_is_told_with_all_forms(tmp_path):
    with pytest.raises(UsageError, match="neither a folder, a zip or npz of images, nor a dataset") as caught:
        sources.find("fashon")
    assert "did you mean 'fashion'" in str(caught.value)
    assert "train or val of a run" in str(caught.value)
    with pytest.raises(UsageError, match="path=train means a split"):
        sources.find("train", option="path")
    with pytest.raises(GenkitError, match="no such file"):
        sources.find(str(tmp_path / "none.npz"))
    assert sources.find("val", {"type": "fashion", "source": "embedded", "split": "train", "size": None}).count == 1000


def test_file_names_never_break_a_line(tmp_path):
    path = zip_of(tmp_path / "a.zip", {"a\nb.png": b"x"})
    with pytest.raises(GenkitError) as caught:
        sources.from_zip(path)
    assert "\n" not in str(caught.value)


# Whatever bytes a file has, the answer is one line.


def packed(kind):
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("dataset.json", '{"labels": [["a.png", 1]]}')
            archive.writestr("a.png", png(pixels_of(1, side=6)[0]))
    else:
        np.savez(buffer, arr_0=pixels_of(2, side=4), arr_1=np.arange(2))
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["zip", "npz"])
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_give_one_line_or_images(tmp_path, kind):
    whole = packed(kind)
    path = tmp_path / f"a.{kind}"

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(
        st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), max_size=4),
        st.integers(0, len(whole)) | st.just(len(whole)),
        st.binary(max_size=8),
    )
    def check(changes, length, tail):
        data = bytearray(whole)
        for at, value in changes:
            data[at] = value
        path.write_bytes(bytes(data[:length]) + tail)
        try:
            images = sources.find(str(path))
            x, _ = images.read(0, images.count)
            assert x.shape == (images.count, *images.shape)
            assert images.sha
        except GenkitError as error:
            assert "\n" not in str(error)  # noqa: PT017 - whether it is raised depends on the bytes

    check()
