"""Block-sparse attention against torch's dense attention and against its compiled flex_attention.

`genkit bench block_sparse_attention` times the pairs. `python benchmarks/block_sparse_attention.py` prints how close to the machine's limit they come.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from genkit.bench import Case
from genkit.kernels.block_sparse_attention.op import block_sparse_attention
from genkit.kernels.block_sparse_attention.pattern import Pattern, build, random_blocks

H, K, BLOCK, DENSITY = 6, 64, 64, 0.1  # 90 % of the blocks are left out
LENGTHS = (1024, 4096)
DENSE_GOAL, FLEX_GOAL = 4, 1.3


def cases(quick: bool) -> Iterable[Case]:
    """Random blocks per head. Dense attention does more, which is the point of leaving blocks out; flex_attention does the same, but without the
    log-sum-exp, and on a CPU it has no backward pass.
    """
    name = f"torch {torch.__version__}"
    for N in LENGTHS[:1] if quick else LENGTHS:
        x, pattern = inputs(N), pattern_of(N)
        size = f"block-sparse attention B1 H{H} N{N} K{K}, {100 * pattern.block_density:.0f} % of blocks"
        yield Case(f"{size}, forward", f"{name} dense", DENSE_GOAL, forward(ours(pattern), x), forward(dense, x))
        yield Case(
            f"{size}, forward and backward", f"{name} dense", DENSE_GOAL, training(ours(pattern), x), training(dense, x)
        )
        yield Case(f"{size}, forward", f"{name} flex, compiled", FLEX_GOAL, forward(ours(pattern), x), flex(pattern, x))


def inputs(N: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randn(1, H, N, K, generator=random) for _ in "qkv"]


def pattern_of(N: int) -> Pattern:
    return build(N, BLOCK, blocks=random_blocks(N, N, BLOCK, DENSITY, num_heads=H))


def ours(pattern: Pattern) -> Callable[..., Tensor]:
    return lambda q, k, v: block_sparse_attention(q, k, v, pattern)[0]


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v)


def flex(pattern: Pattern, x: list[Tensor]) -> Callable[[], Tensor] | str:
    """The same blocks in flex_attention's form, or why it does not run here."""
    rows = pattern.num_blocks[0]
    counts = pattern.q_lists.starts.diff().view(1, H, rows)
    ids = torch.zeros(1, H, rows, pattern.num_blocks[1], dtype=torch.int32)
    ids[..., : int(counts.max())] = pattern.q_lists.ids.view(1, H, rows, -1)  # as many in every row
    none = torch.zeros_like(counts), torch.zeros_like(ids)
    mask = BlockMask.from_kv_blocks(*none, full_kv_num_blocks=counts, full_kv_indices=ids, BLOCK_SIZE=BLOCK)
    compiled = torch.compile(flex_attention)

    @torch.no_grad()
    def run() -> Tensor:
        q, k, v = x
        return compiled(q, k, v, block_mask=mask)

    try:
        run()
    except Exception as error:  # compilers fail in many ways, and the row says how
        return f"does not compile here ({type(error).__name__})"
    return run


def forward(attend: Callable[..., Tensor], x: list[Tensor]) -> Callable[[], Tensor]:
    return lambda: attend(*x)


def training(attend: Callable[..., Tensor], x: list[Tensor]) -> Callable[[], Any]:
    leaves = [t.clone().requires_grad_() for t in x]
    return lambda: torch.autograd.grad(attend(*leaves).sum(), leaves)


def main() -> None:
    """Billions of operations per second of the products alone, beside torch's matrix product of 1024 x 1024 timed in turns with them."""
    N = LENGTHS[-1]
    x, pattern, square = inputs(N), pattern_of(N), torch.randn(1024, 1024)
    work = 4 * N * N * K * H * pattern.block_density  # of the two products forward; there are five more backward
    runs: dict[str, tuple[float, Callable[[], Any]]] = {
        "matrix product": (2 * 1024**3, lambda: square @ square),
        "forward": (work, forward(ours(pattern), x)),
        "forward and backward": (3.5 * work, training(ours(pattern), x)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(9):
        for name, (_, run) in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    rates = {name: amount / statistics.median(seconds[name]) / 1e9 for name, (amount, _) in runs.items()}
    for name, rate in rates.items():
        print(
            f"{name:22} {1e3 * statistics.median(seconds[name]):8.2f} ms {rate:7.1f} GFLOP/s {rate / rates['matrix product']:5.0%} of the matrix product"
        )


if __name__ == "__main__":
    main()
