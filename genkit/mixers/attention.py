"""Full attention between all tokens, or from each to those before it; normed queries and keys, rotary positions on every axis of the grid."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from genkit.errors import UsageError
from genkit.interfaces import ATTEND, Cache, Layout
from genkit.mixers.grids import width_per_head
from genkit.nn.attend import attend
from genkit.nn.norm import RMSNorm
from genkit.nn.rope import rope_table, rotate


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al., 2017), x [B, N, D] -> [B, N, D].

    Queries and keys are RMS-normed per head, which keeps training stable at high learning rates (after Dehghani et al.,
    "ViT-22B", 2023, who use layer norm), and turned by their coordinates. Padding (layout.valid False) is never
    attended to; what comes out at padding has no meaning.

    Args:
        dim: D, divisible by num_heads unless head_dim is given.
        layer: number of the layer, the key under which a mixer keeps things in a cache.
        rope_base: the longest wavelength of the rotation nears 2 pi rope_base tokens; axes are short, hence 100 where
            text models use 10000.
        num_kv_heads: fewer heads of keys and values than of queries, each shared by as many queries (Ainslie et al., "GQA", 2023); None = as many.
        head_dim: K, of every head; None = D / num_heads.
        bias: of the two linear maps.
        is_causal: each token sees itself and the tokens before it. With a cache, keys and values of earlier calls are
            kept (see TokenMixer).

    Raises: UsageError for numbers of heads that do not divide.
    """

    needs_grid = False
    is_resolution_free = True

    def __init__(
        self,
        *,
        dim: int,
        layer: int,
        num_heads: int = 4,
        qk_norm: bool = True,
        rope: bool = True,
        rope_base: float = 100.0,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        is_causal: bool = False,
    ):
        super().__init__()
        if head_dim is not None and (num_heads < 1 or head_dim < 1 or (rope and head_dim % 2)):
            raise UsageError(
                f"mixer.head_dim={head_dim} and mixer.num_heads={num_heads} must be at least 1, and head_dim even with rope"
            )
        self.layer, self.num_heads = layer, num_heads
        self.head_dim = width_per_head(dim, num_heads) if head_dim is None else head_dim
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if self.num_kv_heads < 1 or num_heads % self.num_kv_heads:
            raise UsageError(f"mixer.num_kv_heads={num_kv_heads} must divide mixer.num_heads={num_heads}")
        self.rope, self.rope_base, self.is_causal = rope, rope_base, is_causal
        self.heeds = () if is_causal else (ATTEND,)
        self.qkv = nn.Linear(dim, (num_heads + 2 * self.num_kv_heads) * self.head_dim, bias=bias)
        self.q_norm = RMSNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim) if qk_norm else nn.Identity()
        self.proj = nn.Linear(num_heads * self.head_dim, dim, bias=bias)

    def forward(self, x: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor:
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        q, k, v = self.qkv(x).unflatten(-1, (-1, self.head_dim)).split(heads, dim=2)  # [B, N, H, K] each
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rope:
            table = rope_table(layout.coords, self.head_dim, self.rope_base)
            q, k = rotate(q, table), rotate(k, table)
        q, k, v = (y.transpose(1, 2).to(v.dtype) for y in (q, k, v))  # the rotation runs in float32 under autocast
        if not self.is_causal:
            attended = attend(q, k, v, grid=layout.grid, valid=layout.valid, cache=cache)  # [B, H, N, K]
            return self.proj(attended.transpose(1, 2).flatten(2))
        num_before, valid = 0, layout.valid
        if cache is not None:
            held = cache.setdefault(self.layer, KeysValues(cache.get("num_tokens", 0)))
            num_before, k, v, valid = held.append(k, v, valid)
        is_square, mask = valid is None and num_before == 0, None
        if not is_square:
            mask = causal_mask(q.shape[2], num_before, valid, q.device)
        is_grouped = self.num_kv_heads < self.num_heads
        attended = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_square, enable_gqa=is_grouped
        )  # [B, H, N, K]
        return self.proj(attended.transpose(1, 2).flatten(2))


def causal_mask(num_new: int, num_before: int, valid: Tensor | None, device: torch.device) -> Tensor | None:
    """What each of num_new tokens may see of the num_before + num_new, bool broadcastable to [B, H, new, all]; None = everything.

    Args:
        valid: [B, num_before + num_new] bool, False = padding.

    Every token sees itself, padded or not: a row without a key would be NaN, and its gradient would reach all weights.
    """
    if num_new == 1 and valid is None:
        return None
    mask = torch.ones(num_new, num_before + num_new, dtype=torch.bool, device=device).tril(num_before)
    if valid is None:
        return mask
    itself = torch.ones_like(mask).triu(num_before) & mask
    return mask & valid[:, None, None, :] | itself


class KeysValues:
    """Keys and values of the tokens so far, in memory that is set aside ahead: a step writes its own and copies nothing.

    Args:
        num_tokens: for how many tokens there is room at first; the room doubles when it is used up.
    """

    def __init__(self, num_tokens: int):
        self.num_tokens, self.length = num_tokens, 0
        self.valid: Tensor | None = None  # [B, m] bool, False = padding among the first m tokens
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def reserve(self, count: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values with room for `count` more tokens of k or v [B, H, n, K]."""
        needed = self.length + count
        if self.keys is None or self.values is None or needed > self.keys.shape[2]:
            room = max(self.num_tokens, needed if self.length == 0 else 2 * needed)
            keys, values = (like.new_empty(*like.shape[:2], room, like.shape[3]) for _ in range(2))
            if self.keys is not None and self.values is not None:
                known = slice(0, self.length)
                keys[:, :, known], values[:, :, known] = self.keys[:, :, known], self.values[:, :, known]
            self.keys, self.values = keys, values
        return self.keys, self.values

    def append(self, k: Tensor, v: Tensor, valid: Tensor | None = None) -> tuple[int, Tensor, Tensor, Tensor | None]:
        """(number of tokens before; keys and values of all; which of all are no padding, None = all) once k and v [B, H, n, K] are behind the others."""
        self.keys, self.values = self.reserve(k.shape[2], k)
        before, self.length = self.length, self.length + k.shape[2]
        self.keys[:, :, before : self.length] = k.detach()
        self.values[:, :, before : self.length] = v.detach()
        if valid is not None:
            earlier = self._valid(before)
            all_real = valid.new_ones(valid.shape[0], before)
            self.valid = torch.cat([all_real if earlier is None else earlier, valid], dim=1)
        known = slice(0, self.length)
        return before, self.keys[:, :, known], self.values[:, :, known], self._valid(self.length)

    def _valid(self, length: int) -> Tensor | None:
        if self.valid is None:
            return None
        return pad(self.valid, (0, length - self.valid.shape[1]), value=True)

    def select(self, rows: Tensor) -> None:
        """Sample i goes on as sample rows[i] has come so far: rows [B] int64."""
        if self.keys is not None and self.values is not None:
            used = slice(0, self.length)
            self.keys[:, :, used] = self.keys[rows, :, used]
            self.values[:, :, used] = self.values[rows, :, used]
        if self.valid is not None:
            self.valid = self.valid[rows]

    def truncate(self, length: int) -> None:
        """Forget all but the first tokens."""
        self.length = min(self.length, length)

    @property
    def batch(self) -> int:
        """Samples, 0 before the first call."""
        return 0 if self.keys is None else self.keys.shape[0]

    @property
    def num_bytes(self) -> int:
        """Of the memory that is set aside."""
        return sum(y.numel() * y.element_size() for y in (self.keys, self.values) if y is not None)
