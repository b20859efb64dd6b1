"""Keys and values that a pass over all tokens leaves behind, for light passes over a few of them.

Liu et al., "Plug-and-Play Context Feature Reuse for Efficient Masked Generation" (ReCAP), NeurIPS 2025, section 3. A light pass computes only the
chosen tokens; they attend to their own fresh keys and values and to those that all other tokens had in the last full pass. If nothing that the chosen
tokens are given has changed since, it gives what the full pass gave.

Keys and values are kept in the order of the full pass, and a light pass writes its own in their places: nothing is gathered or joined, a token attends
to as many keys as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from genkit.errors import UsageError
from genkit.interfaces import ATTEND, Cache, Layout
from genkit.nn.attend import attend

TABLE = "table"  # in a cache that a backbone hands to its blocks: Context.table


class Context:
    """What lies in a cache under "context".

    A sampler sets `chosen`; a backbone says where its sequence lies among the kept rows, by `enter` or `place`; every attention layer calls `update`.

    Args:
        keeps_condition: tokens that stand for the condition (a class token, MAR's buffer) are not computed in light passes either: their keys and values
            are those of the full pass, too.

    Attributes:
        chosen: [B, n] int64, numbers of the tokens that a light pass is given; None = a full pass, which keeps everything.
        used: [B, n] bool: False = the token only fills up the row of a sample that has fewer to compute: nothing sees it. None = all are.
    """

    def __init__(self, *, keeps_condition: bool = False):
        self.keeps_condition = keeps_condition
        self.chosen: Tensor | None = None
        self.used: Tensor | None = None
        self._kept: dict[Any, tuple[Tensor, Tensor]] = {}
        self._tables: dict[Any, Any] = {}
        self._rows: Tensor | None = None
        self._valid: Tensor | None = None
        self._size = self._calls = 0
        self._twin: Context | None = None

    @property
    def is_light(self) -> bool:
        return self.chosen is not None

    @property
    def has_condition(self) -> bool:
        """Whether the pass at hand computes the tokens of the condition."""
        return not (self.is_light and self.keeps_condition)

    def twin(self) -> Context:
        """For another network that is asked about the same tokens."""
        if self._twin is None:
            self._twin = Context(keeps_condition=self.keeps_condition)
        self._twin.chosen, self._twin.used = self.chosen, self.used
        return self._twin

    def of(self, batch_size: int) -> Tensor:
        """`chosen` for a batch of this size: a guided batch is the sampler's, repeated. [batch_size, n]."""
        assert self.chosen is not None
        return self.chosen.repeat(batch_size // len(self.chosen), 1)

    def used_of(self, batch_size: int) -> Tensor | None:
        """`used` for a batch of this size."""
        return None if self.used is None else self.used.repeat(batch_size // len(self.used), 1)

    def layout(self, layout: Layout, batch_size: int) -> Layout:
        """Of the tokens that are passed: all of them, or those chosen, which lie on no full grid."""
        if self.chosen is None:
            return layout
        return Layout(coords=rows_of(layout.coords.expand(batch_size, -1, -1), self.of(batch_size)), grid=None)

    def table(self, name: Any, make: Callable[[], Any]) -> Any:
        """What make() gave in the last full pass; asked again at every full pass."""
        if self.chosen is None:
            self._tables[name] = make()
        return self._tables[name]

    def per_token(self, name: str, make: Callable[[], Tensor], batch_size: int) -> Tensor:
        """Rows [batch_size or 1, tokens, ...] that do not change between passes, of the tokens at hand."""
        table = self.table(name, make)
        if self.chosen is None:
            return table
        return rows_of(table.expand(batch_size, *table.shape[1:]), self.of(batch_size))

    def enter(self, num_before: int, num_tokens: int, batch_size: int) -> None:
        """Said before layers whose sequence is num_before tokens of the condition, then those of the grid, num_tokens in a full pass."""
        if self.chosen is None:
            self.place()
            return
        rows, valid, size = self.of(batch_size) + num_before, None, num_before + num_tokens
        if (used := self.used_of(batch_size)) is not None:
            rows = torch.where(used, rows, size)  # a row behind all others, which is no key
            valid = (torch.arange(size + 1, device=rows.device) < size).expand(batch_size, -1)
            size += 1
        if self.has_condition:
            before = torch.arange(num_before, device=rows.device).expand(batch_size, -1)
            rows = torch.cat([before, rows], dim=1)
        self.place(rows, valid, size)

    def place(self, rows: Tensor | None = None, valid: Tensor | None = None, size: int = 0) -> None:
        """Said before layers that share one sequence.

        Args:
            rows: [B, n] int64: where among the kept rows the tokens of a light pass lie; None in a full pass.
            valid: [B, kept rows] bool: False = no key. None = all are.
            size: kept rows, where there are more of them than tokens in the full pass.
        """
        self._rows, self._valid, self._size, self._calls = rows, valid, size, 0

    def update(self, key: Any, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(keys, values, valid [B, rows] or None) that the queries of this layer attend to, given fresh ones [B, H, n, K]."""
        if self._rows is None:
            self._kept[key] = k, v = k.contiguous(), v.contiguous()
            return k, v, self._valid
        keys, values = self._kept[key]
        if (lacking := self._size - keys.shape[2]) > 0:
            keys, values = (nn.functional.pad(y, (0, 0, 0, lacking)) for y in (keys, values))
            self._kept[key] = keys, values
        index = self._rows[:, None, :, None].expand_as(k)
        return keys.scatter_(2, index, k.to(keys.dtype)), values.scatter_(2, index, v.to(values.dtype)), self._valid

    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, ...] | None, valid: Tensor | None) -> Tensor:
        """What attention of the mixers asks in place of itself (genkit/nn/attend.py): layers count in the order of their calls."""
        k, v, valid = self.update(("call", self._calls), k, v)
        self._calls += 1
        if valid is None and not self.is_light:
            return attend(q, k, v, grid=grid, valid=None, cache=None)
        mask = None if valid is None else valid[:, None, None, :]
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def kept(self, key: Any) -> tuple[Tensor, Tensor]:
        """(keys, values) [B, H, rows, K] of a layer."""
        return self._kept[key]

    @property
    def num_bytes(self) -> int:
        """Of all keys and values: 2 layers rows D numbers per sample."""
        return sum(y.numel() * y.element_size() for pair in self._kept.values() for y in pair)


def context_of(cache: Cache | None) -> Context | None:
    """The context in a cache, if there is one."""
    return None if cache is None else cache.get("context")


def rows_of(values: Tensor, rows: Tensor) -> Tensor:
    """values [B, N, ...], rows [B, n] int64 -> [B, n, ...]."""
    index = rows.view(*rows.shape, *[1] * (values.ndim - 2)).expand(*rows.shape, *values.shape[2:])
    return values.gather(1, index)


def check_keeps_context(blocks: Iterable[Any]) -> None:
    """Raises UsageError for a mixer that computes all tokens or none: context can be reused where tokens meet by attention alone."""
    for block in blocks:
        if ATTEND not in getattr(block.mixer, "heeds", ()):
            raise UsageError(
                f"sampler.reuse.type=recap needs attention in every layer, found {type(block.mixer).__name__}; "
                "set sampler.reuse=null, or train with backbone.mixer.type=attention"
            )
