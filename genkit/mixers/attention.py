"""Full attention between all tokens, with normed queries and keys and rotary positions on every axis of the grid."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from genkit.errors import UsageError
from genkit.interfaces import Cache, Layout
from genkit.nn.norm import RMSNorm
from genkit.nn.rope import rope_table, rotate


class Attention(nn.Module):
    """Bidirectional multi-head attention (Vaswani et al., 2017), x [B, N, D] -> [B, N, D].

    Queries and keys are RMS-normed per head, which keeps training stable at high learning rates (after Dehghani et al.,
    "ViT-22B", 2023, who use layer norm), and turned by their coordinates. Padding (layout.valid False) is never
    attended to; what comes out at padding has no meaning. All tokens are computed at every call, so a cache is accepted
    and left untouched.

    Args:
        dim: D, divisible by num_heads.
        layer: number of the layer, the key under which a mixer keeps things in a cache.
        rope_base: the longest wavelength of the rotation nears 2 pi rope_base tokens; axes are short, hence 100 where
            text models use 10000.
    """

    def __init__(
        self,
        *,
        dim: int,
        layer: int,
        num_heads: int = 4,
        qk_norm: bool = True,
        rope: bool = True,
        rope_base: float = 100.0,
    ):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise UsageError(f"mixer.num_heads={num_heads} does not divide the width dim={dim}")
        self.layer, self.num_heads, self.head_dim = layer, num_heads, dim // num_heads
        self.rope, self.rope_base = rope, rope_base
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = RMSNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)  # [B, N, H, K] each
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rope:
            table = rope_table(layout.coords, self.head_dim, self.rope_base)
            q, k = rotate(q, table), rotate(k, table)
        attended = scaled_dot_product_attention(
            q.transpose(1, 2).to(v.dtype),  # the rotation runs in float32 under autocast
            k.transpose(1, 2).to(v.dtype),
            v.transpose(1, 2),
            attn_mask=None if layout.valid is None else layout.valid[:, None, None, :],
        )  # [B, H, N, K]
        return self.proj(attended.transpose(1, 2).flatten(2))
