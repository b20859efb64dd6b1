"""Times all kernels against their peers and writes docs/results/kernels.md, kernels.json and kernels.png.

    python scripts/results_kernels.py [--quick] [--threads 2] [--only selective_scan,linrec] [--draw]

Suites that are named with --only replace their rows and leave those of the others; --draw makes page and plot again from the rows that are there.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from genkit import bench, env
from genkit.kernels.aaren.op import aaren
from genkit.kernels.linrec.op import linrec

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
SUITES = ("selective_scan", "linear_attention", "linrec", "block_sparse_attention", "octree_attention")
HEAD = """# Kernels, measured on a CPU

Made by `python scripts/results_kernels.py`, in one process, both sides in turns: the ratio is the median over pairs of the peer's seconds by ours, above 1 we
are faster. float32. The GPU paths have not been run on a GPU; `python scripts/compile_kernels.py` prints what their compiler says of them.

{machine}

Results above 32 MB, such as those of 16,384 tokens, lie where dropped ones lay (genkit/memory.py): with fresh pages from the system at every call a scan of 16,384
tokens took 7 times as long as one of 4,096, now it is the row "in the time of 4 x". The peers take theirs as torch gives them.

{limits}

![Time per call over the number of tokens](kernels.png)

*Forward passes of the compiled paths (solid) and of what they are compared with (dashed).*
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default=",".join(SUITES))
    parser.add_argument("--draw", action="store_true")
    args = parser.parse_args()
    path = RESULTS / "kernels.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"suites": {}}
    torch.set_num_threads(args.threads)
    for suite in () if args.draw else args.only.split(","):
        rows = bench.run(suite, quick=args.quick, threads=args.threads)
        print(bench.render(rows), flush=True)
        found["suites"][suite] = rows
        found["machine"] = machine(args.threads)
        found["limits"] = limits()
        found["peaks"] = peaks()
        path.write_text(json.dumps(found, indent=1) + "\n")
    write_page(found)
    draw(found)


def machine(threads: int) -> str:
    """What it is and how fast at what kernels are made of, in one sentence."""
    n = 1024
    left, right = torch.rand(n, n), torch.rand(n, n)
    source, target = torch.rand(2**24), torch.rand(2**24)
    product, copy = _least(lambda: left @ right), _least(lambda: target.copy_(source))
    known = env.collect()
    return (
        f"Machine: {known['cpu']}, {threads} threads, compiled for {known['cpu_set']}, torch {torch.__version__}. Its limits, measured: "
        f"{2 * n**3 / product / 1e9:.0f} GFLOP/s in a {n} x {n} matrix product, {8 * 2**24 / copy / 1e9:.0f} GB/s read and written in a copy of 64 MiB."
    )


def limits() -> list[dict[str, Any]]:
    """Forward passes by their arithmetic and by what they must read and write, beside a matrix product and a copy timed in the same minute."""
    B, N, D, R, H, K = 2, 4096, 384, 16, 6, 64
    scan, linear, sparse = (
        bench.module(name) for name in ("selective_scan", "linear_attention", "block_sparse_attention")
    )
    pattern, row = sparse.pattern_of(N), 4 * B * N * D  # bytes of [B, N, D]
    a, b = torch.rand(B, N, D), torch.randn(B, N, D)
    scores, v = torch.randn(B, N, H), torch.randn(B, N, H, K)
    M, window = 25_000, 32
    windows = bench.module("octree_attention").forward(M, "cpu", window=window, dilation=1)
    square, source, target = torch.rand(1024, 1024), torch.rand(2**24), torch.rand(2**24)
    # What runs, its operations (a multiplication and an addition are two), the bytes that it must read or write.
    runs: dict[str, tuple[Callable[[], Any], float, float]] = {
        "matrix product 1024^3": (lambda: square @ square, 2 * 1024**3, 12 * 1024**2),
        "copy of 64 MiB": (lambda: target.copy_(source), 0, 2 * 4 * 2**24),
        "selective_scan": (scan.forward(scan.ours, scan.inputs(N)), scan.OPERATIONS * B * N * D * R, 3 * row),
        "causal_conv1d": (scan.forward(scan.our_filter, scan.filter_inputs(N)), 2 * scan.K * B * N * D, 2 * row),
        "gla": (linear.forward("gla", linear.inputs("gla", N), "cpu"), 4 * B * N * H * K * K, 5 * row),
        "ssd": (linear.forward("ssd", linear.inputs("ssd", N), "cpu"), 4 * B * N * H * K * K, 4 * row),
        "linrec": (lambda: linrec(a, b, path="cpu"), 2 * B * N * D, 3 * row),
        "aaren": (lambda: aaren(scores, v, path="cpu"), 3 * B * N * D, 2 * row),
        "block_sparse_attention, 10 %": (
            sparse.forward(sparse.ours(pattern), sparse.inputs(N)),
            4 * N * N * K * H * pattern.block_density,
            4 * 4 * N * H * K,
        ),
        f"octree_attention, {M} nodes": (windows, 4 * M * window * 192, 4 * 4 * M * 192),
    }
    seconds = {name: _least(run) for name, (run, _, _) in runs.items()}
    return [
        {"name": name, "s": seconds[name], "operations": ops, "bytes": size} for name, (_, ops, size) in runs.items()
    ]


