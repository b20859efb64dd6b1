"""What every tokenizer promises, walked over all of them: each word has a toy recipe, and the toy recipe's tokenizer keeps the contract."""

from functools import cache
from pathlib import Path

import pytest
import torch

from genkit import config, registry
from genkit.errors import UsageError

CONFIGS = Path(config.__file__).parent / "configs"
RECIPES = {
    path.stem: path
    for path in sorted((CONFIGS / "toy").glob("*.yaml"))
    if "tokenizer" in (parsed := config.load(path))
    and parsed.task == "tokenize"
    and parsed["tokenizer"]["type"] != "octree_vq"  # of shapes, which are no images: tests/test_octree_vq.py
    # Those of emoji differ in channels and stride alone; two stand for all.
    and (parsed["data"]["type"] != "emoji" or path.stem in ("vq-emoji", "dqvae-emoji"))
}
SIZES = {"fashion": (1, 28, 28), "emoji": (3, 64, 64)}


@cache
def shape(name):
    data = config.load(RECIPES[name])["data"]
    channels, *sides = SIZES[data["type"]]
    side = data.get("size") or sides[0]
    return (channels, side, side)


@pytest.fixture(params=list(RECIPES))
def recipe(request):
    return request.param


@pytest.fixture
def tokenizer(recipe):
    torch.manual_seed(0)
    spec = config.load(RECIPES[recipe])["tokenizer"]
    made = registry.build("tokenizer", spec, image_channels=shape(recipe)[0])
    made.train()
    made(images(recipe, 8))  # a codebook is clustered by the first batch it is trained on
    for module in made.modules():
        if hasattr(module, "after_step"):
            module.after_step()
    return made.eval()


def images(recipe, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, shape(recipe)[0], 7, 7, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=shape(recipe)[1:], mode="bilinear") * 2 - 1


def assert_like(found, expected):
    """Equal but for the rare vector that lies between two codes."""
    assert (found - expected).abs().mean() < 0.02 * expected.std()


def test_every_tokenizer_has_a_toy_recipe_and_one_at_full_size():
    specs = {path: config.load(path).get("tokenizer", {}) for path in CONFIGS.rglob("*.yaml")}
    words = set(registry.words("tokenizer")) - {"pixels", "bare"}  # nothing to train
    specs = {path: spec for path, spec in specs.items() if spec.get("type") != "pixels"}
    assert words == {spec["type"] for path, spec in specs.items() if "type" in spec and path.parent.name == "toy"}
    assert words == {spec["type"] for path, spec in specs.items() if "type" in spec and path.parent.name != "toy"}


@torch.no_grad()
def test_shapes_and_ids_are_what_it_says(recipe, tokenizer):
    x = images(recipe, 3)
    reconstruction, encoded = tokenizer(x)
    assert reconstruction.shape == x.shape
    assert encoded.z.shape[:2] == (3, tokenizer.channels)
    assert all(value.shape == (3,) for value in encoded.losses.values())
    if tokenizer.num_levels == 0:
        assert encoded.ids is None
        return
    assert encoded.ids.dtype == torch.int64
    assert encoded.ids.shape[:2] == (3, tokenizer.num_levels)
    assert 0 <= encoded.ids.min() <= encoded.ids.max() < tokenizer.codebook_size


@torch.no_grad()
def test_ids_say_everything(recipe, tokenizer):
    if tokenizer.num_levels == 0:
        with pytest.raises(UsageError):
            tokenizer.codes(torch.zeros(1, 1, 7, 7, dtype=torch.int64))
        return
    tokenizer.set_latent_stats(torch.linspace(-1, 1, tokenizer.channels), torch.linspace(0.5, 2, tokenizer.channels))
    encoded = tokenizer.encode(images(recipe, 3))
    assert torch.equal(tokenizer.codes(encoded.ids), encoded.z)
    assert torch.equal(tokenizer.decode(tokenizer.codes(encoded.ids)), tokenizer.decode(encoded.z))


