"""A quantiser without networks: what others call an image is a grid of vectors here. For quantisers that were trained within another's network.

`genkit import --from vector-quantize-pytorch` makes one; there is nothing to train, and no recipe.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from diffusers.configuration_utils import register_to_config
from torch import nn

from genkit.errors import UsageError
from genkit.nn.binary import BinaryQuantizer
from genkit.nn.grid_tokenizer import GridTokenizer, check_sizes
from genkit.nn.quantize import Quantizer
from genkit.nn.scalar import ScalarQuantizer

KINDS = {"tables": Quantizer, "scalar": ScalarQuantizer, "binary": BinaryQuantizer}
# "own": what the quantiser makes itself, a linear layer where widths differ; the others are linear layers too, whether widths differ or not.
Layer = Literal["own", "linear", "linear without bias", "linear and norm"]


class Bare(GridTokenizer):
    """Vectors [B, image_channels, Y, X] of any range <-> z of the same shape <-> ids [B, Q, Y, X].

    Args:
        image_channels: width of the vectors.
        kind: "tables" (genkit.nn.quantize), "scalar" (genkit.nn.scalar) or "binary" (genkit.nn.binary).
        options: constructor arguments of that quantiser but for `dim`.
        project_in, project_out: the layers before and after it, see Layer.

    Raises: UsageError for another kind or layer, or options that the quantiser does not take.
    """

    stride = 1

    @register_to_config
    def __init__(
        self,
        *,
        image_channels: int,
        kind: Literal["tables", "scalar", "binary"],
        options: dict[str, Any],
        project_in: Layer = "own",
        project_out: Layer = "own",
    ):
        super().__init__()
        check_sizes(image_channels=image_channels)
        if kind not in KINDS:
            raise UsageError(f"tokenizer.kind={kind} must be one of {', '.join(KINDS)}")
        try:
            self.quantizer = KINDS[kind](dim=image_channels, **options)
        except TypeError as error:
            raise UsageError(f"tokenizer.options of a bare quantiser: {error}") from None
        self.quantizer.project_in = _layer(project_in, self.quantizer.project_in, image_channels)
        self.quantizer.project_out = _layer(project_out, self.quantizer.project_out, image_channels)
        self.image_channels = self.channels = image_channels
        self.num_levels, self.codebook_size = self.quantizer.num_levels, self.quantizer.codebook_size
        self.encoder, self.decoder = nn.Identity(), nn.Identity()
        self.finish()


def word_of(layer: nn.Module, is_own: bool) -> Layer:
    """The word that makes a layer of this form; is_own: whether the quantiser's constructor made it."""
    if is_own:
        return "own"
    if isinstance(layer, nn.Sequential):
        return "linear and norm"
    return "linear" if getattr(layer, "bias", None) is not None else "linear without bias"


def _layer(word: Layer, own: nn.Module, width: int) -> nn.Module:
    if word not in get_args(Layer):
        raise UsageError(f"tokenizer.project_in={word} must be one of {', '.join(get_args(Layer))}")
    if word == "own":
        return own
    before, after = (own.in_features, own.out_features) if isinstance(own, nn.Linear) else (width, width)
    linear = nn.Linear(before, after, bias=word != "linear without bias")
    return nn.Sequential(linear, nn.LayerNorm(after)) if word == "linear and norm" else linear
