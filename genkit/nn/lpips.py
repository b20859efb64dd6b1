"""LPIPS: how different two images look, by the features of VGG16 (Zhang et al. 2018, arXiv:1801.03924; version 0.1, linear heads)."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from genkit.errors import GenkitError, UsageError
from genkit.weights import WeightsFile, read_state

# Channels of VGG16's convolutions (Simonyan and Zisserman 2015, configuration D); 0 = maximum over 2x2.
_VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)
_TAPS = {3: 64, 8: 128, 15: 256, 22: 512, 29: 512}  # layer of `features` -> channels: relu1_2, 2_2, 3_3, 4_3, 5_3
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # ImageNet's mean and deviation, for pixels in [-1, 1]
_LEAST = 16  # pixels: smaller images do not reach the last layer


TRUNK = WeightsFile(
    "vgg16",
    "vgg16-397923af.pth",
    "https://download.pytorch.org/models/vgg16-397923af.pth",
    "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
)
# The same bytes as lpips/weights/v0.1/vgg.pth of richzhang/PerceptualSimilarity.
HEADS = WeightsFile(
    "LPIPS",
    "weights-vgg16-lpips.pth",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-vgg16-lpips.pth",
    "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
)


class LPIPS(nn.Module):
    """Frozen, and in eval mode whatever is asked of it: it has nothing that behaves differently in training.

    Attributes:
        sha256: of the files its weights came from: trunk, heads.
    """

    sha256: tuple[str, str] = ("", "")

    def __init__(self) -> None:
        super().__init__()
        self.features = vgg16_features()[: max(_TAPS) + 1]
        self.heads = nn.ParameterList(torch.empty(channels) for channels in _TAPS.values())
        self.requires_grad_(False)
        self.eval()

    @property
    def is_published(self) -> bool:
        return self.sha256 == (TRUNK.sha256, HEADS.sha256)

    def train(self, mode: bool = True) -> LPIPS:
        return super().train(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distance of each pair, [B], 0 = equal. Differentiable in both.

        Args:
            x, y: [B, 1 or 3, Y, X] in [-1, 1], at least 16x16; grey is repeated three times.
        """
        if x.shape != y.shape or x.ndim != 4 or x.shape[1] not in (1, 3):
            raise UsageError(
                f"LPIPS compares images [B, 1 or 3, Y, X] of one shape, got {list(x.shape)} and {list(y.shape)}"
            )
        if min(x.shape[2:]) < _LEAST:
            raise UsageError(f"LPIPS needs images of at least {_LEAST}x{_LEAST} pixels, got {x.shape[2]}x{x.shape[3]}")
        # Two passes, not one of both: what needs no gradient keeps nothing for it.
        pairs = zip(self._directions(x), self._directions(y), self.heads, strict=True)
        return torch.stack([_difference(a, b, head) for a, b, head in pairs]).sum(0)

    def _directions(self, x: Tensor) -> list[Tensor]:
        """Unit vectors of the tapped layers, [B, C, y, x] each."""
        shift, scale = (x.new_tensor(values).view(1, 3, 1, 1) for values in (_SHIFT, _SCALE))
        h = (x - shift) / scale  # [B, 3, Y, X], of grey images too
        found = []
        for number, layer in enumerate(self.features):
            h = layer(h)
            if number in _TAPS:
                # vector_norm, because the derivative of the square root of a sum of squares is NaN where all are zero.
                found.append(h / (torch.linalg.vector_norm(h, dim=1, keepdim=True) + 1e-10))
        return found


def _difference(a: Tensor, b: Tensor, head: Tensor) -> Tensor:
    """Squared difference, channels weighted by the head, mean over places: [B, C, y, x] twice, [C] -> [B]."""
    return conv2d((a - b).square(), head.view(1, -1, 1, 1)).mean(dim=(1, 2, 3))


def vgg16_features() -> nn.Sequential:
    """VGG16's convolutions under torchvision's names: layer N of the published file is layer N here, [B, 3, Y, X] -> [B, 512, Y/32, X/32]."""
    layers: list[nn.Module] = []
    width = 3
    for channels in _VGG16:
        if channels:
            layers += [nn.Conv2d(width, channels, 3, padding=1), nn.ReLU(inplace=True)]
            width = channels
        else:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


def load_lpips(weights: str | None = None) -> LPIPS:
    """LPIPS with its weights.

    Args:
        weights: a folder that holds both published files; or a file that holds one part or both (torchvision's VGG16, the heads, or the
            state of the `lpips` package's LPIPS(net="vgg")): a part it lacks is looked for beside it. Else $GENKIT_WEIGHTS, else the cache folder.

    Raises: GenkitError, one line, when a file is missing or holds something else.
    """
    trunk, heads = _locate(weights)
    hashes = (TRUNK.check(trunk, weights), HEADS.check(heads, weights))
    with torch.device("meta"):  # 15 M numbers that would be drawn for nothing
        module = LPIPS()
    state = _trunk(read_state(trunk, TRUNK.of)) | _heads(read_state(heads, HEADS.of))
    wanted = module.state_dict()
    wrong = [name for name, value in wanted.items() if name not in state or state[name].shape != value.shape]
    if wrong:
        path = heads if wrong[0].startswith("heads") else trunk
        raise GenkitError(
            f"{path} does not hold weights of LPIPS: {wrong[0]} is missing or has another shape ({len(wrong)} of {len(wanted)})"
        )
    module.load_state_dict({name: state[name].float() for name in wanted}, assign=True)
    module.sha256 = hashes
    return module.requires_grad_(False)


def is_available(weights: str | None = None) -> bool:
    """Whether the files `load_lpips` needs are here; does not read them."""
    try:
        _locate(weights)
    except GenkitError:
        return False
    return True


def _locate(weights: str | None) -> tuple[Path, Path]:
    """Files of the trunk and of the heads, the same one where it holds both."""
    if weights is None or Path(weights).is_dir():
        return TRUNK.locate(weights), HEADS.locate(weights)
    path = HEADS.locate(weights)
    state = read_state(path, HEADS.of)
    if not _trunk(state) and not _heads(state):
        raise GenkitError(
            f"{path} holds neither VGG16 (features.N.weight) nor the heads of LPIPS (linN.model.1.weight)"
        )
    beside = str(path.parent)
    return (path if _trunk(state) else TRUNK.locate(beside)), (path if _heads(state) else HEADS.locate(beside))


def _trunk(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convolutions named as torchvision does, or as the lpips package does: in slices that keep torchvision's numbers."""
    named = (
        (re.fullmatch(r"(?:features|net\.slice\d)\.(\d+\.(?:weight|bias))", name), value)
        for name, value in state.items()
    )
    return {f"features.{match[1]}": value for match, value in named if match}


def _heads(state: dict[str, Tensor]) -> dict[str, Tensor]:
    named = ((re.fullmatch(r"lin(\d)\.model\.1\.weight", name), value) for name, value in state.items())
    return {f"heads.{match[1]}": value.flatten() for match, value in named if match}
