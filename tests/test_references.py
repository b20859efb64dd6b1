"""Reference files: every layout there is, what is refused, damage."""

import io
import re
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from genkit.errors import GenkitError, UsageError
from genkit.metrics import arrays, references, sources
from genkit.metrics.statistics import FeatureSums, Moments
from genkit.weights import file_sha256
from tests.reference_files import DIM, MU, NET, PIXELS, ROWS, SIGMA, moments, npz

# Files of other tools, written as they write them


@pytest.mark.parametrize(
    ("layout", "arrays"),
    [
        ("fid", {"mu": MU, "sigma": SIGMA}),
        ("fid", {"mu": MU.astype(np.float32), "sigma": SIGMA.astype(np.float32)}),
        ("fid", {"mu": MU.astype(">f8"), "sigma": np.asfortranarray(SIGMA)}),
        ("lucidrains", {"m2": MU, "s2": SIGMA}),
        ("adm", {"mu": MU, "sigma": SIGMA, "mu_s": MU[:3], "sigma_s": SIGMA[:3, :3], "arr_0": PIXELS}),
        ("adm", {"mu": MU, "sigma": SIGMA, "mu_s": MU[:3], "sigma_s": SIGMA[:3, :3]}),
        ("images", {"arr_0": PIXELS}),
    ],
)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_layouts_of_other_tools_are_told_by_their_keys(tmp_path, layout, arrays, save):
    save(tmp_path / "ref.npz", **arrays)
    found = references.read(tmp_path / "ref.npz")
    assert (found.layout, found.name, found.net_sha256, found.features) == (layout, "ref.npz", "", None)
    assert found.sha == file_sha256(tmp_path / "ref.npz")
    assert found.count == (5 if layout == "images" else 0)
    if layout != "images":
        tolerance = 1e-6 if arrays.get("mu", MU).dtype == np.float32 else 1e-15
        np.testing.assert_allclose(found.moments["pool"].mu, MU, rtol=tolerance)
        np.testing.assert_allclose(found.moments["pool"].sigma, SIGMA, rtol=10 * tolerance)
    assert ("spatial" in found.moments) == ("mu_s" in arrays)
    if "mu_s" in arrays:
        np.testing.assert_allclose(found.moments["spatial"].sigma, SIGMA[:3, :3])
    assert (found.images is not None) == ("arr_0" in arrays)
    if found.images is not None:
        assert found.images.shape == (3, 8, 8)
        pixels = (found.images.read(0, 5)[0] * 127.5 + 127.5).round().permute(0, 2, 3, 1)
        assert np.array_equal(pixels.numpy(), PIXELS)


# Our own files


@pytest.mark.parametrize("format", references.FORMATS)
def test_what_is_written_is_read_again_here_and_by_plain_numpy(tmp_path, format):
    path, layers = tmp_path / "deep" / "ref.npz", {"pool": moments()}
    rows = torch.from_numpy(ROWS).float()
    if format in ("adm", "genkit"):
        layers["spatial"] = Moments(
            torch.from_numpy(MU[:3]), torch.from_numpy(SIGMA[:3, :3]), 40, "ab" * 32, "net-v1", "x"
        )
    images = sources.from_npz(npz(tmp_path / "images.npz", arr_0=np.tile(PIXELS[..., :1], (8, 1, 1, 1))))
    references.write(path, format, layers, features=rows, images=images)
    found = references.read(path)
    assert (found.layout, found.count, found.net_sha256, found.protocol) == (format, 40, "ab" * 32, "net-v1")
    assert found.source == "forty rows"
    assert torch.equal(found.moments["pool"].mu, layers["pool"].mu)
    assert torch.equal(found.moments["pool"].sigma, layers["pool"].sigma)
    assert ("spatial" in found.moments) == ("spatial" in layers)
    assert (found.images is not None) == (format == "adm")
    if format == "genkit":
        assert torch.equal(found.features, rows)
        found.features[0, 0] = 5  # it is ours, and the file stays as it is
        assert torch.equal(references.read(path).features, rows)
    else:
        assert found.features is None
    with np.load(path, allow_pickle=False) as plain:
        assert np.array_equal(plain["mu"], MU)
        assert np.array_equal(plain["sigma"], SIGMA)
        if format == "adm":
            assert {"mu_s", "sigma_s"} <= set(plain.files)
            assert plain["arr_0"].shape == (40, 8, 8, 3)
            assert np.array_equal(plain["arr_0"], np.tile(PIXELS[..., :1], (8, 1, 1, 3)))  # grey, three times
    again = tmp_path / "again.npz"
    references.write(again, format, layers, features=rows, images=images)
    assert again.read_bytes() == path.read_bytes()


