"""Times diffusion against its peers and writes docs/results/diffusion_speed.md, diffusion_speed.json and diffusion_speed.png.

    python scripts/results_diffusion_speed.py [--quick] [--threads 2] [--only limit,cost] [--draw]

Parts: pairs, limit, memory, closeness, padding, cost. Those that are named replace what is there of them; --draw makes page and plot again from that alone.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from pages import RESULTS, axes, counts_on_x, save_plot, table
from results_kernels import machine

from genkit import bench

PARTS = ("pairs", "limit", "memory", "closeness", "padding", "cost")
HEAD = """# Speed of diffusion, measured on a CPU

Made by `python scripts/results_diffusion_speed.py`. float32; both sides of a pair in one process, in turns: the ratio is the median over pairs of the peer's
seconds by ours, above 1 we are faster.

{machine}

**Below its goal:** {missed}
"""
WHY_DIMSUM = """The goal for DiMSUM, ten times the same network on the reference scan, is out of reach on this machine, whatever the scan costs: the reference, a loop in torch
over tokens, takes no more than one to three times as long as the network's matrix products and attention, and those are the same on both sides. The scan alone
against that loop is on the page of [kernels](kernels.md)."""
SWINGS = """On a processor that others share the seconds of one side alone swing by a third between pairs, and ratios with them: other runs had 1.04, 1.46 and 1.49 for
20 guided steps at batch 4, and 1.03 and 1.14 for the training step (by CPU time of one thread 1.11)."""
WHERE = """The exact gain is oneDNN's linear layers with weights laid out once for all steps, bias and GELU in the same pass (`genkit/nn/packed.py`), and shifts, scales and
gates in one pass each. Both sides run near the machine's speed of matrix products otherwise, so that more is to be had only by computing less: skipped blocks are
`sampler.reuse.type=skip_blocks`, see [diffusion_reuse.md](diffusion_reuse.md)."""


def measure(part: str, quick: bool, threads: int) -> Any:
    suite = bench.module("diffusion")
    if part == "pairs":
        rows = bench.run("diffusion", quick=quick, threads=threads)
        print(bench.render(rows), flush=True)
        return rows
    if part == "memory":
        return {side: suite.memory(side) for side in ("our_step", "plain_step")}
    if part == "cost":
        return {family: list(points.items()) for family, points in suite.cost().items()}
    return getattr(suite, part)()


def write_page(found: dict[str, Any]) -> None:
    missed = [row["case"] for row in found["pairs"] if row["ratio"] is not None and row["ratio"] < row["goal"]]
    text = [HEAD.format(machine=found["machine"], missed="; ".join(missed) or "nothing.")]
    text += [pairs_table(found["pairs"]), "", SWINGS, "", WHERE, "", WHY_DIMSUM, ""]
    text.append(
        f"With skipped blocks the sample is {found['closeness']:.1f} dB (PSNR) from the exact one, with random weights; the goal is 35 dB. With trained ones see there.\n"
    )
    text += ["## Beside the machine's limit\n", limit_table(found["limit"]), ""]
    ours, plain = (found["memory"][side] for side in ("our_step", "plain_step"))
    text.append(
        f"Peak memory of a process that trains DiT-S/2 with batches of 8: {ours:,} MiB, of the plainly written one {plain:,} MiB.\n"
    )
    packed, padded = (found["padding"][kind] for kind in ("packed", "padded"))
    text.append(
        f"Batches of 32 images of random sizes between 1:2 and 2:1, at most 256 tokens: packing leaves {packed:.1%} of attention's places to padding and none elsewhere; "
        f"a padded batch would be {padded:.0%} padding. The goal is 5%.\n"
    )
    text += ["## Cost of an image over its tokens\n", "![Seconds per image over tokens](diffusion_speed.png)\n"]
    text += [cost_table(found["cost"]), ""]
    (RESULTS / "diffusion_speed.md").write_text("\n".join(text))


def pairs_table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        mark = "" if row["ratio"] is None or row["ratio"] >= row["goal"] else " **missed**"
        peer = f"{row['peer_s'] * 1e3:,.0f} ms" if row["peer_s"] else row["note"]
        ratio = f"{row['ratio']:.2f}x" if row["ratio"] else "-"
        ours = f"{row['ours_s'] * 1e3:,.0f} ms"
        lines.append((row["case"], row["peer"], ours, peer, ratio, f"{row['goal']:g}x{mark}"))
    return table(("case", "peer", "ours", "peer's", "ratio", "goal"), lines)


def limit_table(rates: dict[str, float]) -> str:
    """DiT-S/2's forward pass by the arithmetic of its products and attention."""
    product = rates["matrix product"]
    rows = [(name, f"{rate:.0f}", f"{rate / product:.0%}") for name, rate in rates.items()]
    return table(("DiT-S/2 forward", "GFLOP/s", "of torch's product of 1,024 x 1,024 (goal 90%)"), rows)


def cost_table(cost: dict[str, list[tuple[int, float]]]) -> str:
    tokens = [n for n, _ in next(iter(cost.values()))]
    rows = [(family, *(f"{1e3 * seconds:,.0f} ms" for _, seconds in points)) for family, points in cost.items()]
    return table(("one call, batch 1", *(f"{n:,} tokens" for n in tokens)), rows)


def draw(cost: dict[str, list[tuple[int, float]]]) -> None:
    figure, axis = axes(6, 4)
    for family, points in cost.items():
        axis.plot(*zip(*points, strict=True), marker="o", label=family)
    axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="seconds per image and step")
    counts_on_x(axis, [n for n, _ in next(iter(cost.values()))])
    save_plot(figure, axis, RESULTS / "diffusion_speed.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and smaller pairs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--draw", action="store_true")
    args = parser.parse_args()
    chosen = [] if args.draw else args.only.split(",")
    if unknown := set(chosen) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    path = RESULTS / "diffusion_speed.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    torch.set_num_threads(args.threads)
    for part in chosen:
        found[part] = measure(part, args.quick, args.threads)
        found["machine"] = machine(args.threads)
        path.write_text(json.dumps(found, indent=1) + "\n")
        print(part, "done", flush=True)
    if missing := [part for part in PARTS if part not in found]:
        raise SystemExit(f"not measured yet: {', '.join(missing)}")
    write_page(found)
    draw(found["cost"])


if __name__ == "__main__":
    main()
