"""OctGPT: octrees depth by depth, each depth by unmasking (Wei et al., "OctGPT: Octree-based Multiscale Autoregressive Models", SIGGRAPH 2025).

An encoder sees the known tokens, a decoder all of them. `octree-nn/octgpt models/octgpt.py` with all its options; positions are counted for any
`max_depth` (there 6), and windows may begin anew with every sample, so that a shape does not depend on its batch.
"""

from __future__ import annotations

from typing import Literal

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from genkit.errors import UsageError
from genkit.interfaces import Cond
from genkit.nn.norm import RMSNorm
from genkit.nn.octree_places import Light, Places, in_front, places_of
from genkit.nn.octree_windows import Kept, OctreeStack
from genkit.nn.pictures import PictureEncoder
from genkit.nn.text import TextEncoder
from genkit.octree.octree import Octree
from genkit.octree.tokens import OctreeTokens


class OctGPT(ModelMixin, ConfigMixin):
    """Tokens with holes -> logits of every token.

    Args:
        bits: of a code; follows from the tokenizer.
        full_depth: of the first split bits.
        code_depth: of the codes.
        max_depth: positions are counted in halves of this depth's nodes, at least those of code_depth - 1; None = code_depth.
        num_scales: rows of the scale embedding; None = one per depth from full_depth to code_depth.
        num_classes: classes that cond["label"] counts; 0 = unconditional.
        dim: D; a head's width must be divisible by 6.
        depth: blocks, half of them in the encoder.
        window: tokens that attend to each other.
        dilation: of every second block.
        buffer: tokens in front of a shape that hold its condition.
        norm: "layer" or "rms".
        positions: "waves" or "table".
        dropout: on the branches.
        has_shift: blocks 2 and 3 of every four move their windows by half.
        has_null: a row of the class table for "no class", which guidance needs; the released models have none.
        is_aligned: windows begin anew with every sample.
        context_dim: width of cond["context"] [B, L, context_dim], tokens of a text or an image; None = there are none.
        text_length: letters of the texts in cond["text"], read by an encoder that is trained here, whose states are the context; None = none.
        picture_size, picture_cells: pixels along a side of the pictures in cond["picture"], and tokens along a side (4 where nothing is said) that an encoder
            trained here makes of them; None = none. The section `condition` of a recipe sets one of the three.
        embed_std: of what is made of split bits, codes, classes and the condition's tokens at first. Theirs, 0.02, is small beside the positions that every block adds, and takes long
            to be noticed; short training needs about 0.5.
        has_told_mask: the vector that stands for an unknown token holds the mean of the condition's tokens as well, as it holds the class where there are
            classes; the released models do without, and learn what they are told later.
        context: how they come in: "concat" in the buffer, "cross" by attention in every second block as well.
    """

    _supports_gradient_checkpointing = True
    answers = "octrees"

    @register_to_config
    def __init__(
        self,
        *,
        bits: int,
        full_depth: int,
        code_depth: int,
        max_depth: int | None = None,
        num_scales: int | None = None,
        num_classes: int = 0,
        dim: int = 768,
        depth: int = 24,
        num_heads: int = 8,
        window: int = 1024,
        dilation: int = 4,
        buffer: int = 64,
        norm: Literal["layer", "rms"] = "layer",
        positions: Literal["waves", "table"] = "waves",
        dropout: float = 0.1,
        has_shift: bool = True,
        has_null: bool = True,
        is_aligned: bool = True,
        context_dim: int | None = None,
        context: Literal["concat", "cross"] = "concat",
        embed_std: float = 0.02,
        has_told_mask: bool = False,
        text_length: int | None = None,
        picture_size: int | None = None,
        picture_cells: int | None = None,
    ):
        super().__init__()
        if sum(given is not None for given in (context_dim, text_length, picture_size)) > 1:
            raise UsageError(
                "backbone.context_dim, backbone.text_length and backbone.picture_size: the context is one or the other"
            )
        if dim % num_heads or dim // num_heads % 6:
            raise UsageError(
                f"backbone.dim={dim} over num_heads={num_heads}: a head's width must be whole and divisible by 6"
            )
        if depth < 2 or depth % 2:
            raise UsageError(f"backbone.depth={depth} must be even: half of the blocks are the encoder's")
        tokens = text_length or (0 if picture_size is None else (picture_cells or 4) ** 2)
        if tokens > buffer:
            what = "letters" if text_length else "parts of a picture"
            raise UsageError(
                f"backbone.buffer={buffer} holds the condition, of {tokens} {what}; set backbone.buffer={tokens}"
            )
        max_depth = code_depth if max_depth is None else max_depth
        if not full_depth <= code_depth <= max_depth + 1:
            raise UsageError(
                f"full_depth {full_depth} and code_depth {code_depth} must rise, to 1 more than max_depth {max_depth} at most"
            )
        if num_scales is not None and num_scales <= code_depth - full_depth:
            raise UsageError(f"num_scales={num_scales} are too few for the depths {full_depth}..{code_depth}")
        self.bits, self.full_depth, self.code_depth, self.max_depth = bits, full_depth, code_depth, max_depth
        self.num_classes, self.buffer, self.is_aligned = num_classes, buffer, is_aligned
        self.split = nn.Embedding(2, dim)
        self.label = nn.Embedding(max(1, num_classes + has_null * bool(num_classes)), dim)
        self.has_null = has_null or not num_classes
        self.code = nn.Linear(bits, dim)
        self.attends_to_context, self.has_told_mask = context == "cross", has_told_mask
        self.mask = self.context_norm = self.context_proj = self.text = self.picture = None
        if text_length is not None:
            self.text = TextEncoder(dim=dim, num_heads=num_heads, length=text_length)
            context_dim = dim
        if picture_size is not None:
            self.picture = PictureEncoder(dim=dim, num_heads=num_heads, size=picture_size, cells=picture_cells or 4)
            context_dim = dim
        if context_dim is not None:
            self.mask = nn.Parameter(torch.empty(1, dim))
            self.context_norm = nn.LayerNorm(context_dim) if norm == "layer" else RMSNorm(context_dim)
            self.context_proj = nn.Linear(context_dim, dim)

        def stack() -> OctreeStack:
            return OctreeStack(
                depth=depth // 2,
                dim=dim,
                num_heads=num_heads,
                window=window,
                dilation=dilation,
                has_shift=has_shift,
                norm=norm,
                positions=positions,
                num_places=2 ** (max_depth + 1),
                num_depths=num_scales or code_depth - full_depth + 1,
                dropout=dropout,
                context_dim=context_dim if context == "cross" else None,
            )

        self.encoder, self.decoder = stack(), stack()
        self.split_head = nn.Linear(dim, 2)
        self.code_head = nn.Linear(dim, 2 * bits)
        self.initialise(embed_std)

    def initialise(self, embed_std: float) -> None:
        """Linear layers and tables from N(0, 0.02), as in the official code, but for what reads tokens and classes; the attention to a condition keeps
        torch's, and so do the encoders of texts and pictures, which the official code has none of: from 0.02 they take long to say anything."""
        kept = {module for encoder in (self.text, self.picture) if encoder is not None for module in encoder.modules()}
        for module in self.modules():
            if module in kept:
                continue
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for weight in (self.split.weight, self.label.weight, self.code.weight):
            nn.init.normal_(weight, std=embed_std)
        if self.mask is not None and self.context_proj is not None:
            nn.init.normal_(self.mask, std=embed_std)
            nn.init.normal_(self.context_proj.weight, std=max(0.02, embed_std * self.context_proj.in_features**-0.5))

    def forward(self, tokens: OctreeTokens, known: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """Logits of the split bits [S, 2] and of the bits of the codes [M, bits, 2].

        Args:
            tokens: values where known; elsewhere they are ignored.
            known: [S + M] bool.
        """
        octree = tokens.octree
        x = torch.cat([self.embed_splits(tokens.splits), self.embed_codes(tokens.codes)])
        places = self.places(octree, range(octree.full_depth, octree.depth + 1))
        y = self.decode_all(x, places, known, cond)
        return self.split_logits(y[: len(tokens.splits)]), self.code_logits(y[len(tokens.splits) :])

    def decode_all(self, x: Tensor, places: Places, known: Tensor, cond: Cond) -> Tensor:
        """Embedded tokens [T, D], those that are not known replaced by the mask -> features [T, D], in one go."""
        front, context, mask = self.condition(cond, places.batch_size)
        ahead = in_front(self.buffer, places)
        x = torch.cat([front, torch.where(known[:, None], x, mask[places.samples])])
        everywhere = ahead.followed_by(places)
        visible = torch.cat([known.new_ones(len(front)), known]).nonzero().squeeze(1)
        seen = self.encoder(x.index_select(0, visible), everywhere.select(visible), context)
        x = x.index_copy(0, visible, seen.to(x.dtype))
        return self.decoder(x, everywhere, context)[len(front) :]

    def places(self, octree: Octree, depths: range) -> Places:
        return places_of(
            octree, depths, max_depth=self.max_depth, first_depth=self.full_depth, is_aligned=self.is_aligned
        )

    def embed_splits(self, splits: Tensor) -> Tensor:
        """[S] -> [S, D]; what is below 0 counts as 0 and is to be masked."""
        return self.split(splits.clamp_min(0))

    def embed_codes(self, codes: Tensor) -> Tensor:
        """[M, bits] of 0 and 1 -> [M, D]; the code is a vector of length 1."""
        return self.code((codes.to(self.code.weight.dtype) * 2 - 1) * self.bits**-0.5)

    def split_logits(self, y: Tensor) -> Tensor:
        return self.split_head(y)

    def code_logits(self, y: Tensor) -> Tensor:
        return self.code_head(y).unflatten(1, (self.bits, 2))

    def labels(self, cond: Cond, batch_size: int) -> Tensor:
        """Rows of the class table; -1 is the last one where there is a row for it."""
        label = cond.get("label")
        device = self.label.weight.device
        if label is None or not self.num_classes:
            label = torch.full((batch_size,), -1 if self.num_classes else 0, device=device)
        if not self.has_null and (label < 0).any():
            raise UsageError(
                "this model was trained without a class for 'any'; give each sample a class, and guidance 1"
            )
        return torch.where(label < 0, len(self.label.weight) - 1, label)

    def condition(self, cond: Cond, batch_size: int) -> tuple[Tensor, Tensor | None, Tensor]:
        """(tokens in front of all shapes [B buffer, D], what blocks attend to [B, L, C] or None, what stands for an unknown token [B, D])."""
        if self.context_proj is None or self.mask is None:
            label = self.label(self.labels(cond, batch_size))
            return label.repeat_interleave(self.buffer, 0), None, label
        word = "text" if self.text is not None else "picture" if self.picture is not None else "context"
        if word not in cond:
            raise UsageError(
                f"this model is conditioned on the tokens of a text or an image: cond['{word}'] is missing"
            )
        context = cond[word]
        if self.text is not None:
            states, is_letter = self.text(context)
            context = torch.where(is_letter[:, :, None], states, 0)
        if self.picture is not None:
            states, is_there = self.picture(context)
            context = torch.where(is_there[:, None, None], states, 0)
        assert self.context_norm is not None
        front = self.context_proj(self.context_norm(context))  # [B, L, D]
        if front.shape[1] > self.buffer:
            raise UsageError(f"{front.shape[1]} tokens of the condition do not fit a buffer of {self.buffer}")
        mask = self.mask.expand(batch_size, -1)
        if self.has_told_mask:
            is_said = (context != 0).any(-1, keepdim=True)  # [B, L, 1]
            mask = mask + (front * is_said).sum(1) / is_said.sum(1).clamp_min(1)
        front = nn.functional.pad(front, (0, 0, 0, self.buffer - front.shape[1]))
        return front.flatten(0, 1), context if self.attends_to_context else None, mask


class Growing:
    """A batch of shapes while they are made: what has been finished is kept in the form of keys and values, and never computed again.

    The finished tokens of a shape precede the current depth and see nothing of it; with aligned windows they therefore keep their values exactly. The tokens
    that hold the condition count as of the first depth, see it, and are finished with it.

    Args:
        model: with is_aligned.
        cond: of B shapes.
        octree: down to the first depth.
    """

    def __init__(self, model: OctGPT, cond: Cond, octree: Octree):
        if not model.is_aligned:
            raise UsageError(
                "windows that run on through a batch change with every token: set backbone.is_aligned=true"
            )
        self.model = model
        self.encoded: Kept = {}
        self.decoded: Kept = {}
        self.done: Places | None = None
        self.front, self.context, self.mask = model.condition(cond, octree.batch_size)
        self.at(octree)

    def at(self, octree: Octree) -> None:
        """Turn to the finest depth of an octree."""
        nodes = self.model.places(octree, range(octree.depth, octree.depth + 1))
        self.nodes = nodes
        self.current = in_front(self.model.buffer, nodes).followed_by(nodes) if self.done is None else nodes
        self.current.before = self.done
        self.is_code = octree.depth == self.model.code_depth

    def logits(self, values: Tensor, known: Tensor) -> Tensor:
        """Of the current depth: values [n] or [n, bits], known [n] -> [n, 2] or [n, bits, 2]. Light passes may follow."""
        model = self.model
        x = self._behind_front(torch.where(known[:, None], self._embed(values), self.mask[self.nodes.samples]))
        visible = torch.cat([known.new_ones(len(x) - len(known)), known]).nonzero().squeeze(1)
        encoded, decoded = dict(self.encoded), dict(self.decoded)
        if len(visible):
            chosen = self.current.select(visible)
            seen = model.encoder(x.index_select(0, visible), chosen, self.context, encoded)
            x = x.index_copy(0, visible, seen)
        y = model.decoder(x, self.current, self.context, decoded)
        self.full = visible, encoded, decoded
        return self._read(y[len(x) - len(known) :])

    def light(self, values: Tensor, known: Tensor, chosen: Tensor, keeps_condition: bool = False) -> Tensor:
        """Of a few of the tokens, the others as the last full pass saw them.

        Args:
            values, known: of all, as for `logits`.
            chosen: [m], numbers of those that are computed anew: all that became known since the full pass, and all that are asked for.
            keeps_condition: the tokens in front stay as they were, too; else they are computed anew while they are of the current depth.

        Returns: logits [m, 2] or [m, bits, 2].
        """
        model, (visible, encoded, decoded) = self.model, self.full
        ahead = len(self.current) - len(known)
        x = torch.where(known[chosen, None], self._embed(values[chosen]), self.mask[self.nodes.samples[chosen]])
        own = chosen + ahead
        if ahead and not keeps_condition:
            x = torch.cat([self.front, x])
            own = torch.cat([torch.arange(ahead, device=own.device), own])
        is_visible = torch.cat([known.new_ones(ahead), known])
        seen_now, rank = is_visible.nonzero().squeeze(1), is_visible.cumsum(0) - 1
        asking = is_visible[own].nonzero().squeeze(1)
        if len(asking):
            light = Light(self.current.select(seen_now), rank[own[asking]], rank[visible])
            seen = model.encoder(x[asking], self.current.select(own[asking]), self.context, encoded, light)
            x = x.index_copy(0, asking, seen)
        light = Light(self.current, own, None)
        y = model.decoder(x, self.current.select(own), self.context, decoded, light)
        return self._read(y[len(own) - len(chosen) :])

    def _read(self, y: Tensor) -> Tensor:
        return self.model.code_logits(y) if self.is_code else self.model.split_logits(y)

    def finish(self, values: Tensor) -> None:
        """The values of the current depth are final: keep what later depths need of them."""
        x = self._behind_front(self._embed(values))
        seen = self.model.encoder(x, self.current, self.context, self.encoded)
        self.model.decoder(seen, self.current, self.context, self.decoded)
        for kept in (self.encoded, self.decoded):
            for layer in [-1 - name for name in kept if name < 0]:
                k, v = kept.pop(-1 - layer)
                if layer in kept:
                    k, v = torch.cat([kept[layer][0], k]), torch.cat([kept[layer][1], v])
                kept[layer] = (k, v)
        self.done = self.current if self.done is None else self.done.followed_by(self.current)

    def _embed(self, values: Tensor) -> Tensor:
        return self.model.embed_codes(values) if self.is_code else self.model.embed_splits(values)

    def _behind_front(self, x: Tensor) -> Tensor:
        return torch.cat([self.front, x]) if self.done is None else x
