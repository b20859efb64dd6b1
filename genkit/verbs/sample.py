"""`genkit sample`."""

from __future__ import annotations

import argparse

from genkit import console
from genkit.verbs.answer import Answer
from genkit.verbs.arguments import (
    BATCH_SIZE,
    DEVICE,
    GUIDANCE,
    RAW,
    ROPE,
    RUN,
    SAMPLER,
    SEED,
    SIZE,
    STEPS,
    argument,
    rope_changes,
)

ABOUT = "generate images with a trained generator"
ARGUMENTS = (
    RUN,
    argument("-n", "--count", type=int, help="images (default: one of each label)"),
    argument("--labels", help='classes in turn: "0-9", "3,7", or names: "Sneaker,Bag"'),
    SEED,
    STEPS,
    GUIDANCE,
    SAMPLER,
    SIZE,
    *ROPE,
    argument("--known", metavar="IMAGE", help="of masked generators: an image of which a part stays (--keep)"),
    argument(
        "--keep",
        metavar="MASK",
        help="which pixels of it: left, right, top, bottom, center, a box Y0:Y1,X0:X1, several joined by +, 'not ...', or an image",
    ),
    argument(
        "--caption",
        action="append",
        default=[],
        metavar="TEXT",
        help="of generators that are told captions: what to draw; may be repeated",
    ),
    argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="of generators that are told pictures: what to draw, dark on white or transparent ground; may be repeated",
    ),
    argument(
        "--database",
        metavar="IMAGES",
        help="of generators that are told neighbours: others than in training, a folder, zip or npz, fashion:val, or a file of `genkit database`",
    ),
    argument("--classes", help="of a database: only entries of these, named as labels are"),
    argument("--format", help="of shapes: ply, obj, glb, stl or off (default: ply)"),
    argument(
        "--resolution", type=int, metavar="CELLS", help="of shapes: cells along a side that a surface is looked for in"
    ),
    argument("--turntable", action="store_true", help="of shapes: a GIF of each as well"),
    argument("-o", "--out", metavar="DIR", help="default: a folder in the run"),
    RAW,
    BATCH_SIZE,
    DEVICE,
)


def run(args: argparse.Namespace) -> Answer:
    from genkit.sampling import sample

    found = sample(
        args.run,
        count=args.count,
        labels=args.labels,
        seed=args.seed,
        out=args.out,
        steps=args.steps,
        guidance=args.guidance,
        sampler=args.sampler,
        size=args.size,
        rope=rope_changes(args),
        known=args.known,
        keep=args.keep,
        captions=args.caption,
        pictures=args.image,
        database=args.database,
        classes=args.classes,
        format=args.format,
        resolution=args.resolution,
        turntable=args.turntable,
        ema=not args.raw,
        batch_size=args.batch_size,
        device=args.device,
    )
    seconds = console.duration(found["seconds"])
    if "shapes" in found:
        none = "".join(f"\n{name} has no surface and was not written" for name in found["empty"])
        told = f"{found['shapes']} shapes in {found['out']} after {seconds}{none}"
        return Answer(found, f"{told}\ncontact sheet {found['grid']}\nseeds {found['json']}")
    return Answer(
        found,
        f"{found['images']} images in {found['out']} after {seconds}\ngrid {found['grid']}\nseeds {found['json']}",
    )
