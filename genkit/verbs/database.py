"""`genkit database`."""

from __future__ import annotations

import argparse

from genkit.verbs.answer import Answer
from genkit.verbs.arguments import DEVICE, RUN, argument

ABOUT = "embed images as a database of neighbours, for `genkit sample --database`"
ARGUMENTS = (
    RUN,
    argument("images", metavar="IMAGES", help="a folder, zip or npz of images, or a word: fashion:val"),
    argument("-o", "--out", required=True, metavar="FILE", help="a name in .safetensors"),
    argument("--classes", help="only these, named as labels are"),
    DEVICE,
)


def run(args: argparse.Namespace) -> Answer:
    from genkit.databases import write_database

    found = write_database(args.run, args.images, args.out, classes=args.classes, device=args.device)
    return Answer(found, f"{found['entries']} embeddings of {found['width']} numbers in {found['out']}")
