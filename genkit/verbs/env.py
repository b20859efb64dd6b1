"""`genkit env`."""

from __future__ import annotations

import argparse

from genkit.verbs.answer import Answer

ABOUT = "say what this machine and this installation offer"
ARGUMENTS = ()


def run(args: argparse.Namespace) -> Answer:
    from genkit import env

    found = env.collect()
    return Answer(found, env.render(found))
