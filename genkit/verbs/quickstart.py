"""`genkit quickstart`."""

from __future__ import annotations

import argparse

from genkit.verbs.answer import Answer
from genkit.verbs.arguments import DEVICE, RUNS, SEED, argument

ABOUT = (
    "train a small tokenizer and generator on embedded images or shapes, sample, evaluate: everything once, in minutes"
)
ARGUMENTS = (
    argument("what", nargs="?", choices=["images", "shapes"], default="images", help="default: images"),
    RUNS,
    SEED,
    DEVICE,
)


def run(args: argparse.Namespace) -> Answer:
    from genkit import quickstart

    found = quickstart.quickstart(what=args.what, out=args.out, seed=args.seed, device=args.device)
    return Answer(found, quickstart.render(found))
