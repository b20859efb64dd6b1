"""Inception-2015 against torch-fidelity, pytorch-fid and clean-fid on shared random weights, and how its weights are found."""

from dataclasses import replace

import pytest
import torch

from genkit.errors import GenkitError, UsageError
from genkit.metrics import features, inception
from genkit.metrics.statistics import FeatureSums, frechet_distance
from genkit.weights import file_sha256


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights, scaled so that activations neither vanish nor explode over 94 layers."""
    torch.manual_seed(0)
    state = {}
    with torch.device("meta"):
        shapes = inception.Inception2015().state_dict()
    for name, value in shapes.items():
        value = torch.empty(value.shape)
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(0)
        elif name.endswith("running_var"):
            state[name] = torch.rand_like(value) + 0.5
        elif name.endswith("bn.weight"):
            state[name] = torch.rand_like(value) * 0.4 + 0.8
        elif value.ndim > 1:
            state[name] = torch.randn_like(value) * (2 / value[0].numel()) ** 0.5
        else:
            state[name] = torch.randn_like(value) * 0.1
    path = tmp_path_factory.mktemp("weights") / inception.FILE
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def net(weights):
    return features.load("inception-2015", str(weights))


@pytest.fixture(scope="module")
def fidelity(weights):
    """torch-fidelity's net with the same weights."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    wanted = ["2048", "logits_unbiased", "logits"]
    return module.FeatureExtractorInceptionV3("peer", wanted, feature_extractor_weights_path=str(weights))


def pixels(*shape):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def scaled(images):
    """uint8 -> [-1, 1]."""
    return images.float() / 127.5 - 1


def assert_close(found, expected):
    """94 layers in fp32 with other algorithms and folded norms: 2e-6 was seen, of features with a spread of about 1."""
    scale = expected.abs().max()
    assert expected.std() > 1e-2 * scale  # a constant would pass the comparison
    assert (found - expected).abs().max() < 2e-5 * scale


@pytest.mark.parametrize("size", [(51, 40), (310, 325)], ids=["enlarged", "shrunk"])
def test_layers_equal_torch_fidelity(net, fidelity, size):
    images = pixels(1, 3, *size)
    branch = []
    handle = fidelity.Mixed_6d.branch1x1.register_forward_hook(lambda module, x, y: branch.append(y))
    pool, unbiased, logits = fidelity(images)
    handle.remove()
    found = net.layers(scaled(images))
    assert_close(found["pool"], pool)
    assert_close(found["logits"], unbiased)
    assert_close(net.classify(found["pool"]), logits)
    # TensorFlow's mixed_6/conv is the 1x1 branch after its ReLU; there channels come last.
    expected = branch[0][:, :7].permute(0, 2, 3, 1).reshape(1, -1)
    assert expected.min() == 0
    assert_close(found["spatial"], expected)
    assert {name: value.shape[1] for name, value in found.items()} == net.dims


@pytest.mark.parametrize("size", [(51, 40), (310, 325)], ids=["enlarged", "shrunk"])
def test_bilinear_features_equal_pytorch_fid(weights, size, monkeypatch):
    module = pytest.importorskip("pytorch_fid.inception")
    monkeypatch.setattr(
        module, "load_state_dict_from_url", lambda *_, **__: torch.load(weights, map_location="cpu", weights_only=True)
    )
    peer = module.InceptionV3().eval()
    images = pixels(1, 3, *size)
    with torch.no_grad():
        expected = peer(images.float() / 255)[0].flatten(1)
    assert_close(features.load("inception-2015-bilinear", str(weights))(scaled(images)), expected)


@pytest.mark.parametrize("size", [(51, 40), (310, 325), (299, 17)])
@pytest.mark.parametrize("channels", [1, 3])
def test_clean_resize_equals_clean_fid(size, channels):
    build = pytest.importorskip("cleanfid.resize").build_resizer
    images = pixels(1, channels, *size)
    rgb = images.expand(-1, 3, -1, -1)[0].permute(1, 2, 0).numpy()
    expected = torch.from_numpy(build("clean")(rgb)).permute(2, 0, 1)[None]  # [1, 3, 299, 299] in 0..255
    seen = inception.RESIZES["clean"](images.float()).expand(-1, 3, -1, -1)
    assert expected.min() == 0  # the kernel overshoots, and is cut
    assert (seen * 128 + 128 - expected).abs().max() < 1e-4  # grey levels


def test_resizes_are_the_only_difference_between_the_variants(weights, net):
    images = scaled(pixels(1, 3, 299, 299))  # nothing to resize
    for name in ("inception-2015-clean", "inception-2015-bilinear"):
        other = features.load(name, str(weights))
        assert other.protocol == f"{name} (other weights)"
        assert other.sha256 == net.sha256
        if name.endswith("clean"):  # pytorch-fid maps 0..255 to [-1, 1], the others to [-1, 0.992]
            assert_close(other(images), net(images))
    small = scaled(pixels(1, 3, 32, 32))
    found = [features.load(name, str(weights))(small) for name in features.NAMES if name.startswith("inception")]
    assert len(found) == 3
    for one, two in ((0, 1), (0, 2), (1, 2)):
        assert (found[one] - found[two]).abs().max() > 1e-3 * found[0].abs().max()


@pytest.mark.parametrize("threads", [1, 2])
def test_neither_parts_of_a_batch_nor_threads_matter(net, monkeypatch, threads):
    images = scaled(pixels(3, 3, 20, 24))
    whole = net.layers(images)
    before = torch.get_num_threads()
    monkeypatch.setattr(net.module, "chunk", 1)
    torch.set_num_threads(threads)
    try:
        found = net.layers(images)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for name, value in found.items():
        assert not value.requires_grad
        torch.testing.assert_close(value, whole[name], rtol=1e-5, atol=1e-5 * float(value.abs().max()))


