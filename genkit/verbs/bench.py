"""`genkit bench`."""

from __future__ import annotations

import argparse

from genkit.verbs.answer import Answer
from genkit.verbs.arguments import argument

ABOUT = "time genkit and named peers side by side"
ARGUMENTS = (
    argument("suite", metavar="SUITE"),
    argument("--quick", action="store_true", help="smaller cases"),
    argument("--only", metavar="WORDS", default="", help="cases with these words in their names"),
    argument("--threads", type=int, help="torch threads for both sides"),
)


def run(args: argparse.Namespace) -> Answer:
    import sys

    from genkit import bench

    rows = bench.run(
        args.suite,
        quick=args.quick,
        threads=args.threads,
        only=args.only,
        on_row=lambda row: print(bench.line(row), file=sys.stderr, flush=True),
    )
    return Answer(rows, bench.render(rows))
