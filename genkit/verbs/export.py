"""`genkit export`."""

from __future__ import annotations

import argparse

from genkit.verbs.answer import Answer
from genkit.verbs.arguments import RAW, RUN, argument

ABOUT = "write a run as a pipeline that others load; every run is one of genkit's parts already"
ARGUMENTS = (
    RUN,
    argument("out", metavar="DIR", help="a folder that does not exist yet"),
    argument(
        "--to",
        default="pipeline",
        metavar="WORD",
        help="pipeline: of genkit's parts; diffusers-dit: diffusers' own DiTPipeline, where the parts can be theirs (default: pipeline)",
    ),
    RAW,
)


def run(args: argparse.Namespace) -> Answer:
    from genkit.exporting import export

    found = export(args.run, args.out, to=args.to, ema=not args.raw)
    parts = ", ".join(f"{name} {kind}" for name, kind in found["parts"].items())
    return Answer(found, f"{found['out']}: {parts}")
