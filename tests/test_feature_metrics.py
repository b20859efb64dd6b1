"""Metrics of feature vectors as parts of an evaluation: sums over batches and processes, references, names, notes, faults."""

import math

import pytest
import torch

from genkit import registry
from genkit.errors import GenkitError, UsageError
from genkit.metrics import features, neighbours
from genkit.metrics.density_coverage import DensityCoverage, density_coverage
from genkit.metrics.fd_infinity import FDInfinity, fd_infinity
from genkit.metrics.frechet import FID_COUNT, Frechet, frechet_name
from genkit.metrics.inception_score import InceptionScore, inception_score
from genkit.metrics.kid import Kid, mmd2
from genkit.metrics.memorisation import Memorisation, match
from genkit.metrics.precision_recall import PrecisionRecall, precision_recall
from genkit.metrics.references import Reference
from genkit.metrics.statistics import FeatureSums, frechet_distance
from genkit.metrics.vendi import Vendi, vendi
from tests.features import vectors

WORDS = [
    "density_coverage",
    "fd_infinity",
    "frechet",
    "inception_score",
    "kid",
    "memorisation",
    "precision_recall",
    "vendi",
]
COMPARED = [word for word in WORDS if word != "inception_score"]


class Pixels:
    """Stands for a net: the first pixels are its features."""

    chunk = 1000

    def to(self, device):
        return self

    def layers(self, x):
        flat = x.flatten(1) + 1
        return {"pool": flat[:, :12], "spatial": flat[:, 12:18], "logits": 4 * flat[:, 18:24]}


def net(name="inception-2015", **changes):
    about = {
        "protocol": name,
        "dims": {"pool": 12, "spatial": 6, "logits": 6},
        "sha256": "0" * 64,
        "class_names": (),
        "module": Pixels(),
    }
    return features.FeatureNet(name, **about | changes)


@pytest.fixture
def stub(monkeypatch):
    """Every net is a FeatureNet called what was asked for, on Pixels."""
    monkeypatch.setattr(features, "load", lambda name, *_: net(name))


