"""Nets that other fields made and evaluation borrows: VGG16, DINOv2, CLIP. Images become 224x224 whatever their shape.

Parameter names are those of the published files. Each module has what genkit.metrics.features asks of a net: `dims`, `class_names`,
`chunk`, `layers`.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, scaled_dot_product_attention

from genkit import optional
from genkit.metrics.inception import resize_tf1, to_pixels
from genkit.nn.lpips import vgg16_features
from genkit.weights import WeightsFile, read_state

SIZE = 224
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and deviation of pixels in [0, 1]
_HEAD_DIM = 64  # in every published size of DINOv2
_PATCH = 14


def dinov2_file(letter: str) -> WeightsFile:
    """The published file of ViT-B/14 ("b") or ViT-L/14 ("l"), without registers."""
    sha256 = {
        "b": "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73",
        "l": "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
    }
    name = f"dinov2_vit{letter}14_pretrain.pth"
    url = f"https://dl.fbaipublicfiles.com/dinov2/dinov2_vit{letter}14/{name}"
    return WeightsFile(f"dinov2-vit-{letter}-14", name, url, sha256[letter])


def clip_file(size: str) -> WeightsFile:
    """The published file of "ViT-B-32" or "ViT-L-14"."""
    sha256 = {
        "ViT-B-32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
        "ViT-L-14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    }[size]
    url = f"https://openaipublic.azureedge.net/clip/models/{sha256}/{size}.pt"
    return WeightsFile(f"clip-{size.lower()}", f"{size}.pt", url, sha256)


class Vgg16(nn.Module):
    """The second hidden layer of VGG16 after its ReLU, as improved precision and recall were published with (Kynkäänniemi et al. 2019).

    Resized as TensorFlow 1 did, as torch-fidelity does. Torchvision's weights.
    """

    dims: dict[str, int]
    class_names: tuple[str, ...] = ()
    chunk = 16

    def __init__(self) -> None:
        super().__init__()
        self.dims = {"pool": 4096}
        self.features = vgg16_features()
        layers = {"0": nn.Linear(512 * 7 * 7, 4096), "1": nn.ReLU(), "3": nn.Linear(4096, 4096), "4": nn.ReLU()}
        self.classifier = nn.Sequential(OrderedDict(layers))

    def layers(self, x: Tensor) -> dict[str, Tensor]:
        """[B, 1 or 3, Y, X] in [-1, 1] -> "pool" [B, 4096], not negative."""
        x = _normalise(resize_tf1(to_pixels(x, "vgg16"), SIZE) / 255)
        return {"pool": self.classifier(self.features(x).flatten(1))}


class DinoV2(nn.Module):
    """The class token of DINOv2 after its last norm (Oquab et al. 2023, arXiv:2304.07193).

    Resized bicubically with antialiasing, not rounded or cut afterwards, as EDM2 does (Karras et al. 2024); close to Stein et al. 2023, who let Pillow do it.

    Args:
        dim, depth: D and number of blocks.
        grid: patches along a side of the images it was trained on.
    """

    dims: dict[str, int]
    class_names: tuple[str, ...] = ()
    chunk = 16

    def __init__(self, *, dim: int, depth: int, grid: int):
        super().__init__()
        self.dims = {"pool": dim}
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + grid * grid, dim))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, _PATCH, _PATCH)})
        self.blocks = nn.ModuleList(_Block(dim) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def layers(self, x: Tensor) -> dict[str, Tensor]:
        """[B, 1 or 3, Y, X] in [-1, 1] -> "pool" [B, D]."""
        pixels = to_pixels(x, "dinov2")
        return {"pool": self(_normalise(interpolate(pixels, (SIZE, SIZE), mode="bicubic", antialias=True) / 255))}

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images [B, 3, 14 a, 14 a] -> [B, D]."""
        patches = self.patch_embed["proj"](x)  # [B, D, a, a]
        h = torch.cat([self.cls_token.expand(len(x), -1, -1), patches.flatten(2).transpose(1, 2)], dim=1)
        h = h + self._positions(patches.shape[-1])  # [B, 1 + a a, D]
        for block in self.blocks:
            h = block(h)
        return self.norm(h[:, 0])

    def _positions(self, side: int) -> Tensor:
        """[1, 1 + side^2, D]. The published model stretches its table by (side + 0.1) / grid, a little more than fits, and so must we."""
        grid = round((self.pos_embed.shape[1] - 1) ** 0.5)
        if side == grid:
            return self.pos_embed
        token, table = self.pos_embed[:, :1], self.pos_embed[:, 1:].unflatten(1, (grid, grid)).permute(0, 3, 1, 2)
        scale = (side + 0.1) / grid
        stretched = interpolate(table, scale_factor=(scale, scale), mode="bicubic")  # [1, D, side, side]
        return torch.cat([token, stretched.flatten(2).transpose(1, 2)], dim=1)


