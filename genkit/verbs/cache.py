"""`genkit cache`."""

from __future__ import annotations

import argparse

from genkit import console
from genkit.verbs.answer import Answer
from genkit.verbs.arguments import DEVICE, OVERRIDES, RECIPE, argument

ABOUT = "encode the data of a generator's recipe with its tokenizer, once"
ARGUMENTS = (
    RECIPE,
    OVERRIDES,
    argument("--out", "-o", default="cache", metavar="DIR", help="default: cache"),
    DEVICE,
)


def run(args: argparse.Namespace) -> Answer:
    from genkit import caching, recipes

    found = caching.cache(recipes.resolve(args.recipe), args.overrides, out=args.out, device=args.device)
    return Answer(found, console.table(found.items()))
