"""Retention of RetNet: linear attention that forgets at a fixed rate per head, a constant case of ssd."""

from __future__ import annotations

import torch
from torch import Tensor

from genkit.kernels.ssd.op import ssd


def log_decays(num_heads: int, device: torch.device | str | None = None) -> Tensor:
    """[H] float32: log(1 - 2^(-5 - h)), later heads remember longer."""
    return torch.log1p(-(2.0 ** (-5.0 - torch.arange(num_heads, dtype=torch.float32, device=device))))


def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    reverse: bool = False,
    return_state: bool = False,
    path: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """o [B, N, H, V] with o_t = scale sum_{s<=t} gamma^(t-s) (q_t . k_s) v_s (Sun et al. 2023, "Retentive Network", eq. 5), without its rotation and norm.

    Args:
        q, k: [B, N, H, K], one dtype with v. Differentiable, as all tensors here.
        v: [B, N, H, V].
        log_decay: [H], log gamma <= 0, in v's dtype or float32; None = `log_decays`.
        scale: None = K^-1/2.
        initial_state, reverse, return_state, path: as in ssd.

    Raises: as ssd, and ValueError for a log_decay of another shape.
    """
    if v.ndim != 4:
        raise ValueError(f"retention: v must be [B, N, H, V], got {list(v.shape)}")
    H = v.shape[2]
    if log_decay is None:
        log_decay = log_decays(H, v.device).to(torch.promote_types(v.dtype, torch.float32))
    if log_decay.shape != (H,):
        raise ValueError(
            f"retention: log_decay must be [{H}] to go with v {list(v.shape)}, got {list(log_decay.shape)}"
        )
    g = log_decay.expand(v.shape[:3])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return ssd(
        q, k, v, g, scale=scale, initial_state=initial_state, reverse=reverse, return_state=return_state, path=path
    )
