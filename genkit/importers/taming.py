"""What the projects that carry VQGAN's networks call their parts, and how sizes and rules follow from that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from genkit.errors import GenkitError
from genkit.importers.names import Rules, count, has, shape
from genkit.nn.codebook import normalise


@dataclass(frozen=True)
class Vocabulary:
    """Their words. {} stands for a number.

    Attributes:
        down, up: a level of the encoder and of the decoder.
        up_is_finest_first: whether they number the decoder's levels as the encoder's; ours begin with the coarsest.
        block, attention: within a level.
        middle: block, attention, block at the coarsest grid, within either network.
        shortcut: the 1x1 convolution of a residual block.
        norm, qkv, out: parts of attention; qkv is one convolution or three.
    """

    down: str = "encoder.down.{}"
    up: str = "decoder.up.{}"
    up_is_finest_first: bool = True
    block: str = "block.{}"
    attention: str = "attn.{}"
    halve: str = "downsample.conv"
    double: str = "upsample.conv"
    middle: tuple[str, str, str] = ("mid.block_1", "mid.attn_1", "mid.block_2")
    shortcut: str = "nin_shortcut"
    norm: str = "norm"
    qkv: tuple[str, ...] = ("q", "k", "v")
    out: str = "proj_out"
    norm_out: str = "norm_out"


def sizes(state: Mapping[str, Tensor], words: Vocabulary, what: str) -> dict[str, Any]:
    """Constructor arguments of VQGAN and KLGAN that the weights tell: image_channels, widths, stem, num_blocks, attention, mid_attention,
    decoder_widths and decoder_attention (None where they are the encoder's).

    Raises: GenkitError when a weight they are read from is missing, and when the networks have different numbers of levels.
    """
    block = f".{words.block}"
    first = block.format(0) + ".conv1.weight"
    levels = range(max(1, count(state, words.down + block.split("{")[0])))
    up = [words.up.format(i if words.up_is_finest_first else len(levels) - 1 - i) for i in levels]
    num_up = max(1, count(state, words.up + block.split("{")[0]))
    if num_up != len(levels):
        raise GenkitError(
            f"these weights are of {what} with {len(levels)} levels down and {num_up} up: images would change their size"
        )
    stem, image_channels, *_ = shape(state, "encoder.conv_in.weight", what)
    widths = [shape(state, words.down.format(i) + first, what)[0] for i in levels]
    decoder_widths = [shape(state, level + first, what)[0] for level in up]
    begins = f".{words.attention}".split("{")[0]
    attention = [i for i in levels if has(state, words.down.format(i) + begins)]
    decoder_attention = [i for i in levels if has(state, up[i] + begins)]
    return {
        "image_channels": image_channels,
        "widths": widths,
        "stem": None if stem == widths[0] else stem,
        "num_blocks": max(count(state, words.down.format(i) + block + ".") for i in levels),
        "attention": attention,
        "mid_attention": has(state, f"encoder.{words.middle[1]}."),
        "decoder_widths": None if decoder_widths == widths else decoder_widths,
        "decoder_attention": None if decoder_attention == attention else decoder_attention,
    }


def rules(words: Vocabulary, num_levels: int) -> Rules:
    """Where every weight of both networks comes from."""
    last = num_levels - 1

    def level(net: str, number: str) -> str:
        if net == "encoder":
            return words.down.format(number)
        return words.up.format(last - int(number) if words.up_is_finest_first else number)

    def block(net: str, number: str, i: str, part: str, kind: str) -> str:
        return f"{level(net, number)}.{words.block.format(i)}.{words.shortcut if part == 'shortcut' else part}.{kind}"

    def within_attention(place: str, part: str, kind: str) -> str | tuple[str, ...]:
        if part == "qkv":
            return tuple(f"{place}.{name}.{kind}" for name in words.qkv)
        return f"{place}.{words.norm if part == 'norm' else words.out}.{kind}"

    def attention(net: str, number: str, i: str, part: str, kind: str) -> str | tuple[str, ...]:
        return within_attention(f"{level(net, number)}.{words.attention.format(i)}", part, kind)

    def resample(net: str, number: str, kind: str) -> str:
        return f"{level(net, number)}.{words.halve if net == 'encoder' else words.double}.{kind}"

    net, kind = "(encoder|decoder)", "(weight|bias)"
    return [
        (rf"{net}\.levels\.(\d+)\.blocks\.(\d+)\.(\w+)\.{kind}", block),
        (rf"{net}\.levels\.(\d+)\.attention\.(\d+)\.(\w+)\.{kind}", attention),
        (rf"{net}\.levels\.(\d+)\.resample\.{kind}", resample),
        (
            rf"{net}\.middle\.(0|2)\.(\w+)\.{kind}",
            lambda net, i, part, kind: f"{net}.{words.middle[int(i)]}.{part}.{kind}",
        ),
        (
            rf"{net}\.middle\.1\.(\w+)\.{kind}",
            lambda net, part, kind: within_attention(f"{net}.{words.middle[1]}", part, kind),
        ),
        (rf"{net}\.norm_out\.{kind}", lambda net, kind: f"{net}.{words.norm_out}.{kind}"),
        (rf"encoder\.project\.{kind}", "quant_conv.{0}"),
        (rf"decoder\.project\.{kind}", "post_quant_conv.{0}"),
        (rf"{net}\.(conv_in|conv_out)\.{kind}", "{0}.{1}.{2}"),
        *CODEBOOK,
        (r"latent_(mean|std)", None),
    ]


# The table of codes; what is counted about their use starts afresh (see set_codes).
CODEBOOK: Rules = [(r"quantizer\.codebook\.embed", "quantize.embedding.weight"), (r"quantizer\.codebook\..*", None)]


def set_codes(tokenizer: Any) -> None:
    """Make the codebook's statistics agree with codes that were just read, and codes of length 1 what they are called."""
    codebook = tokenizer.quantizer.codebook
    codebook.set_codes(normalise(codebook.embed) if codebook.cosine else codebook.embed.clone())
