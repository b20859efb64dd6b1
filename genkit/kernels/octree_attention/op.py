"""Attention in windows of consecutive nodes of an octree, after OctFormer (Wang 2023): linear in the number of nodes.

There is no Triton path: on a GPU the windows are one batch of torch's own attention, whose kernels take a mask. On a CPU that batch is several times slower
than the compiled path (benchmarks/octree_attention.py).
"""

from __future__ import annotations

from torch import Tensor

from genkit.dispatch import Operation

_attend = Operation("octree_attention")


def octree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch_ids: Tensor,
    *,
    window: int,
    dilation: int = 1,
    shift: int = 0,
    bias: Tensor | None = None,
    depth: Tensor | None = None,
    scale: float | None = None,
    path: str | None = None,
) -> Tensor:
    """o [M, H, V]: every node attends to the nodes of its window that belong to the same sample.

    The nodes of all samples stand one after another, each sample in z-order (or, as in OctGPT, depth after depth). A window holds `window` of them: consecutive
    ones, or with `dilation` d every d-th out of window x d. Fillers that complete the last group are seen by nobody.

    Args:
        q: [M, H, K]. Differentiable, as k, v and bias.
        k: [M, H, K], same dtype and device.
        v: [M, H, V], same dtype and device.
        batch_ids: [M] int64, the sample a node belongs to; below 0 a filler, which nobody sees and which sees nothing: its result is 0.
        window: nodes per window.
        dilation: distance of two neighbours in a window.
        shift: fillers in front of the first node, less than window x dilation: OctGPT moves the windows of some blocks by half a window.
        bias: [W, H, window, window] or [1, ...], added to the scores, query first: values of a table of relative positions. What lies in which window is
            `windows.to_windows` of anything that belongs to the nodes.
        depth: [M] int64; a node does not see deeper ones (OctGPT trains with all depths in one sequence). None = no such rule.
        scale: of the products; None = K^-1/2.
        path: see genkit.dispatch.

    The official code hides by adding -1000; here what is hidden has exactly no weight.

    Raises: ValueError for shapes, dtypes or devices that do not fit, naming the argument; UsageError for a path that cannot run.
    """
    if q.ndim != 3 or q.shape[0] < 1 or q.shape[2] < 1:
        raise ValueError(f"octree_attention: q must be [M, H, K] with M >= 1, got {list(q.shape)}")
    M, H, K = q.shape
    if window < 1 or dilation < 1 or not 0 <= shift < window * dilation:
        raise ValueError(
            f"octree_attention: window {window} and dilation {dilation} must be at least 1, shift {shift} from 0 to below {window * dilation}"
        )
    num_windows = dilation * -(-(M + shift) // (window * dilation))
    for name, given, shape in (
        ("k", k, (M, H, K)),
        ("v", v, (M, H, v.shape[-1])),
        ("bias", bias, (1 if bias is not None and len(bias) == 1 else num_windows, H, window, window)),
    ):
        if given is None:
            continue
        if given.shape != shape:
            raise ValueError(
                f"octree_attention: {name} must be {list(shape)} to go with q and the windows, got {list(given.shape)}"
            )
        if given.dtype != q.dtype or given.device != q.device:
            raise ValueError(
                f"octree_attention: {name} is {given.dtype} on {given.device}, q is {q.dtype} on {q.device}; they must agree"
            )
    for name, given in (("batch_ids", batch_ids), ("depth", depth)):
        if given is not None and (given.shape != (M,) or str(given.dtype) != "torch.int64" or given.device != q.device):
            raise ValueError(
                f"octree_attention: {name} must be int64 [{M}] on {q.device}, got {given.dtype} {list(given.shape)} on {given.device}"
            )
    scale = K**-0.5 if scale is None else float(scale)
    return _attend(path, q, k, v, batch_ids, bias, depth, window, dilation, shift, scale)
