"""All windows as one batch of torch's own attention."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from genkit.kernels.octree_attention.windows import from_windows, is_seen, to_windows


def octree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch_ids: Tensor,
    bias: Tensor | None,
    depth: Tensor | None,
    window: int,
    dilation: int,
    shift: int,
    scale: float,
) -> Tensor:
    """As `reference.octree_attention`."""
    q_rows, k_rows, v_rows = (
        to_windows(x, window, dilation=dilation, shift=shift).transpose(1, 2) for x in (q, k, v)
    )  # [W, H, window, K]
    seen = is_seen(batch_ids, depth, window, dilation, shift)[:, None]  # [W, 1, window, window]
    mask = seen if bias is None else bias.masked_fill(~seen, -torch.inf)
    out = scaled_dot_product_attention(q_rows, k_rows, v_rows, attn_mask=mask, scale=scale)  # [W, H, window, V]
    out = from_windows(out.transpose(1, 2), len(q), dilation=dilation, shift=shift)
    is_filler = batch_ids < 0
    # One more pass over the result, where it is for nothing: asked on a CPU alone, elsewhere the answer would be waited for.
    if is_filler.device.type == "cpu" and not torch.compiler.is_compiling() and not is_filler.any():
        return out.contiguous()
    return out.masked_fill(is_filler[:, None, None], 0.0)
