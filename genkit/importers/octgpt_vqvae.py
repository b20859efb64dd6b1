"""Octree VQ-VAE of octree-nn/octgpt with the binary quantiser (default, big, large, huge), and what its trainer saves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from genkit.errors import GenkitError
from genkit.importers.names import Rules, count, fill, flat, has, shape
from genkit.tokenizers.octree_vq import OctreeVQ

WHAT = "an octree VQ-VAE with binary codes"
IGNORED = {r"quantizer\.basis": "powers of two that packed codes would need; theirs are not packed"}
DEPTH, FULL_DEPTH = 8, 3
_FEATURES = {4: "ND", 3: "N", 7: "NDL", 6: "NL"}

_HEADS = {"split": "predict", "value": "regress"}
_NORM = r"(weight|bias)"
RULES: Rules = (
    (r"first\.conv\.weight", "encoder.conv1.conv.weights"),
    (r"first\.norm\." + _NORM, lambda kind: f"encoder.conv1.gn.{_plural(kind)}"),
    (r"encoder\.(\d+)\.(\d+)\.conv([12])\.conv\.weight", lambda i, j, k: f"{_block(i, j, k)}.conv.weights"),
    (
        r"encoder\.(\d+)\.(\d+)\.conv([12])\.norm\." + _NORM,
        lambda i, j, k, kind: f"{_block(i, j, k)}.gn.{_plural(kind)}",
    ),
    (r"encoder_down\.(\d+)\.conv\.weight", "encoder.downsample.{0}.conv.weights"),
    (r"encoder_down\.(\d+)\.norm\." + _NORM, lambda i, kind: f"encoder.downsample.{i}.gn.{_plural(kind)}"),
    (r"to_code\.(.+)", "pre_proj.{0}"),
    (r"from_code\.(.+)", "post_proj.{0}"),
    (r"(inner|decoder)\.(\d+)\.(\d+)\.conv([12])\.weight", lambda s, i, j, k: f"{_graph(s, i, j, k)}.conv.weights"),
    (
        r"(inner|decoder)\.(\d+)\.(\d+)\.norm([12])\.norm\." + _NORM,
        lambda s, i, j, k, kind: f"{_graph(s, i, j, k)}.norm.norm.{_plural(kind)}",
    ),
    (r"inner_down\.(\d+)\.weight", "decoder.downsample.{0}.downsample.weights"),
    (r"decoder_up\.(\d+)\.weight", "decoder.upsample.{0}.upsample.weights"),
    (
        r"(inner_down|decoder_up)\.(\d+)\.linear\.(.+)",
        lambda s, i, rest: f"decoder.{'downsample' if s == 'inner_down' else 'upsample'}.{i}.conv1x1.{_linear(rest)}",
    ),
    (
        r"(split|value)_heads\.(\d+)\.first\.(.+)",
        lambda s, i, rest: f"decoder.{_HEADS[s]}.{i}.conv1.{_linear(rest)}",
    ),
    (r"(split|value)_heads\.(\d+)\.last\.(.+)", lambda s, i, rest: f"decoder.{_HEADS[s]}.{i}.conv2.linear.{rest}"),
)


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> OctreeVQ:
    """State dict -> tokenizer in evaluation mode. Sizes are read from the weights.

    Args:
        config: of the original's options, flat or nested as in its files, depth (8), full_depth (3) and feature (read from the number of channels where it is one of ND, N, NDL, NL).

    Raises: GenkitError for weights that do not fit, naming the keys, and for other quantisers.
    """
    options = flat(config or {})
    if has(state, "quantizer.embedding") or has(state, "quantizer.quantizers"):
        raise GenkitError("this octree VQ-VAE has a codebook of vectors; only the binary quantiser is known")
    channels = shape(state, "encoder.conv1.conv.weights", WHAT)[1]
    encoder = [
        shape(state, f"encoder.blocks.{i}.resblks.0.conv3x3b.conv.weights", WHAT)[2]
        for i in range(count(state, "encoder.blocks.{}."))
    ]
    inner = [_width(state, f"decoder.encoder.{i}") for i in range(count(state, "decoder.encoder.{}."))]
    outer = [_width(state, f"decoder.decoder.{i}") for i in range(count(state, "decoder.decoder.{}."))]
    middle = shape(state, "decoder.encoder.0.resblks.0.conva.conv.weights", WHAT)
    feature = options.get("feature") or _FEATURES.get(channels)
    if feature is None:
        raise GenkitError(f"these weights read {channels} channels of a node; give `feature` with --config")
    network = OctreeVQ(
        depth=options.get("depth", DEPTH),
        full_depth=options.get("full_depth", FULL_DEPTH),
        bits=shape(state, "pre_proj.weight", WHAT)[0],
        encoder_channels=encoder,
        encoder_blocks=[count(state, f"encoder.blocks.{i}.resblks.{{}}.") for i in range(len(encoder))],
        inner_channels=inner,
        inner_blocks=[count(state, f"decoder.encoder.{i}.resblks.{{}}.") for i in range(len(inner))],
        decoder_channels=outer,
        decoder_blocks=[count(state, f"decoder.decoder.{i}.resblks.{{}}.") for i in range(len(outer))],
        features="".join(letter for letter in "NDLP" if letter in feature),
        bottleneck=inner[0] // middle[1],
        num_depths=middle[0] // 7 - inner[0],
    )
    laid_out = {key: value[None] if _is_conv(key) else value for key, value in state.items()}
    laid_out = {key: value.flatten() if key.endswith(_NORMS) else value for key, value in laid_out.items()}
    fill(network, laid_out, RULES, IGNORED, WHAT)
    return network.eval()


_NORMS = ("gn.weights", "gn.bias", "norm.norm.weights", "norm.norm.bias")


def _is_conv(key: str) -> bool:
    """Convolutions over nodes: ours begin with an axis of groups."""
    return key.startswith("encoder.") and key.endswith("conv.weights")


def _width(state: Mapping[str, Tensor], stage: str) -> int:
    return shape(state, f"{stage}.resblks.0.convb.conv.weights", WHAT)[1]


def _plural(kind: str) -> str:
    return "weights" if kind == "weight" else kind


def _block(i: str, j: str, k: str) -> str:
    return f"encoder.blocks.{i}.resblks.{j}.conv3x3{'ab'[int(k) - 1]}"


def _graph(s: str, i: str, j: str, k: str) -> str:
    return f"decoder.{'encoder' if s == 'inner' else 'decoder'}.{i}.resblks.{j}.conv{'ab'[int(k) - 1]}"


def _linear(rest: str) -> str:
    """linear.weight, norm.norm.weight -> their names within a 1x1 convolution."""
    if rest.startswith("linear."):
        return f"conv.{rest}"
    kind = rest.rpartition(".")[2]
    return f"norm.norm.{_plural(kind)}"
