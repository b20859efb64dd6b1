"""Named feature nets: images -> the vectors a distance is measured between, and the logits of a classifier.

A net is a file of weights with a known sha256. Weights that do not come with the package are looked for and never downloaded.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genkit.errors import GenkitError, UsageError, nearest
from genkit.images import to_uint8
from genkit.metrics import borrowed, emoji_net, fashion_net, inception
from genkit.nn import lpips
from genkit.weights import WeightsFile, read_state

_GPU_CHUNKS = 8  # a GPU takes this many times the images a CPU's caches like


@dataclass(frozen=True, eq=False)
class FeatureNet:
    """A frozen net in eval mode. It computes where its input is.

    Attributes:
        name: the word a config uses.
        protocol: net and version, as printed beside every number.
        dims: layer -> length of its vectors. Every net has "pool", what distances are usually measured between.
        sha256: of the weights file, 64 hex digits.
        class_names: what its logits mean; empty where they have no names here.
        is_published: whether the weights are the ones everybody has; other weights give numbers that only they explain.
    """

    name: str
    protocol: str
    dims: dict[str, int]
    sha256: str
    class_names: tuple[str, ...]
    module: Any
    is_published: bool = True

    @property
    def dim(self) -> int:
        """Length of a "pool" vector."""
        return self.dims["pool"]

    def __call__(self, x: Tensor) -> Tensor:
        """Images [B, C, Y, X] in [-1, 1] -> "pool" features [B, dim] float32."""
        return self.layers(x)["pool"]

    @torch.no_grad()
    def layers(self, x: Tensor) -> dict[str, Tensor]:
        """Images [B, C, Y, X] in [-1, 1] -> every layer of `dims`, [B, its dim] float32, in one pass.

        Raises: UsageError for a size or channels the net cannot take.
        """
        self.module.to(x.device)
        if x.device.type == "cpu":
            parts = _side_by_side(self.module.layers, x, self.module.chunk)
        else:
            parts = [self.module.layers(part) for part in x.split(self.module.chunk * _GPU_CHUNKS)]
        return {name: torch.cat([part[name] for part in parts]) for name in self.dims}

    @torch.no_grad()
    def classify(self, features: Tensor) -> Tensor:
        """Features [B, dim] of this net -> logits [B, classes]. Raises UsageError for a net that knows no classes."""
        if "logits" not in self.dims:
            raise UsageError(f"{self.name} knows no classes; use fashion-cnn or inception-2015")
        return self.module.classify(features)

    def logits(self, x: Tensor) -> Tensor:
        """Images [B, C, Y, X] in [-1, 1] -> logits [B, classes]."""
        return self.classify(self(x))


def _side_by_side(compute: Callable[[Tensor], dict[str, Tensor]], x: Tensor, chunk: int) -> list[dict[str, Tensor]]:
    """Parts of x, at most `chunk` images each, on as many threads as torch may use, one part per thread.

    Threads that share every layer of one part wait for each other a hundred times, and for whatever else runs on the machine.
    """
    threads = torch.get_num_threads()
    if threads == 1 or len(x) <= chunk:
        return [compute(part) for part in x.split(chunk)]
    rounds = math.ceil(len(x) / (chunk * threads))

    @torch.no_grad()  # a thread has its own
    def work(part: Tensor) -> dict[str, Tensor]:
        return compute(part)

    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, x.split(math.ceil(len(x) / (rounds * threads)))))
    finally:
        torch.set_num_threads(threads)  # for threads to come; this one's number never changed


class ImageBatch:
    """Images as metrics see them: rounded to 8 bits, and passed once through each net however many metrics ask.

    Args:
        x: [B, C, Y, X] in [-1, 1]. Rounding makes a sample and its PNG file score the same.
    """

    def __init__(self, x: Tensor):
        self.x = to_uint8(x).to(x.device).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1
        self._features: dict[FeatureNet, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.x)

    def features(self, net: FeatureNet, layer: str = "pool") -> Tensor:
        """[B, dim of the layer] float32."""
        if net not in self._features:
            self._features[net] = net.layers(self.x)
        return self._features[net][layer]


def as_batch(images: ImageBatch | Tensor) -> ImageBatch:
    """Metrics accept plain tensors too; those are passed through the net by each metric anew."""
    return images if isinstance(images, ImageBatch) else ImageBatch(images)


@dataclass(frozen=True)
class _Net:
    """A line of the table of nets.

    Attributes:
        protocol: net and version in words.
        weights: the published file; without a URL it comes with the package, and no other weights are accepted.
        build: reads a file of weights into a module with `dims`, `class_names`, `chunk` (images at once on a CPU) and `layers`.
    """

    protocol: str
    weights: WeightsFile
    build: Callable[[Path], Any]


def _own(name: str, module: fashion_net.FashionCNN | emoji_net.EmojiCNN, path: Path) -> Any:
    state = {key: value.float() for key, value in read_state(path, name).items()}  # stored in half precision
    module.load_state_dict(state, strict=False)  # leaves out step counters of the norms only
    return module


def _inception(name: str, resize: inception.Resize) -> _Net:
    return _Net(name, inception.WEIGHTS, functools.partial(inception.load_inception, resize=resize))


def _clip(size: str) -> _Net:
    name = f"clip-{size.lower()}"
    return _Net(name, borrowed.clip_file(size), functools.partial(borrowed.Clip, name))


NETS = {
    "fashion-cnn": _Net(
        fashion_net.PROTOCOL,
        WeightsFile("fashion-cnn", fashion_net.WEIGHTS.name, "", fashion_net.SHA256),
        lambda path: _own("fashion-cnn", fashion_net.FashionCNN(), path),
    ),
    "emoji-cnn": _Net(
        emoji_net.PROTOCOL,
        WeightsFile("emoji-cnn", emoji_net.WEIGHTS.name, "", emoji_net.SHA256),
        lambda path: _own("emoji-cnn", emoji_net.EmojiCNN(), path),
    ),
    "inception-2015": _inception("inception-2015", "tf1"),
    "inception-2015-clean": _inception("inception-2015-clean", "clean"),
    "inception-2015-bilinear": _inception("inception-2015-bilinear", "bilinear"),
    "vgg16": _Net("vgg16-fc2-relu", lpips.TRUNK, borrowed.load_vgg16),
    "dinov2-vit-b-14": _Net("dinov2-vit-b-14", borrowed.dinov2_file("b"), borrowed.load_dinov2),
    "dinov2-vit-l-14": _Net("dinov2-vit-l-14", borrowed.dinov2_file("l"), borrowed.load_dinov2),
    "clip-vit-b-32": _clip("ViT-B-32"),
    "clip-vit-l-14": _clip("ViT-L-14"),
}
NAMES = tuple(NETS)
_OWN = {"fashion-cnn": fashion_net.WEIGHTS, "emoji-cnn": emoji_net.WEIGHTS}  # they come with the package


def load(name: str, weights: str | None = None, device: torch.device | str = "cpu") -> FeatureNet:
    """A feature net by name.

    Args:
        name: "fashion-cnn" (28x28 grey) and "emoji-cnn" (small square RGB), which come with the package, or another of NAMES (any size).
        weights: a file, or a folder that holds it; else $GENKIT_WEIGHTS, else the cache folder. Only a file named here may be another
            than the published one; the net's protocol then says so.

    Raises:
        UsageError: no net has this name.
        GenkitError: the weights are missing (says from where and to where) or are not what they should be.
    """
    path = locate(name, weights)
    net = _load(name, str(path), weights is not None and bool(NETS[name].weights.url))
    net.module.to(device)
    return net


def locate(name: str, weights: str | None = None) -> Path:
    """The weights file of a net. Raises GenkitError naming where it can be had and where it belongs, UsageError for an unknown net."""
    if name not in NETS:
        raise UsageError(f"features={name} is not a feature net; {nearest(name, NAMES)}")
    if weights is None and name in _OWN:
        return _OWN[name]
    return NETS[name].weights.locate(weights)


@functools.cache
def _load(name: str, path: str, is_free: bool) -> FeatureNet:
    """Read, check and freeze. `is_free`: the weights need not be the published ones."""
    net = NETS[name]
    sha256 = net.weights.check(Path(path), path if is_free else None)
    try:
        module = net.build(Path(path)).eval().requires_grad_(False)
    except (RuntimeError, KeyError) as error:  # other names or shapes; several lines of them
        reason = " ".join(str(error).split())[:150]
        raise GenkitError(f"{path} does not hold weights of {name}: {reason}") from None
    module.to(memory_format=torch.channels_last)
    is_published = sha256 == net.weights.sha256
    protocol = net.protocol if is_published else f"{net.protocol} (other weights)"
    return FeatureNet(name, protocol, module.dims, sha256, module.class_names, module, is_published)
