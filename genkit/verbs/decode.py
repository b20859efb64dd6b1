"""`genkit decode`."""

from __future__ import annotations

import argparse

from genkit.verbs.answer import Answer
from genkit.verbs.arguments import BATCH_SIZE, DEVICE, RAW, RUN, SEED, argument

ABOUT = "turn a file of coded token ids back into images"
ARGUMENTS = (
    RUN,
    argument("codes", metavar="CODES", help="what `genkit encode` wrote"),
    argument("-o", "--out", default="decoded", metavar="DIR", help="default: decoded"),
    argument("--prior", metavar="RUN", help="the generator the file was coded with, if it was"),
    argument("--only", action="append", metavar="NAME", help="decode this image alone; may be repeated"),
    argument(
        "--restore",
        metavar="RUN",
        help="fill in lost ids with a masked generator of the same tokens; nearest = copy the nearest known id",
    ),
    argument("--lose", type=float, default=0.0, metavar="SHARE", help="lose this share of the ids, to try --restore"),
    SEED,
    RAW,
    BATCH_SIZE,
    DEVICE,
)


def run(args: argparse.Namespace) -> Answer:
    from genkit.coding import decode

    found = decode(
        args.run,
        args.codes,
        args.out,
        prior=args.prior,
        only=args.only,
        restore=args.restore,
        lose=args.lose,
        seed=args.seed,
        device=args.device,
        batch_size=args.batch_size,
        ema=not args.raw,
    )
    lost = f"; {found['lost']} of {found['ids']} ids were lost and filled in" if found.get("lost") else ""
    return Answer(found, f"{found['images']} images in {found['out']}{lost}")
