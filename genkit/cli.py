"""The command line: verbs, their options, and the one place where an error becomes a line and an exit code.

Nothing heavy is imported before a verb runs. Results go to stdout, everything else to stderr. Exit codes: 0 ok,
1 failure, 2 wrong usage or config, 85 stopped by a signal after saving (the same command continues), 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from genkit import __version__, console
from genkit.errors import GenkitError, UsageError, nearest

_BROKEN_PIPE = 141  # what a shell reports for a program that SIGPIPE ended


@dataclass(frozen=True)
class Answer:
    """What a verb found: data for --json, text for people, and the exit code where the finding is that something does not hold."""

    data: Any
    text: str
    exit_code: int = 0


@dataclass(frozen=True)
class Verb:
    """A command: what it runs, a line about it, and its arguments as argparse takes them."""

    run: Callable[[argparse.Namespace], Answer]
    about: str
    arguments: tuple[tuple[tuple[str, ...], dict[str, Any]], ...]


VERBS: dict[str, Verb] = {}


def argument(*names: str, **settings: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    return names, settings


def verb(about: str, *arguments: tuple[tuple[str, ...], dict[str, Any]]) -> Callable[[Any], Any]:
    """Make a function the verb of its name."""

    def register(run: Callable[[argparse.Namespace], Answer]) -> Callable[[argparse.Namespace], Answer]:
        VERBS[run.__name__.rstrip("_")] = Verb(run, about, arguments)
        return run

    return register


RECIPE = argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a recipe (`genkit ls recipes`)")
OVERRIDES = argument(
    "overrides",
    metavar="KEY=VALUE",
    nargs="*",
    help="train.lr=3e-4 sets, data.size=null resets, metrics+={type: fid} appends",
)
RUN = argument("run", metavar="RUN", help="a run directory, one of its checkpoints, or a saved pipeline")
DEVICE = argument("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
SEED = argument("--seed", type=int, default=0, help="the same seed gives the same result (default: 0)")
STEPS = argument("--steps", type=int, help="sampler steps (default: the recipe's)")
GUIDANCE = argument("--guidance", type=float, help="classifier-free guidance strength (default: the recipe's)")
SAMPLER = argument(
    "--sampler",
    nargs="+",
    action="extend",
    default=[],
    metavar="KEY=VALUE",
    help="changes of the recipe's sampler: type=heun, reuse.type=skip_blocks, guidance_weak=RUN",
)
SIZE = argument(
    "--size", metavar="YxX", help="pixels, rows x columns: 48x64 is wider than high (default: as it was trained)"
)
ROPE = (
    argument(
        "--rope",
        metavar="METHOD",
        help="of the backbone fit at another size: plain, interpolate, ntk, ntk_by_parts or yarn (default: the recipe's)",
    ),
    argument("--rope-gain", metavar="WORD", help="of its attention by the number of tokens: none, paper or release"),
    argument("--rope-longest", action="store_true", help="its axes all by the longest, not each by its own length"),
)
RAW = argument("--raw", action="store_true", help="the weights as trained, not their moving average")
LAUNCH = argument("--launch", type=int, metavar="N", help="share the images out over N processes of this machine")
BATCH_SIZE = argument(
    "--batch-size", type=int, default=64, help="images at a time; the result stays the same (default: 64)"
)
RUNS = argument("--out", "-o", default="runs", metavar="DIR", help="where run directories lie (default: runs)")
COMMON = (
    argument("--json", action="store_true", help="the result as JSON on stdout, and nothing else there"),
    argument("-q", "--quiet", action="store_true", help="no progress"),
    argument("-v", "--verbose", action="store_true", help="say more; tracebacks"),
)


@verb(
    "train a small tokenizer and generator on embedded images or shapes, sample, evaluate: everything once, in minutes",
    argument("what", nargs="?", choices=["images", "shapes"], default="images", help="default: images"),
    RUNS,
    SEED,
    DEVICE,
)
def quickstart(args: argparse.Namespace) -> Answer:
    from genkit import quickstart

    found = quickstart.quickstart(what=args.what, out=args.out, seed=args.seed, device=args.device)
    return Answer(found, quickstart.render(found))


@verb(
    "list what a config may name, or the runs there are",
    argument(
        "kind",
        metavar="KIND",
        nargs="?",
        help="recipes, tokenizers, backbones, mixers, conditions, objectives, samplers, reuse, data, metrics or runs",
    ),
    RUNS,
)
def ls(args: argparse.Namespace) -> Answer:
    from genkit import recipes

    if args.kind not in (None, *recipes.KINDS):
        raise UsageError(f"nothing is listed under {args.kind}; {nearest(args.kind, recipes.KINDS)}")
    found = {kind: recipes.listing(kind, args.out) for kind in ([args.kind] if args.kind else recipes.KINDS)}
    lines = []
    for kind, names in found.items():
        lines += ["", kind] if len(found) > 1 else []
        lines.append(console.table(names.items()) or "(none)")
    return Answer(found[args.kind] if args.kind else found, "\n".join(lines).strip("\n"))


@verb(
    "copy a recipe to start from",
    argument("recipe", metavar="RECIPE"),
    argument("file", metavar="FILE", nargs="?", help="default: the recipe's own name, here"),
)
def init(args: argparse.Namespace) -> Answer:
    from genkit import recipes

    path = recipes.init(args.recipe, args.file)
    return Answer({"recipe": path}, f"{path}: edit it, then `genkit config check {path}` and `genkit train {path}`")


@verb(
    "look at a folder of images or meshes, prepare meshes for training, fetch a set of them",
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
def data(args: argparse.Namespace) -> Answer:
    if args.action != "prepare" and (args.overrides or args.workers is not None):
        raise UsageError(f"`data {args.action}` takes no {'--workers' if args.workers is not None else 'KEY=VALUE'}")
    if args.action != "fetch" and args.out is not None:
        raise UsageError(f"`data {args.action}` writes nothing to --out")
    if args.action == "prepare":
        from genkit.data import prepare

        found = prepare.prepare(args.path, args.overrides, workers=args.workers)
        return Answer(found, prepare.render(found))
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


@verb(
    "encode the data of a generator's recipe with its tokenizer, once",
    RECIPE,
    OVERRIDES,
    argument("--out", "-o", default="cache", metavar="DIR", help="default: cache"),
    DEVICE,
)
def cache(args: argparse.Namespace) -> Answer:
    from genkit import caching, recipes

    found = caching.cache(recipes.resolve(args.recipe), args.overrides, out=args.out, device=args.device)
    return Answer(found, console.table(found.items()))


@verb(
    "train a tokenizer or a generator; the same command again continues",
    RECIPE,
    OVERRIDES,
    argument("--name", help="of the run (default: the recipe's)"),
    RUNS,
    argument("--seed", type=int, help="short for train.seed=N"),
    DEVICE,
    argument("--launch", type=int, metavar="N", help="train in N processes of this machine"),
)
def train(args: argparse.Namespace) -> Answer:
    from genkit import recipes

    recipe = recipes.resolve(args.recipe)
    if args.launch is not None:
        raise SystemExit(_launch(args))
    from genkit.training import train

    overrides = [*args.overrides, *([f"train.seed={args.seed}"] if args.seed is not None else [])]
    run = train(recipe, overrides, name=args.name, out=args.out, device=args.device)
    found = {"run": run.path, "metrics": run.metrics, "checkpoint": run.last}
    return Answer(found, f"{run.path}\n{console.table(run.metrics.items())}\n`genkit show {run.path}` shows more")


def _launch(args: argparse.Namespace) -> int:
    from genkit.launch import launch

    if args.launch < 1:
        raise UsageError(f"--launch {args.launch}: at least one process is needed")
    words = list(args.argv)
    at = next(i for i, word in enumerate(words) if word.partition("=")[0] == "--launch")
    del words[at : at + (1 if "=" in words[at] else 2)]
    return launch(words, args.launch)


@verb(
    "generate images with a trained generator",
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
        "--database",
        metavar="IMAGES",
        help="of generators that are told neighbours: others than in training, a folder, zip or npz, fashion:val, or a file of `genkit database`",
    ),
    argument("--classes", help="of a database: only entries of these, named as labels are"),
    argument("--format", default="ply", help="of shapes: ply, obj, glb, stl or off (default: ply)"),
    argument(
        "--resolution", type=int, metavar="CELLS", help="of shapes: cells along a side that a surface is looked for in"
    ),
    argument("--turntable", action="store_true", help="of shapes: a GIF of each as well"),
    argument("-o", "--out", metavar="DIR", help="default: a folder in the run"),
    RAW,
    BATCH_SIZE,
    DEVICE,
)
def sample(args: argparse.Namespace) -> Answer:
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
        rope=_rope(args),
        known=args.known,
        keep=args.keep,
        captions=args.caption,
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


def _rope(args: argparse.Namespace) -> dict[str, Any]:
    """The changes of rotary positions that were asked for."""
    asked = {"method": args.rope, "gain": args.rope_gain, "per_axis": False if args.rope_longest else None}
    return {name: value for name, value in asked.items() if value is not None}


@verb(
    "embed images as a database of neighbours, for `genkit sample --database`",
    RUN,
    argument("images", metavar="IMAGES", help="a folder, zip or npz of images, or a word: fashion:val"),
    argument("-o", "--out", required=True, metavar="FILE", help="a name in .safetensors"),
    argument("--classes", help="only these, named as labels are"),
    DEVICE,
)
def database(args: argparse.Namespace) -> Answer:
    from genkit.sampling import write_database

    found = write_database(args.run, args.images, args.out, classes=args.classes, device=args.device)
    return Answer(found, f"{found['entries']} embeddings of {found['width']} numbers in {found['out']}")


@verb(
    "turn images into a file of coded token ids",
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
def encode(args: argparse.Namespace) -> Answer:
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


@verb(
    "turn a file of coded token ids back into images",
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
def decode(args: argparse.Namespace) -> Answer:
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


@verb(
    "turn published weights into a tokenizer or a generator that every verb takes in place of a run",
    argument(
        "file",
        metavar="FILE",
        help="a checkpoint (.safetensors, .pt, .pth, .ckpt), or a folder with one and config.json",
    ),
    argument(
        "--from",
        dest="source",
        required=True,
        metavar="NAME",
        help="whose weights: taming-vqgan, llamagen-vq, var-vqvae, titok, dqvae, maskgit-vqgan, diffusers-vq, diffusers-kl, vector-quantize-pytorch, dit, sit, fit, dimsum, ...",
    ),
    argument("-o", "--out", required=True, metavar="DIR"),
    argument(
        "--config",
        metavar="FILE",
        help="the original's options, YAML or JSON (default: config.json beside the weights)",
    ),
    argument(
        "--tokenizer",
        metavar="RUN",
        help="of a generator: the tokenizer whose latents it was trained on, a run or what was imported before",
    ),
    argument("--size", type=int, help="pixels per side that images are brought to (default: the config's, or 256)"),
    argument(
        "--data",
        default="data/images",
        metavar="DIR",
        help="images that `genkit eval` reconstructs (default: data/images)",
    ),
    argument("--check", action="store_true", help="encode and decode a drawn picture, or draw one"),
)
def import_(args: argparse.Namespace) -> Answer:
    from genkit.importing import import_weights, render

    found = import_weights(
        args.file,
        args.source,
        args.out,
        config=args.config,
        check=args.check,
        data=args.data,
        size=args.size,
        tokenizer=args.tokenizer,
    )
    return Answer(found, render(found))


@verb(
    "write a run as a pipeline that others load; every run is one of genkit's parts already",
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
def export(args: argparse.Namespace) -> Answer:
    from genkit.exporting import export

    found = export(args.run, args.out, to=args.to, ema=not args.raw)
    parts = ", ".join(f"{name} {kind}" for name, kind in found["parts"].items())
    return Answer(found, f"{found['out']}: {parts}")


@verb(
    "measure a run, a folder, zip or npz of images, or a folder of meshes; every number carries its protocol",
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
def eval_(args: argparse.Namespace) -> Answer:
    from genkit import comparing

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
        raise SystemExit(_launch(args))
    from genkit.launch import joined

    if args.verify:
        with joined(args.device):
            found = comparing.verify(
                args.targets[0], tolerance=args.tolerance, device=args.device, batch_size=args.batch_size
            )
        return Answer(found, comparing.render_verification(found), 0 if found["same"] else 1)
    from genkit.evaluation import evaluate

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
            rope=_rope(args),
            sampler=args.sampler,
            ema=not args.raw,
            device=args.device,
            out=args.out,
        )
    text = f"{report}\nreport: {report.path}" if report.path else str(report)
    return Answer(report.to_dict(), text)


@verb(
    "statistics of a set of images, as a file that evaluations are compared with",
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
def stats(args: argparse.Namespace) -> Answer:
    if args.launch is not None:
        raise SystemExit(_launch(args))
    from genkit.launch import joined
    from genkit.stats import stats

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


@verb("say what a run is, how far, how good, and where its pictures lie", argument("run", metavar="RUN"))
def show(args: argparse.Namespace) -> Answer:
    from genkit import show

    found = show.summary(args.run)
    return Answer(found, show.render(found))


@verb(
    "look at configs: check or show one, diff two, explain a key, or print the schema of all",
    argument("action", choices=["check", "show", "diff", "explain", "schema"]),
    argument(
        "words",
        metavar="WORD",
        nargs="*",
        help="check, show: RECIPE [KEY=VALUE ...]; diff: A B; explain: KEY; a run directory stands for its config",
    ),
)
def config(args: argparse.Namespace) -> Answer:
    count = {"diff": 2, "explain": 1, "schema": 0}.get(args.action)
    if len(args.words) != count if count is not None else not args.words:
        wanted = {"diff": "two recipes or runs", "explain": "one key", "schema": "nothing more"}
        raise UsageError(f"`config {args.action}` takes {wanted.get(args.action, 'a recipe and KEY=VALUE overrides')}")
    return {"diff": _diff, "explain": _explain, "schema": _schema}.get(args.action, _resolved)(args)


def _resolved(args: argparse.Namespace) -> Answer:
    from genkit import config, recipes

    found = config.load(recipes.resolve(args.words[0]), args.words[1:])
    if args.action == "show":
        return Answer(found, config.dump(found).rstrip())
    digest = config.digest(found)
    sections = ("backbone", "tokenizer", "objective", "sampler", "data")
    parts = ", ".join(f"{name} {found[name]['type']}" for name in sections if "type" in found.get(name, {}))
    return Answer(
        {"name": found["name"], "task": found.task, "digest": digest}, f"{found['name']} is fine: {parts} [{digest}]"
    )


def _diff(args: argparse.Namespace) -> Answer:
    from genkit import config, recipes

    a, b = (config.load(recipes.resolve(word)) for word in args.words)
    lines = config.diff(a, b)
    return Answer({"differences": lines}, "\n".join(lines) or "no differences")


def _explain(args: argparse.Namespace) -> Answer:
    from genkit.explain import explain

    keys = explain(args.words[0])
    rows = [(key.path, key.type, key.default, key.about) for key in keys]
    return Answer([vars(key) for key in keys], console.table(rows, ("key", "type", "default", "meaning")))


def _schema(args: argparse.Namespace) -> Answer:
    from genkit.explain import schema

    found = schema()
    return Answer(found, console.to_json(found))


@verb("say what this machine and this installation offer")
def env(args: argparse.Namespace) -> Answer:
    from genkit import env

    found = env.collect()
    return Answer(found, env.render(found))


@verb(
    "time genkit and named peers side by side",
    argument("suite", metavar="SUITE"),
    argument("--quick", action="store_true", help="smaller cases"),
    argument("--threads", type=int, help="torch threads for both sides"),
)
def bench(args: argparse.Namespace) -> Answer:
    from genkit import bench

    rows = bench.run(args.suite, quick=args.quick, threads=args.threads)
    return Answer(rows, bench.render(rows))


class _Parser(argparse.ArgumentParser):
    """Raises instead of exiting: wrong usage is an error like any other."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see `{self.prog} --help`")


