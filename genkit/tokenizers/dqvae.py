"""DQ-VAE: more ids where an image has more to tell.

Huang et al., "Towards Accurate Image Coding: Improved Autoregressive Image Generation with Dynamic Vector Quantization", CVPR 2023; behaviour as in
CrossmodalGroup/DynamicVectorQuantization models/stage1_dynamic. Differences: the codebook is clustered from the first batch and keeps statistics that
begin at the codes themselves (genkit.nn.codebook); without `widths` the networks are the light ones of genkit.nn.conv, one for each grain.
"""

from __future__ import annotations

from typing import Literal

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from genkit.errors import UsageError
from genkit.interfaces import Encoded
from genkit.nn import conv, taming
from genkit.nn import grain as grains
from genkit.nn.grain_networks import (
    NORM_GROUPS,
    EntropyRouter,
    FeatureRouter,
    GrainEncoder,
    LightGrainEncoder,
    Positions,
)
from genkit.nn.grid_tokenizer import GridTokenizer, check_sizes
from genkit.nn.quantize import Quantizer
from genkit.nn.straight_through import Gradient


class DQVAE(GridTokenizer):
    """Images [B, image_channels, Y, X] in [-1, 1] <-> z [B, channels, Y / stride, X / stride] <-> ids [B, 1, Y / stride, X / stride].

    ids and z lie on the fine grid; where a region is coded coarsely its one id stands in all of its cells. So a generator of fixed grids works on
    them as on any ids, `pack` keeps what is needed, and `decode` needs no map: the decoder sees codes and positions, and which regions are coarse
    can be read from equal ids (`grain_of`).

    Args:
        image_channels: 1 grey, 3 colour.
        image_size: largest side of the images in pixels: rows and columns have learned positions.
        stride: pixels per fine cell along each axis, a power of two.
        num_grains: G; a region is 2^(G-1) fine cells a side and takes 1 to 4^(G-1) codes. 2 and 3 are the paper's.
        router: what decides on a region's grain: the entropy of its grey levels, or a network that sees the features.
        thresholds: of the entropy router, G - 1 rising values in nats; genkit.nn.grain.entropy_threshold measures them on images.
        targets: of the feature router, the shares of regions meant to have grain 1 (.. G - 1); the rest is grain 0.
        budget: weight of the squared distance from these shares. As in the released code, the loss is 2 budget (share - target)^2 for two grains
            (it adds its second term twice), and budget (...)^2 for the finest, (...)^2 for the middle one of three.
        router_groups: of the group norm before the feature router; 0 = none.
        router_is_deep: a hidden layer in the feature router.
        router_activation: behind that layer.
        width: channels of the light networks on the coarsest grid.
        num_blocks: residual blocks on every grid.
        widths: instead of `width`, channels of every level of the paper's encoder, finest first, multiples of 32; the last G levels have ways out.
        stem: with `widths`, channels of the encoder's first convolution; null = the first of them.
        attention: with `widths`, the levels with attention after each block.
        decoder_widths, decoder_attention: the same for the decoder, whose coarsest level is the fine grid; null = as the encoder's.
        feature_channels: channels between the networks and the 1x1 convolutions that lead to the codes and back; null = no such convolutions.
        channels: of z, the width of a code.
        codebook_size: number of codes.
        positions: what tells the decoder where a cell is: sines of learned directions, a table of rows and one of columns, both, or nothing.
        gradient: see genkit.tokenizers.vq.
        decay, restart: see genkit.nn.codebook.Codebook.

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
        num_grains: int = 2,
        router: Literal["entropy", "feature"] = "feature",
        thresholds: tuple[float, ...] = (),
        targets: tuple[float, ...] = (0.5,),
        budget: float = 10.0,
        router_groups: int = 8,
        router_is_deep: bool = True,
        router_activation: Literal["silu", "relu"] = "silu",
        width: int = 128,
        num_blocks: int = 2,
        widths: tuple[int, ...] | None = None,
        stem: int | None = None,
        attention: tuple[int, ...] = (),
        decoder_widths: tuple[int, ...] | None = None,
        decoder_attention: tuple[int, ...] | None = None,
        feature_channels: int | None = None,
        channels: int = 32,
        codebook_size: int = 512,
        positions: Literal["waves+tables", "waves", "tables", "none"] = "tables",
        gradient: Gradient = "straight_through",
        decay: float = 0.99,
        restart: float = 0.1,
    ):
        super().__init__()
        check_sizes(stride=stride, width=width, num_blocks=num_blocks, channels=channels, codebook_size=codebook_size)
        if num_grains < 2:
            raise UsageError(
                f"tokenizer.num_grains={num_grains} must be at least 2; for one grain take another tokenizer"
            )
        self.image_channels, self.channels, self.stride = image_channels, channels, stride
        self.image_size, self.num_grains, self.codebook_size = image_size, num_grains, codebook_size
        self.region = stride * 2 ** (num_grains - 1)  # pixels
        if image_size < self.region or image_size % self.region:
            raise UsageError(
                f"tokenizer.image_size={image_size} must be a multiple of {self.region}, the side of a region of {num_grains} grains at stride {stride}"
            )
        inner = feature_channels or channels
        self.choose = self._make_router(
            router, thresholds, targets, inner, router_groups, router_is_deep, router_activation
        )
        self.targets, self.budget = tuple(targets), budget
        if widths is None:
            light = {
                "image_channels": image_channels,
                "channels": inner,
                "stride": stride,
                "width": width,
                "num_blocks": num_blocks,
            }
            self.encoder = LightGrainEncoder(**light, num_grains=num_grains)
            self.decoder = conv.Decoder(**light)
        else:
            if stride * 2 ** (num_grains - 1) != 2 ** (len(widths) - 1):
                raise UsageError(
                    f"tokenizer.widths={list(widths)} mean regions of {2 ** (len(widths) - 1)} pixels, but stride and num_grains mean {self.region}"
                )
            fine = len(widths) - num_grains + 1
            decoder_widths = tuple(widths[:fine]) if decoder_widths is None else tuple(decoder_widths)
            if decoder_attention is None:
                decoder_attention = tuple(level for level in attention if level < fine)
            if len(decoder_widths) != fine:
                raise UsageError(f"tokenizer.decoder_widths={list(decoder_widths)} must be {fine}, one for each level")
            taming.check_levels(widths, attention, NORM_GROUPS)
            taming.check_levels(decoder_widths, decoder_attention, NORM_GROUPS)
            deep = {"image_channels": image_channels, "channels": inner, "num_blocks": num_blocks}
            self.encoder = GrainEncoder(
                **deep, widths=tuple(widths), attention=tuple(attention), num_grains=num_grains, stem=stem
            )
            self.decoder = taming.Decoder(
                **deep,
                widths=decoder_widths,
                attention=decoder_attention,
                mid_attention=True,
                groups=NORM_GROUPS,
                neck=None,
            )
        self.enter = nn.Conv2d(inner, channels, 1) if feature_channels else nn.Identity()
        self.quantizer = Quantizer(
            dim=channels, codebook_size=codebook_size, gradient=gradient, decay=decay, restart=restart
        )
        self.leave = nn.Conv2d(channels, inner, 1) if feature_channels else nn.Identity()
        self.place = Positions(
            channels=inner,
            side=image_size // stride,
            has_waves="waves" in positions,
            has_tables="tables" in positions,
        )
        self.finish()

    def _make_router(
        self,
        kind: str,
        thresholds: tuple[float, ...],
        targets: tuple[float, ...],
        channels: int,
        groups: int,
        is_deep: bool,
        activation: Literal["silu", "relu"],
    ) -> EntropyRouter | FeatureRouter:
        needed = self.num_grains - 1
        if kind == "entropy":
            if len(thresholds) != needed or list(thresholds) != sorted(thresholds):
                raise UsageError(
                    f"tokenizer.thresholds={list(thresholds)} must be {needed} rising entropies in nats; measure them with genkit.nn.grain.entropy_threshold"
                )
            return EntropyRouter(patch_size=self.region, thresholds=thresholds)
        if len(targets) != needed or min(targets) < 0 or sum(targets) > 1:
            raise UsageError(
                f"tokenizer.targets={list(targets)} must be {needed} shares of the regions, at most 1 in all"
            )
        if groups and channels % groups:
            raise UsageError(
                f"tokenizer.router_groups={groups} does not divide the {channels} channels of the features"
            )
        hidden = channels * self.num_grains if is_deep else None
        return FeatureRouter(
            channels=channels, num_grains=self.num_grains, norm_groups=groups, hidden=hidden, activation=activation
        )

    def encode(self, x: Tensor) -> Encoded:
        """x [B, image_channels, Y, X] in [-1, 1] -> z, ids on the fine grid, and losses [B] each.

        "commitment": mean squared distance of the vectors to their codes, in which a coarse code counts as much as a fine one; "budget": see the class, the
        same for all images of the batch; "_codes": number of codes each image needs, for the log.
        In training the grains of a feature router are drawn with Gumbel noise from torch's global generator.

        Raises: UsageError for another number of channels, or sides that are no multiple of a region's or above image_size.
        """
        features, gate = self.look(x)
        chosen = gate.argmax(1)
        rows = self.enter(self.merge(features, gate)).permute(0, 2, 3, 1)  # [B, Y, X, C]
        found = self.quantizer(rows)
        weights = grains.mask_weights(chosen, self.num_grains)[..., None]
        distance = (rows.float() - found.codes.detach().float()).square()
        losses = {"commitment": (weights * distance).flatten(1).mean(1)}
        if isinstance(self.choose, FeatureRouter):
            losses["budget"] = self._budget(gate if self.training else _one_hot(gate)).expand(len(x))
        losses["_codes"] = grains.code_counts(chosen).float()
        return Encoded(self.scale(found.codes.permute(0, 3, 1, 2)), found.ids.permute(0, 3, 1, 2), losses)

    def decode(self, z: Tensor) -> Tensor:
        """z [B, channels, Y, X] -> images [B, image_channels, stride Y, stride X], not limited to [-1, 1]."""
        h = self.place(self.leave(self.unscale(z)))
        return self.decoder(h.contiguous(memory_format=torch.channels_last))

    def grain(self, x: Tensor) -> Tensor:
        """Images -> grain maps [B, y, x] int64, y = Y / region: how finely each region is coded, 0 = by one code. In evaluation mode without noise."""
        return self.look(x)[1].argmax(1)

    def num_codes(self, x: Tensor) -> Tensor:
        """Images -> [B] int64: how many codes each of them takes, from one to 4^(G-1) per region."""
        return grains.code_counts(self.grain(x))

    def grain_of(self, ids: Tensor) -> Tensor:
        """ids [B, 1, Y, X] -> the coarsest grain maps they can be packed with: a region, or a square in it, is one code where its ids are equal."""
        self.check_ids(ids)
        return grains.grain_of(ids[:, 0], self.num_grains)

    def pack(self, ids: Tensor, grain: Tensor | None = None) -> grains.Packed:
        """ids [B, 1, Y, X] -> for every image (positions [n], codes [n]), every code once; without grain maps by those of `grain_of`."""
        return grains.pack(ids, self.grain_of(ids) if grain is None else grain, self.num_grains)

    def unpack(self, packed: grains.Packed, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The inverse of `pack`, for a fine grid (Y, X): (ids [B, 1, Y, X], grain maps)."""
        ids, grain = grains.unpack(packed, grid, self.num_grains)
        self.check_ids(ids)
        return ids, grain

    def check_image(self, x: Tensor) -> None:
        super().check_image(x)
        Y, X = x.shape[2:]
        if Y % self.region or X % self.region or max(Y, X) > self.image_size:
            raise UsageError(
                f"images of {Y}x{X} do not fit: sides must be multiples of {self.region}, the side of a region, up to tokenizer.image_size={self.image_size}"
            )

    def look(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Images -> (features of every grain, coarse to fine, gate [B, G, y, x]): the grain of a region is the one with the largest gate."""
        self.check_image(x)
        features = self.encoder(x.contiguous(memory_format=torch.channels_last))
        gate = self.choose(x, features)
        if self.training and isinstance(self.choose, FeatureRouter):
            gate = F.gumbel_softmax(gate.float(), hard=True, dim=1)
        return features, gate

    def merge(self, features: list[Tensor], gate: Tensor) -> Tensor:
        """Every region from the features of its grain, [B, C, Y, X] on the fine grid."""
        times = 2 ** (self.num_grains - 1)
        where = grains.expand(gate.argmax(1), times)[:, None]
        merged = features[-1]
        for g, of_grain in enumerate(features[:-1]):
            merged = torch.where(where == g, grains.expand(of_grain, times // 2**g), merged)
        if self.training and isinstance(self.choose, FeatureRouter):
            merged = merged * grains.expand(
                gate.amax(1, keepdim=True), times
            )  # times one: carries the router's gradient
        return merged

    def _budget(self, gate: Tensor) -> Tensor:
        shares = gate.mean((0, 2, 3))[1:]  # of grains 1 to G - 1
        off = (shares - torch.tensor(self.targets, device=gate.device)).square()
        if self.num_grains == 2:
            return 2 * self.budget * off[0]
        return off[:-1].sum() + self.budget * off[-1]


def _one_hot(gate: Tensor) -> Tensor:
    return F.one_hot(gate.argmax(1), gate.shape[1]).permute(0, 3, 1, 2).float()
