"""TiTok of bytedance/1d-tokenizer: first-stage weights (proxy codes), second-stage weights (with the pixel decoder) and those that end in RGB."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from genkit.errors import GenkitError, UsageError
from genkit.importers import taming
from genkit.importers.names import Rules, count, fill, flat, shape
from genkit.tokenizers.titok import TiTok

WHAT = "a TiTok"
IGNORED = {
    r"quantize\.embed_prob": "decayed use of the codes, from which they were restarted in training",
    r"pixel_quantize\.(?!embedding\.weight).*": "buffers beside the table of proxy codes",
}
_HEAD_WIDTH = 64  # channels per attention head of every released size


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> TiTok:
    """State dict -> tokenizer in evaluation mode. Sizes are read from the weights.

    The original takes and gives images in [0, 1]; here they are in [-1, 1] as everywhere.

    Args:
        config: of the original's options, flat or nested as in its files: `num_heads` (default one per 64 channels, as in all that were released),
            `use_l2_norm` (default true) and `quantize_mode`.

    Raises: GenkitError for weights that do not fit, naming the keys; UsageError for an option that is not supported.
    """
    options = flat(config or {})
    if options.get("quantize_mode", "vq") != "vq":
        raise UsageError(f"quantize_mode={options['quantize_mode']}: only TiTok with a codebook can be imported")
    dim, image_channels, stride, _ = shape(state, "encoder.patch_embed.weight", WHAT)
    codebook_size, channels = shape(state, "quantize.embedding.weight", WHAT)
    num_tokens = shape(state, "latent_tokens", WHAT)[0]
    num_patches = shape(state, "encoder.positional_embedding", WHAT)[0] - 1
    grid = math.isqrt(num_patches)
    decoder_dim = shape(state, "decoder.ln_pre.weight", WHAT)[0]
    decoder_grid = math.isqrt(shape(state, "decoder.positional_embedding", WHAT)[0] - 1)
    if decoder_grid < 1 or grid * stride % decoder_grid:
        raise GenkitError(
            f"these weights are of {WHAT} with {grid}x{grid} patches of {stride} pixels read and {decoder_grid}x{decoder_grid} written"
        )
    proxy_codes = state["decoder.ffn.2.weight"].shape[0] if "decoder.ffn.2.weight" in state else None
    levels = count(state, "pixel_decoder.up.{}.block.")
    pixel: dict[str, Any] = {}
    if levels:
        pixel = {
            "pixel_widths": [
                shape(state, f"pixel_decoder.up.{i}.block.0.conv1.weight", WHAT)[0] for i in range(levels)
            ],
            "pixel_channels": shape(state, "pixel_quantize.embedding.weight", WHAT)[1],
            "pixel_blocks": count(state, "pixel_decoder.mid.{}."),
        }
    tokenizer = TiTok(
        image_channels=image_channels,
        image_size=grid * stride,
        stride=stride,
        num_tokens=num_tokens,
        dim=dim,
        depth=count(state, "encoder.transformer.{}."),
        num_heads=int(options.get("num_heads", max(1, dim // _HEAD_WIDTH))),
        decoder_dim=decoder_dim,
        decoder_depth=count(state, "decoder.transformer.{}."),
        decoder_heads=int(options.get("num_heads", max(1, decoder_dim // _HEAD_WIDTH))),
        decoder_stride=grid * stride // decoder_grid,
        channels=channels,
        codebook_size=codebook_size,
        cosine=bool(options.get("use_l2_norm", True)),
        proxy_codes=proxy_codes,
        **pixel,
    )
    ignored = dict(IGNORED)
    if not levels:
        ignored[r"pixel_quantize\..*"] = "proxy codes without a decoder for them"
    fill(tokenizer, state, rules(levels), ignored, WHAT)
    taming.set_codes(tokenizer)
    return tokenizer.eval()


_NET = "(encoder|decoder)"
_BLOCK = {"norm1": "ln_1", "norm2": "ln_2", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj", "out": "attn.out_proj"}
_RULES: Rules = [
    (rf"{_NET}\.blocks\.(\d+)\.qkv\.(\w+)", "{0}.transformer.{1}.attn.in_proj_{2}"),
    (
        rf"{_NET}\.blocks\.(\d+)\.(norm1|norm2|mlp\.up|mlp\.down|out)\.(\w+)",
        lambda net, i, part, kind: f"{net}.transformer.{i}.{_BLOCK[part]}.{kind}",
    ),
    (rf"{_NET}\.class_token", "{0}.class_embedding"),
    (rf"{_NET}\.patch_positions", "{0}.positional_embedding"),
    (rf"{_NET}\.token_positions", "{0}.latent_token_positional_embedding"),
    (rf"{_NET}\.norm_in\.(\w+)", "{0}.ln_pre.{1}"),
    (rf"{_NET}\.norm_out\.(\w+)", "{0}.ln_post.{1}"),
    (r"encoder\.tokens", "latent_tokens"),
    (r"encoder\.embed\.(\w+)", "encoder.patch_embed.{0}"),
    (r"encoder\.project\.(\w+)", "encoder.conv_out.{0}"),
    (r"decoder\.embed\.(\w+)", "decoder.decoder_embed.{0}"),
    (r"decoder\.mask_token", "decoder.mask_token"),
    (r"head\.(up|pixels)\.(\w+)", lambda part, kind: f"decoder.ffn.0.{kind}"),
    (r"head\.down\.(\w+)", "decoder.ffn.2.{0}"),
    (r"head\.smooth\.(\w+)", "decoder.conv_out.{0}"),
    (r"proxy_table\.weight", "pixel_quantize.embedding.weight"),
    *taming.CODEBOOK,
    (r"latent_(mean|std)", None),
]


def rules(levels: int) -> Rules:
    """Where every weight comes from. Of the pixel decoder's levels theirs number from the finest, ours from the coarsest; the way up to a finer grid belongs to the level before."""

    def block(level: str, i: str, part: str, kind: str) -> str:
        place = f"pixel_decoder.up.{levels - 1 - int(level)}.block.{i}"
        return f"{place}.{'nin_shortcut' if part == 'shortcut' else part}.{kind}"

    return [
        *_RULES,
        (r"pixels\.levels\.(\d+)\.(\d+)\.(\w+)\.(\w+)", block),
        (
            r"pixels\.doubles\.(\d+)\.(\w+)",
            lambda i, kind: f"pixel_decoder.up.{levels - 1 - int(i)}.upsample_conv.{kind}",
        ),
        (r"pixels\.middle\.(\d+)\.(\w+)\.(\w+)", "pixel_decoder.mid.{0}.{1}.{2}"),
        (r"pixels\.(conv_in|norm_out|conv_out)\.(\w+)", "pixel_decoder.{0}.{1}"),
    ]