class _Block(nn.Module):
    """Attention and MLP before which tokens are normalised and after which they are scaled."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim)))
        self.ls1, self.ls2 = (nn.ParameterDict({"gamma": torch.empty(dim)}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.attn["qkv"](self.norm1(x)).unflatten(2, (3, -1, _HEAD_DIM))  # [B, N, 3, H, K]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, H, N, K] each
        attended = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # [B, N, D]
        x = x + self.attn["proj"](attended) * self.ls1["gamma"]
        return x + self.mlp(self.norm2(x)) * self.ls2["gamma"]


class Clip(nn.Module):
    """The image embedding of CLIP (Radford et al. 2021, arXiv:2103.00020), not normalised, by torch-fidelity's code and with its TensorFlow 1 resize.

    Args:
        name: torch-fidelity's word for the net, "clip-vit-b-32".
        path: the TorchScript archive OpenAI published.
    """

    dims: dict[str, int]
    class_names: tuple[str, ...] = ()
    chunk = 16

    def __init__(self, name: str, path: Path):
        super().__init__()
        optional.require("torch_fidelity")
        from torch_fidelity.feature_extractor_clip import FeatureExtractorCLIP

        self.extractor = FeatureExtractorCLIP(name, ["clip"], feature_extractor_weights_path=str(path))
        self.dims = {"pool": self.extractor.model.visual.output_dim}

    def layers(self, x: Tensor) -> dict[str, Tensor]:
        """[B, 1 or 3, Y, X] in [-1, 1] -> "pool" [B, D]."""
        pixels = to_pixels(x, "clip").to(torch.uint8).expand(-1, 3, -1, -1)
        return {"pool": self.extractor(pixels)[0]}


def load_vgg16(path: Path) -> Vgg16:
    """From torchvision's file; its last layer, the classes, is left out."""
    with torch.device("meta"):
        module = Vgg16()
    state = read_state(path, "vgg16")
    module.load_state_dict({k: v for k, v in state.items() if not k.startswith("classifier.6.")}, assign=True)
    return module


def load_dinov2(path: Path) -> DinoV2:
    """From the published file; its size is read from the shapes."""
    state = read_state(path, "dinov2")
    state.pop("mask_token", None)  # stands for hidden patches in training
    dim, places = state["cls_token"].shape[-1], state["pos_embed"].shape[1] - 1
    depth = len([name for name in state if name.endswith(".ls1.gamma")])
    with torch.device("meta"):
        module = DinoV2(dim=dim, depth=depth, grid=round(places**0.5))
    module.load_state_dict(state, assign=True)
    return module


def _normalise(x: Tensor) -> Tensor:
    """[B, 1 or 3, Y, X] in [0, 1] -> [B, 3, Y, X], zero mean and unit deviation over ImageNet."""
    mean, deviation = (x.new_tensor(values).view(1, 3, 1, 1) for values in IMAGENET)
    return (x - mean) / deviation