@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch(recipe, tokenizer):
    x = images(recipe, 4)
    together, alone = tokenizer.encode(x), tokenizer.encode(x[2:3])
    # Rounding differs between batch sizes, and of two equal codes of an untrained codebook either may be chosen.
    assert_like(alone.z, together.z[2:3])
    torch.testing.assert_close(
        tokenizer.decode(together.z)[2:3], tokenizer.decode(together.z[2:3]), rtol=1e-3, atol=1e-3
    )


def test_gradient_reaches_the_encoder(recipe, tokenizer):
    tokenizer.train()
    x = images(recipe, 8, seed=1)
    reconstruction, _ = tokenizer(x)
    (reconstruction - x).square().mean().backward()
    grads = [parameter.grad for parameter in tokenizer.encoder.parameters() if parameter.grad is not None]
    assert sum(grad.abs().sum() for grad in grads) > 0
    assert all(grad.isfinite().all() for grad in grads)


@torch.no_grad()
def test_saved_and_loaded_it_is_the_same(recipe, tokenizer, tmp_path):
    x = images(recipe, 2)
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path, low_cpu_mem_usage=False).eval()
    before, after = tokenizer.encode(x), again.encode(x)
    # Loaded weights lie in memory in another order, which changes the last digits of a convolution.
    assert_like(after.z, before.z)
    torch.testing.assert_close(tokenizer.decode(before.z), again.decode(before.z), rtol=1e-3, atol=1e-3)
    for (name, value), (other, same) in zip(tokenizer.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(value, same), name


def test_wrong_images_and_ids_are_one_line(recipe, tokenizer):
    channels, side, _ = shape(recipe)
    wrong = [torch.zeros(1, channels + 1, side, side)]
    if tokenizer.stride > 1:
        wrong.append(torch.zeros(1, channels, side + 1, side))
    for x in wrong:
        with pytest.raises(UsageError) as caught:
            tokenizer.encode(x)
        assert "\n" not in str(caught.value)
    if tokenizer.num_levels:
        ids = tokenizer.encode(images(recipe, 1)).ids
        with pytest.raises(UsageError, match=str(tokenizer.codebook_size)):
            tokenizer.codes(torch.full_like(ids, tokenizer.codebook_size))
        with pytest.raises(UsageError):
            tokenizer.codes(ids[:, 0])


def test_use_of_codes_is_reported(recipe, tokenizer):
    tokenizer.train()
    tokenizer(images(recipe, 4))
    for module in tokenizer.modules():
        if hasattr(module, "after_step"):
            module.after_step()
    named = {name for module in tokenizer.modules() if hasattr(module, "stats") for name in module.stats()}
    if tokenizer.num_levels:
        assert any("usage" in name for name in named)


def test_gradient_may_be_turned_where_a_codebook_is_looked_up(recipe, tokenizer):
    spec = config.load(RECIPES[recipe])["tokenizer"]
    if "gradient" not in registry.options(registry.find("tokenizer", spec["type"])):
        assert spec["type"] in ("fsq", "lfq", "bsq", "kl", "klgan", "ibq", "pixels")  # none, or a way of its own
        return
    turned = registry.build("tokenizer", {**spec, "gradient": "rotation"}, image_channels=shape(recipe)[0])
    turned.load_state_dict(tokenizer.state_dict())
    x = images(recipe, 8, seed=1)
    found = {}
    for name, made in (("straight", tokenizer), ("turned", turned)):
        torch.manual_seed(3)  # grains are drawn
        reconstruction, encoded = made.train()(x)
        reconstruction.square().mean().backward()
        gradient = torch.cat([p.grad.flatten() for p in made.encoder.parameters() if p.grad is not None])
        found[name] = (encoded.z.detach(), gradient)
    torch.testing.assert_close(found["turned"][0], found["straight"][0])
    assert found["turned"][1].isfinite().all()
    assert not torch.allclose(found["turned"][1], found["straight"][1], rtol=1e-2, atol=0)
