"""Statistics and distances against closed forms and scipy; metrics against definitions written out."""

import math

import numpy as np
import pytest
import torch

from genkit import registry
from genkit.data.fashion import Fashion
from genkit.errors import GenkitError, UsageError
from genkit.metrics import fashion_net, features, references
from genkit.metrics.class_accuracy import ClassAccuracy
from genkit.metrics.codebook import Codebook, codebook_statistics
from genkit.metrics.features import ImageBatch
from genkit.metrics.frechet import Frechet
from genkit.metrics.reconstruction import Reconstruction, psnr, ssim
from genkit.metrics.statistics import FeatureSums, frechet_distance


@pytest.fixture(scope="module")
def fashion():
    """All embedded images [10000, 1, 28, 28] and their classes; the last 1,000 are the validation split."""
    dataset = Fashion(source="embedded", split="all")
    return dataset.pixels.float() / 127.5 - 1, dataset.labels


def gaussian(n, dim, seed, rank=None):
    """Samples [n, dim] with a random mean and covariance."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(rank or dim, dim, generator=generator, dtype=torch.float64)
    mean = torch.randn(dim, generator=generator, dtype=torch.float64)
    return torch.randn(n, rank or dim, generator=generator, dtype=torch.float64) @ mixing + mean


def moments(rows):
    statistics = FeatureSums(rows.shape[1])
    statistics.update(rows)
    return statistics.moments()


# The distance


def test_frechet_of_gaussians_that_differ_in_mean_only_is_the_squared_shift():
    sigma = moments(gaussian(200, 6, 0)).sigma
    shift = torch.arange(6.0, dtype=torch.float64)
    assert frechet_distance(torch.zeros(6), sigma, shift, sigma) == pytest.approx(
        float(shift.square().sum()), rel=1e-10
    )
    assert frechet_distance(shift, sigma, shift, sigma) == pytest.approx(0, abs=1e-10)


def test_frechet_of_commuting_covariances_is_the_difference_of_their_roots():
    a, b = torch.tensor([1.0, 4.0, 0.0, 9.0]), torch.tensor([4.0, 4.0, 25.0, 0.0])
    expected = float((a.sqrt() - b.sqrt()).square().sum())
    assert frechet_distance(torch.zeros(4), a.diag(), torch.zeros(4), b.diag()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dim", [1, 7, 64])
def test_frechet_equals_scipys_matrix_root(dim):
    linalg = pytest.importorskip("scipy.linalg")
    one, two = moments(gaussian(300, dim, 1)), moments(gaussian(250, dim, 2))
    found = frechet_distance(one.mu, one.sigma, two.mu, two.sigma)
    root = linalg.sqrtm(one.sigma.numpy() @ two.sigma.numpy()).real
    expected = float((one.mu - two.mu).square().sum() + one.sigma.trace() + two.sigma.trace()) - 2 * np.trace(root)
    assert found == pytest.approx(expected, rel=1e-8)


def test_frechet_of_singular_covariances_is_real_and_symmetric():
    one, two = moments(gaussian(20, 40, 3)), moments(gaussian(200, 40, 4, rank=5))
    forth = frechet_distance(one.mu, one.sigma, two.mu, two.sigma)
    assert math.isfinite(forth)
    assert forth > 0
    # Roots of eigenvalues that are zero up to 1e-16 of the largest: 1e-8 each.
    assert frechet_distance(two.mu, two.sigma, one.mu, one.sigma) == pytest.approx(forth, rel=1e-6)
    assert frechet_distance(one.mu, one.sigma, one.mu, one.sigma) == pytest.approx(0, abs=1e-5)


# Statistics


def test_statistics_equal_numpy_whatever_the_batches_order_and_processes():
    rows = gaussian(500, 12, 5) + 100  # far from zero, where sums of squares lose digits
    shuffled = rows[torch.randperm(500, generator=torch.Generator().manual_seed(0))]
    here, there = FeatureSums(12), FeatureSums(12)
    for part in shuffled[:210].split(32):
        here.update(part)
    for part in shuffled[210:].split(64):
        there.update(part)
    for name, value in here.state().items():
        value += there.state()[name]
    found = here.moments()
    assert found.count == 500
    np.testing.assert_allclose(found.mu, rows.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.sigma, np.cov(rows.numpy(), rowvar=False), rtol=1e-8, atol=1e-8)


def test_statistics_refuse_single_images_and_features_that_are_not_finite():
    statistics = FeatureSums(3)
    statistics.update(torch.zeros(1, 3))
    with pytest.raises(GenkitError, match="at least 2 images on each side, got 1"):
        statistics.moments()
    with pytest.raises(GenkitError, match="1 of 2 images have features that are not finite"):
        statistics.update(torch.tensor([[0.0, 1, 2], [0, float("nan"), 0]]))


def test_moments_survive_a_file(tmp_path):
    statistics = FeatureSums(4)
    statistics.update(gaussian(50, 4, 6))
    saved = statistics.moments("ab" * 32, "net-v1", "fifty rows")
    saved.save(tmp_path / "ref.npz")
    loaded = references.read(tmp_path / "ref.npz").moments["pool"]
    assert torch.equal(loaded.mu, saved.mu)
    assert torch.equal(loaded.sigma, saved.sigma)
    assert (loaded.count, loaded.net_sha256, loaded.protocol, loaded.source) == (50, "ab" * 32, "net-v1", "fifty rows")
    with np.load(tmp_path / "ref.npz", allow_pickle=False) as plain:
        assert {"mu", "sigma"} <= set(plain.files)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mean": np.zeros(3)}, r"holds mean float64 \[3\]; statistics need mu"),
        ({"mu": np.zeros(3), "sigma": np.zeros((2, 2))}, r"mu has shape \(3,\) and sigma \(2, 2\)"),
        ({"mu": np.full(2, np.nan), "sigma": np.zeros((2, 2))}, "not finite"),
        ({"mu": np.array([{}], dtype=object), "sigma": np.zeros((1, 1))}, "pickled objects, which are never loaded"),
    ],
)
def test_unusable_statistics_files_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(GenkitError, match=message):
        references.read(tmp_path / "bad.npz")


def test_files_that_are_no_npz_are_refused(tmp_path):
    (tmp_path / "text.npz").write_text("hello")
    for name in ("text.npz", "missing.npz"):
        with pytest.raises(GenkitError, match=name):
            references.read(tmp_path / name)


# The feature net


def test_feature_net_is_small_and_accurate_on_images_it_never_saw(fashion):
    images, labels = fashion
    assert fashion_net.WEIGHTS.stat().st_size < 1_000_000
    net = features.load("fashion-cnn")
    assert net.sha256 == fashion_net.SHA256
    correct = sum(
        int((net.logits(x).argmax(1) == y).sum()) for x, y in zip(images.split(1000), labels.split(1000), strict=True)
    )
    assert correct / len(labels) >= 0.925


def test_feature_net_classes_are_the_datas():
    assert fashion_net.FashionCNN.class_names == Fashion(source="embedded", split="val").info.class_names


def test_padding_does_not_change_the_features(fashion):
    net = features.load("fashion-cnn")
    padded = Fashion(source="embedded", split="val", size=32).pixels[:8].float() / 127.5 - 1
    torch.testing.assert_close(net(padded), net(fashion[0][9000:9008]))


@pytest.mark.parametrize("shape", [(3, 28, 28), (1, 64, 64), (1, 20, 28)])
def test_feature_net_refuses_other_images(shape):
    with pytest.raises(UsageError, match="28x28 .*, got " + "x".join(map(str, shape))):
        features.load("fashion-cnn")(torch.zeros(2, *shape))


def test_damaged_weights_are_refused(tmp_path):
    data = bytearray(fashion_net.WEIGHTS.read_bytes())
    data[-1] ^= 1
    (tmp_path / "w.safetensors").write_bytes(data)
    with pytest.raises(GenkitError, match="is not the fashion-cnn weights"):
        features.load("fashion-cnn", str(tmp_path / "w.safetensors"))


def test_unknown_net_names_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'inception-2015'"):
        features.load("inception-2016")


def test_images_pass_a_net_once_for_all_metrics(fashion):
    images, labels = fashion
    metrics = [Frechet(), ClassAccuracy(), Reconstruction()]
    passed = []
    handle = metrics[0].net.module.body.register_forward_hook(lambda module, x, y: passed.append(len(y)))
    real, fake = ImageBatch(images[:20]), ImageBatch(images[20:40])
    for metric in metrics:
        metric.update(real=real, fake=fake, label=labels[20:40])
    handle.remove()
    assert passed == [20, 20]


# Metrics


def test_worse_images_have_a_larger_distance(fashion):
    images, _ = fashion
    real = ImageBatch(images[:2000])

    def distance(fake):
        metric = Frechet()
        metric.update(real=real, fake=ImageBatch(fake))
        return metric.result()["FD (fashion-cnn-v1)"]

    others = images[2000:4000]
    blurred = torch.nn.functional.avg_pool2d(others[:1000], 3, 1, 1)
    noise = torch.rand(1000, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    one_class = others[fashion[1][2000:4000] == 1]
    floor = distance(others)
    assert 5 * floor < distance(blurred) < distance(noise)
    assert 5 * floor < distance(one_class)


def test_few_images_are_noted(fashion):
    metric = Frechet()
    metric.update(real=fashion[0][:300], fake=fashion[0][300:350])
    assert len(metric.notes()) == 1
    assert "50 evaluated images are fewer than twice the 128 feature dimensions" in metric.notes()[0]


def test_statistics_of_another_net_are_refused(tmp_path, fashion):
    metric = Frechet()
    metric.update(real=fashion[0][:10])
    own = metric.real.moments(metric.net.sha256, metric.net.protocol, "ten")
    own.save(tmp_path / "own.npz")
    assert metric.use(references.read(tmp_path / "own.npz"))
    assert metric.fixed.count == 10
    metric.real.moments("cd" * 32, "other-net", "ten").save(tmp_path / "other.npz")
    with pytest.raises(GenkitError, match=r"statistics of other-net \(sha cdcdcdcd\)"):
        metric.use(references.read(tmp_path / "other.npz"))
    np.savez(tmp_path / "bare.npz", mu=own.mu, sigma=own.sigma)
    with pytest.raises(GenkitError, match="does not say which net made its 128-dimensional"):
        metric.use(references.read(tmp_path / "bare.npz"))


@pytest.mark.parametrize(("count", "name"), [(9_999, "FID-quick"), (10_000, "FID")])
def test_only_inception_with_ten_thousand_images_is_called_fid(monkeypatch, count, name):
    net = features.FeatureNet("inception-2015", "inception-2015", {"pool": 2}, "0" * 64, (), None)
    monkeypatch.setattr(features, "load", lambda *_: net)
    metric = Frechet(features="inception-2015")
    for statistics, n in ((metric.real, 20_000), (metric.fake, count)):
        statistics.update(torch.rand(n, 2))
    assert list(metric.result()) == [name]


def test_psnr_is_the_mean_over_images_of_their_own_ratio():
    x = torch.zeros(3, 1, 2, 2)
    y = torch.stack([x[0], x[1] + 0.2, x[2] + 2])
    torch.testing.assert_close(psnr(x, y), torch.tensor([100.0, 20.0, 0.0], dtype=torch.float64), atol=1e-5, rtol=0)


def direct_ssim(x, y):
    """Equation 13 of Wang et al. 2004, a window at a time."""
    line = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    w = np.outer(line, line) / line.sum() ** 2
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    values = []
    for c in range(x.shape[0]):
        for i in range(x.shape[1] - 10):
            for j in range(x.shape[2] - 10):
                a, b = x[c, i : i + 11, j : j + 11], y[c, i : i + 11, j : j + 11]
                ma, mb = (w * a).sum(), (w * b).sum()
                va, vb, cov = (w * (a - ma) ** 2).sum(), (w * (b - mb) ** 2).sum(), (w * (a - ma) * (b - mb)).sum()
                values.append((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    return np.mean(values)


def test_ssim_equals_its_definition():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 13, 17, generator=generator) * 2 - 1
    y = (x + 0.3 * torch.randn(x.shape, generator=generator)).clamp(-1, 1)
    expected = [direct_ssim(a.double().numpy(), b.double().numpy()) for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(ssim(x, y), expected, rtol=1e-10)
    torch.testing.assert_close(ssim(x, x), torch.ones(2, dtype=torch.float64))
    with pytest.raises(UsageError, match="11x11 window; images of 10x20"):
        ssim(torch.zeros(1, 1, 10, 20), torch.zeros(1, 1, 10, 20))


def test_class_accuracy_counts_the_class_asked_for(fashion):
    images, labels = fashion[0][9000:], fashion[1][9000:]
    right, wrong = ClassAccuracy(), ClassAccuracy()
    batch = ImageBatch(images)
    right.update(fake=batch, label=labels)
    wrong.update(fake=batch, label=(labels + 1) % 10)
    assert right.result()["class accuracy"] > 0.9
    assert wrong.result()["class accuracy"] < 0.1
    predicted = right.net.logits(images).argmax(1)
    trousers = labels == 1
    assert right.result()["class accuracy: trouser"] == pytest.approx(float((predicted[trousers] == 1).double().mean()))


def test_class_accuracy_refuses_labels_that_are_no_class(fashion):
    for label in (-1, 10):
        with pytest.raises(UsageError, match=f"label {label} is out of range; fashion-cnn knows 0-9"):
            ClassAccuracy().update(fake=fashion[0][:2], label=torch.tensor([0, label]))
    with pytest.raises(UsageError, match="needs labels"):
        ClassAccuracy().update(fake=fashion[0][:2])


def test_codebook_statistics_of_known_histograms():
    found = codebook_statistics(torch.tensor([[5, 5, 5, 5], [7, 0, 0, 0]]))
    assert found == pytest.approx({"codebook usage": 5 / 8, "codebook perplexity": (4 + 1) / 2, "dead codes": 3})


def test_codebook_counts_each_level_by_itself():
    metric = Codebook()
    ids = torch.tensor([[[0, 1], [3, 3]], [[0, 1], [3, 3]]])  # [B 2, Q 2, 2]
    metric.update(ids=ids, codebook_size=4)
    assert metric.histogram.tolist() == [[2, 2, 0, 0], [0, 0, 0, 4]]
    assert "only 1.0 ids per code" in metric.notes()[0]
    with pytest.raises(UsageError, match=r"ids lie in 0\.\.3, but the codebook has 3 entries"):
        Codebook().update(ids=ids, codebook_size=3)
    with pytest.raises(UsageError, match="continuous"):
        Codebook().update(ids=None, codebook_size=0)


@pytest.mark.parametrize("word", list(registry.words("metrics")))
def test_states_of_two_processes_sum_to_the_state_of_one_and_can_be_resumed(word, fashion):
    images, labels = fashion
    batch = {
        "real": images[:40],
        "fake": images[40:80] * 0.9,
        "label": labels[40:80],
        "ids": torch.arange(80).reshape(40, 1, 2) % 16,
        "number": torch.arange(40),
        "codebook_size": 16,
        "total": 40,
    }

    spec = registry.check("metrics", {"type": word}, "metrics[0]")

    def saw(*parts):
        try:
            metric = registry.build("metrics", spec)
        except GenkitError as error:
            if "are not here and are never downloaded" not in str(error):
                raise
            pytest.skip(str(error))
        for rows in parts:
            metric.update(**{name: value if isinstance(value, int) else value[rows] for name, value in batch.items()})
        return metric

    expected = saw(slice(0, 40)).result()
    here, there = saw(slice(0, 10)), saw(slice(10, 40))
    saved = {name: value.clone() for name, value in here.state().items()}
    for name, value in here.state().items():
        value += there.state()[name]
    assert here.result() == pytest.approx(expected, rel=1e-6, abs=1e-6)
    resumed = saw()
    resumed.restore(saved)
    resumed.update(**{name: value if isinstance(value, int) else value[10:] for name, value in batch.items()})
    assert resumed.result() == pytest.approx(expected, rel=1e-6, abs=1e-6)
