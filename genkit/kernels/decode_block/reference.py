"""The block as its equations say, in plain torch: the specification."""

from __future__ import annotations

from torch import Tensor, arange, cat
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu


def decode_block(
    x: Tensor,
    norm1: Tensor,
    wqkv: Tensor,
    wo: Tensor,
    norm2: Tensor,
    wup: Tensor,
    wdown: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    length: int,
    eps: float,
    first: Tensor | None = None,
) -> Tensor:
    B, G, _, K = keys.shape
    qkv = linear(rms_norm(x, norm1.shape, norm1, eps), wqkv).view(B, -1, K)  # [B, H + 2 G, K]
    a, b = qkv[:, :-G].chunk(2, dim=-1)
    turned = cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    q, k = turned[:, :-G], turned[:, -G:]
    keys[:, :, length], values[:, :, length] = k, qkv[:, -G:]
    known = slice(0, length + 1)
    is_seen = None if first is None else (arange(length + 1, device=x.device) >= first[:, None])[:, None, None]
    mixed = scaled_dot_product_attention(
        q.unsqueeze(2), keys[:, :, known], values[:, :, known], is_seen, enable_gqa=True
    )
    h = x + linear(mixed.flatten(1), wo)
    gate, value = linear(rms_norm(h, norm2.shape, norm2, eps), wup).chunk(2, dim=-1)
    return h + linear(silu(gate) * value, wdown)