def peaks() -> dict[str, float]:
    """MiB at the peak of a selective scan of 4,096 tokens with gradients, a process each."""
    suite = Path(bench.module("selective_scan").__file__)
    found = {}
    for side in ("ours", "mambapy"):
        command = [sys.executable, str(suite), "peak", side, "4096"]
        found[side] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def limits_table(rows: list[dict[str, Any]], peaks: dict[str, float]) -> str:
    product = rows[0]["operations"] / rows[0]["s"]
    copy = rows[1]["bytes"] / rows[1]["s"]
    lines = [
        "## How near to the machine's limits",
        "",
        "Forward passes of 4,096 tokens at width 384 (two sequences; sparse attention one), least of 20 times. The higher share says what holds a kernel up.",
        "",
        "| | ms | GFLOP/s | of the product's | GB/s | of the copy's |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        rate, stream = row["operations"] / row["s"], row["bytes"] / row["s"]
        lines.append(
            f"| {row['name']} | {row['s'] * 1e3:.2f} | {rate / 1e9:.1f} | {rate / product:.0%} | {stream / 1e9:.1f} | {stream / copy:.0%} |"
        )
    ratio = peaks["mambapy"] / peaks["ours"]
    lines += [
        "",
        f"Memory at the peak of a selective scan of 4,096 tokens with gradients: {peaks['ours']:.0f} MiB, mambapy {peaks['mambapy']:.0f} MiB, {ratio:.1f} times as much.",
    ]
    return "\n".join(lines)


def _least(run: Callable[[], Any]) -> float:
    seconds = []
    run()
    for _ in range(20):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def write_page(found: dict[str, Any]) -> None:
    lines = [HEAD.format(machine=found["machine"], limits=limits_table(found["limits"], found["peaks"]))]
    for suite in SUITES:
        if suite not in found["suites"]:
            continue
        lines += [f"\n## {suite}\n", "| case | peer | ours | peer's | ratio | goal |", "|---|---|---|---|---|---|"]
        for row in found["suites"][suite]:
            peer = f"{row['peer_s'] * 1e3:.2f} ms" if row["peer_s"] else row["note"]
            ratio = f"{row['ratio']:.2f}x" if row["ratio"] else "-"
            mark = "" if row["ratio"] is None or row["ratio"] >= row["goal"] else " **missed**"
            lines.append(
                f"| {row['case']} | {row['peer']} | {row['ours_s'] * 1e3:.2f} ms | {peer} | {ratio} | {row['goal']:.2g}x{mark} |"
            )
    (RESULTS / "kernels.md").write_text("\n".join(lines) + "\n")


def draw(found: dict[str, Any]) -> None:
    """Seconds over tokens, of the rows that say a number of tokens and no gradients."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8.5, 4.5))
    # operation -> peer -> (tokens, our seconds, the peer's)
    curves: dict[str, dict[str, list[tuple[int, float, float]]]] = {}
    for row in (row for suite in SUITES for row in found["suites"].get(suite, [])):
        tokens = re.search(r"N ?=? ?(\d+)|\[2, (\d+), 384\]|(\d+) nodes", row["case"])
        is_other = re.search("backward|gradient|time of|conv|aaren|matmul", row["case"] + row["peer"])
        if tokens and not is_other and row["peer_s"]:
            operation = re.split(r"[, ]+(?:N|B\d|M\d|forward)", row["case"])[0]
            number = int(next(group for group in tokens.groups() if group))
            point = (number, row["ours_s"], row["peer_s"])
            curves.setdefault(operation, {}).setdefault(row["peer"], []).append(point)
    for i, (operation, by_peer) in enumerate(curves.items()):
        for style, (peer, points) in zip(("--", ":", "-."), by_peer.items(), strict=False):
            at, ours, theirs = zip(*sorted(points), strict=True)
            if style == "--":
                axes.plot(at, [1e3 * s for s in ours], "o-", color=f"C{i}", label=operation)
            axes.plot(at, [1e3 * s for s in theirs], style, color=f"C{i}", alpha=0.6, label=f"  {peer}")
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms per forward pass")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(RESULTS / "kernels.png", dpi=110)


if __name__ == "__main__":
    main()
