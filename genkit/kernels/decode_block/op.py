"""One new token of each sample through one block of a Llama-like transformer, keys and values of the tokens before it kept in place."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, int64

from genkit.dispatch import Operation

_decode_block = Operation("decode_block")


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
    path: str | None = None,
) -> Tensor:
    """x [B, D] -> h + wdown (silu(gate) value) with (gate, value) = wup rms(h) norm2 and h = x + wo attention(wqkv rms(x) norm1).

    No gradient flows; there is no reason to call it while training.

    Args:
        norm1, norm2: [D], weights of the RMS norms.
        wqkv: [(H + 2 G) K, D], rows of H heads of queries, then G heads of keys, then of values; wo [D, H K].
        wup: [2 F, D], rows of the gates, then of the values; wdown [D, F].
        cos, sin: [K / 2], the turn of the pairs (j, j + K / 2) of every query and key at the new token's place.
        keys, values: [B, G, room, K], contiguous, of which the first `length` are known; the new token's are written behind them. G divides H.
        eps: of the norms.
        first: [B] int64 in 0 .. length, the first token that each sample sees, as those before it are padding; None = 0.
        path: see genkit.dispatch.

    Raises: ValueError for shapes that do not fit; UsageError for a path that cannot run.
    """
    B, D = x.shape
    _, G, room, K = keys.shape
    rows = wqkv.shape[0] // K
    F = wdown.shape[1]
    expected = {
        "norm1": (norm1, (D,)),
        "norm2": (norm2, (D,)),
        "wqkv": (wqkv, (rows * K, D)),
        "wo": (wo, (D, (rows - 2 * G) * K)),
        "wup": (wup, (2 * F, D)),
        "wdown": (wdown, (D, F)),
        "cos": (cos, (K // 2,)),
        "sin": (sin, (K // 2,)),
        "keys": (keys, (B, G, room, K)),
        "values": (values, (B, G, room, K)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} is {list(tensor.shape)}, expected {list(shape)}")
    if K % 2 or rows <= 2 * G or rows % G:
        raise ValueError(f"wqkv has {rows} heads of {K} channels, which {G} heads of keys and of values do not fit")
    if not 0 <= length < room:
        raise ValueError(f"length={length} must be in 0..{room - 1}: keys have room for {room} tokens")
    if first is not None and (first.dtype != int64 or tuple(first.shape) != (B,)):
        raise ValueError(f"first is {first.dtype} {list(first.shape)}, expected int64 [{B}]")
    if first is not None and not bool(((first >= 0) & (first <= length)).all()):
        raise ValueError(f"first is in {int(first.min())}..{int(first.max())}, expected 0..{length}")
    return _decode_block(path, x, norm1, wqkv, wo, norm2, wup, wdown, cos, sin, keys, values, length, eps, first)


def compiled(x: Tensor) -> Callable[..., Callable[..., Tensor]] | None:
    """The compiled path for tokens one after the other, which checks nothing, for a network that has checked its sizes: see cpu.bound. None where it cannot
    take such an x or another is ordered."""
    if x.device.type != "cpu" or _decode_block.choose(None, x) != "cpu":
        return None
    from genkit.kernels.decode_block.cpu import bound

    return bound
