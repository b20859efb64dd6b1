"""Arguments that several verbs take, and what two of them ask for."""

from __future__ import annotations

import argparse
from typing import Any

from genkit.errors import UsageError

Argument = tuple[tuple[str, ...], dict[str, Any]]


def argument(*names: str, **settings: Any) -> Argument:
    """An argument as argparse takes it."""
    return names, settings


RECIPE = argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a recipe (`genkit ls recipes`)")
OVERRIDES = argument(
    "overrides",
    metavar="KEY=VALUE",
    nargs="*",
    help="train.lr=3e-4 sets, data.size=null resets, metrics+={type: fid} appends",
)
RUN = argument("run", metavar="RUN", help="a run directory, one of its checkpoints, or a saved pipeline")


def device(word: str) -> str:
    """A place that tensors can lie in. Raises argparse's error for one that is not there."""
    import torch

    try:
        torch.empty(1, device=word).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise argparse.ArgumentTypeError(f"{word} cannot be used here ({' '.join(str(error).split())[:120]})") from None
    return word


DEVICE = argument("--device", type=device, help="cpu, cuda, cuda:1, mps (default: the best there is)")
SEED = argument("--seed", type=int, default=0, help="the same seed gives the same result (default: 0)")
STEPS = argument("--steps", type=int, help="sampler steps (default: the recipe's)")
GUIDANCE = argument("--guidance", type=float, help="classifier-free guidance strength (default: the recipe's)")
SAMPLER = argument(
    "--sampler",
    nargs="+",
    action="extend",
    default=[],
    metavar="KEY=VALUE",
    help="changes of the recipe's sampler: type=heun, reuse.type=skip_blocks, guidance_weak=RUN",
)
SIZE = argument(
    "--size", metavar="YxX", help="pixels, rows x columns: 48x64 is wider than high (default: as it was trained)"
)
ROPE = (
    argument(
        "--rope",
        metavar="METHOD",
        help="of the backbone fit at another size: plain, interpolate, ntk, ntk_by_parts or yarn (default: the recipe's)",
    ),
    argument("--rope-gain", metavar="WORD", help="of its attention by the number of tokens: none, paper or release"),
    argument("--rope-longest", action="store_true", help="its axes all by the longest, not each by its own length"),
)
RAW = argument("--raw", action="store_true", help="the weights as trained, not their moving average")
LAUNCH = argument("--launch", type=int, metavar="N", help="share the images out over N processes of this machine")
BATCH_SIZE = argument(
    "--batch-size", type=int, default=64, help="images at a time; the result stays the same (default: 64)"
)
RUNS = argument("--out", "-o", default="runs", metavar="DIR", help="where run directories lie (default: runs)")
COMMON = (
    argument("--json", action="store_true", help="the result as JSON on stdout, and nothing else there"),
    argument("-q", "--quiet", action="store_true", help="no progress"),
    argument("-v", "--verbose", action="store_true", help="say more; tracebacks"),
)


def rope_changes(args: argparse.Namespace) -> dict[str, Any]:
    """The changes of rotary positions that were asked for by ROPE."""
    asked = {"method": args.rope, "gain": args.rope_gain, "per_axis": False if args.rope_longest else None}
    return {name: value for name, value in asked.items() if value is not None}


def launched(args: argparse.Namespace) -> int:
    """The same command without --launch, in as many processes as it asked for: their exit code."""
    from genkit.launch import launch

    if args.launch < 1:
        raise UsageError(f"--launch {args.launch}: at least one process is needed")
    words = list(args.argv)
    at = next(i for i, word in enumerate(words) if word.partition("=")[0] == "--launch")
    del words[at : at + (1 if "=" in words[at] else 2)]
    return launch(words, args.launch)
