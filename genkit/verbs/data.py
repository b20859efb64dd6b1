"""`genkit data`."""

from __future__ import annotations

import argparse

from genkit.errors import UsageError
from genkit.verbs.answer import Answer
from genkit.verbs.arguments import argument

ABOUT = "look at a folder of images or meshes, prepare meshes for training, fetch a set of them"
ARGUMENTS = (
    argument("action", choices=["check", "prepare", "fetch"]),
    argument(
        "path",
        metavar="PATH",
        help="check: a folder, fashion or emoji; prepare: a folder of meshes, or a recipe; fetch: sweethome3d",
    ),
    argument(
        "overrides",
        metavar="KEY=VALUE",
        nargs="*",
        help="prepare: options of the data, `genkit config explain data.meshes`: repair=true, up=z, resolution=64",
    ),
    argument("--out", "-o", metavar="DIR", help="fetch: where to (default: data/NAME)"),
    argument("--workers", type=int, metavar="N", help="prepare: processes (default: one for each core)"),
)


def run(args: argparse.Namespace) -> Answer:
    if args.action != "prepare" and (args.overrides or args.workers is not None):
        raise UsageError(f"`data {args.action}` takes no {'--workers' if args.workers is not None else 'KEY=VALUE'}")
    if args.action != "fetch" and args.out is not None:
        raise UsageError(f"`data {args.action}` writes nothing to --out")
    if args.action == "prepare":
        from genkit.data import prepare

        found = prepare.prepare(args.path, args.overrides, workers=args.workers)
        return Answer(found, prepare.render(found), 0 if found["prepared"] + found["found"] else 1)
    if args.action == "fetch":
        from genkit.data import fetch

        found = fetch.fetch(args.path, args.out)
        return Answer(found, fetch.render(found))
    from genkit.data import check, check_meshes

    if check_meshes.has_only_meshes(args.path):
        found = check_meshes.report(args.path)
        return Answer(found, check_meshes.render(found))
    found = check.report(args.path)
    return Answer(found, check.render(found))