def parse(words: list[str]) -> argparse.Namespace:
    """Arguments as a namespace; KEY=VALUE overrides may stand anywhere after the recipe. Raises UsageError."""
    parser = _Parser(
        prog="genkit",
        description="From raw data to tokens, a trained generator, samples and honest metrics.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"genkit {__version__}")
    # Suppressed defaults: what stands before the verb is not reset by what could have stood after it.
    for names, settings in COMMON:
        parser.add_argument(*names, default=argparse.SUPPRESS, **settings)
    commands = parser.add_subparsers(dest="verb", metavar="COMMAND", required=True, parser_class=_Parser)
    for name, command in VERBS.items():
        sub = commands.add_parser(
            name, help=command.about, description=f"{command.about[0].upper()}{command.about[1:]}.", allow_abbrev=False
        )
        for names, settings in command.arguments:
            sub.add_argument(*names, **settings)
        for names, settings in COMMON:
            sub.add_argument(*names, default=argparse.SUPPRESS, **settings)
    if not words:
        parser.print_help()
        raise SystemExit(UsageError.exit_code)
    verb = _verb(words)
    if verb and verb not in VERBS:
        raise UsageError(f"no such command: {verb}; {nearest(verb, list(VERBS))}")
    args, rest = parser.parse_known_args(words, argparse.Namespace(json=False, quiet=False, verbose=False))
    # argparse fills KEY=VALUE from one stretch of words; those after an option are left over.
    unknown = [word for word in rest if word.startswith("-") or "=" not in word or "overrides" not in args]
    if unknown:
        known = [name for names, _ in (*VERBS[args.verb].arguments, *COMMON) for name in names if name.startswith("--")]
        hint = (
            nearest(unknown[0].partition("=")[0], known)
            if unknown[0].startswith("--")
            else f"see `genkit {args.verb} --help`"
        )
        raise UsageError(f"unexpected argument {unknown[0]}; {hint}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    args.argv = words
    return args


def _verb(words: list[str]) -> str:
    return next((word for word in words if not word.startswith("-")), "")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    # GNU OpenMP's threads spin for milliseconds before they sleep. On a machine that does anything else this makes training many times
    # slower (11 instead of 108 images/s was seen); spinning briefly costs a tenth where nothing else runs.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    name = f"genkit {_verb(words)}" if _verb(words) in VERBS else "genkit"
    verbose = "-v" in words or "--verbose" in words
    try:
        args = parse(words)
        console.set_quiet(args.quiet)
        logging.basicConfig(format="%(message)s")
        logging.getLogger("genkit").setLevel(logging.INFO if verbose else logging.WARNING)
        if os.getcwd() not in sys.path:
            # `type: mypkg.part:Class` may lie here; at the end of the path nothing here hides an installed package.
            sys.path.append(os.getcwd())
        # Whatever a library prints while a verb works must not mix with the result.
        with contextlib.redirect_stdout(sys.stderr):
            answer = VERBS[args.verb].run(args)
        if console.is_main_process():
            print(console.to_json(answer.data) if args.json else answer.text)
            sys.stdout.flush()
        return answer.exit_code
    except SystemExit as leaving:  # --help, --version, or the exit code of launched processes
        return leaving.code if isinstance(leaving.code, int) else 0
    except KeyboardInterrupt:
        return _fail(name, "interrupted", 130)
    except BrokenPipeError:
        # The reader (`| head`) has seen enough; without this Python would complain when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except GenkitError as error:
        if verbose:
            traceback.print_exc()
        # Of several processes all are told the same about a recipe; one of them says it.
        return (
            _fail(name, str(error), error.exit_code)
            if console.is_main_process() or error.exit_code == 1
            else error.exit_code
        )
    except OSError as error:
        if verbose:
            traceback.print_exc()
        return _fail(name, str(error), 1)
    except Exception as error:
        if verbose:
            traceback.print_exc()
            return 1
        reason = " ".join(str(error).split())
        return _fail(name, f"unexpected {type(error).__name__}: {reason}; run again with -v for the traceback", 1)


def _fail(name: str, message: str, code: int) -> int:
    print(f"{name}: {message}", file=sys.stderr)
    return code
