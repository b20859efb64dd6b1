"""LPIPS against the lpips package on shared random trunks and its own heads; how its weights are found."""

import hashlib
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from genkit.errors import GenkitError, UsageError
from genkit.metrics.features import ImageBatch
from genkit.metrics.lpips import LPIPS
from genkit.nn import lpips as own
from genkit.nn.lpips import is_available, load_lpips


@pytest.fixture(scope="module")
def trunk():
    """Random VGG16 convolutions under torchvision's names, scaled so that activations neither vanish nor explode."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, value in own.vgg16_features().state_dict().items():
        drawn = torch.randn(value.shape, generator=generator)
        state[f"features.{name}"] = drawn * (2 / value[0].numel()) ** 0.5 if value.ndim > 1 else drawn * 0.1
    return state


@pytest.fixture(scope="module")
def heads():
    generator = torch.Generator().manual_seed(1)
    widths = own._TAPS.values()
    return {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1, generator=generator) for i, c in enumerate(widths)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, trunk, heads):
    """Both files under their published names, the trunk with a layer that LPIPS does not need."""
    path = tmp_path_factory.mktemp("weights")
    torch.save(trunk | {"classifier.0.weight": torch.zeros(3, 3)}, path / own.TRUNK.name)
    torch.save(heads, path / own.HEADS.name)
    return path


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """An empty cache and no variable."""
    monkeypatch.setenv("GENKIT_CACHE", str(tmp_path))
    monkeypatch.delenv("GENKIT_WEIGHTS", raising=False)
    return tmp_path / "weights"


def pair(*shape):
    generator = torch.Generator().manual_seed(2)
    x = torch.rand(shape, generator=generator) * 2 - 1
    return x, (x + 0.3 * torch.randn(shape, generator=generator)).clamp(-1, 1)


@pytest.fixture(scope="module")
def peer(trunk):
    """The package's module with the random trunk and its own heads, and the file of these."""
    package = pytest.importorskip("lpips")
    pytest.importorskip("torchvision")
    file = Path(package.__file__).parent / "weights" / "v0.1" / "vgg.pth"
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torchvision, about how the package calls it
        module = package.LPIPS(net="vgg", pnet_rand=True, pretrained=False, verbose=False)
    module.scaling_layer = package.ScalingLayer()
    numbered = {name: trunk[f"features.{name.partition('.')[2]}"] for name in module.net.state_dict()}
    module.net.load_state_dict(numbered, assign=True)
    module.load_state_dict(torch.load(file, map_location="cpu", weights_only=True), strict=False, assign=True)
    return module.eval().requires_grad_(False), file


@pytest.mark.parametrize("size", [(33, 50), (16, 16)])
def test_distance_and_gradient_equal_the_lpips_package(folder, peer, size, tmp_path):
    other_module, heads_file = peer
    (tmp_path / own.TRUNK.name).write_bytes((folder / own.TRUNK.name).read_bytes())
    (tmp_path / own.HEADS.name).write_bytes(heads_file.read_bytes())
    module = load_lpips(str(tmp_path))
    assert module.sha256[1] == own.HEADS.sha256  # the package's file is the published one

    x, y = pair(2, 3, *size)
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    found, expected = module(mine, y), other_module(other, y).flatten()
    assert expected.min() > 1e-2
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    found.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-4 * float(other.grad.abs().max()))


def test_the_packages_own_state_loads_from_one_file(folder, trunk, heads, tmp_path):
    slices = [4, 9, 16, 23, 30]
    one = {}
    for name, value in trunk.items():
        number = int(name.split(".")[1])
        one[f"net.slice{1 + sum(number >= end for end in slices)}.{name.removeprefix('features.')}"] = value
    one |= heads | {f"lins.{i}.model.1.weight": value for i, value in enumerate(heads.values())}
    torch.save(one | {"scaling_layer.shift": torch.zeros(1, 3, 1, 1)}, tmp_path / "one.pth")
    x, y = pair(1, 3, 20, 20)
    assert torch.equal(load_lpips(str(tmp_path / "one.pth"))(x, y), load_lpips(str(folder))(x, y))


def test_a_file_with_one_part_finds_the_other_beside_it(folder, nowhere):
    x, y = pair(1, 3, 16, 16)
    expected = load_lpips(str(folder))(x, y)
    for name in (own.TRUNK.name, own.HEADS.name):
        assert torch.equal(load_lpips(str(folder / name))(x, y), expected)
    lonely = nowhere.parent / "heads.pth"
    lonely.write_bytes((folder / own.HEADS.name).read_bytes())
    with pytest.raises(GenkitError, match=f"no such file: .*{own.TRUNK.name}"):
        load_lpips(str(lonely))


