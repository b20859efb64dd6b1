"""Inception features of a folder of images against torch-fidelity and pytorch-fid; the Fréchet distance against scipy's matrix root."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from genkit.bench import Case
from genkit.metrics import features, inception
from genkit.metrics.image_files import from_folder
from genkit.metrics.statistics import frechet_distance

MISSING = "not installed; pip install 'genkit-torch[bench]'"
READ = 64  # images at a time, as torch-fidelity does


def cases(quick: bool) -> Iterable[Case]:
    """Whole runs over a folder of 64x64 PNG files: decode, resize, net. Weights are random and the same on both sides."""
    count, dim = (8, 256) if quick else (200, 2048)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = random_weights(folder)
        images = random_images(folder / "images", count)
        ours, fidelity, fid = folder_sides(images, weights)
        yield Case(f"features of {count} PNG, 64x64", _named("torch-fidelity"), 1.3, ours, fidelity)
        bilinear = functools.partial(_ours, images, features.load("inception-2015-bilinear", str(weights)))
        yield Case(f"features of {count} PNG, 64x64, bilinear", _named("pytorch-fid"), 1.3, bilinear, fid)
    yield Case(f"Fréchet distance, {dim}-d", _named("scipy"), 4.0, *frechet_sides(dim))


def folder_sides(
    images: Path, weights: Path
) -> tuple[Callable[[], Tensor], Callable[[], Tensor] | str, Callable[[], Tensor] | str]:
    """Features [N, 2048] of a folder by us (TensorFlow's resize), by torch-fidelity (the same) and by pytorch-fid (its own)."""
    ours = functools.partial(_ours, images, features.load("inception-2015", str(weights)))
    return ours, _fidelity(images, weights), _fid(images, weights)


def _ours(folder: Path, net: features.FeatureNet) -> Tensor:
    images = from_folder(folder)
    reads = range(0, images.count, READ)
    batches = (images.read(first, min(first + READ, images.count))[0] for first in reads)
    return torch.cat([features.ImageBatch(x).features(net) for x in batches])


def _fidelity(images: Path, weights: Path) -> Callable[[], Tensor] | str:
    try:
        from torch_fidelity.utils import create_feature_extractor, extract_featuresdict_from_input_id
    except ImportError:
        return MISSING
    name = "inception-v3-compat"
    quiet = {"cuda": False, "verbose": False}
    net = create_feature_extractor(name, ["2048"], feature_extractor_weights_path=str(weights), **quiet)

    def peer() -> Tensor:
        found = extract_featuresdict_from_input_id(1, net, input1=str(images), batch_size=READ, cache=False, **quiet)
        return found["2048"]

    return peer


def _fid(images: Path, weights: Path) -> Callable[[], Tensor] | str:
    try:
        from pytorch_fid import fid_score
        from pytorch_fid import inception as module
    except ImportError:
        return MISSING
    download = module.load_state_dict_from_url
    module.load_state_dict_from_url = lambda *_, **__: torch.load(weights, weights_only=True)
    try:
        net = module.InceptionV3()
    finally:
        module.load_state_dict_from_url = download
    fid_score.tqdm = lambda loader: loader  # its progress bar would fill the screen
    files = sorted(images.iterdir())
    return lambda: torch.from_numpy(fid_score.get_activations(files, net)).float()


def frechet_sides(dim: int) -> tuple[Callable[[], float], Callable[[], float] | str]:
    """The distance of two sets of moments by us, and by tr((S1 S2)^(1/2)) as pytorch-fid, ADM and clean-fid write it."""
    generator = torch.Generator().manual_seed(0)
    moments = []
    for shift in (0.0, 0.1):
        rows = torch.randn(2 * dim, dim, generator=generator, dtype=torch.float64).cumsum(1) / dim**0.5 + shift
        moments += [rows.mean(0), rows.T.cov()]
    mu1, sigma1, mu2, sigma2 = moments

    def ours() -> float:
        return frechet_distance(mu1, sigma1, mu2, sigma2)

    try:
        from scipy import linalg
    except ImportError:
        return ours, MISSING

    def peer() -> float:
        root = linalg.sqrtm(sigma1.numpy() @ sigma2.numpy())
        return float((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace()) - 2 * float(np.trace(root).real)

    return ours, peer


def random_weights(folder: Path) -> Path:
    """A file as published, scaled so that activations neither vanish nor explode over 94 layers: numbers near zero would be slow."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = inception.Inception2015().state_dict()
    state = {}
    for name, value in shapes.items():
        drawn = torch.randn(value.shape, generator=generator)
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(0)
        elif value.ndim > 1:
            state[name] = drawn * (2 / value[0].numel()) ** 0.5
        elif name.endswith(("running_var", "bn.weight")):
            state[name] = 1 + 0.1 * drawn.clamp(-3, 3)
        else:
            state[name] = 0.1 * drawn
    path = folder / inception.FILE
    torch.save(state, path)
    return path


def random_images(folder: Path, count: int) -> Path:
    """PNG files of 64x64 pixels, coarse blocks under noise, so that they compress about as photographs do."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        blocks = rng.integers(0, 226, (8, 8, 3)).repeat(8, 0).repeat(8, 1)
        pixels = (blocks + rng.integers(0, 30, (64, 64, 3))).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:04}.png")
    return folder


def _named(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return package
