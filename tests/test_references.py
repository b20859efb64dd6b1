"""Reference files: every layout there is, what is refused, how they are made, and what is kept for the next evaluation."""

import io
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from genkit import stats as making
from genkit.data.fashion import Fashion
from genkit.errors import GenkitError, UsageError
from genkit.evaluation import evaluate
from genkit.metrics import arrays, features, known, references, sources
from genkit.metrics.frechet import Frechet
from genkit.metrics.rows import FeatureRows
from genkit.metrics.statistics import FeatureSums, Moments, covariance_root, frechet_distance
from genkit.stats import stats
from genkit.weights import file_sha256

DIM = 6
RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(40, DIM)) @ RNG.normal(size=(DIM, DIM))
MU, SIGMA = ROWS.mean(0), np.cov(ROWS, rowvar=False)
PIXELS = RNG.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
NET = SimpleNamespace(name="inception-2015", protocol="net-v1", sha256="ab" * 32, dims={"pool": DIM})


def npz(path, **arrays):
    np.savez(path, **arrays)
    return path


def moments(count=40):
    return Moments(torch.from_numpy(MU), torch.from_numpy(SIGMA), count, "ab" * 32, "net-v1", "forty rows")


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


# The distance


def spectrum(dim, rank, seed):
    """A covariance of this rank with eigenvalues over three decades."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))
    values = torch.cat([torch.logspace(0, -3, rank, dtype=torch.float64), torch.zeros(dim - rank, dtype=torch.float64)])
    sigma = basis * values @ basis.T
    return (sigma + sigma.T) / 2, basis, values


@pytest.mark.parametrize(("rank1", "rank2"), [(40, 40), (40, 7), (7, 40), (9, 7), (1, 1)])
def test_distance_of_covariances_with_the_same_axes_is_known(rank1, rank2):
    sigma1, basis, values1 = spectrum(40, rank1, 0)
    values2 = torch.cat([torch.logspace(-2, 1, rank2, dtype=torch.float64), torch.zeros(40 - rank2)])
    sigma2 = basis * values2 @ basis.T
    sigma2 = (sigma2 + sigma2.T) / 2
    mu = torch.zeros(40, dtype=torch.float64)
    expected = float((values1.sqrt() - values2.sqrt()).square().sum()) + 4 * 40
    found = frechet_distance(mu, sigma1, mu + 2, sigma2)
    assert found == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(mu + 2, sigma2, mu, sigma1) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(mu, sigma1, mu + 2, sigma2, covariance_root(sigma1)) == found


def test_distance_equals_scipys_matrix_root():
    linalg = pytest.importorskip("scipy.linalg")
    (sigma1, _, _), (sigma2, _, _) = spectrum(60, 60, 1), spectrum(60, 60, 2)
    mu = torch.zeros(60)
    overlap = np.trace(linalg.sqrtm(sigma1.numpy() @ sigma2.numpy())).real
    expected = float(sigma1.trace() + sigma2.trace()) - 2 * overlap
    assert frechet_distance(mu, sigma1, mu, sigma2) == pytest.approx(expected, rel=1e-9)


def test_roots_have_the_rank_of_their_covariance():
    for rank in (50, 49, 26, 13, 1, 0):
        sigma, _, _ = spectrum(50, rank, rank)
        root = covariance_root(sigma)
        assert root.shape == (50, rank)
        assert torch.allclose(root @ root.T, sigma, rtol=0, atol=1e-13)
    still = torch.zeros(50, 50, dtype=torch.float64)  # whose first features never vary
    still[30:, 30:] = spectrum(20, 15, 5)[0]
    root = covariance_root(still)
    assert root.shape == (50, 15)
    assert torch.allclose(root @ root.T, still, rtol=0, atol=1e-13)
    few = torch.randn(20, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert covariance_root(torch.cov(few.T)).shape == (50, 19)


def test_distance_to_itself_is_nothing_even_without_variance():
    for rank in (30, 5, 0):
        sigma, _, _ = spectrum(30, rank, 3)
        assert frechet_distance(torch.ones(30), sigma, torch.ones(30), sigma) == pytest.approx(0, abs=1e-12)


# genkit stats


def fashion_folder(path, count):
    pixels = Fashion(source="embedded", split="val").pixels[:count, 0].numpy()
    for i, image in enumerate(pixels):
        (path / str(i % 2)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path / str(i % 2) / f"{i:04d}.png")
    return path


def test_statistics_of_a_folder_serve_as_reference_for_every_metric(tmp_path):
    folder = fashion_folder(tmp_path / "images", 60)
    found = stats(folder, tmp_path / "ref.npz", batch_size=17)
    assert found["images"] == 60
    assert (found["out"], found["format"], found["net"]) == (str(tmp_path / "ref.npz"), "genkit", "fashion-cnn-v1")
    assert found["sha"] == file_sha256(tmp_path / "ref.npz")
    reference = references.read(tmp_path / "ref.npz")
    assert reference.source == f"folder images sha {sources.from_folder(folder).sha[:8]}"
    assert reference.features.shape == (60, 128)
    by_images = evaluate(folder, reference="fashion:val", metrics=["frechet"])
    val = stats("fashion:val", tmp_path / "val.npz")
    assert val["images"] == 1000
    by_file = evaluate(folder, reference=str(tmp_path / "val.npz"), metrics=["frechet"])
    assert by_file["FD"] == pytest.approx(by_images["FD"], rel=1e-6)  # other batches, other last digits
    metric = Frechet()
    metric.use(reference)
    metric.update(fake=sources.from_folder(folder).read(0, 60)[0])
    assert metric.result()["FD (fashion-cnn-v1)"] == pytest.approx(0, abs=1e-4)


def test_statistics_of_the_front_and_of_a_run(tmp_path):
    folder = fashion_folder(tmp_path / "images", 8)
    found = stats(folder, tmp_path / "ref.npz", count=5)
    assert found["images"] == 5
    reference = references.read(tmp_path / "ref.npz")
    assert reference.source.endswith("(the first 5 of 8)")
    images = sources.from_folder(folder)
    expected = features.load("fashion-cnn")(features.ImageBatch(images.read(0, 5)[0]).x)
    torch.testing.assert_close(reference.features, expected)

    run = tmp_path / "run"
    run.mkdir()
    spec = {"type": "fashion", "source": "embedded", "split": "val", "size": None}
    (run / "config.resolved.yaml").write_text(json.dumps({"name": "toy", "data": spec}))
    assert stats(run, tmp_path / "run.npz", count=30)["images"] == 30
    assert "fashion train" in references.read(tmp_path / "run.npz").source


class Stub(torch.nn.Module):
    """Means of strips of pixels."""

    chunk = 8
    dims = {"pool": 4, "spatial": 3, "logits": 2}  # noqa: RUF012

    def layers(self, x):
        return {name: x.flatten(1)[:, : 12 * dim].unflatten(1, (dim, 12)).mean(2) for name, dim in self.dims.items()}


@pytest.fixture
def stub(monkeypatch):
    net = features.FeatureNet("inception-2015", "inception-2015", Stub.dims, "ee" * 32, (), Stub())
    asked = []
    monkeypatch.setattr(making.nets, "load", lambda name, weights, device: asked.append((name, weights)) or net)
    return asked


@pytest.mark.parametrize("format", references.FORMATS)
def test_every_format_can_be_made_from_every_source(tmp_path, stub, format):
    np.savez(tmp_path / "images.npz", arr_0=np.tile(PIXELS, (3, 1, 1, 1)))
    found = stats(tmp_path / "images.npz", tmp_path / "ref.npz", format=format, weights="w.pth", batch_size=4)
    assert found["images"] == 15
    assert stub == [("inception-2015", "w.pth")]
    reference = references.read(tmp_path / "ref.npz")
    assert (reference.layout, reference.count, reference.net_sha256) == (format, 15, "ee" * 32)
    assert set(reference.moments) == ({"pool", "spatial"} if format in ("adm", "genkit") else {"pool"})
    assert (reference.images.count if reference.images else 0) == (15 if format == "adm" else 0)
    pixels = torch.from_numpy(np.tile(PIXELS, (3, 1, 1, 1)).transpose(0, 3, 1, 2).copy())
    rows = Stub().layers(pixels.double() / 127.5 - 1)
    np.testing.assert_allclose(reference.moments["pool"].sigma, np.cov(rows["pool"].T.numpy()), rtol=1e-5, atol=1e-8)
    if format in ("adm", "genkit"):
        np.testing.assert_allclose(reference.moments["spatial"].mu, rows["spatial"].mean(0), rtol=1e-5, atol=1e-7)


def test_net_that_comes_along_is_for_our_own_format_only(tmp_path, stub):
    folder = fashion_folder(tmp_path / "images", 4)
    for format in ("genkit", "fid"):
        stats(folder, tmp_path / "ref.npz", format=format)
    assert [name for name, _ in stub] == ["fashion-cnn", "inception-2015"]


def test_conversions_are_told(tmp_path, stub):
    for i, image in enumerate(PIXELS):
        Image.fromarray(np.dstack([image, image[..., :1]])).save(tmp_path / f"{i}.png")
    found = stats(tmp_path, tmp_path / "ref.npz", format="fid", batch_size=2)
    assert "5 of 5 images are RGBA: alpha was laid over white" in found["notes"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "pkl"}, "format=pkl is not one of"),
        ({"out": "ref.pt"}, r"must end in \.npz"),
        ({"path": "nowhere"}, "path=nowhere is neither a folder"),
        ({"count": 1}, "statistics of 1 images"),
        ({"count": 1001}, "which has 1000"),
        ({"batch_size": 0}, "batch_size=0"),
        (
            {"features": "fashion-cnn", "format": "adm"},
            "format=adm needs spatial features, which fashion-cnn does not have",
        ),
    ],
)
def test_wrong_options_are_one_line(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message) as caught:
        stats(**({"path": "fashion:val", "out": "ref.npz"} | options))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


TWO_PROCESSES = """
import sys, json
sys.path.insert(0, {root!r})
import torch
torch.distributed.init_process_group("gloo", init_method="file://{store}", rank=int(sys.argv[1]), world_size=2)
from genkit.stats import stats
found = stats({images!r}, {out!r}, batch_size=4)
open({out!r} + "." + sys.argv[1], "w").write(json.dumps(found))
torch.distributed.destroy_process_group()
"""


def test_two_processes_make_the_file_of_one(tmp_path):
    folder = fashion_folder(tmp_path / "images", 21)
    for name in ("0/0000.png", "1/0019.png"):
        Image.open(folder / name).convert("LA").save(folder / name)
    out = str(tmp_path / "two.npz")
    script = TWO_PROCESSES.format(
        root=str(Path(__file__).parent.parent), store=tmp_path / "store", images=str(folder), out=out
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([sys.executable, "-c", script, str(rank)], env=environment) for rank in range(2)]
    assert [rank.wait(timeout=200) for rank in ranks] == [0, 0]
    told = [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(2)]
    alone = stats(folder, tmp_path / "one.npz", batch_size=4)
    assert told[0] == told[1]
    assert told[0]["notes"] == alone["notes"] == ["2 of 21 images are LA: alpha was laid over white"]
    one, two = references.read(tmp_path / "one.npz"), references.read(out)
    torch.testing.assert_close(two.features, one.features)
    torch.testing.assert_close(two.moments["pool"].sigma, one.moments["pool"].sigma, rtol=0, atol=1e-6)
    assert (two.count, two.source) == (one.count, one.source)


# What is kept for the next evaluation

KEY = {"images_sha": "i", "net_sha": "n", "net_name": "net", "layer": "pool", "kind": "FeatureSums", "count": 3}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GENKIT_CACHE", str(tmp_path / "cache"))
    known._tell.cache_clear()
    return tmp_path / "cache" / "references"


def test_a_kept_state_comes_back_under_exactly_its_key(cache):
    sums = FeatureSums(DIM)
    sums.update(torch.from_numpy(ROWS))
    assert known.load(**KEY) is None
    known.save(sums.state(), **KEY)
    again = FeatureSums(DIM)
    again.restore(known.load(**KEY))
    assert all(torch.equal(value, sums.state()[name]) for name, value in again.state().items())
    for name, value in KEY.items():
        assert known.load(**(KEY | {name: value + (1 if name == "count" else "x")})) is None, name
    assert known.load(**KEY, device="cuda") is None
    rows = FeatureRows(DIM)
    rows.update(torch.from_numpy(ROWS))
    known.save(rows.state(), **(KEY | {"kind": "FeatureRows"}))
    kept = FeatureRows(DIM)
    kept.restore(known.load(**(KEY | {"kind": "FeatureRows"})))
    assert torch.equal(kept.rows(), rows.rows())


def test_other_versions_do_not_see_it(cache, monkeypatch):
    known.save({"a": torch.ones(2)}, **KEY)
    assert known.load(**KEY) is not None
    monkeypatch.setattr(known, "VERSION", known.VERSION + 1)
    assert known.load(**KEY) is None


def test_damaged_or_foreign_entries_are_as_good_as_none(cache):
    known.save({"a": torch.ones(2)}, **KEY)
    known.save({"a": torch.zeros(2)}, **(KEY | {"count": 4}))
    (path,) = [p for p in cache.iterdir() if p == known._place(*KEY.values(), "cpu")[0]]
    (other,) = [p for p in cache.iterdir() if p != path]
    whole = path.read_bytes()
    path.write_bytes(other.read_bytes())  # whose key is another
    assert known.load(**KEY) is None
    for broken in (b"", b"x", whole[:-3], whole[:20]):
        path.write_bytes(broken)
        assert known.load(**KEY) is None
    path.write_bytes(whole)
    assert known.load(**KEY) is not None


def test_the_least_recently_used_entries_go_first(cache, monkeypatch):
    state = {"a": torch.ones(1000)}
    for count in range(4):
        known.save(state, **(KEY | {"count": count}))
        os.utime(known._place(*(KEY | {"count": count}).values(), "cpu")[0], (count, count))
    known.load(**(KEY | {"count": 0}))
    size = next(cache.iterdir()).stat().st_size
    monkeypatch.setattr(known, "MAX_TOTAL", 3 * size + 100)
    known.save(state, **(KEY | {"count": 9}))
    assert [count for count in (0, 1, 2, 3, 9) if known.load(**(KEY | {"count": count}))] == [0, 3, 9]


def test_large_states_are_not_kept(cache, monkeypatch):
    monkeypatch.setattr(known, "MAX_ENTRY", 100)
    known.save({"a": torch.ones(26)}, **KEY)
    assert known.load(**KEY) is None
    known.save({"a": torch.ones(25)}, **KEY)
    assert known.load(**KEY) is not None


def test_a_folder_that_cannot_be_written_costs_one_line(cache, caplog):
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the folder should be")
    for count in (1, 2):
        known.save({"a": torch.ones(2)}, **(KEY | {"count": count}))
        assert known.load(**(KEY | {"count": count})) is None
    assert len([record for record in caplog.records if "not kept" in record.message]) == 1


def test_npz_in_memory_sizes_never_follow_a_forged_header(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(2))
    forged = buffer.getvalue().replace(b"(2,), }", b"(9999999999999,), }".ljust(7))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("mu.npy", forged)
        archive.writestr("sigma.npy", forged)
    with pytest.raises(GenkitError, match="cannot be read as npz"):
        references.read(tmp_path / "a.npz")
