"""Causal transformer over ids in raster order (Sun et al., "Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation", LlamaGen, 2024).

The network of Llama (Touvron et al., 2023): RMS norms before, gated perceptrons, no biases, rotary positions, here over the axes of the grid. A
class stands as a token before the first id, a text as several. Differences from the paper: any causal mixer may take the place of attention; heads pair
the first and second half of their channels in rotations (genkit.nn.rope), which an importer of weights makes up for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn.functional import pad

from genkit.errors import UsageError
from genkit.interfaces import Cache, Cond, Layout
from genkit.kernels.decode_block.op import compiled
from genkit.mixers.attention import Attention, KeysValues
from genkit.nn.causal_block import causal, init_normal
from genkit.nn.context_prefix import ContextPrefix
from genkit.nn.drop_path import DropPath
from genkit.nn.dropout import Dropout
from genkit.nn.embed import IdEmbedding, LabelEmbedding
from genkit.nn.gated_mlp import GatedMLP
from genkit.nn.norm import RMSNorm
from genkit.nn.rope import rope_table
from genkit.nn.sequence import behind_prefix, part
from genkit.nn.told import Told
from genkit.registry import MixerSpec, maker

ATTENTION: MixerSpec = {
    "type": "attention",
    "num_heads": 4,
    "qk_norm": False,
    "rope_base": 10000.0,
    "bias": False,
    "is_causal": True,
}


def hidden_of(dim: int, multiple_of: int) -> int:
    """Channels inside a gated perceptron as wide as an MLP with ratio 4: 8/3 dim, rounded down, then up to a multiple."""
    return -(-int(8 * dim / 3) // multiple_of) * multiple_of


class Block(nn.Module):
    """Mixer and gated perceptron in residual branches, an RMS norm before each; with a context, attention to it between them."""

    def __init__(
        self,
        *,
        dim: int,
        mixer: nn.Module,
        hidden: int,
        norm_eps: float,
        dropout: float,
        drop_path: float,
        cross: nn.Module | None = None,
    ):
        super().__init__()
        self.mix_norm, self.mixer = RMSNorm(dim, norm_eps), mixer
        self.mlp_norm, self.mlp = RMSNorm(dim, norm_eps), GatedMLP(dim=dim, hidden=hidden, bias=False)
        self.dropout, self.drop_path = Dropout(dropout), DropPath(drop_path)
        self.eps = norm_eps
        self.cross = cross
        self.cross_norm = None if cross is None else RMSNorm(dim, norm_eps)

    def forward(
        self, h: Tensor, layout: Layout, cache: Cache | None = None, context: tuple[Tensor, Tensor | None] | None = None
    ) -> Tensor:
        h = h + self.drop_path(self.dropout(self.mixer(self.mix_norm(h), layout, cache)))
        if self.cross is not None and self.cross_norm is not None and context is not None:
            h = h + self.drop_path(self.dropout(self.cross(self.cross_norm(h), *context)))
        return h + self.drop_path(self.dropout(self.mlp(self.mlp_norm(h))))

    @property
    def is_plain(self) -> bool:
        """Whether the mixer is attention as Llama has it, for which there is a kernel."""
        mixer = self.mixer
        return (
            type(mixer) is Attention
            and mixer.rope
            and mixer.qkv.bias is None
            and isinstance(mixer.q_norm, nn.Identity)
            and self.cross is None
        )

    def step(self, cache: Cache, kernel: Any) -> Step:
        """For one new token of each sample behind others in a cache: as `forward`, by the kernel decode_block."""
        mixer: Any = self.mixer
        held = cache[mixer.layer]
        keys, values = held.reserve(1, held.keys)
        weights = (self.mix_norm, mixer.qkv, mixer.proj, self.mlp_norm, self.mlp.up, self.mlp.down)
        first = None if held.valid is None else (~held.valid).sum(1)  # padding stands in front
        run = kernel(*[part.weight for part in weights], keys, values, self.eps, first)
        return Step(run, held, keys, held.valid, (mixer.head_dim, mixer.rope_base))


@dataclass(frozen=True)
class Step:
    """A block for one token at a time: (h [B, D], cos, sin, length) -> h, and the keys and values it goes on with."""

    run: Callable[[Tensor, Tensor, Tensor, int], Tensor]
    held: KeysValues
    keys: Tensor  # that `run` writes to
    valid: Tensor | None  # what `run` takes for padding
    turn: tuple[int, float]  # head_dim and base of its rotations

    @property
    def is_current(self) -> bool:
        """Whether keys and padding still lie where they did, with room for one more."""
        held = self.held
        return held.keys is self.keys and held.valid is self.valid and held.length < self.keys.shape[2]


class GPT(ModelMixin, ConfigMixin):
    """ids [B, 1, *grid] -> logits [B, 1, *grid, S] of each id given those before it and the condition. A fresh network returns 0.

    Args:
        codebook_size: S.
        num_levels: must be 1; see backbones/rq.py for several.
        num_classes: classes that cond["label"] counts; 0 = unconditional.
        grid: tokens per axis while training.
        dim, depth: of the paper's sizes, B 768 and 12, L 1024 and 24, XL 1280 and 36, with 12, 16 and 20 heads.
        mixer: a causal part, or a list of parts repeated through the depth.
        multiple_of: hidden channels of the perceptrons are 8/3 dim rounded up to a multiple of this.
        hidden: so many instead; null = as multiple_of says.
        class_rope: rotary place of the condition's token. "zero" has no place, as in the released code: it is attended to with logit 0. "identity":
            it is at 0, as the first id is.
        context_dim, text_length: what every block attends to besides, see genkit.nn.told; the section `condition` of a recipe sets them.
        context: "cross" as just said; "concat": vectors of width context_dim stand before the first id, in place of the class, as in the paper's
            text-conditional networks.
        context_length: of "concat", how many there are at most.
        null_class: whether the table of classes has a row for "none".
        norm_eps: of the RMS norms.
        token_dropout: on the embedded tokens.
        dropout: on both residual branches.
        drop_path: probability of leaving out a branch in the last layer, rising from 0 in the first.

    Raises: UsageError for a mixer that sees ahead, and for tokens of several levels.
    """

    _supports_gradient_checkpointing = True
    answers = "next ids"

    @register_to_config
    def __init__(
        self,
        *,
        codebook_size: int,
        num_levels: int,
        num_classes: int,
        grid: tuple[int, ...],
        dim: int = 192,
        depth: int = 6,
        mixer: MixerSpec = ATTENTION,
        multiple_of: int = 256,
        hidden: int | None = None,
        class_rope: Literal["zero", "identity"] = "zero",
        context_dim: int | None = None,
        text_length: int | None = None,
        context: Literal["cross", "concat"] = "cross",
        context_length: int | None = None,
        null_class: bool = True,
        norm_eps: float = 1e-5,
        token_dropout: float = 0.0,
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ):
        super().__init__()
        if depth < 1 or multiple_of < 1 or (hidden is not None and hidden < 1):
            raise UsageError(
                f"backbone.depth={depth}, backbone.multiple_of={multiple_of} and backbone.hidden={hidden} must be at least 1"
            )
        if num_levels != 1:
            raise UsageError(
                f"backbone.type=gpt draws one id per place, the tokenizer makes {num_levels}; use backbone.type=rq"
            )
        make_mixer = maker("mixer", mixer)
        self.gradient_checkpointing = False
        self.front = _context_prefix(context, dim, context_dim, text_length, context_length)
        self.told = Told(dim=dim, context_dim=context_dim if self.front is None else None, text_length=text_length)
        self.embed = IdEmbedding(num_levels=1, num_rows=codebook_size, dim=dim)
        if self.front is None:
            self.label = LabelEmbedding(num_classes=num_classes, dim=dim, null_class=null_class)
        self.drop_tokens = Dropout(token_dropout)
        self.blocks = nn.ModuleList(
            Block(
                dim=dim,
                mixer=causal(make_mixer(dim=dim, layer=i), i),
                hidden=hidden or hidden_of(dim, multiple_of),
                norm_eps=norm_eps,
                dropout=dropout,
                drop_path=drop_path * i / max(1, depth - 1),
                cross=self.told.attention(),
            )
            for i in range(depth)
        )
        self.norm = RMSNorm(dim, norm_eps)
        self.head = nn.Linear(dim, codebook_size, bias=False)
        self.apply(init_normal)
        nn.init.zeros_(self.head.weight)  # the first loss is exactly ln S

    def forward(self, x: Tensor, t: Tensor | None, cond: Cond, layout: Layout, cache: Cache | None = None) -> Tensor:
        """Logits of every id in one pass.

        Args:
            x: ids [B, 1, *grid] int64.
            t: not used.
            cond: "label" [B] int64, -1 = null class.
            layout: coords of the N = prod(grid) tokens.
            cache: not used; see next_logits.

        Returns: [B, 1, *grid, S].
        """
        ids = x.flatten(1)
        logits = self.next_logits(ids[:, :-1], cond, layout, last=ids.shape[1])
        return logits.unflatten(1, (1, *x.shape[2:]))

    def next_logits(self, ids: Tensor, cond: Cond, layout: Layout, cache: Cache | None = None, last: int = 1) -> Tensor:
        """Logits of the `last` ids up to and with the one after those given: ids [B, m] -> [B, last, S].

        With a cache only the ids behind those of earlier calls are computed.
        """
        context = self._context(cond, cache)
        before = 0 if cache is None else cache.get("seen", 0)  # tokens whose keys and values are known
        valid: Tensor | None = None
        sequence = behind_prefix(layout, self.prefix, self.config["class_rope"])
        h = self.embed.table(ids[:, max(0, before - self.prefix) :])  # [B, n, D]
        if before == 0:
            front, valid = self._in_front(cond, ids.shape[0])
            h = torch.cat([front, h], dim=1)
        h = self.drop_tokens(h)
        if cache is not None:
            cache.setdefault("num_tokens", sequence.coords.shape[1] - 1)  # what follows the last id is never asked for
            cache["seen"] = before + h.shape[1]
        tokens = part(sequence, before, before + h.shape[1])
        if valid is not None:
            tokens = replace(tokens, valid=pad(valid, (0, h.shape[1] - valid.shape[1]), value=True))
        steps = self._steps(h, tokens, cache) if before and h.shape[1] == 1 else None
        if steps is not None:
            h = h[:, 0]
            turns = {turn: rope_table(tokens.coords, *turn) for turn in {step.turn for step in steps}}
            for step in steps:
                h = step.run(h, *turns[step.turn], step.held.length)
                step.held.length += 1
            return self.head(self.norm(h)).unsqueeze(1)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                h = self._gradient_checkpointing_func(block, h, tokens, None, context)
            else:
                h = block(h, tokens, cache, context)
        return self.head(self.norm(h[:, -last:]))

    @property
    def prefix(self) -> int:
        """Tokens before the first id."""
        return 1 if self.front is None else self.front.length

    def _in_front(self, cond: Cond, batch_size: int) -> tuple[Tensor, Tensor | None]:
        """(tokens [B, prefix, D], which of them are no padding, None = all)."""
        if self.front is None:
            return self.label(cond, batch_size).unsqueeze(1), None
        return self.front(cond, batch_size)

    def _context(self, cond: Cond, cache: Cache | None) -> tuple[Tensor, Tensor | None] | None:
        """What the blocks attend to and which of it is real; made once for a cache."""
        if cache is not None and "context" in cache:
            return cache["context"]
        context = self.told(cond)
        if cache is not None and context is not None:
            cache["context"] = context
        return context

    def _steps(self, h: Tensor, tokens: Layout, cache: Cache | None) -> list[Step] | None:
        """What takes a single token through the blocks faster than their parts, or None. Made once for a cache."""
        is_inference = not (self.training or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))
        if cache is None or not is_inference or tokens.coords.shape[0] > 1 or torch.compiler.is_compiling():
            return None
        steps = cache.get("quick")
        if steps is None or not all(step.is_current for step in steps):
            blocks = [cast(Block, block) for block in self.blocks]
            kernel = compiled(h[:, 0]) if all(block.is_plain for block in blocks) else None
            steps = cache["quick"] = [] if kernel is None else [block.step(cache, kernel) for block in blocks]
        return steps or None

    def step_counts(self, grid: tuple[int, ...]) -> list[int]:
        """How many ids each step of sampling draws."""
        return [1] * torch.Size(grid).numel()


def _context_prefix(
    context: str, dim: int, context_dim: int | None, text_length: int | None, context_length: int | None
) -> ContextPrefix | None:
    """What makes tokens of a context, None where it is attended to. Raises UsageError for options that do not go together."""
    if context == "cross":
        if context_length is not None:
            raise UsageError(f"backbone.context_length={context_length} is of backbone.context=concat alone")
        return None
    if context_length is None or context_length < 1:
        raise UsageError("backbone.context=concat needs backbone.context_length, how many vectors stand in front")
    if context_dim is None:
        raise UsageError(
            "backbone.context=concat needs vectors: condition.type=captions with an encoder of transformers, or neighbours"
            + (" (letters are attended to: backbone.context=cross)" if text_length is not None else "")
        )
    return ContextPrefix(dim=dim, context_dim=context_dim, length=context_length)
