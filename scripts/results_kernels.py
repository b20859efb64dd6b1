"""Times all kernels against their peers and writes docs/results/kernels.md, kernels.json and kernels.png.

    python scripts/results_kernels.py [--quick] [--threads 2] [--only selective_scan,gla] [--draw]

Suites that are named with --only replace their rows and leave those of the others; --draw makes page and plot again from the rows that are there.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

import torch

from genkit import bench, env

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
SUITES = ("selective_scan", "gla", "ssd", "linrec", "block_sparse_attention", "octree_attention")
HEAD = """# Kernels, measured on a CPU

Made by `python scripts/results_kernels.py`, in one process, both sides in turns: the ratio is the median over pairs of the peer's seconds by ours, above 1 we
are faster. float32. The GPU paths have not been run on a GPU; `python scripts/compile_kernels.py` prints what their compiler says of them.

{machine}

Of selective scans of 16,384 tokens a good part is memory: glibc gives results above 32 MB back to the system after every call, and touching fresh pages takes
longer than the scan. As measured here, with the allocator as it comes, 16,384 tokens take about 7 times as long as 4,096; with memory kept (mallopt, as the suite
`linrec` does) 4.3 times (41.4 ms and 9.7 ms), and the peer, which writes all states out, gains more than we do: ratios of its forward pass are then 20x to 52x.

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


def _least(run: Any) -> float:
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def write_page(found: dict[str, Any]) -> None:
    lines = [HEAD.format(machine=found["machine"])]
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
    for i, suite in enumerate(SUITES):
        curves: dict[str, list[tuple[int, float, float | None]]] = {}
        for row in found["suites"].get(suite, []):
            tokens = re.search(r"N ?=? ?(\d+)|\[2, (\d+), 384\]|(\d+) nodes", row["case"])
            is_forward = not re.search(
                "backward|gradient|time of|convolution|conv|aaren|copy|matmul", row["case"] + row["peer"]
            )
            if tokens and is_forward and row["peer_s"]:
                number = int(next(group for group in tokens.groups() if group))
                curves.setdefault(row["peer"], []).append((number, row["ours_s"], row["peer_s"]))
        for style, (peer, points) in zip(("--", ":", "-."), curves.items(), strict=False):
            points = sorted(set(points))
            tokens_at = [point[0] for point in points]
            if style == "--":
                axes.plot(tokens_at, [p[1] * 1e3 for p in points], "o-", color=f"C{i}", label=suite)
            axes.plot(
                tokens_at, [p[2] * 1e3 for p in points if p[2]], style, color=f"C{i}", alpha=0.6, label=f"  {peer}"
            )
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms per forward pass")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(RESULTS / "kernels.png", dpi=110)


if __name__ == "__main__":
    main()
