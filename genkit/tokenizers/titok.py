"""TiTok: an image as a short row of ids without a grid.

Yu et al., "An Image is Worth 32 Tokens for Reconstruction and Generation", NeurIPS 2024; behaviour as in bytedance/1d-tokenizer modeling/titok.py.
Difference: the codebook follows its assignments, is clustered from the first batch and recycles codes (genkit.nn.codebook).
"""

from __future__ import annotations

from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from genkit.errors import GenkitError, UsageError
from genkit.interfaces import Encoded
from genkit.nn.grid_tokenizer import GridTokenizer, check_sizes
from genkit.nn.maskgit_conv import GROUPS, Decoder
from genkit.nn.quantize import Quantizer
from genkit.nn.straight_through import Gradient
from genkit.nn.taming import check_levels
from genkit.nn.vit import PatchPixels, ProxyLogits, TokenDecoder, TokenEncoder


class TiTok(GridTokenizer):
    """Images [B, image_channels, image_size, image_size] in [-1, 1] <-> z [B, channels, K] <-> ids [B, 1, K].

    Args:
        image_channels: 1 grey, 3 colour.
        image_size: side of the images in pixels; positions are learned, so no other size fits.
        stride: side of a patch in pixels, what the transformers see; it has no part in the number of ids.
        num_tokens: K.
        dim, depth, num_heads: width, blocks and heads of the encoder's transformer.
        decoder_dim, decoder_depth, decoder_heads, decoder_stride: the same of the decoder's, and the side of its patches; null = as the encoder's.
        channels: of z, and width of a code; 8 to 16 with `cosine` is usual.
        codebook_size: number of codes.
        cosine: codes and what is compared with them have length 1.
        gradient: see genkit.tokenizers.vq.
        decay, restart: see genkit.nn.codebook.Codebook.
        proxy_codes: null = the decoder ends in pixels. Otherwise it ends in logits over this many codes of another tokenizer, as in the paper's
            first stage; see `proxy_logits`.
        pixel_widths: with `proxy_codes`, the decoder of that other tokenizer, MaskGIT's VQGAN (genkit.nn.maskgit_conv): channels of every level, finest
            first, multiples of 32. It is given the mean of the proxy codes under their probabilities, as in the paper's second stage. null = no
            such decoder: images cannot be made.
        pixel_channels, pixel_blocks: width of the proxy codes and residual blocks per level of that decoder.

    Raises: UsageError for sizes that do not fit each other.
    """

    num_levels = 1

    @register_to_config
    def __init__(
        self,
        *,
        image_channels: int,
        image_size: int = 32,
        stride: int = 4,
        num_tokens: int = 32,
        dim: int = 128,
        depth: int = 4,
        num_heads: int = 4,
        decoder_dim: int | None = None,
        decoder_depth: int | None = None,
        decoder_heads: int | None = None,
        decoder_stride: int | None = None,
        channels: int = 12,
        codebook_size: int = 512,
        cosine: bool = True,
        gradient: Gradient = "straight_through",
        decay: float = 0.99,
        restart: float = 0.1,
        proxy_codes: int | None = None,
        pixel_widths: tuple[int, ...] | None = None,
        pixel_channels: int = 256,
        pixel_blocks: int = 2,
    ):
        super().__init__()
        check_sizes(num_tokens=num_tokens, dim=dim, channels=channels, codebook_size=codebook_size, num_heads=num_heads)
        patch = stride if decoder_stride is None else decoder_stride
        out_dim, out_heads = decoder_dim or dim, decoder_heads or num_heads
        for name, side in (("stride", stride), ("decoder_stride", patch)):
            if side < 1 or image_size < side or image_size % side:
                raise UsageError(f"tokenizer.image_size={image_size} must be a multiple of tokenizer.{name}={side}")
        if dim % num_heads or out_dim % out_heads:
            raise UsageError(
                f"widths {dim} and {out_dim} must be multiples of the numbers of heads, {num_heads} and {out_heads}"
            )
        self.image_channels, self.image_size, self.stride = image_channels, image_size, stride
        self.num_tokens, self.channels, self.codebook_size = num_tokens, channels, codebook_size
        self.encoder = TokenEncoder(
            image_channels=image_channels,
            channels=channels,
            grid=image_size // stride,
            patch_size=stride,
            num_tokens=num_tokens,
            dim=dim,
            depth=depth,
            num_heads=num_heads,
            is_legacy=proxy_codes is not None,
        )
        self.quantizer = Quantizer(
            dim=channels, codebook_size=codebook_size, cosine=cosine, gradient=gradient, decay=decay, restart=restart
        )
        self.decoder = TokenDecoder(
            channels=channels,
            grid=image_size // patch,
            num_tokens=num_tokens,
            dim=out_dim,
            depth=depth if decoder_depth is None else decoder_depth,
            num_heads=out_heads,
        )
        self.head: PatchPixels | ProxyLogits
        if proxy_codes is None:
            self.head = PatchPixels(dim=out_dim, image_channels=image_channels, patch_size=patch)
        else:
            self.head = ProxyLogits(dim=out_dim, num_codes=proxy_codes)
        self.pixels: Decoder | None = None
        if pixel_widths is not None:
            if proxy_codes is None or 2 ** (len(pixel_widths) - 1) != patch:
                raise UsageError(
                    f"tokenizer.pixel_widths={list(pixel_widths)} needs tokenizer.proxy_codes, and patches of the decoder of {2 ** (len(pixel_widths) - 1)}"
                )
            check_levels(pixel_widths, (), GROUPS)
            self.proxy_table = nn.Embedding(proxy_codes, pixel_channels)
            self.pixels = Decoder(
                image_channels=image_channels, channels=pixel_channels, widths=pixel_widths, num_blocks=pixel_blocks
            )
        self.finish()

    @property
    def last_layer(self) -> Tensor:
        return self.head.pixels.weight if isinstance(self.head, PatchPixels) else super().last_layer

    def encode(self, x: Tensor) -> Encoded:
        """x [B, image_channels, image_size, image_size] in [-1, 1] -> z [B, channels, K], ids [B, 1, K] and the quantiser's losses, [B] each.

        Raises: UsageError for images of another size.
        """
        self.check_image(x)
        found = self.quantizer(self.latents(x).mT)
        return Encoded(self.scale(found.codes.mT), found.ids.mT, found.losses)

    def latents(self, x: Tensor) -> Tensor:
        """Images -> [B, channels, K], what is quantised. The networks see and give pixels in [0, 1], as the original's."""
        return self.encoder((x + 1) / 2)

    def decode(self, z: Tensor) -> Tensor:
        """z [B, channels, K] -> images [B, image_channels, image_size, image_size], not limited to [-1, 1].

        Raises: GenkitError where the decoder ends in proxy codes and there is none for those.
        """
        if isinstance(self.head, PatchPixels):
            return 2 * self.head(self.decoder(self.unscale(z))) - 1
        if self.pixels is None:
            raise GenkitError(
                "this TiTok decodes to codes of another tokenizer and has no decoder for them; "
                "give proxy_logits(z).argmax(1) to that tokenizer, or import weights of the second stage"
            )
        expected = self.proxy_logits(z).softmax(1).movedim(1, -1) @ self.proxy_table.weight  # [B, Y, X, pixel_channels]
        return self.pixels(expected.movedim(-1, 1))

    def proxy_logits(self, z: Tensor) -> Tensor:
        """z [B, channels, K] -> logits [B, proxy_codes, Y, X] over the codes of another tokenizer, on a grid of image_size / stride.

        Raises: UsageError where the decoder ends in pixels.
        """
        if not isinstance(self.head, ProxyLogits):
            raise UsageError("this TiTok decodes to pixels; proxy logits need tokenizer.proxy_codes")
        return self.head(self.decoder(self.unscale(z)))

    def codes(self, ids: Tensor) -> Tensor:
        """ids [B, 1, K] -> the z that encode returns with them. Raises UsageError for ids outside the codebook."""
        self.check_ids(ids)
        return self.scale(self.quantizer.codes(ids.mT).mT)

    def check_image(self, x: Tensor) -> None:
        super().check_image(x)
        if x.shape[2:] != (self.image_size,) * 2:
            raise UsageError(
                f"images are {x.shape[2]}x{x.shape[3]}, but tokenizer.image_size={self.image_size}; resize the images, or train with their size"
            )

    def check_ids(self, ids: Tensor) -> None:
        if ids.ndim != 3 or ids.shape[1:] != (1, self.num_tokens):
            raise UsageError(f"ids are {list(ids.shape)}, expected [B, 1, {self.num_tokens}]")
        super().check_ids(ids[..., None])
