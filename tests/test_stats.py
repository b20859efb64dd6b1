"""`genkit stats`: every format from every source, and by several processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from genkit.data.fashion import Fashion
from genkit.errors import UsageError
from genkit.evaluation import stats as making
from genkit.evaluation.evaluate import evaluate
from genkit.evaluation.stats import stats
from genkit.metrics import features, references, sources
from genkit.metrics.frechet import Frechet
from genkit.weights import file_sha256
from tests.reference_files import PIXELS


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
from genkit.evaluation.stats import stats
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
