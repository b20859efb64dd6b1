"""The multi-scale VQVAE of FoundationVision/VAR (vae_ch160v4096z32)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from genkit.errors import GenkitError
from genkit.importers import taming
from genkit.importers.names import Rules, count, fill, has, shape
from genkit.tokenizers.var_vq import VarVq

WHAT = "a VAR VQVAE"
IGNORED: dict[str, str] = {}
_FUSED: Any = ("qkv",)  # one convolution where others have three
_WORDS = taming.Vocabulary(qkv=_FUSED)
_PATCH_SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)  # of the released weights


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> VarVq:
    """State dict -> tokenizer in evaluation mode. Sizes are read from the weights.

    Images come out as the network makes them; the original limits them to [-1, 1].

    Args:
        config: of the original's constructor arguments those that weights do not tell: `v_patch_nums` (default those of the released weights),
            `quant_resi` (0.5), `using_znorm` (False).

    Raises: GenkitError for weights that do not fit, naming the keys.
    """
    options = config or {}
    patch_sizes = tuple(options.get("v_patch_nums", _PATCH_SIZES))
    scales = shape(state, "quantize.ema_vocab_hit_SV", WHAT)[0]
    if scales != len(patch_sizes):
        raise GenkitError(
            f"these weights are of {WHAT} with {scales} scales, but v_patch_nums={list(patch_sizes)} has {len(patch_sizes)}"
        )
    found = taming.sizes(state, _WORDS, WHAT)
    codebook_size, channels = shape(state, "quantize.embedding.weight", WHAT)
    num_phi, phi = _phi(state)
    tokenizer = VarVq(
        image_channels=found["image_channels"],
        patch_sizes=patch_sizes,
        stride=2 ** (len(found["widths"]) - 1),
        num_blocks=found["num_blocks"],
        widths=found["widths"],
        stem=found["stem"],
        latent_kernel=shape(state, "quant_conv.weight", WHAT)[-1],
        channels=channels,
        codebook_size=codebook_size,
        num_phi=max(1, num_phi),
        phi_ratio=abs(float(options.get("quant_resi", 0.5))) if num_phi else 0.0,
        cosine=bool(options.get("using_znorm", False)),
    )
    fill(tokenizer, state, rules(len(found["widths"]), phi), IGNORED, WHAT)
    taming.set_codes(tokenizer)
    return tokenizer.eval()


def _phi(state: Mapping[str, Tensor]) -> tuple[int, str]:
    """(number of convolutions after the look-up, what they are called): shared by some scales, by all, or one each."""
    if has(state, "quantize.quant_resi.qresi_ls."):
        return count(state, "quantize.quant_resi.qresi_ls.{}."), "quantize.quant_resi.qresi_ls.{0}.{1}"
    if has(state, "quantize.quant_resi.qresi."):
        return 1, "quantize.quant_resi.qresi.{1}"
    return count(state, "quantize.quant_resi.{}."), "quantize.quant_resi.{0}.{1}"


def rules(num_levels: int, phi: str) -> Rules:
    """Where every weight comes from; phi is what the convolutions after the look-up are called."""
    return [
        (r"enter\.(\w+)", "quant_conv.{0}"),
        (r"leave\.(\w+)", "post_quant_conv.{0}"),
        (r"quantizer\.phi\.(\d+)\.(\w+)", phi),
        (r"quantizer\.codebook\.recent", "quantize.ema_vocab_hit_SV"),
        *taming.rules(_WORDS, num_levels),
    ]
