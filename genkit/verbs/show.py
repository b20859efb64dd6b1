"""`genkit show`."""

from __future__ import annotations

import argparse

from genkit.verbs.answer import Answer
from genkit.verbs.arguments import argument

ABOUT = "say what a run is, how far, how good, and where its pictures lie"
ARGUMENTS = (argument("run", metavar="RUN"),)


def run(args: argparse.Namespace) -> Answer:
    from genkit import show

    found = show.summary(args.run)
    return Answer(found, show.render(found))
