"""Inception-2015 against torch-fidelity on shared random weights, and how its weights are found."""

import pytest
import torch

from genkit.errors import GenkitError, UsageError
from genkit.metrics import features, inception
from genkit.metrics.statistics import FeatureSums, frechet_distance


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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "SHA256", features.file_sha256(weights))
        return features.load("inception-2015", str(weights))


def test_features_and_logits_equal_torch_fidelity(net, weights):
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    peer = module.FeatureExtractorInceptionV3("peer", ["2048", "logits"], feature_extractor_weights_path=str(weights))
    generator = torch.Generator().manual_seed(1)
    for size in [(51, 40), (310, 325)]:  # enlarged, shrunk; neither is square
        pixels = torch.randint(256, (1, 3, *size), generator=generator, dtype=torch.uint8)
        expected, expected_logits = peer(pixels)
        x = pixels.float() / 127.5 - 1
        # 94 layers in fp32 with other algorithms and folded norms: 1e-5 was seen, of features with a spread of about 1.
        scale = expected.abs().max()
        found = net(x)
        assert (found - expected).abs().max() < 1e-4 * scale
        assert (net.classify(found) - expected_logits).abs().max() < 1e-4 * expected_logits.abs().max()
        assert expected.std() > 1e-2 * scale  # a constant would pass the comparison


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
    assert net.protocol == "inception-2015"


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
    assert inception.URL in text
    assert "6726825d" in text
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


def test_other_weights_are_refused_by_hash(tmp_path):
    path = tmp_path / inception.FILE
    path.write_bytes(b"something else")
    with pytest.raises(GenkitError, match=r"sha256 is .* expected 6726825d"):
        features.load("inception-2015", str(path))