def test_features_are_mapped_from_the_file(tmp_path):
    references.write(tmp_path / "ref.npz", "genkit", {"pool": moments()}, features=torch.from_numpy(ROWS))
    mapped = arrays.Npz(tmp_path / "ref.npz").map("features", "c")
    assert isinstance(mapped, np.memmap)
    assert mapped.offset % 64 == 0


def test_images_of_an_adm_reference_are_spread_over_all(tmp_path, monkeypatch):
    monkeypatch.setattr(references, "ADM_IMAGES", 4)
    pixels = np.arange(10, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    images = sources.from_npz(npz(tmp_path / "images.npz", arr_0=pixels))
    layers = {"pool": moments(9), "spatial": moments(9)}
    images.missing[4] = "corrupt.png"  # as if a dataset had left it out
    references.write(tmp_path / "ref.npz", "adm", layers, images=images)
    with np.load(tmp_path / "ref.npz") as plain:
        assert plain["arr_0"][:, 0, 0, 0].tolist() == [0, 2, 5, 7]  # of 0 1 2 3 5 6 7 8 9
    layers = {"pool": moments(4), "spatial": moments(4)}  # of the first four and the one left out
    references.write(tmp_path / "ref.npz", "adm", layers, images=images)
    with np.load(tmp_path / "ref.npz") as plain:
        assert plain["arr_0"][:, 0, 0, 0].tolist() == [0, 1, 2, 3]


def test_moments_survive_a_file(tmp_path):
    sums = FeatureSums(DIM)
    sums.update(torch.from_numpy(ROWS))
    saved = sums.moments("ab" * 32, "net-v1", "forty rows")
    saved.save(tmp_path / "ref.npz")
    found = references.read(tmp_path / "ref.npz")
    assert found.layout == "genkit"
    loaded = found.moments["pool"]
    assert torch.equal(loaded.mu, saved.mu)
    assert torch.equal(loaded.sigma, saved.sigma)
    assert (loaded.count, loaded.net_sha256, loaded.protocol, loaded.source) == (40, "ab" * 32, "net-v1", "forty rows")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "ref.npz"
    path.write_text("old")
    images = sources.from_npz(npz(tmp_path / "images.npz", arr_0=PIXELS))
    images.take = lambda numbers: 1 / 0
    with pytest.raises(ZeroDivisionError):
        references.write(path, "adm", {"pool": moments(), "spatial": moments()}, images=images)
    assert path.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images.npz", "ref.npz"]
    with pytest.raises(UsageError, match="format=pt is not one of genkit, adm, fid, edm"):
        references.write(path, "pt", {"pool": moments()})
    with pytest.raises(UsageError, match="format=adm needs spatial features"):
        references.write(path, "adm", {"pool": moments()}, images=images)


# What is refused


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mean": np.zeros(3)}, r"holds mean float64 \[3\]; statistics need mu"),
        ({}, "holds nothing; statistics need mu"),
        ({"mu": np.zeros(3)}, "statistics need mu .* and sigma"),
        ({"m2": np.zeros(3)}, "statistics need m2 .* and s2"),
        ({"mu": MU, "sigma": SIGMA, "mu_s": MU}, "statistics need mu_s .* and sigma_s"),
        ({"mu": np.zeros(3), "sigma": np.zeros((2, 2))}, r"mu has shape \(3,\) and sigma \(2, 2\)"),
        ({"mu": np.zeros((1, 3)), "sigma": np.zeros((3, 3))}, "expected"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, "expected"),
        ({"mu": np.full(2, np.nan), "sigma": np.zeros((2, 2))}, "not finite"),
        ({"mu": np.zeros(2), "sigma": np.full((2, 2), np.inf)}, "not finite"),
        ({"mu": np.zeros(2), "sigma": np.array([[1, 2], [0, 1.0]])}, "not a covariance: it must be symmetric"),
        ({"mu": np.zeros(2), "sigma": np.array([[-1, 0], [0, 1.0]])}, "not a covariance"),
        ({"mu": np.zeros(2, complex), "sigma": np.zeros((2, 2))}, "mu is complex128, not real numbers"),
        ({"mu": np.array(["a"]), "sigma": np.zeros((1, 1))}, "not real numbers"),
        ({"mu": np.array([{}], dtype=object), "sigma": np.zeros((1, 1))}, "pickled objects, which are never loaded"),
        ({"mu": MU, "sigma": SIGMA, "count": np.array(-1)}, "not a number of images"),
        ({"mu": MU, "sigma": SIGMA, "count": np.zeros(2)}, "not a number of images"),
        ({"mu": MU, "sigma": SIGMA, "source": np.zeros(2)}, "source is .* not a short text"),
        ({"mu": MU, "sigma": SIGMA, "format": np.array("v9")}, "has format 'v9'; known: genkit"),
        ({"mu": MU, "sigma": SIGMA, "net_sha256": np.array("a"), "features": ROWS}, "features are float64"),
        (
            {"mu": MU, "sigma": SIGMA, "net_sha256": np.array("a"), "features": ROWS.astype(np.float32)},
            r"mu and count say float32 \[0, 6\]",
        ),
        ({"arr_0": PIXELS.astype(np.float32)}, "arr_0 must be uint8"),
    ],
)
def test_unusable_files_are_refused_in_one_line(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(GenkitError, match=message) as caught:
        references.read(tmp_path / "bad.npz")
    assert "bad.npz" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_npz_are_refused(tmp_path):
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "empty.npz").touch()
    for name in ("text.npz", "empty.npz", "missing.npz", "."):
        with pytest.raises(GenkitError, match=re.escape(name)):
            references.read(tmp_path / name)