def images(n, seed):
    return torch.rand(n, 1, 5, 5, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def reference(of=None, *, layer="pool", sha="0" * 64, keep=()):
    """A file about the images `of`: "moments", "features" or both."""
    statistics = {}
    rows = None if of is None else features.as_batch(of).features(net(), layer)
    if "moments" in keep:
        sums = FeatureSums(rows.shape[1])
        sums.update(rows)
        statistics = {layer: sums.moments()}
    vectors = rows if "features" in keep else None
    return Reference("ref.npz", "ab" * 32, "genkit", sha, "inception-2015", 0, "", statistics, vectors, None)


# What must hold


def test_equal_sets_score_perfectly():
    x = vectors(200, 12, 0)
    assert precision_recall(x, x) == (1, 1)
    assert density_coverage(x, x) == (1, 1)
    assert mmd2(x, x[torch.randperm(200)]) <= 0


def test_sets_far_apart_score_nothing():
    x, y = vectors(200, 12, 0), vectors(200, 12, 1, shift=100)
    assert precision_recall(x, y) == (0, 0)
    assert density_coverage(x, y) == (0, 0)
    assert mmd2(x, y) > 1000


def fed(word, parts, **options):
    """A metric that saw the images of `parts`: (real, fake) numbers, of 90 in all."""
    metric = registry.build(
        "metrics", registry.check("metrics", {"type": word, "features": "inception-2015", **options}, "m")
    )
    real, fake = images(90, 0), images(90, 1) * 0.9
    for part in parts:
        metric.update(real=real[part], fake=fake[part], number=part, total=90, label=part, step=3)
    return metric


@pytest.mark.parametrize("word", WORDS)
def test_batches_order_and_processes_do_not_change_a_number(stub, word):
    expected = fed(word, [torch.arange(90)]).result()
    shuffled = torch.randperm(90, generator=torch.Generator().manual_seed(0))
    assert fed(word, shuffled.split(7)).result() == pytest.approx(expected, rel=1e-6, abs=1e-6)
    here, there = fed(word, [shuffled[:60]]), fed(word, shuffled[60:].split(11))
    for name, value in here.state().items():
        value += there.state()[name]
    assert here.result() == pytest.approx(expected, rel=1e-6, abs=1e-6)
    said = getattr(fed(word, [torch.arange(90)]), "notes", list)()
    assert getattr(here, "notes", list)() == said


@pytest.mark.parametrize("word", WORDS)
def test_a_restored_metric_goes_on(stub, word):
    order = torch.arange(90)
    half = {name: value.clone() for name, value in fed(word, [order[:40]]).state().items()}
    metric = fed(word, [])
    metric.restore(half)
    metric.update(real=images(90, 0)[40:], fake=images(90, 1)[40:] * 0.9, number=order[40:], total=90)
    assert metric.result() == pytest.approx(fed(word, [order]).result(), rel=1e-6, abs=1e-6)
    restored_alone = fed(word, [])
    restored_alone.restore(half)
    metric.restore(half)
    assert metric.state().keys() == restored_alone.state().keys()
    assert all(torch.equal(value, half[name]) for name, value in metric.state().items())


@pytest.mark.parametrize("word", WORDS)
def test_every_metric_says_what_it_did(stub, word):
    metric = fed(word, [torch.arange(90)])
    assert metric.better in ("lower", "higher")
    assert metric.protocol.startswith("inception-2015 sha 00000000")
    assert all(isinstance(value, float) and math.isfinite(value) for value in metric.result().values())
    assert hasattr(metric, "reference") == (word in COMPARED)


@pytest.mark.parametrize("word", WORDS)
def test_features_that_are_not_finite_are_refused(monkeypatch, word):
    class Broken(Pixels):
        def layers(self, x):
            return {name: value.index_fill(0, torch.tensor(1), math.nan) for name, value in super().layers(x).items()}

    monkeypatch.setattr(features, "load", lambda name, *_: net(name, module=Broken()))
    with pytest.raises(GenkitError, match="1 of 90 images have features that are not finite"):
        fed(word, [torch.arange(90)])


# References from files


@pytest.mark.parametrize("word", COMPARED)
def test_a_reference_file_stands_for_its_images(stub, word):
    needed = "moments" if word in ("frechet", "fd_infinity") else "features"
    real, fake = images(90, 0), images(90, 1) * 0.9
    expected = fed(word, [torch.arange(90)]).result()
    metric = fed(word, [])
    assert metric.use(reference(real, keep=[needed]))
    metric.update(fake=fake, number=torch.arange(90), total=90)
    assert metric.result() == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert not fed(word, []).use(reference(real))
    assert not fed(word, []).use(reference(real, keep=[{"moments": "features", "features": "moments"}[needed]]))
    with pytest.raises(GenkitError, match=r"statistics of inception-2015 \(sha cdcdcdcd\)"):
        fed(word, []).use(reference(real, keep=[needed], sha="cd" * 32))


def test_statistics_of_an_unnamed_net_are_taken_for_inceptions(stub):
    unnamed = reference(images(90, 0), keep=["moments"], sha="")
    assert Frechet(features="inception-2015").use(unnamed)
    assert Frechet(features="inception-2015-clean").use(unnamed)
    with pytest.raises(GenkitError, match="does not say which net made its 12-dimensional"):
        Frechet(features="fashion-cnn").use(unnamed)
    other_size = reference(images(90, 0), keep=["moments"], layer="spatial", sha="")
    other_size = Reference(**vars(other_size) | {"moments": {"pool": other_size.moments["spatial"]}})
    with pytest.raises(GenkitError, match="6-dimensional statistics; pool features of inception-2015 have 12"):
        Frechet(features="inception-2015").use(other_size)


def test_spatial_statistics_give_sfid_only(stub):
    real, fake = images(90, 0), images(90, 1)
    spatial = reference(real, keep=["moments"], layer="spatial")
    assert not Frechet(features="inception-2015").use(spatial)
    metric = Frechet(features="inception-2015", layer="spatial")
    assert metric.use(spatial)
    metric.update(fake=fake)
    a, b = (features.as_batch(x).features(net(), "spatial").double() for x in (real, fake))
    expected = frechet_distance(a.mean(0), a.T.cov(), b.mean(0), b.T.cov())
    assert metric.result() == {"sFID-quick": pytest.approx(expected, rel=1e-9)}


# Names


@pytest.mark.parametrize(
    ("name", "full", "few"),
    [
        ("inception-2015", "FID", "FID-quick"),
        ("inception-2015-clean", "clean-FID", "clean-FID-quick"),
        ("inception-2015-bilinear", "FID (pytorch-fid)", "FID-quick (pytorch-fid)"),
        ("vgg16", "FD (vgg16)", "FD (vgg16)"),
        ("fashion-cnn", "FD (fashion-cnn)", "FD (fashion-cnn)"),
    ],
)
def test_a_frechet_distance_is_called_what_it_is(name, full, few):
    assert frechet_name(net(name), FID_COUNT) == full
    assert frechet_name(net(name), FID_COUNT - 1) == few
    assert frechet_name(net(name), FID_COUNT, prefix="s") == full.replace("F", "sF", 1)
    assert frechet_name(net(name), FID_COUNT, suffix="-infinity") == full.replace("D", "D-infinity", 1)


def test_weights_nobody_published_give_no_fid(monkeypatch):
    own = net(protocol="inception-2015 own weights", is_published=False)
    assert frechet_name(own, FID_COUNT) == "FD (inception-2015 own weights)"
    monkeypatch.setattr(features, "load", lambda *_: own)
    metric = InceptionScore(features="inception-2015")
    metric.update(fake=images(20, 0))
    assert list(metric.result()) == ["IS (inception-2015 own weights)", "IS std (inception-2015 own weights)"]


def test_inception_score_of_another_net_is_named_after_it(stub):
    for word, name in (("inception-2015", "IS"), ("fashion-cnn", "IS (fashion-cnn)")):
        metric = InceptionScore(features=word)
        metric.update(fake=images(20, 0), real=images(20, 1))
        assert next(iter(metric.result())) == name


# Metrics beside their numbers


def test_kid_of_few_images_is_one_estimate_and_says_so(stub):
    metric = fed("kid", [torch.arange(90)], subset_size=91)
    assert list(metric.result()) == ["KID"]
    assert metric.result() == fed("kid", [torch.arange(90)], subsets=None).result()
    assert "90 evaluated and 90 reference images do not fill subsets of 91" in metric.notes()[0]
    assert metric.protocol.endswith("unbiased over all pairs")
    enough = fed("kid", [torch.arange(90)], subset_size=90, subsets=3)
    assert list(enough.result()) == ["KID", "KID std"]
    assert enough.notes() == []
    assert enough.protocol.endswith("3 subsets of 90, seed 2020")
    # All of them, in another order each time.
    assert enough.result() == {
        "KID": pytest.approx(metric.result()["KID"], abs=1e-9),
        "KID std": pytest.approx(0, abs=1e-9),
    }


def test_only_so_many_reference_images_spread_over_all_count_where_that_is_asked_for(stub):
    metric = fed("precision_recall", [torch.arange(90)], max_reference=40)
    real, fake = (features.as_batch(x).features(net()) for x in (images(90, 0), images(90, 1) * 0.9))
    spread = real[[int(i * 90 / 40) for i in range(40)]]
    assert tuple(metric.result().values()) == precision_recall(spread, fake)
    assert "at most 40 reference images" in metric.protocol
    whole = fed("precision_recall", [torch.arange(90)], max_reference=90)
    assert tuple(whole.result().values()) == precision_recall(real, fake)


def test_vendi_needs_no_reference(stub):
    metric = Vendi()
    metric.update(fake=images(90, 1))
    unit = torch.nn.functional.normalize(features.as_batch(images(90, 1)).features(net()).double(), dim=1)
    assert metric.result() == {"Vendi": pytest.approx(vendi(unit.T @ unit / 90), rel=1e-9)}
    metric.update(real=images(50, 0))
    assert list(metric.result()) == ["Vendi", "Vendi real"]
    assert "of 90 images, Vendi real of 50" in metric.notes()[0]


def test_suspicious_pairs_come_first_with_their_own_numbers(stub):
    metric = Memorisation()
    real, fake = images(60, 0), images(30, 1)
    fake[7], fake[20] = real[33], real[5] * 0.99
    metric.update(real=real, number=torch.arange(5, 65), total=70)
    metric.update(fake=fake[20:], number=torch.arange(20, 30), total=40)
    metric.update(fake=fake[:10], number=torch.arange(10), total=40)  # 10 to 19 are another process's
    (first, second, third) = metric.pairs(3)
    assert first == (7, 38, 0.0)
    assert second[:2] == (20, 10)
    assert 0 < second[2] < 0.2 < third[2]
    assert len(metric.pairs(100)) == 20
    assert metric.result()["near-copies"] == pytest.approx(2 / 20)


# Faults


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Kid(subsets=0), "subsets=0 must be at least 1 or null"),
        (lambda: Kid(subset_size=1), "subset_size=1 at least 2"),
        (lambda: InceptionScore(splits=0), "splits=0 and split_size=None must be at least 1"),
        (lambda: PrecisionRecall(k=0), "k=0 and max_reference=None must be at least 1"),
        (lambda: PrecisionRecall(max_reference=0), "max_reference=0 must be at least 1"),
        (lambda: DensityCoverage(k=0), "k=0 must be at least 1"),
        (lambda: FDInfinity(points=1), "points=1 must be at least 2"),
        (lambda: FDInfinity(smallest=1.0), "smallest=1.0 between 0 and 1"),
        (lambda: Memorisation(near=0.0), "near=0.0 must lie in"),
    ],
)
def test_options_that_mean_nothing_are_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()


