"""Borrowed feature nets against the libraries they come from, at random weights; both sides of the evaluation benchmarks."""

import importlib.util
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from genkit.errors import GenkitError, UsageError
from genkit.metrics import borrowed, features

SUITE = Path(__file__).parents[1] / "benchmarks" / "evaluation.py"
DEVIATION = torch.tensor(borrowed.IMAGENET[1]).view(3, 1, 1)
MEAN = torch.tensor(borrowed.IMAGENET[0]).view(3, 1, 1)


def pixels(*shape):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def scaled(images):
    """uint8 -> [-1, 1]."""
    return images.float() / 127.5 - 1


def fill(state, seed=0):
    """Random values that keep activations of about unit size."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in state.items():
        value.normal_(generator=generator)
        if value.ndim > 1:
            value.mul_((1.5 / max(1, value[0].numel())) ** 0.5)
        elif "norm" in name and name.endswith("weight"):
            value.abs_()
        else:
            value.mul_(0.2)
    return state


def test_every_net_names_its_file_and_whole_hash():
    for name, net in features.NETS.items():
        assert len(net.weights.sha256) == 64
        comes_along = name in ("fashion-cnn", "emoji-cnn")
        assert net.weights.url.startswith("https://") or comes_along
        assert net.weights.url.endswith(net.weights.name) or comes_along
    shared = {net.weights.sha256 for name, net in features.NETS.items() if name.startswith("inception")}
    assert len(shared) == 1


def test_nets_without_classes_say_so(tiny_dinov2):
    net = features.load("dinov2-vit-b-14", str(tiny_dinov2))
    with pytest.raises(UsageError, match="dinov2-vit-b-14 knows no classes"):
        net.logits(torch.zeros(1, 3, 20, 20))


# VGG16


@pytest.mark.parametrize("size", [(40, 51)])
def test_vgg16_equals_torch_fidelity(size, monkeypatch):
    module = pytest.importorskip("torch_fidelity.feature_extractor_vgg16")
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        random = torchvision.models.vgg16()
    random = random.to_empty(device="cpu")
    fill(random.state_dict())
    monkeypatch.setattr(module, "torchvision_load_pretrained_vgg16", lambda **_: random)
    peer = module.FeatureExtractorVGG16("vgg16", ["fc2_relu"])
    with torch.device("meta"):
        mine = borrowed.Vgg16()
    mine.load_state_dict(peer.model.state_dict(), assign=True)
    images = pixels(1, 3, *size)
    with torch.no_grad():
        found = mine.layers(scaled(images))["pool"]
    (expected,) = peer(images)
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.max()))


# DINOv2


@pytest.fixture(scope="module")
def tiny_dinov2(tmp_path_factory):
    """A file as published, of a net with two blocks of 128 channels, trained on 37 x 37 patches."""
    module = borrowed.DinoV2(dim=128, depth=2, grid=37)
    path = tmp_path_factory.mktemp("weights") / "dinov2_vitb14_pretrain.pth"
    torch.save(fill(module.state_dict()) | {"mask_token": torch.zeros(1, 128)}, path)
    return path


def test_dinov2_blocks_equal_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=224, patch_size=14
    )
    peer = transformers.Dinov2Model(config).eval()
    mine = borrowed.DinoV2(dim=128, depth=2, grid=16)
    state = fill(mine.state_dict())
    names = {
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "blocks": "encoder.layer",
        "ls1.gamma": "layer_scale1.lambda1",
        "ls2.gamma": "layer_scale2.lambda1",
        "attn.proj": "attention.o_proj",
    }
    theirs = {"embeddings.mask_token": torch.zeros(1, 128)}
    for name, value in state.items():
        name = f"layer{name}" if name.startswith("norm.") else name
        for mine_word, their_word in names.items():
            name = name.replace(mine_word, their_word)
        if "attn.qkv" in name:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                theirs[name.replace("attn.qkv", f"attention.{letter}_proj")] = part
        else:
            theirs[name] = value
    if "encoder.layer.0.attention.q_proj.weight" not in peer.state_dict():  # before release 5
        older = {
            "o_proj": "output.dense",
            "q_proj": "attention.query",
            "k_proj": "attention.key",
            "v_proj": "attention.value",
        }
        theirs = {re.sub("[oqkv]_proj", lambda word: older[word[0]], name): value for name, value in theirs.items()}
    peer.load_state_dict(theirs)
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(mine(x), peer(x).pooler_output, rtol=1e-4, atol=1e-5)


def test_dinov2_positions_are_stretched_a_little_more_than_fits(tiny_dinov2):
    module = borrowed.load_dinov2(tiny_dinov2)
    table = module.pos_embed[0, 1:].detach().double().unflatten(0, (37, 37)).numpy()
    # Bicubic with a = -3/4 at (i + 1/2) * 37 / 16.1 - 1/2, reads past the border repeat it.
    place = (np.arange(16) + 0.5) * 37 / 16.1 - 0.5
    matrix = np.zeros((16, 37))
    for row, at in enumerate(place):
        for k in range(int(np.floor(at)) - 1, int(np.floor(at)) + 3):
            d = abs(at - k)
            near, far = 1.25 * d**3 - 2.25 * d**2 + 1, -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)
            matrix[row, min(max(k, 0), 36)] += near if d <= 1 else far
    expected = np.einsum("ij,jkd,lk->ild", matrix, table, matrix).reshape(256, -1)
    found = module._positions(16)[0].detach()
    assert torch.equal(found[0], module.pos_embed[0, 0])
    np.testing.assert_allclose(
        found[1:], expected, atol=1e-4 * np.abs(expected).max()
    )  # the taps' weights are single precision


@pytest.mark.parametrize("size", [(40, 51), (300, 260)])
def test_dinov2_sees_what_pillow_makes_of_the_image(tiny_dinov2, size):
    net = features.load("dinov2-vit-b-14", str(tiny_dinov2))
    images = pixels(1, 3, *size)
    planes = [
        Image.fromarray(plane.float().numpy()).resize((224, 224), Image.Resampling.BICUBIC) for plane in images[0]
    ]
    seen = (torch.from_numpy(np.stack([np.asarray(plane) for plane in planes])) / 255 - MEAN) / DEVIATION
    expected = net.module(seen[None])
    torch.testing.assert_close(net(scaled(images)), expected, rtol=1e-3, atol=1e-4)
    assert net.protocol == "dinov2-vit-b-14 (other weights)"
    assert net.dims == {"pool": 128}


def test_borrowed_nets_take_grey_and_refuse_two_channels(tiny_dinov2):
    net = features.load("dinov2-vit-b-14", str(tiny_dinov2))
    grey = scaled(pixels(1, 1, 30, 20))
    torch.testing.assert_close(net(grey), net(grey.expand(-1, 3, -1, -1)))
    with pytest.raises(UsageError, match="dinov2 takes images of 1 or 3 channels, got 2x8x8"):
        net(torch.zeros(1, 2, 8, 8))


# CLIP


class Archive(torch.nn.Module):
    """What of a published CLIP the image side is read from."""

    def __init__(self, visual, dim):
        super().__init__()
        self.visual = visual
        self.text_projection = torch.nn.Parameter(torch.ones(1, dim))

    def forward(self, x):
        return self.visual(x) * self.text_projection


def test_clip_equals_torch_fidelity(tmp_path):
    module = pytest.importorskip("torch_fidelity.feature_extractor_clip")
    visual = module.VisionTransformer(input_resolution=32, patch_size=8, width=64, layers=2, heads=1, output_dim=16)
    fill(visual.state_dict())
    path = tmp_path / "tiny.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about the format CLIP was published in
        torch.jit.save(torch.jit.trace(Archive(visual, 16), torch.zeros(1, 3, 32, 32)), path)
        net = features.load("clip-vit-b-32", str(path))
        peer = module.FeatureExtractorCLIP("clip-vit-b-32", ["clip"], feature_extractor_weights_path=str(path))
    assert net.dims == {"pool": 16}
    assert net.protocol == "clip-vit-b-32 (other weights)"
    images = pixels(2, 3, 40, 51)
    (expected,) = peer(images)
    assert expected.std() > 1e-3
    torch.testing.assert_close(net(scaled(images)), expected)
    grey = pixels(1, 1, 9, 9)
    torch.testing.assert_close(net(scaled(grey)), peer(grey.expand(-1, 3, -1, -1))[0])
    (tmp_path / "odd.pt").write_bytes(b"something else")
    with pytest.raises(GenkitError, match="does not hold weights of clip-vit-b-32"):
        features.load("clip-vit-b-32", str(tmp_path / "odd.pt"))


# Benchmarks


@pytest.fixture(scope="module")
def suite():
    spec = importlib.util.spec_from_file_location("benchmarks_evaluation", SUITE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_sides_of_the_folder_benchmark_find_the_same_features(suite, tmp_path):
    weights = suite.random_weights(tmp_path)
    images = suite.random_images(tmp_path / "images", 2)
    ours, fidelity, fid = suite.folder_sides(images, weights)
    bilinear = suite._ours(images, features.load("inception-2015-bilinear", str(weights)))
    for found, peer in ((ours(), fidelity), (bilinear, fid)):
        if not isinstance(peer, str):
            expected = peer()
            assert expected.std(0).max() > 0.01 * expected.max()  # images differ: an order that is mixed up would show
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5 * float(expected.max()))


def test_both_sides_of_the_frechet_benchmark_find_the_same_distance(suite):
    ours, peer = suite.frechet_sides(40)
    if isinstance(peer, str):
        pytest.skip(peer)
    assert ours() == pytest.approx(peer(), rel=1e-8)
    assert ours() > 0.1