def test_statistics_of_another_net_are_refused(tmp_path):
    references.write(tmp_path / "ours.npz", "genkit", {"pool": moments()})
    references.read(tmp_path / "ours.npz").check_net(NET)
    other = SimpleNamespace(**vars(NET) | {"sha256": "cd" * 32, "name": "fashion-cnn", "protocol": "fashion-cnn-v1"})
    with pytest.raises(
        GenkitError, match=r"ours\.npz holds statistics of net-v1 \(sha abababab\); they cannot be compared"
    ):
        references.read(tmp_path / "ours.npz").check_net(other)
    resized = SimpleNamespace(**vars(NET) | {"protocol": "net-v1-clean"})  # the same weights, shown other pixels
    with pytest.raises(GenkitError, match=r"holds statistics of net-v1 .* they cannot be compared with net-v1-clean"):
        references.read(tmp_path / "ours.npz").check_net(resized)
    bare = references.read(npz(tmp_path / "bare.npz", mu=MU, sigma=SIGMA))
    bare.check_net(NET)
    with pytest.raises(GenkitError, match=r"does not say which net made its 6-dimensional statistics"):
        bare.check_net(other)


@pytest.mark.filterwarnings("ignore")
def test_damaged_files_give_one_line_or_statistics(tmp_path):
    path = tmp_path / "ref.npz"
    images = sources.from_npz(npz(tmp_path / "images.npz", arr_0=PIXELS[:2, :2, :2]))
    layers = {"pool": Moments(torch.ones(2), torch.eye(2), 2, "ab", "net", "x")}
    references.write(path, "adm", layers | {"spatial": layers["pool"]}, images=images)
    adm = path.read_bytes()
    references.write(path, "genkit", layers, features=torch.ones(2, 2))
    files = [adm, path.read_bytes()]

    @settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(st.data())
    def check(draw):
        whole = draw.draw(st.sampled_from(files))
        data = bytearray(whole)
        for at, value in draw.draw(
            st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), max_size=4)
        ):
            data[at] = value
        path.write_bytes(bytes(data[: draw.draw(st.just(len(whole)) | st.integers(0, len(whole)))]))
        try:
            found = references.read(path)
            assert all(m.sigma.isfinite().all() for m in found.moments.values())
            if found.images is not None:
                found.images.read(0, found.images.count)
        except GenkitError as error:
            assert "\n" not in str(error)  # noqa: PT017 - whether it is raised depends on the bytes

    check()


def test_npz_in_memory_sizes_never_follow_a_forged_header(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(2))
    forged = buffer.getvalue().replace(b"(2,), }", b"(9999999999999,), }".ljust(7))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("mu.npy", forged)
        archive.writestr("sigma.npy", forged)
    with pytest.raises(GenkitError, match="cannot be read as npz"):
        references.read(tmp_path / "a.npz")
