"""Inception-2015: the network behind every published FID (Szegedy et al. 2016; TensorFlow graph classify_image_graph_def of 2015-12-05).

Differs from the Inception-v3 of torchvision: 1008 classes, means at borders count only real pixels, the last block takes a maximum where
the one before takes a mean, and images are enlarged the way TensorFlow 1 did it, or as two other evaluators do. Parameter names are those
of the public PyTorch conversion (toshas/torch-fidelity), so that its file loads unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, max_pool2d, relu
from torch.nn.utils.fusion import fuse_conv_bn_eval

from genkit.errors import UsageError
from genkit.weights import WeightsFile, read_state

FILE = "weights-inception-2015-12-05-6726825d.pth"
WEIGHTS = WeightsFile(
    "inception-2015",
    FILE,
    f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILE}",
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
)
SIZE = 299  # pixels a side of what the net sees

Kernel = int | tuple[int, int]
Step = tuple[int, Kernel] | tuple[int, Kernel, int]  # channels out, kernel, stride (1)
Fork = list[Step]  # convolutions of the same input, concatenated
Chains = dict[str, list[Step | Fork]]
Pool = Literal["mean", "max", "down"]
Resize = Literal["tf1", "clean", "bilinear"]


class _Layer(nn.Module):
    """Convolution, batch norm, ReLU. Keeps the size unless it is strided."""

    def __init__(
        self, channels_in: int, channels_out: int, kernel: Kernel, stride: int = 1, padding: int | None = None
    ):
        super().__init__()
        k = (kernel, kernel) if isinstance(kernel, int) else kernel
        same = (k[0] // 2, k[1] // 2) if stride == 1 and padding is None else padding or 0
        self.conv = nn.Conv2d(channels_in, channels_out, k, stride, same, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(channels_out, eps=1e-3)

    def fuse(self) -> None:
        """Fold the norm into the convolution."""
        assert isinstance(self.bn, nn.BatchNorm2d)
        self.conv, self.bn = fuse_conv_bn_eval(self.conv, self.bn), nn.Identity()

    def linear(self, x: Tensor) -> Tensor:
        """All but the ReLU."""
        return self.bn(self.conv(x))

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.linear(x), inplace=True)


class _Mixed(nn.Module):
    """Parallel chains of layers and one pooling branch, concatenated.

    Args:
        chains: name -> steps. The layers of a chain of several are called name_1, name_2, ...; those of a fork name_3a, name_3b.
        pool: "mean" or "max" over 3x3 followed by a 1x1 layer of `pool_channels`; "down" is a strided maximum alone.
    """

    def __init__(self, channels: int, chains: Chains, pool: Pool, pool_channels: int = 0):
        super().__init__()
        self.pool = pool
        self.chains: list[list[list[str]]] = []  # names: chain, step, prong
        for name, steps in chains.items():
            width, chain = channels, []
            for number, step in enumerate(steps, 1):
                prongs = step if isinstance(step, list) else [step]
                stem = name if len(steps) == 1 else f"{name}_{number}"
                names = [stem + letter for letter in "ab"] if isinstance(step, list) else [stem]
                for layer_name, prong in zip(names, prongs, strict=True):
                    self.add_module(layer_name, _Layer(width, *prong))
                width = sum(prong[0] for prong in prongs)
                chain.append(names)
            self.chains.append(chain)
        if pool != "down":
            self.branch_pool = _Layer(channels, pool_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = []
        for chain in self.chains:
            h = x
            for names in chain:
                prongs = [self.get_submodule(name)(h) for name in names]
                h = prongs[0] if len(prongs) == 1 else torch.cat(prongs, 1)
            out.append(h)
        if self.pool == "down":
            out.append(max_pool2d(x, 3, 2))
        elif self.pool == "max":
            out.append(self.branch_pool(max_pool2d(x, 3, 1, 1)))
        else:
            # A mean over places and a 1x1 convolution commute, and there are fewer channels after it than before.
            out.append(relu(avg_pool2d(self.branch_pool.linear(x), 3, 1, 1, count_include_pad=False), inplace=True))
        return torch.cat(out, 1)


def _mixed_5(channels: int, pool_channels: int) -> _Mixed:
    chains: Chains = {
        "branch1x1": [(64, 1)],
        "branch5x5": [(48, 1), (64, 5)],
        "branch3x3dbl": [(64, 1), (96, 3), (96, 3)],
    }
    return _Mixed(channels, chains, "mean", pool_channels)


def _mixed_6(width: int) -> _Mixed:
    row, column = (1, 7), (7, 1)
    chains: Chains = {
        "branch1x1": [(192, 1)],
        "branch7x7": [(width, 1), (width, row), (192, column)],
        "branch7x7dbl": [(width, 1), (width, column), (width, row), (width, column), (192, row)],
    }
    return _Mixed(768, chains, "mean", 192)


def _mixed_7(channels: int, pool: Pool) -> _Mixed:
    fork: Fork = [(384, (1, 3)), (384, (3, 1))]
    chains: Chains = {
        "branch1x1": [(320, 1)],
        "branch3x3": [(384, 1), fork],
        "branch3x3dbl": [(448, 1), (384, 3), fork],
    }
    return _Mixed(channels, chains, pool, 192)


class Inception2015(nn.Module):
    """pool3 features (2048), the start of mixed_6/conv (7 channels of 17x17) and the 1008 logits.

    Args:
        resize: how images become 299x299. "tf1": as the graph does it (ADM, EDM, torch-fidelity); "clean": bicubic as Pillow's, each channel in
            float and cut to 0..255 but not rounded (clean-fid); "bilinear": with the half-pixel shift and without antialiasing (pytorch-fid).
    """

    dims: ClassVar[dict[str, int]] = {"pool": 2048, "spatial": 7 * 17 * 17, "logits": 1008}
    class_names: tuple[str, ...] = ()  # 1008 outputs of which 1000 are ImageNet classes in an order of their own
    chunk = 16  # images at once: more run no faster, and 256 would need 2 GB for their first layers

    def __init__(self, resize: Resize = "tf1") -> None:
        super().__init__()
        self.resized = RESIZES[resize]
        self.Conv2d_1a_3x3 = _Layer(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = _Layer(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = _Layer(32, 64, 3)
        self.Conv2d_3b_1x1 = _Layer(64, 80, 1)
        self.Conv2d_4a_3x3 = _Layer(80, 192, 3, padding=0)
        self.Mixed_5b = _mixed_5(192, 32)
        self.Mixed_5c = _mixed_5(256, 64)
        self.Mixed_5d = _mixed_5(288, 64)
        self.Mixed_6a = _Mixed(
            288, {"branch3x3": [(384, 3, 2)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3, 2)]}, "down"
        )
        self.Mixed_6b = _mixed_6(128)
        self.Mixed_6c = _mixed_6(160)
        self.Mixed_6d = _mixed_6(160)
        self.Mixed_6e = _mixed_6(192)
        long: list[Step | Fork] = [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)]
        self.Mixed_7a = _Mixed(768, {"branch3x3": [(192, 1), (320, 3, 2)], "branch7x7x3": long}, "down")
        self.Mixed_7b = _mixed_7(1280, "mean")
        self.Mixed_7c = _mixed_7(2048, "max")
        self.fc = nn.Linear(2048, 1008)

    def fuse(self) -> Inception2015:
        """Fold every batch norm into its convolution; features change by rounding only."""
        for module in self.modules():
            if isinstance(module, _Layer):
                module.fuse()
        return self

    def layers(self, x: Tensor) -> dict[str, Tensor]:
        """Images [B, 1 or 3, Y, X] in [-1, 1], any size -> the vectors of `dims`. Rounds to 8 bits; grey is repeated three times.

        The logits have no bias, as the Inception score wants them.
        """
        h = self.resized(to_pixels(x, "inception-2015")).expand(-1, 3, -1, -1)  # [B, 3, 299, 299]
        # oneDNN is 1.4 times faster on channels-last here.
        h = h.contiguous(memory_format=torch.channels_last)
        h = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(h)))  # [B, 64, 147, 147]
        h = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(max_pool2d(h, 3, 2)))  # [B, 192, 71, 71]
        h = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(max_pool2d(h, 3, 2))))  # [B, 288, 35, 35]
        h = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(h)))  # [B, 768, 17, 17]
        h = self.Mixed_6d(h)  # [B, 768, 17, 17]
        # Its first branch is TensorFlow's mixed_6/conv, of which the ADM evaluator takes 7 channels; flattened with channels innermost, as there.
        spatial = h[:, :7].permute(0, 2, 3, 1).flatten(1)
        h = self.Mixed_6e(h)  # [B, 768, 17, 17]
        h = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(h)))  # [B, 2048, 8, 8]
        pool = h.mean(dim=(2, 3))
        return {"pool": pool, "spatial": spatial, "logits": pool @ self.fc.weight.T}

    def classify(self, features: Tensor) -> Tensor:
        """[B, 2048] -> logits [B, 1008], with bias."""
        return self.fc(features)


def load_inception(path: Path, resize: Resize = "tf1") -> Inception2015:
    """From the published file; batch norms are folded."""
    with torch.device("meta"):  # 24 M parameters that would be initialised for nothing
        module = Inception2015(resize)
    module.load_state_dict(read_state(path, "inception-2015"), assign=True)
    return module.eval().fuse()


def to_pixels(x: Tensor, net: str) -> Tensor:
    """Images [B, 1 or 3, Y, X] in [-1, 1] -> whole numbers 0..255, float. Raises UsageError, which names the net, for other channels."""
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise UsageError(f"{net} takes images of 1 or 3 channels, got {'x'.join(map(str, x.shape[1:]))}")
    return ((x.float() + 1) * 127.5).round().clamp(0, 255)


def resize_tf1(x: Tensor, size: int) -> Tensor:
    """[B, C, Y, X] -> [B, C, size, size]: bilinear, as TensorFlow 1 did it.

    Output pixel i reads position i * (old size / size), without the half-pixel shift every library uses today and without smoothing when
    it shrinks; reads past the last pixel repeat it.
    """
    for axis in (3, 2):  # TensorFlow interpolates along the row first; the order decides the last bit
        old = x.shape[axis]
        position = torch.arange(size, dtype=torch.float32, device=x.device) * torch.tensor(
            old / size, dtype=torch.float32
        )
        low = position.long()
        weight = (position - low).view(-1, 1) if axis == 2 else position - low
        first = x.index_select(axis, low)
        x = first + (x.index_select(axis, (low + 1).clamp_max(old - 1)) - first) * weight
    return x


def _tf1(pixels: Tensor) -> Tensor:
    return (resize_tf1(pixels, SIZE) - 128) / 128


def _clean(pixels: Tensor) -> Tensor:
    # Torch's bicubic with antialiasing is Pillow's: the same kernel (a = -1/2), widened when it shrinks, with weights in double
    # precision (single: off by up to 0.006 grey levels). Apple's GPUs have no double.
    precise = pixels if pixels.device.type == "mps" else pixels.double()
    resized = interpolate(precise, (SIZE, SIZE), mode="bicubic", antialias=True).float()
    return (resized.clamp(0, 255) - 128) / 128


def _bilinear(pixels: Tensor) -> Tensor:
    return 2 * interpolate(pixels / 255, (SIZE, SIZE), mode="bilinear") - 1


# Pixels [B, C, Y, X] in 0..255 -> what the net sees, [B, C, 299, 299] in [-1, 1].
RESIZES: dict[Resize, Callable[[Tensor], Tensor]] = {"tf1": _tf1, "clean": _clean, "bilinear": _bilinear}
