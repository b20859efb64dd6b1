"""`genkit encode`."""

from __future__ import annotations

import argparse

from genkit.verbs.answer import Answer
from genkit.verbs.arguments import BATCH_SIZE, DEVICE, RAW, RUN, argument

ABOUT = "turn images into a file of coded token ids"
ARGUMENTS = (
    RUN,
    argument("images", metavar="IMAGES", help="a folder of images, or one"),
    argument(
        "-o", "--out", default="codes.gtk", metavar="FILE", help="default: codes.gtk; a name in .npz gives plain arrays"
    ),
    argument(
        "--prior",
        default="auto",
        metavar="WORD",
        help="uniform, static, adaptive, auto = the smallest, or the run of a masked generator of the same tokens (default: auto)",
    ),
    argument("--codes", type=int, metavar="S", help="cluster the codebook into S codes first: fewer bits, no training"),
    argument("--packets", choices=["none", "rows", "interleaved"], default="none", help="what is lost stays local"),
    argument("--pad", action="store_true", help="extend images to sides the tokenizer takes; decoding removes it"),
    argument("--fit", action="store_true", help="crop and resize images to the size the tokenizer was trained on"),
    RAW,
    BATCH_SIZE,
    DEVICE,
)


def run(args: argparse.Namespace) -> Answer:
    from genkit.coding import encode

    found = encode(
        args.run,
        args.images,
        args.out,
        prior=args.prior,
        codes=args.codes,
        packets=args.packets,
        pad=args.pad,
        fit=args.fit,
        device=args.device,
        batch_size=args.batch_size,
        ema=not args.raw,
    )
    text = (
        f"{found['images']} images in {found['out']}: {found['tokens']} ids of {found['codebook_size']} each, "
        f"{found['bits_per_pixel']:.4f} bits per pixel, {found['entropy_bits_per_pixel']:.4f} by their frequencies"
    )
    skipped = [f"left out {name}: {reason}" for name, reason in found.get("skipped", {}).items()]
    return Answer(found, "\n".join([text, *skipped]))
