"""Named protocols, labels, interrupted evaluations, and metrics that share what they look at."""

import json

import numpy as np
import pytest
import torch

from genkit.errors import GenkitError, UsageError
from genkit.evaluation import against, partial
from genkit.evaluation import evaluate as evaluating
from genkit.evaluation.evaluate import evaluate
from genkit.metrics import frechet, known, protocols, sources
from genkit.metrics.features import FeatureNet
from tests.test_evaluation import IMAGES, Generator, images_of, npz, pictures


@pytest.fixture(autouse=True)
def _no_memory(monkeypatch, tmp_path):
    """What an evaluation keeps of its reference stays in the test that made it."""
    monkeypatch.setenv("GENKIT_CACHE", str(tmp_path / "genkit-cache"))


class Small(torch.nn.Module):
    """Stands in for Inception: three layers of a few numbers, any image size."""

    chunk = 100
    dims = {"pool": 12, "spatial": 8, "logits": 5}  # noqa: RUF012
    class_names = ()

    def layers(self, x):
        rows = torch.nn.functional.adaptive_avg_pool2d(x.mean(1, keepdim=True), 4).flatten(1)  # [B, 16]
        return {"pool": rows[:, :12] + 0.1, "spatial": rows[:, 8:], "logits": rows[:, :5] * 8}


@pytest.fixture
def inception(monkeypatch):
    from genkit.metrics import features

    def load(name, weights=None, device="cpu"):
        return FeatureNet(
            name=name, protocol=name, dims=Small.dims, sha256="6726825d" * 8, class_names=(), module=Small()
        )

    monkeypatch.setattr(features, "load", load)


def test_adm_measures_its_five_numbers_and_says_when_images_are_too_few(inception):
    pipe = Generator()
    report = evaluate(pipe, protocol="adm", count=200, reference="fashion:val")
    assert report.keys()[:6] == ["FID-quick", "sFID-quick", "IS", "IS std", "precision", "recall"]
    assert "KID" in report.keys()  # nobody asked, but 200 images make no FID
    assert all(row["protocol"].startswith("adm, ") for row in report.rows)
    assert any("adm needs 50,000 images, these are 200" in note for note in report.notes)
    assert report.settings["protocol"] == "adm"


def test_protocol_decides_count_and_labels(inception, monkeypatch):
    asked = []
    pipe = Generator()
    monkeypatch.setattr(pipe, "generate", lambda label, seeds, **_: asked.append(label) or IMAGES[: len(label)])
    monkeypatch.setitem(
        protocols.PROTOCOLS,
        "edm",
        protocols.Protocol("edm", "", protocols.PROTOCOLS["edm"].metrics, 300, "random"),
    )
    report = evaluate(pipe, protocol="edm", reference="fashion:val", batch_size=128)
    drawn = torch.cat(asked)
    assert len(drawn) == 300
    assert not torch.equal(drawn, torch.arange(300) % 10)
    assert drawn.bincount(minlength=10).min() > 10
    assert "labels random" in report.rows[0]["protocol"]


@pytest.mark.parametrize("batch_size", [7, 64])
def test_random_labels_belong_to_the_sample_and_not_to_the_batch(batch_size):
    one, two = Generator(), Generator()
    evaluate(one, metrics=["class_accuracy"], count=90, labels="random", batch_size=90)
    evaluate(two, metrics=["class_accuracy"], count=90, labels="random", batch_size=batch_size)
    assert one.labels == two.labels


def test_every_protocol_is_made_of_metrics_that_exist():
    from genkit import registry

    for protocol in protocols.PROTOCOLS.values():
        for spec in protocol.metrics:
            registry.check("metrics", spec, protocol.name)
    with pytest.raises(UsageError, match="no protocol is called amd; did you mean 'adm'"):
        evaluate(Generator(), protocol="amd")
    with pytest.raises(UsageError, match="either a protocol or metrics"):
        evaluate(Generator(), protocol="adm", metrics=["frechet"])


