"""Octree VQ-VAE: a point cloud as an octree with a binary code on every node of a middle depth, and a signed distance function out of them.

Wei et al., "OctGPT", SIGGRAPH 2025, section 3.1; `octree-nn/octgpt models/vae.py VQVAE` with its binary quantiser. The encoder convolves all nodes, finest
depth to the codes; the decoder, a U-net on the dual graph, grows the octree back and puts a linear function on every node, blended to a function of
space (genkit.octree.partition). Differences: the gradient of that function is computed in closed form, and a shape in which no node would be split
splits its own first node, not the first of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from genkit.errors import GenkitError, UsageError
from genkit.meshes.marching_cubes import marching_cubes
from genkit.meshes.mesh import Mesh
from genkit.nn.dual_graph import Blocks, Down, Head, Up, to_nodes
from genkit.nn.octree_conv import OctreeConv, OctreeGroupNorm
from genkit.nn.sphere import BinarySphere
from genkit.octree import build
from genkit.octree.graph import dual_graph
from genkit.octree.octree import Octree
from genkit.octree.partition import around, blend, blend_with_gradient
from genkit.octree.tokens import OctreeTokens, splits_of
from genkit.octree.values import input_features, pad

FEATURES = {"N": 3, "D": 1, "L": 3, "P": 3}
BOX = 0.9  # half side of the box that a surface is looked for in, as theirs
LEVEL = 0.002  # of the distance that is taken for the surface, as theirs: it keeps thin walls closed
_AT_ONCE = 2**17  # places evaluated together


class OctreeVQ(ModelMixin, ConfigMixin):
    """Points with normals [B, P, 3] <-> OctreeTokens -> a signed distance function, negative inside.

    Args:
        depth: of the finest nodes; side 2 / 2^depth.
        full_depth: complete grids down to it; split bits begin there.
        bits: of a code.
        encoder_channels: of the encoder, finest depth first; the codes are at depth - len + 1.
        encoder_blocks: residual blocks of each.
        inner_channels, inner_blocks: of the decoder's own encoder, from the depth of the codes up to full_depth or less.
        decoder_channels, decoder_blocks: from there down to the finest depth.
        features: what is read of a node, letters of genkit.octree.values.input_features.
        bottleneck: inner channels of a residual block are 1 / bottleneck of the outer ones.
        num_depths: depths a node of the code depth's graph may have, as one-hot channels; more than there are does no harm (theirs are 7). None = as
            many as there are.
        head_channels: inner channels of what predicts splits and functions.
        encoder_nodes: "all", as theirs, or "occupied": the encoder computes nothing on empty nodes, in about half of the time, and all empty nodes have one
            code, so that a generator has less to learn.
        unit: in which distances leave the network: "box", half the side of the box, as theirs, or "node", the side of a finest node. A step of the optimiser
            moves an output by about its learning rate, which the first makes a large part of a distance that matters, and the second a small one.
        temperature, certain, diverse: of the quantiser's entropy penalty.

    Raises: UsageError for sizes that do not fit each other.
    """

    # What the line of images reads; a shape has neither pixels nor a grid.
    channels = 0
    stride = 1
    num_levels = 0
    codebook_size = 0

    @register_to_config
    def __init__(
        self,
        *,
        depth: int = 8,
        full_depth: int = 3,
        bits: int = 32,
        encoder_channels: list[int] = [32, 32, 64],  # noqa: B006
        encoder_blocks: list[int] = [2, 2, 2],  # noqa: B006
        inner_channels: list[int] = [64, 128, 256, 512],  # noqa: B006
        inner_blocks: list[int] = [2, 4, 8, 2],  # noqa: B006
        decoder_channels: list[int] = [512, 256, 128, 64, 32, 32],  # noqa: B006
        decoder_blocks: list[int] = [2, 4, 8, 2, 2, 2],  # noqa: B006
        features: str = "ND",
        bottleneck: int = 1,
        num_depths: int | None = None,
        head_channels: int = 64,
        encoder_nodes: Literal["all", "occupied"] = "all",
        unit: Literal["box", "node"] = "box",
        temperature: float = 1.0,
        certain: float = 1.0,
        diverse: float = 1.0,
    ):
        super().__init__()
        for name, channels, blocks in (
            ("encoder", encoder_channels, encoder_blocks),
            ("inner", inner_channels, inner_blocks),
            ("decoder", decoder_channels, decoder_blocks),
        ):
            if len(channels) != len(blocks) or not channels:
                raise UsageError(
                    f"tokenizer.{name}_channels={channels} and {name}_blocks={blocks} must be lists of one length"
                )
        self.depth, self.full_depth, self.bits = depth, full_depth, bits
        self.code_depth = depth - len(encoder_channels) + 1
        self.top = self.code_depth - len(inner_channels) + 1
        if not full_depth <= self.top <= self.code_depth or len(decoder_channels) != depth - self.top + 1:
            raise UsageError(
                f"tokenizer.depth={depth}, full_depth={full_depth}: codes are at depth {self.code_depth}, the decoder turns at {self.top} (not above "
                f"full_depth) and needs {depth - self.top + 1} decoder_channels, found {len(decoder_channels)}"
            )
        if inner_channels[-1] != decoder_channels[0] or any(
            inner_channels[-1 - i] != decoder_channels[i] for i in range(len(inner_channels))
        ):
            raise UsageError(
                f"tokenizer.decoder_channels={decoder_channels} must begin with inner_channels={inner_channels} turned around: skips are added"
            )
        unknown = [letter for letter in features if letter not in FEATURES]
        if unknown or not features:
            raise UsageError(f"tokenizer.features={features!r}: known letters are {', '.join(FEATURES)}")
        self.features = features
        width = encoder_channels
        self.is_dense = encoder_nodes == "all"
        self.first = _ConvNorm(sum(FEATURES[letter] for letter in features), width[0], is_dense=self.is_dense)
        self.encoder = nn.ModuleList(
            nn.ModuleList(_Block(c, bottleneck, self.is_dense) for _ in range(n))
            for c, n in zip(width, encoder_blocks, strict=True)
        )
        self.encoder_down = nn.ModuleList(_ConvNorm(a, b, stride=2, is_dense=self.is_dense) for a, b in pairwise(width))
        self.to_code = nn.Linear(width[-1], bits)
        self.quantizer = BinarySphere(bits, certain=certain, diverse=diverse, temperature=temperature)
        self.from_code = nn.Linear(bits, inner_channels[0])
        kinds = num_depths if num_depths is not None else self.code_depth - full_depth + 1
        self.inner = nn.ModuleList(
            Blocks(c, n, kinds - i, bottleneck)
            for i, (c, n) in enumerate(zip(inner_channels, inner_blocks, strict=True))
        )
        self.inner_down = nn.ModuleList(Down(a, b) for a, b in pairwise(inner_channels))
        kinds = kinds - len(inner_channels) + 1
        self.decoder = nn.ModuleList(
            Blocks(c, n, kinds + i, bottleneck)
            for i, (c, n) in enumerate(zip(decoder_channels, decoder_blocks, strict=True))
        )
        self.decoder_up = nn.ModuleList(Up(a, b) for a, b in pairwise(decoder_channels))
        heads = decoder_channels[self.code_depth - self.top :]
        self.split_heads = nn.ModuleList(Head(c, head_channels, 2) for c in heads)
        self.value_heads = nn.ModuleList(Head(c, head_channels, 4) for c in heads)
        side = 2.0 ** (1 - depth) if unit == "node" else 1.0
        self.register_buffer("scale", torch.tensor([1.0, 1.0, 1.0, side]), persistent=False)
        for head in self.value_heads:
            # Distances that matter are hundredths: from torch's own beginning, a first tenth of training only makes them small.
            nn.init.normal_(head.last.weight, std=1e-3)  # type: ignore[union-attr,arg-type]
            nn.init.zeros_(head.last.bias)  # type: ignore[union-attr,arg-type]

    def forward(self, points: Tensor, normals: Tensor, queries: Tensor) -> Decoded:
        """Reconstruction of a batch for training: the octree is the true one, and the function is evaluated at queries [B, Q, 3] for every deepest depth."""
        octree = self.octree(points, normals)
        z, _, entropy = self.quantizer(self.code_of(octree))
        decoded = self.decode(z, octree)
        decoded.entropy = entropy
        B, Q, _ = queries.shape
        owner = torch.arange(B, device=queries.device).repeat_interleave(Q)
        near = around(octree, queries.flatten(0, 1), owner, range(self.code_depth, self.depth + 1))
        decoded.at = {d: blend_with_gradient(decoded.values[d], near[d]) for d in near}
        return decoded

    def octree(self, points: Tensor, normals: Tensor) -> Octree:
        """[B, P, 3] in [-1, 1) and normals -> octrees."""
        B, P, _ = points.shape
        samples = torch.arange(B, device=points.device).repeat_interleave(P)
        return build.from_points(
            points.flatten(0, 1),
            normals=normals.flatten(0, 1),
            samples=samples,
            batch_size=B,
            depth=self.depth,
            full_depth=self.full_depth,
        )

    def code_of(self, octree: Octree) -> Tensor:
        """Vectors on the nodes of code_depth, [M, bits]."""
        x = self.first(input_features(octree, self.features, self.is_dense), octree, octree.depth)
        for i, blocks in enumerate(self.encoder):
            d = octree.depth - i
            for block in blocks:  # type: ignore[attr-defined]
                x = block(x, octree, d)
            if i < len(self.encoder_down):
                x = self.encoder_down[i](x, octree, d)
        return self.to_code(x if self.is_dense else pad(x, octree, self.code_depth))

    def encode(self, points: Tensor, normals: Tensor) -> OctreeTokens:
        """Points and normals [B, P, 3] -> tokens."""
        octree = self.octree(points, normals)
        bits = self.quantizer(self.code_of(octree))[1]
        return OctreeTokens(build.until(octree, self.code_depth), splits_of(octree, self.code_depth), bits)

    def decode(self, codes: Tensor, octree: Octree, is_growing: bool = False) -> Decoded:
        """Codes [M, bits] of length 1 on the nodes of code_depth -> functions and split logits for code_depth .. depth.

        Args:
            octree: down to depth; or with is_growing down to code_depth, and it grows by what is predicted.
        """
        graphs = {d: dual_graph(octree, d) for d in range(self.top, self.code_depth + 1)}
        graph = graphs[self.code_depth]
        y = self.from_code(codes)
        x = torch.cat([y.new_zeros(graph.num_leaves, y.shape[1]), y])
        skips: dict[int, Tensor] = {}
        for i, stage in enumerate(self.inner):
            d = self.code_depth - i
            x = skips[d] = stage(x, graphs[d])
            if i < len(self.inner_down):
                x = self.inner_down[i](x, octree, graphs[d], graphs[d - 1])
        splits: dict[int, Tensor] = {}
        values: dict[int, Tensor] = {}
        x = skips[self.top]
        for i, stage in enumerate(self.decoder):
            d = self.top + i
            if i:
                graphs.setdefault(d, dual_graph(octree, d))
                x = self.decoder_up[i - 1](x, octree, graphs[d - 1], graphs[d])
                x = x + skips[d] if d in skips else x
            x = stage(x, graphs[d])
            if d < self.code_depth:
                continue
            head = d - self.code_depth
            splits[d] = self.split_heads[head](x, graphs[d])[graphs[d].num_leaves :]
            values[d] = to_nodes(self.value_heads[head](x, graphs[d]) * self.scale, graphs[d])
            if is_growing:
                marks = build.at_least_one(octree, splits[d].argmax(1).bool())
                octree = build.split(octree, marks) if d < self.depth else build.mark(octree, marks)
        return Decoded(octree, splits, values)

    @torch.no_grad()
    def field(self, tokens: OctreeTokens) -> Decoded:
        """The functions of finished tokens; the octree below the codes grows by what the decoder predicts."""
        octree = tokens.octree
        if octree.depth != self.code_depth or tokens.codes.shape[1] != self.bits:
            raise UsageError(
                f"tokens of depth {octree.depth} with {tokens.codes.shape[1]} bits; this tokenizer has depth {self.code_depth} and {self.bits} bits"
            )
        return self.decode(self.quantizer.codes(tokens.codes).to(self.from_code.weight.dtype), octree, is_growing=True)

    @torch.no_grad()
    def meshes(self, tokens: OctreeTokens, resolution: int | None = None, level: float = LEVEL) -> list[Mesh]:
        """A mesh per shape, without faces where the function has no surface.

        Args:
            resolution: cells along a side of the box [-0.9, 0.9]^3; None = 2^(depth + 1), at most 256.

        Raises: GenkitError for functions that are not finite.
        """
        decoded = self.field(tokens)
        cells = resolution or min(256, 2 ** (self.depth + 1))
        found = []
        for i in range(tokens.batch_size):
            grid = decoded.grid(i, cells, self.depth)
            if not bool(grid.isfinite().all()):
                raise GenkitError(
                    f"the tokenizer decodes to a function that is not finite at {int((~grid.isfinite()).sum()):,} of {grid.numel():,} places; "
                    "its weights are damaged, take an older checkpoint"
                )
            found.append(marching_cubes(grid, level=level, bounds=(-BOX, BOX)))
        return found


@dataclass
class Decoded:
    """What the decoder made.

    Attributes:
        octree: the one the functions lie on.
        splits: depth -> logits [M_d, 2] of being split (at the finest depth, of being occupied).
        values: depth -> linear functions [T, 4] on all nodes of the depths full_depth .. depth.
        at: depth -> (F [B Q], its gradient [B Q, 3]) at the queries of training.
        entropy: penalty of the quantiser, [].
    """

    octree: Octree
    splits: dict[int, Tensor]
    values: dict[int, Tensor]
    at: dict[int, tuple[Tensor, Tensor]] | None = None
    entropy: Tensor | None = None

    def __call__(self, points: Tensor, sample: int, depth: int) -> Tensor:
        """F [P] at points [P, 3] of one shape."""
        owner = torch.full((len(points),), sample, dtype=torch.int64, device=points.device)
        return blend(self.values[depth], around(self.octree, points, owner, range(depth, depth + 1))[depth])

    def grid(self, sample: int, cells: int, depth: int) -> Tensor:
        """[cells + 1]^3 values over [-0.9, 0.9]^3, evaluated finely only near the surface; the outermost layer is outside.

        A coarse grid is evaluated first. Blocks of 4^3 cells whose corners are all farther from the surface than their diagonal get values in between.
        """
        step = 4 if cells % 4 == 0 and cells >= 32 else 1
        coarse = self._evaluate(sample, depth, cells // step, None)
        if step > 1:
            fine = nn.functional.interpolate(
                coarse[None, None], size=(cells + 1,) * 3, mode="trilinear", align_corners=True
            )[0, 0]
            diagonal = 2 * BOX / (cells // step) * 3**0.5
            # Of each corner whether any block around it is near; the function may be flat, so a sign change always counts.
            near = coarse.abs() < 1.5 * diagonal
            low = -nn.functional.max_pool3d(-coarse[None, None], 3, 1, 1)[0, 0]
            high = nn.functional.max_pool3d(coarse[None, None], 3, 1, 1)[0, 0]
            near |= (low <= LEVEL) & (high >= LEVEL)
            spread = nn.functional.interpolate(
                near[None, None].float(), size=(cells + 1,) * 3, mode="trilinear", align_corners=True
            )[0, 0]
            places = (spread > 0).nonzero()
            fine[tuple(places.unbind(1))] = self._evaluate(sample, depth, cells, places)
            coarse = fine
        for axis in range(3):
            coarse.select(axis, 0).clamp_(min=2 * LEVEL + 1e-4)
            coarse.select(axis, cells).clamp_(min=2 * LEVEL + 1e-4)
        return coarse

    def _evaluate(self, sample: int, depth: int, cells: int, places: Tensor | None) -> Tensor:
        device = self.values[depth].device
        if places is None:
            axis = torch.arange(cells + 1, device=device)
            rows = torch.cartesian_prod(axis, axis, axis)
            return self._evaluate(sample, depth, cells, rows).view((cells + 1,) * 3)
        points = places * (2 * BOX / cells) - BOX
        return torch.cat([self(part, sample, depth) for part in points.split(_AT_ONCE)])


class _ConvNorm(nn.Module):
    """Convolution, group norm per shape, ReLU where `is_active`; with stride 2 one depth up. Over all nodes where it is dense, else the occupied ones."""

    def __init__(
        self, in_channels: int, out_channels: int, *, stride: int = 1, is_active: bool = True, is_dense: bool = True
    ):
        super().__init__()
        kernel = "333" if stride == 1 else "222"
        self.conv = OctreeConv(in_channels, out_channels, kernel=kernel, stride=stride, is_dense=is_dense)
        self.norm = OctreeGroupNorm(out_channels)
        self.stride, self.is_active, self.is_dense = stride, is_active, is_dense

    def forward(self, x: Tensor, octree: Octree, depth: int) -> Tensor:
        y = self.conv(x, octree, depth)
        depth -= self.stride - 1
        samples = octree.samples(depth)
        samples = samples if self.is_dense else samples.index_select(0, octree.occupied(depth))
        y = self.norm(y, samples, octree.batch_size)
        return y.relu() if self.is_active else y


class _Block(nn.Module):
    def __init__(self, channels: int, bottleneck: int, is_dense: bool):
        super().__init__()
        self.conv1 = _ConvNorm(channels, channels // bottleneck, is_dense=is_dense)
        self.conv2 = _ConvNorm(channels // bottleneck, channels, is_active=False, is_dense=is_dense)

    def forward(self, x: Tensor, octree: Octree, depth: int) -> Tensor:
        return (x + self.conv2(self.conv1(x, octree, depth), octree, depth)).relu()
