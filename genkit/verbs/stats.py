"""`genkit stats`."""

from __future__ import annotations

import argparse

from genkit.verbs.answer import Answer
from genkit.verbs.arguments import BATCH_SIZE, DEVICE, LAUNCH, argument, launched

ABOUT = "statistics of a set of images, as a file that evaluations are compared with"
ARGUMENTS = (
    argument(
        "path", metavar="PATH", help="a folder, zip or npz of images, a dataset (fashion:val), or a run: its data"
    ),
    argument("-o", "--out", required=True, metavar="FILE", help="an npz"),
    argument(
        "--format",
        choices=["genkit", "adm", "fid", "edm"],
        default="genkit",
        help="genkit: moments and features, for every metric; adm, fid, edm: what those tools read (default: genkit)",
    ),
    argument(
        "--features", help="feature net (default: the one that comes with genkit where it fits, else inception-2015)"
    ),
    argument("--weights", metavar="FILE", help="weights of the feature net"),
    argument("-n", "--count", type=int, help="images from the front (default: all)"),
    LAUNCH,
    BATCH_SIZE,
    DEVICE,
)


def run(args: argparse.Namespace) -> Answer:
    if args.launch is not None:
        raise SystemExit(launched(args))
    from genkit.evaluation.stats import stats
    from genkit.launch import joined

    with joined(args.device):
        found = stats(
            args.path,
            args.out,
            format=args.format,
            features=args.features,
            weights=args.weights,
            count=args.count,
            batch_size=args.batch_size,
            device=args.device,
        )
    return Answer(found, f"{found['out']}: {found['images']} images, {found['net']}, format {found['format']}")