@pytest.mark.parametrize(
    ("measure", "message"),
    [
        (lambda x: mmd2(x[:1], x), "at least 2 images on each side, got 1 real and 20 fake"),
        (lambda x: precision_recall(x[:3], x), "needs more than 3 vectors, got 3"),
        (lambda x: density_coverage(x[:5], x), "needs more than 5 vectors, got 5"),
        (lambda x: neighbours.nearest(x, x[:0]), "the other set has 0 vectors"),
        (lambda x: inception_score(x[:9]), "10 splits needs at least as many images, got 9"),
        (lambda x: match(x[:1], x), "at least 2 training images and a sample, got 1 and 20"),
        (lambda x: fd_infinity(x[0], x[:4].T @ x[:4], x[:10]), "10 samples are too few for 15 subsets"),
    ],
)
def test_too_few_images_are_refused(measure, message):
    with pytest.raises(UsageError, match=message):
        measure(vectors(20, 4, 0))


@pytest.mark.parametrize("word", WORDS)
def test_no_images_at_all_are_refused_in_words(stub, word):
    with pytest.raises(GenkitError):
        fed(word, []).result()


def test_a_net_without_the_layer_is_refused(monkeypatch):
    monkeypatch.setattr(features, "load", lambda name, *_: net(name, dims={"pool": 12}))
    with pytest.raises(GenkitError, match="fashion-cnn has no spatial features"):
        Frechet(layer="spatial")
    with pytest.raises(GenkitError, match="fashion-cnn has no logits"):
        InceptionScore()
