"""Long convolution along one or two axes, one kernel per channel, in the time of an FFT."""

from __future__ import annotations

from torch import Tensor

from genkit.dispatch import Operation

_fftconv = Operation("fftconv")


def fftconv(u: Tensor, kernel: Tensor, *, is_causal: bool = True, path: str | None = None) -> Tensor:
    """y like u, per channel: causal y_t = sum_{j>=0} kernel_j u_{t-j}; otherwise y_t = sum_j kernel_j u_{t-j+L//2}, centred. Zeros outside.

    Args:
        u: [B, N, D] or [B, Y, X, D], real; bfloat16 and float16 are computed in float32.
        kernel: [L, D] or [L, M, D], any lengths, those of u or not. Differentiable, as u.
        is_causal: along every axis. What a causal kernel holds beyond the length of u has no effect.
        path: see genkit.dispatch.

    Raises: ValueError for what does not fit, naming the argument; UsageError for a path that cannot run.
    """
    if u.ndim not in (3, 4) or 0 in u.shape or not u.is_floating_point():
        raise ValueError(
            f"fftconv: u must be [B, N, D] or [B, Y, X, D], real, no size 0, got {list(u.shape)} {u.dtype}"
        )
    if kernel.ndim != u.ndim - 1 or 0 in kernel.shape or kernel.shape[-1] != u.shape[-1]:
        axes = "[L, D]" if u.ndim == 3 else "[L, M, D]"
        raise ValueError(
            f"fftconv: kernel must be {axes} with D={u.shape[-1]} to go with u {list(u.shape)}, got {list(kernel.shape)}"
        )
    if kernel.dtype != u.dtype or kernel.device != u.device:
        raise ValueError(
            f"fftconv: kernel is {kernel.dtype} on {kernel.device}, u is {u.dtype} on {u.device}; they must agree"
        )
    return _fftconv(path, u, kernel, is_causal)
