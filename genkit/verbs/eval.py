"""`genkit eval`."""

from __future__ import annotations

import argparse

from genkit.errors import UsageError
from genkit.verbs.answer import Answer
from genkit.verbs.arguments import (
    BATCH_SIZE,
    DEVICE,
    GUIDANCE,
    LAUNCH,
    RAW,
    ROPE,
    SAMPLER,
    SEED,
    SIZE,
    STEPS,
    argument,
    launched,
    rope_changes,
)

ABOUT = "measure a run, a folder, zip or npz of images, or a folder of meshes; every number carries its protocol"
ARGUMENTS = (
    argument(
        "targets",
        metavar="TARGET",
        nargs="*",
        help="a run directory, a folder or zip of images, an npz; with --compare: runs or reports; with --verify: a report",
    ),
    argument(
        "--ref",
        help="what to compare with: data words, a folder, a zip or an npz; of shapes shapes:test or a folder (default: the run's data)",
    ),
    argument("--metrics", help="comma-separated: `genkit ls metrics` (default: the recipe's)"),
    argument(
        "--protocol", help="adm, edm, clean, torch-fidelity, pytorch-fid or quick: metrics, count and labels by name"
    ),
    argument("-n", "--count", type=int, help="samples"),
    argument("--labels", choices=["balanced", "random"], help="classes of the samples (default: the protocol's)"),
    argument("--weights", metavar="FILE", help="weights of the feature net"),
    argument(
        "-o",
        "--out",
        metavar="PATH",
        help="the report as JSON (default: in the run, eval/STEP.json; of images, beside them); with --compare: a folder",
    ),
    argument("--verify", action="store_true", help="evaluate again what a report is about, and say what differs"),
    argument("--compare", action="store_true", help="put reports side by side, and draw curves with -o"),
    argument("--tolerance", type=float, default=1e-4, help="of --verify, relative (default: 1e-4)"),
    LAUNCH,
    SEED,
    STEPS,
    GUIDANCE,
    SAMPLER,
    SIZE,
    *ROPE,
    RAW,
    BATCH_SIZE,
    DEVICE,
)


def run(args: argparse.Namespace) -> Answer:
    from genkit.evaluation import comparing

    if args.compare and args.verify:
        raise UsageError("--compare and --verify are two things; choose one")
    if args.compare:
        if not args.targets:
            raise UsageError("--compare needs runs or reports to put side by side")
        found = comparing.compare(args.targets, args.out)
        return Answer(found, comparing.render(found))
    if len(args.targets) != 1:
        what = "a report" if args.verify else "a run, a folder or zip of images, or an npz"
        raise UsageError(f"eval takes {what}, got {len(args.targets)} targets; `--compare` takes several")
    if args.launch is not None:
        raise SystemExit(launched(args))
    from genkit.launch import joined

    if args.verify:
        with joined(args.device):
            found = comparing.verify(
                args.targets[0], tolerance=args.tolerance, device=args.device, batch_size=args.batch_size
            )
        return Answer(found, comparing.render_verification(found), 0 if found["same"] else 1)
    from genkit.evaluation.evaluate import evaluate

    with joined(args.device):
        report = evaluate(
            args.targets[0],
            reference=args.ref,
            metrics=args.metrics.split(",") if args.metrics else None,
            protocol=args.protocol,
            count=args.count,
            labels=args.labels,
            weights=args.weights,
            batch_size=args.batch_size,
            seed=args.seed,
            steps=args.steps,
            guidance=args.guidance,
            size=args.size,
            rope=rope_changes(args),
            sampler=args.sampler,
            ema=not args.raw,
            device=args.device,
            out=args.out,
        )
    text = f"{report}\nreport: {report.path}" if report.path else str(report)
    return Answer(report.to_dict(), text)
