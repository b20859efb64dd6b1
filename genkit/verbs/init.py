"""`genkit init`."""

from __future__ import annotations

import argparse

from genkit.verbs.answer import Answer
from genkit.verbs.arguments import argument

ABOUT = "copy a recipe to start from"
ARGUMENTS = (
    argument("recipe", metavar="RECIPE"),
    argument("file", metavar="FILE", nargs="?", help="default: the recipe's own name, here"),
)


def run(args: argparse.Namespace) -> Answer:
    from genkit import recipes

    path = recipes.init(args.recipe, args.file)
    return Answer({"recipe": path}, f"{path}: edit it, then `genkit config check {path}` and `genkit train {path}`")