def test_distance_equals_torch_fidelity():
    module = pytest.importorskip("torch_fidelity.metric_fid")
    generator = torch.Generator().manual_seed(2)
    one, two = (
        torch.randn(n, 48, generator=generator) @ torch.randn(48, 48, generator=generator) + n / 100 for n in (200, 300)
    )
    mine = []
    for rows in (one, two):
        sums = FeatureSums(48)
        sums.update(rows)
        mine.append(sums.moments())
    found = frechet_distance(mine[0].mu, mine[0].sigma, mine[1].mu, mine[1].sigma)
    peers = [module.fid_features_to_statistics(rows.double()) for rows in (one, two)]
    expected = module.fid_statistics_to_metric(*peers, False)[module.KEY_METRIC_FID]
    assert found == pytest.approx(expected, rel=1e-9)


def test_grey_images_count_as_three_equal_channels(net):
    grey = torch.rand(1, 1, 30, 30) * 2 - 1
    torch.testing.assert_close(net(grey), net(grey.expand(-1, 3, -1, -1)))


def test_net_is_frozen_and_in_eval_mode(net):
    assert not net.module.training
    assert not any(p.requires_grad for p in net.module.parameters())
    assert net.dim == 2048


def test_two_channels_are_refused(net):
    with pytest.raises(UsageError, match="1 or 3 channels, got 2x30x30"):
        net(torch.zeros(1, 2, 30, 30))


def test_resize_reads_without_half_pixel_shift():
    x = torch.tensor([[0.0, 10.0], [20.0, 40.0]])[None, None]
    expected = torch.tensor([[0.0, 5, 10, 10], [10, 17.5, 25, 25], [20, 30, 40, 40], [20, 30, 40, 40]])
    torch.testing.assert_close(inception.resize_tf1(x, 4)[0, 0], expected)
    ramp = torch.arange(8.0).expand(1, 1, 8, 8)
    torch.testing.assert_close(inception.resize_tf1(ramp, 4)[0, 0, 0], torch.tensor([0.0, 2, 4, 6]))


def test_missing_weights_are_one_line_with_url_hash_and_target(tmp_path, monkeypatch):
    monkeypatch.setenv("GENKIT_CACHE", str(tmp_path))
    monkeypatch.delenv("GENKIT_WEIGHTS", raising=False)
    with pytest.raises(GenkitError) as caught:
        features.load("inception-2015")
    text = str(caught.value)
    assert inception.WEIGHTS.url in text
    assert inception.WEIGHTS.sha256 in text
    assert str(tmp_path / "weights" / inception.FILE) in text
    assert "\n" not in text


def test_weights_are_found_by_path_then_environment_then_cache(tmp_path, monkeypatch):
    places = {name: tmp_path / name / inception.FILE for name in ("given", "environment", "weights")}
    for path in places.values():
        path.parent.mkdir()
        path.touch()
    monkeypatch.setenv("GENKIT_CACHE", str(tmp_path))
    monkeypatch.setenv("GENKIT_WEIGHTS", str(places["environment"].parent))
    assert features.locate("inception-2015", str(places["given"].parent)) == places["given"]
    assert features.locate("inception-2015", str(places["given"])) == places["given"]
    assert features.locate("inception-2015") == places["environment"]
    places["environment"].unlink()
    assert features.locate("inception-2015") == places["weights"]
    with pytest.raises(GenkitError, match="no such file"):
        features.locate("inception-2015", str(tmp_path / "nowhere.pth"))


def test_a_named_file_of_another_net_is_not_taken_for_this_one(tmp_path, monkeypatch):
    monkeypatch.setenv("GENKIT_CACHE", str(tmp_path))
    for name in ("vgg16-397923af.pth", inception.FILE):
        (tmp_path / name).touch()
    monkeypatch.setenv("GENKIT_WEIGHTS", str(tmp_path / "vgg16-397923af.pth"))
    assert features.locate("vgg16") == tmp_path / "vgg16-397923af.pth"
    with pytest.raises(GenkitError, match="weights of inception-2015 are not here"):
        features.locate("inception-2015")


def test_other_weights_are_marked_where_they_are_given_and_refused_where_they_lie_about(weights, net, monkeypatch):
    assert not net.is_published
    assert net.protocol == "inception-2015 (other weights)"
    assert net.sha256 == file_sha256(weights)
    monkeypatch.setenv("GENKIT_WEIGHTS", str(weights))
    with pytest.raises(GenkitError, match=r"is not the inception-2015 weights: its sha256 is .* expected 6726825d"):
        features.load("inception-2015")


def test_published_weights_are_known_by_their_hash(weights, monkeypatch):
    line = features.NETS["inception-2015"]
    published = replace(line, weights=replace(line.weights, sha256=file_sha256(weights)))
    monkeypatch.setitem(features.NETS, "inception-2015", published)
    monkeypatch.setenv("GENKIT_WEIGHTS", str(weights.parent))
    features._load.cache_clear()
    found = features.load("inception-2015")
    features._load.cache_clear()
    assert found.is_published
    assert found.protocol == "inception-2015"


@pytest.mark.parametrize("content", [b"something else", {"fc.weight": torch.zeros(3)}], ids=["bytes", "tensors"])
def test_files_with_something_else_are_refused_in_one_line(tmp_path, content):
    path = tmp_path / inception.FILE
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(
        GenkitError, match=r"cannot be read as weights|does not hold weights of inception-2015"
    ) as caught:
        features.load("inception-2015", str(path))
    assert "\n" not in str(caught.value)