def test_quick_works_on_the_net_that_comes_along():
    report = evaluate(Generator(), protocol="quick", count=150, reference="fashion:val")
    assert {"FD", "KID", "precision", "recall", "density", "coverage"} <= {k.partition(" (")[0] for k in report.keys()}
    assert all("quick, fashion-cnn-v1" in row["comparable"] for row in report.rows)


def test_interrupted_evaluation_goes_on_and_gives_the_same_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(partial, "_EVERY_S", 0.0)
    monkeypatch.setattr(partial, "_SHARE", 1e9)
    options = {
        "metrics": ["frechet", "kid", "class_accuracy"],
        "count": 120,
        "batch_size": 40,
        "reference": "fashion:val",
    }
    whole = evaluate(Generator(), **options)

    class Interrupted(Generator):
        def generate(self, *args, **options):
            if len(self.calls) == 2:
                raise KeyboardInterrupt
            return super().generate(*args, **options)

    Interrupted.__name__ = "Generator"  # what was evaluated is part of what must be equal
    out = tmp_path / "eval" / "report.json"
    with pytest.raises(KeyboardInterrupt):
        evaluate(Interrupted(), **options, out=out)
    assert len(list(out.parent.iterdir())) == 1
    again = Generator()
    report = evaluate(again, **options, out=out)
    assert again.seeds == list(range(80, 120))  # the first two batches were not made again
    assert [row["value"] for row in report.rows] == [row["value"] for row in whole.rows]
    assert [path.name for path in out.parent.iterdir()] == ["report.json"]


def test_state_of_another_evaluation_is_not_continued(tmp_path, monkeypatch):
    monkeypatch.setattr(partial, "_EVERY_S", 0.0)
    out = tmp_path / "report.json"

    class Interrupted(Generator):
        def generate(self, *args, **options):
            if len(self.calls) == 1:
                raise KeyboardInterrupt
            return super().generate(*args, **options)

    with pytest.raises(KeyboardInterrupt):
        evaluate(Interrupted(), metrics=["class_accuracy"], count=80, batch_size=40, seed=1, out=out)
    again = Generator()
    evaluate(again, metrics=["class_accuracy"], count=80, batch_size=40, seed=2, out=out)
    assert len(again.seeds) == 80


def test_damaged_partial_state_starts_again(tmp_path):
    out = tmp_path / "report.json"
    (tmp_path / ".report.partial-0-of-1.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0half")
    pipe = Generator()
    evaluate(pipe, metrics=["class_accuracy"], count=40, out=out)
    assert len(pipe.seeds) == 40


def test_metrics_on_the_same_vectors_keep_them_once():
    from genkit import registry

    specs = [
        {"type": "kid", "reference": "train"},
        {"type": "precision_recall", "reference": "train"},
        {"type": "density_coverage", "reference": "val"},
    ]
    kid, recall, density = (
        registry.build("metrics", registry.check("metrics", {"features": "fashion-cnn", **spec}, "m")) for spec in specs
    )
    against.share([kid, recall, density])
    assert kid.fake is recall.fake is density.fake
    assert kid.real is recall.real
    assert kid.real is not density.real


def test_reference_is_looked_at_once_and_then_remembered(monkeypatch):
    read = []
    real = sources.find

    def counting(word, data=None):
        images = real(word, data)
        inner = images.read
        object.__setattr__(images, "read", lambda first, last: read.append(first) or inner(first, last))
        return images

    monkeypatch.setattr(sources, "find", counting)
    options = {"metrics": ["frechet", "kid", "vendi"], "count": 60, "reference": "fashion:val"}
    first = evaluate(Generator(), **options)
    looked = len(read)
    assert looked == 4  # 1000 images by 256
    second = evaluate(Generator(), **options)
    assert len(read) == looked
    assert [row["value"] for row in first.rows] == [row["value"] for row in second.rows]