def test_equal_images_have_no_distance_and_no_nan_gradient(folder):
    module = load_lpips(str(folder))
    dead = load_lpips(str(folder))
    for name, value in dead.features.named_parameters():
        value.fill_(-1.0 if name.endswith("bias") else 0.0)  # every feature is zero
    for net in (module, dead):
        x = torch.zeros(1, 3, 16, 16, requires_grad=True)
        distance = net(x, torch.zeros(1, 3, 16, 16))
        distance.sum().backward()
        assert distance.item() == 0
        assert torch.isfinite(x.grad).all()


def test_it_is_frozen_and_stays_in_eval_mode(folder):
    module = load_lpips(str(folder)).train()
    assert not module.training
    assert not any(p.requires_grad for p in module.parameters())


def test_grey_counts_as_three_equal_channels_and_other_shapes_are_refused(folder):
    module = load_lpips(str(folder))
    x, y = pair(2, 1, 17, 20)
    torch.testing.assert_close(module(x, y), module(x.expand(-1, 3, -1, -1), y.expand(-1, 3, -1, -1)))
    with pytest.raises(UsageError, match=r"of one shape, got \[2, 1, 17, 20\] and \[1, 1, 17, 20\]"):
        module(x, y[:1])
    with pytest.raises(UsageError, match="at least 16x16 pixels, got 15x40"):
        module(torch.zeros(1, 3, 15, 40), torch.zeros(1, 3, 15, 40))


def test_missing_files_are_one_line_with_url_hash_and_target(nowhere, folder):
    assert not is_available()
    nowhere.mkdir()
    for part, other in ((own.TRUNK, own.HEADS), (own.HEADS, own.TRUNK)):
        for path in nowhere.iterdir():
            path.unlink()
        (nowhere / other.name).write_bytes(b"")
        with pytest.raises(GenkitError) as caught:
            load_lpips()
        text = str(caught.value)
        assert part.url in text
        assert part.sha256 in text
        assert str(nowhere / part.name) in text
        assert "\n" not in text
    (nowhere / own.HEADS.name).write_bytes(b"")
    assert is_available()


def test_only_published_files_are_taken_from_the_cache(nowhere, folder, monkeypatch):
    nowhere.mkdir()
    for part in (own.TRUNK, own.HEADS):
        (nowhere / part.name).write_bytes((folder / part.name).read_bytes())
    with pytest.raises(GenkitError, match=r"is not the vgg16 weights: its sha256 is .* expected 397923af"):
        load_lpips()
    for word in ("TRUNK", "HEADS"):
        part = getattr(own, word)
        sha256 = hashlib.sha256((folder / part.name).read_bytes()).hexdigest()
        monkeypatch.setattr(own, word, replace(part, sha256=sha256))
    assert load_lpips().is_published


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"other": torch.zeros(3)}, "holds neither VGG16"),
        ([1, 2], "not a dictionary of tensors"),
        (None, "cannot be read as weights of LPIPS"),
    ],
)
def test_files_with_something_else_are_refused(tmp_path, content, message):
    path = tmp_path / "odd.pth"
    path.write_bytes(b"hello") if content is None else torch.save(content, path)
    with pytest.raises(GenkitError, match=message):
        load_lpips(str(path))


def test_a_part_of_another_shape_is_named(tmp_path, folder, heads):
    (tmp_path / own.TRUNK.name).write_bytes((folder / own.TRUNK.name).read_bytes())
    torch.save(heads | {"lin2.model.1.weight": torch.zeros(1, 255, 1, 1)}, tmp_path / own.HEADS.name)
    with pytest.raises(GenkitError, match=r"heads\.2 is missing or has another shape \(1 of 31\)"):
        load_lpips(str(tmp_path))


def test_metric_is_the_mean_over_images_of_8_bits(folder):
    x, y = pair(3, 3, 16, 16)
    metric, resumed = LPIPS(weights=str(folder)), LPIPS(weights=str(folder))
    metric.update(real=x[:2], fake=y[:2])
    resumed.restore({name: value.clone() for name, value in metric.state().items()})
    resumed.update(real=ImageBatch(x[2:]), fake=ImageBatch(y[2:]))
    expected = metric.distance(ImageBatch(x).x, ImageBatch(y).x).double().mean()
    assert resumed.result()["LPIPS"] == pytest.approx(float(expected), rel=1e-6)
    assert metric.state()["images"] == 2
    sha256 = [hashlib.sha256((folder / part.name).read_bytes()).hexdigest()[:8] for part in (own.TRUNK, own.HEADS)]
    assert metric.protocol == f"LPIPS vgg16 v0.1 (other weights), 8 bits, mean over images, sha {'+'.join(sha256)}"
    assert "not the published ones" in metric.notes()[0]
    with pytest.raises(UsageError, match="seen no images"):
        LPIPS(weights=str(folder)).result()
