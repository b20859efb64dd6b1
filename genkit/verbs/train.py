"""`genkit train`."""

from __future__ import annotations

import argparse

from genkit import console
from genkit.verbs.answer import Answer
from genkit.verbs.arguments import DEVICE, OVERRIDES, RECIPE, RUNS, argument, launched

ABOUT = "train a tokenizer or a generator; the same command again continues"
ARGUMENTS = (
    RECIPE,
    OVERRIDES,
    argument("--name", help="of the run (default: the recipe's)"),
    RUNS,
    argument("--seed", type=int, help="short for train.seed=N"),
    DEVICE,
    argument("--launch", type=int, metavar="N", help="train in N processes of this machine"),
)


def run(args: argparse.Namespace) -> Answer:
    from genkit import recipes

    recipe = recipes.resolve(args.recipe)
    if args.launch is not None:
        raise SystemExit(launched(args))
    from genkit.training import train

    overrides = [*args.overrides, *([f"train.seed={args.seed}"] if args.seed is not None else [])]
    trained = train(recipe, overrides, name=args.name, out=args.out, device=args.device)
    found = {"run": trained.path, "metrics": trained.metrics, "checkpoint": trained.last}
    return Answer(
        found, f"{trained.path}\n{console.table(trained.metrics.items())}\n`genkit show {trained.path}` shows more"
    )
