"""`genkit ls`."""

from __future__ import annotations

import argparse

from genkit import console
from genkit.errors import UsageError, nearest
from genkit.verbs.answer import Answer
from genkit.verbs.arguments import RUNS, argument

ABOUT = "list what a config may name, or the runs there are"
ARGUMENTS = (
    argument(
        "kind",
        metavar="KIND",
        nargs="?",
        help="recipes, tokenizers, backbones, mixers, conditions, objectives, samplers, reuse, data, metrics or runs",
    ),
    RUNS,
)


def run(args: argparse.Namespace) -> Answer:
    from genkit import recipes

    if args.kind not in (None, *recipes.KINDS):
        raise UsageError(f"nothing is listed under {args.kind}; {nearest(args.kind, recipes.KINDS)}")
    found = {kind: recipes.listing(kind, args.out) for kind in ([args.kind] if args.kind else recipes.KINDS)}
    lines = []
    for kind, names in found.items():
        lines += ["", kind] if len(found) > 1 else []
        lines.append(console.table(names.items()) or "(none)")
    return Answer(found[args.kind] if args.kind else found, "\n".join(lines).strip("\n"))