def test_order_of_images_changes_nothing(tmp_path):
    """The same images under other names."""
    from genkit.images import to_uint8

    pixels = to_uint8(IMAGES[:80]).numpy()
    np.savez(tmp_path / "a.npz", arr_0=pixels)
    np.savez(tmp_path / "b.npz", arr_0=pixels[::-1])
    options = {
        "metrics": ["frechet", {"type": "kid", "subsets": None}, "precision_recall", "vendi"],
        "reference": "fashion:val",
    }
    a, b = (evaluate(tmp_path / f"{name}.npz", **options) for name in "ab")
    for one, two in zip(a.rows, b.rows, strict=True):
        assert two["value"] == pytest.approx(one["value"], rel=1e-6, abs=1e-9), one["metric"]


def test_statistics_without_images_are_enough_for_fid_and_not_for_kid(tmp_path, inception):
    from genkit.metrics.frechet import Frechet

    metric = Frechet(features="inception-2015")
    metric.update(real=IMAGES[:200])
    moments = metric.real.moments()
    ref = npz(tmp_path / "ref.npz", mu=moments.mu.numpy(), sigma=moments.sigma.numpy())
    folder = images_of(tmp_path / "folder", *[(32, 32)] * 4)
    report = evaluate(folder, metrics=[{"type": "frechet", "features": "inception-2015"}], reference=str(ref))
    assert report.keys() == ["FID-quick"]  # the KID that would be added needs what the file does not hold
    with pytest.raises(GenkitError, match=r"holds neither images nor features, which Kid would need"):
        evaluate(folder, metrics=[{"type": "kid", "features": "inception-2015"}], reference=str(ref))


def test_memorised_samples_are_shown_beside_their_originals(tmp_path):
    report = evaluate(Generator(), metrics=["memorisation"], count=20, reference="fashion:val", out=tmp_path / "r.json")
    assert (tmp_path / "r.nearest.png").exists()
    assert any("r.nearest.png" in note for note in report.notes)
    assert report["AuthPct"] == 0  # this generator hands out real images
    saved = json.loads((tmp_path / "r.json").read_text())
    assert saved["notes"] == report.notes


def test_remembering_is_off_where_the_folder_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("GENKIT_CACHE", str(tmp_path / "file" / "below"))
    assert known.load(images_sha="0", net_sha="0", net_name="n", layer="pool", kind="FeatureSums", count=2) is None
    evaluate(Generator(), metrics=["frechet"], count=20, reference="fashion:val")


def test_few_reference_images_bring_a_kid_too(tmp_path, inception, monkeypatch):
    for module in (evaluating, frechet):
        monkeypatch.setattr(module, "FID_COUNT", 40)
    metrics = [{"type": "frechet", "features": "inception-2015"}]
    folder, few = pictures(tmp_path / "fake", 50), pictures(tmp_path / "real", 30)
    assert evaluate(folder, reference=str(folder), metrics=metrics).keys() == ["FID"]
    assert evaluate(folder, reference=str(few), metrics=metrics).keys() == ["FID-quick", "KID"]


def test_grey_images_and_sides_of_other_sizes_are_told(tmp_path, inception):
    report = evaluate(
        npz(tmp_path / "small.npz", arr_0=np.zeros((9, 20, 20, 1), np.uint8)),
        reference=str(npz(tmp_path / "large.npz", arr_0=np.zeros((9, 30, 31, 3), np.uint8))),
        metrics=[{"type": "precision_recall", "features": "inception-2015"}],
    )
    assert "evaluated images are grey: repeated three times for inception-2015" in report.notes
    assert any("are 30x31, evaluated ones 20x20" in note for note in report.notes)


def test_statistics_that_do_not_name_their_net_are_noted(tmp_path, inception):
    path = npz(tmp_path / "ref.npz", mu=np.zeros(12), sigma=np.eye(12))
    report = evaluate(
        pictures(tmp_path / "some", 12),
        reference=str(path),
        metrics=[{"type": "frechet", "features": "inception-2015"}],
    )
    assert any("does not say which net made its statistics" in note for note in report.notes)
