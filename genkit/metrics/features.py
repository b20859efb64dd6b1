"""Named feature nets: images -> the vectors a distance is measured between, and the logits of a classifier.

A net is a file of weights with a known sha256. Weights that do not come with the package are looked for and never downloaded.
"""

from __future__ import annotations

import functools
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genkit.errors import GenkitError, UsageError, nearest
from genkit.images import to_uint8

NAMES = ("fashion-cnn", "inception-2015")


@dataclass(frozen=True, eq=False)
class FeatureNet:
    """A frozen net in eval mode. It computes where its input is.

    Attributes:
        name: the word a config uses.
        protocol: net and version, as printed beside every number.
        dim: length of a feature vector.
        sha256: of the weights file, 64 hex digits.
        class_names: what its logits mean; empty where they have no names here.
    """

    name: str
    protocol: str
    dim: int
    sha256: str
    class_names: tuple[str, ...]
    module: Any

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Images [B, C, Y, X] in [-1, 1] -> features [B, dim] float32. Raises UsageError for a size or channels the net cannot take."""
        self.module.to(x.device)
        return torch.cat([self.module.features(part) for part in x.split(self.module.chunk)])

    @torch.no_grad()
    def classify(self, features: Tensor) -> Tensor:
        """Features [B, dim] of this net -> logits [B, classes]."""
        return self.module.classify(features)

    def logits(self, x: Tensor) -> Tensor:
        """Images [B, C, Y, X] in [-1, 1] -> logits [B, classes]."""
        return self.classify(self(x))


class ImageBatch:
    """Images as metrics see them: rounded to 8 bits, and passed once through each net however many metrics ask.

    Args:
        x: [B, C, Y, X] in [-1, 1]. Rounding makes a sample and its PNG file score the same.
    """

    def __init__(self, x: Tensor):
        self.x = to_uint8(x).to(x.device).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1
        self._features: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self.x)

    def features(self, net: FeatureNet) -> Tensor:
        """[B, dim] float32."""
        if net.sha256 not in self._features:
            self._features[net.sha256] = net(self.x)
        return self._features[net.sha256]


def as_batch(images: ImageBatch | Tensor) -> ImageBatch:
    """Metrics accept plain tensors too; those are passed through the net by each metric anew."""
    return images if isinstance(images, ImageBatch) else ImageBatch(images)


def load(name: str, weights: str | None = None, device: torch.device | str = "cpu") -> FeatureNet:
    """A feature net by name.

    Args:
        name: "fashion-cnn" (28x28 grey, comes with the package) or "inception-2015" (any size).
        weights: a file, or a folder that holds it; else $GENKIT_WEIGHTS, else the cache folder.

    Raises:
        UsageError: no net has this name.
        GenkitError: the weights are missing (says from where and to where) or are not what they should be.
    """
    if name not in NAMES:
        raise UsageError(f"features={name} is not a feature net; {nearest(name, NAMES)}")
    net = _load(name, str(locate(name, weights)))
    net.module.to(device)
    return net


def locate(name: str, weights: str | None = None) -> Path:
    """The weights file of a net. Raises GenkitError naming where it can be had and where it belongs."""
    from genkit.metrics import fashion_net, inception

    if name == "fashion-cnn":
        file, url, sha256 = fashion_net.WEIGHTS.name, "", fashion_net.SHA256
    else:
        file, url, sha256 = inception.FILE, inception.URL, inception.SHA256
    if weights is not None:
        given = Path(weights)
        path = given / file if given.is_dir() else given
        if not path.is_file():
            raise GenkitError(f"weights of {name}: no such file: {path}")
        return path
    if name == "fashion-cnn":
        return fashion_net.WEIGHTS
    named = os.environ.get("GENKIT_WEIGHTS")
    places = [Path(named), Path(named) / file] if named else []
    target = weights_folder() / file
    for path in [*places, target]:
        if path.is_file():
            return path
    raise GenkitError(
        f"the weights of {name} are not here and are never downloaded silently: put {url} (sha256 {sha256}...) "
        f"at {target}, or name the file with --weights or GENKIT_WEIGHTS"
    )


def weights_folder() -> Path:
    """Where weights are kept: $GENKIT_CACHE/weights, else ~/.cache/genkit/weights."""
    return Path(os.environ.get("GENKIT_CACHE") or Path.home() / ".cache" / "genkit") / "weights"


@functools.cache
def _load(name: str, path: str) -> FeatureNet:
    """Read, check and freeze."""
    from genkit.metrics import fashion_net, inception

    sha256 = file_sha256(path)
    expected = fashion_net.SHA256 if name == "fashion-cnn" else inception.SHA256
    if not sha256.startswith(expected):
        raise GenkitError(
            f"{path} is not the {name} weights: its sha256 is {sha256[:16]}..., expected {expected[:16]}..."
        )
    if name == "fashion-cnn":
        module: Any = fashion_net.FashionCNN()
        module.load_state_dict(_read_safetensors(path), strict=False)  # leaves out step counters of the norms only
        protocol = fashion_net.PROTOCOL
    else:
        with torch.device("meta"):  # 24 M parameters that would be initialised for nothing
            module, protocol = inception.Inception2015(), "inception-2015"
        module.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), assign=True)
    module.eval().requires_grad_(False)
    if name == "inception-2015":
        module.fuse()
    module.to(memory_format=torch.channels_last)
    return FeatureNet(name, protocol, module.dim, sha256, module.class_names, module)


def _read_safetensors(path: str) -> dict[str, Tensor]:
    """Stored in half precision, computed in single."""
    from safetensors.torch import load_file

    return {name: value.float() for name, value in load_file(path).items()}


def file_sha256(path: str | Path) -> str:
    """sha256 of a file, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
