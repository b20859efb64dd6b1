"""Octrees against ocnn: building, neighbours, convolution; attention of octree tokens against dense attention over the same ones; a light step of OctGPT
against a full one.

`genkit bench octree` times the pairs. `python benchmarks/octree.py` prints how attention grows.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention

from genkit.backbones.octgpt import Growing, OctGPT
from genkit.bench import Case
from genkit.kernels.octree_attention.op import octree_attention
from genkit.nn.octree_conv import OctreeConv
from genkit.octree.build import from_points, until
from genkit.octree.octree import Octree

H, K = 8, 48
WINDOW, DILATION = 256, 4
NODES = (8192, 32768)


def cases(quick: bool) -> Iterable[Case]:
    """A sphere of points with normals; attention without the network around it."""
    points = cloud(20_000 if quick else 100_000)
    depth, size = 8, f"{len(points):,} points, depth 8"
    name, theirs = peer(points, depth)
    ours = build(points, depth)
    yield Case(
        f"build, {size}",
        name,
        1.5,
        lambda: build(points, depth),
        theirs if isinstance(theirs, str) else theirs["build"],
    )
    yield Case(
        f"neighbours of all depths, {size}",
        name,
        1.5,
        lambda: neighbours(ours),
        theirs if isinstance(theirs, str) else theirs["neighbours"],
    )
    for channels in (16, 64):
        x = torch.randn(ours.count(6), channels)
        conv = OctreeConv(channels, channels)
        yield Case(
            f"convolution 3x3x3 at depth 6, {channels} channels, forward and backward",
            name,
            1,
            training(lambda x=x, conv=conv: conv(x.requires_grad_(), ours, 6), [x, conv.weight]),
            theirs if isinstance(theirs, str) else theirs["convolve"](x, conv),
        )
    for M in NODES[:1] if quick else NODES:
        q = {name: torch.randn(M, H, K) for name in "qkv"}
        yield Case(
            f"attention M{M} H{H} K{K}, window {WINDOW}, dilation {DILATION}",
            f"torch {torch.__version__} dense",
            2,
            windowed(q),
            lambda q=q: scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in q.values())),
        )
    full, light, count = steps(ours, 5 if quick else 6)
    yield Case(f"OctGPT 4x144, light step over a twelfth of {count:,} nodes", "its full step", 3, light, full)


def cloud(count: int) -> Tensor:
    return normalize(torch.randn(count, 3, generator=torch.Generator().manual_seed(0))) * 0.7


def build(points: Tensor, depth: int) -> Octree:
    return from_points(points, normals=points, depth=depth, full_depth=2)


def neighbours(octree: Octree) -> Tensor:
    """Of all depths, none of them kept from the last time."""
    for d in range(1, octree.depth + 1):
        octree._kept.pop(("neighbours", d), None)
    return octree.neighbours(octree.depth)


def peer(points: Tensor, depth: int) -> tuple[str, dict[str, Any] | str]:
    """ocnn's way of each, or why there is none."""
    try:
        import ocnn
    except ImportError:
        return "ocnn", "ocnn is not installed (pip install genkit-torch[test])"
    from importlib.metadata import version

    def make() -> Any:
        octree = ocnn.octree.Octree(depth, 2)
        octree.build_octree(ocnn.octree.Points(points, points))
        return octree

    kept = make()
    kept.construct_all_neigh()

    def convolve(x: Tensor, conv: OctreeConv) -> Callable[[], Any]:
        other = ocnn.nn.OctreeConv(x.shape[1], x.shape[1], [3], method="block_gemm")
        own = x.clone()
        return training(lambda: other(own.requires_grad_(), kept, 6), [own, other.weights])

    found = {"build": make, "neighbours": kept.construct_all_neigh, "convolve": convolve}
    return f"ocnn {version('ocnn')}", found


def training(forward: Callable[[], Tensor], wanted: list[Tensor]) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(forward().sum(), [x.requires_grad_() for x in wanted])


def windowed(q: dict[str, Tensor]) -> Callable[[], Tensor]:
    samples = torch.zeros(len(q["q"]), dtype=torch.int64)
    return lambda: octree_attention(**q, batch_ids=samples, window=WINDOW, dilation=DILATION)  # type: ignore[arg-type]


def steps(octree: Octree, depth: int) -> tuple[Callable[[], Tensor], Callable[[], Tensor], int]:
    """(a full step of the toy generator over the codes at this depth of a shape, a light one of a group of a twelfth, nodes)."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"dim": 144, "depth": 4, "num_heads": 6, "window": WINDOW, "dilation": 2, "buffer": 8}
    model = OctGPT(bits=16, full_depth=octree.full_depth, code_depth=depth, **sizes).eval()
    with torch.no_grad():
        growing = Growing(model, {}, until(octree, octree.full_depth))
        for d in range(octree.full_depth, depth):
            growing.at(until(octree, d))
            growing.finish(octree.is_occupied(d).long())
        growing.at(until(octree, depth))
    count = octree.count(depth)
    random = torch.Generator().manual_seed(0)
    values, known = torch.randint(0, 2, (count, 16), generator=random), torch.rand(count, generator=random) < 0.5
    group = (torch.rand(count, generator=random) < 1 / 12).nonzero().squeeze(1)

    def run(step: Callable[[], Tensor]) -> Tensor:
        with torch.no_grad():
            return step()

    run(lambda: growing.logits(values, known))
    return (
        lambda: run(lambda: growing.logits(values, known)),
        lambda: run(lambda: growing.light(values, known, group)),
        count,
    )


def main() -> None:
    """Nanoseconds per node must not grow with the number of nodes."""
    for M in (4096, 8192, 32768, 131072):
        run = windowed({name: torch.randn(M, H, K) for name in "qkv"})
        run()
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        middle = statistics.median(seconds)
        print(f"{M:8} nodes {middle * 1e3:8.1f} ms {middle / M * 1e9:8.0f} ns per node")


if __name__ == "__main__":
    main()
