"""The command line: words to a verb and its options, and the one place where an error becomes a line and an exit code.

A verb is a file in genkit/verbs/, and nothing heavy is imported before one runs. Results go to stdout, everything else to stderr.
Exit codes: 0 ok, 1 failure, 2 wrong usage or config, 85 stopped by a signal after saving (the same command continues), 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn, Protocol

from genkit import __version__, console
from genkit.errors import GenkitError, UsageError, nearest
from genkit.verbs import (
    bench,
    cache,
    config,
    data,
    database,
    decode,
    encode,
    env,
    eval,
    export,
    import_,
    init,
    ls,
    quickstart,
    sample,
    show,
    stats,
    train,
)
from genkit.verbs.answer import Answer
from genkit.verbs.arguments import COMMON, Argument

_BROKEN_PIPE = 141  # what a shell reports for a program that SIGPIPE ended


class Verb(Protocol):
    """What a file in genkit/verbs/ says: a line about the verb, its arguments, and what runs (a module's function, without `self`)."""

    ABOUT: str

    @property
    def ARGUMENTS(self) -> tuple[Argument, ...]: ...

    def run(self, args: argparse.Namespace) -> Answer: ...


# In the order of `genkit --help`: the way from raw data to figures.
VERBS: dict[str, Verb] = {
    "quickstart": quickstart,
    "ls": ls,
    "init": init,
    "data": data,
    "cache": cache,
    "train": train,
    "sample": sample,
    "database": database,
    "encode": encode,
    "decode": decode,
    "import": import_,
    "export": export,
    "eval": eval,
    "stats": stats,
    "show": show,
    "config": config,
    "env": env,
    "bench": bench,
}


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
            name, help=command.ABOUT, description=f"{command.ABOUT[0].upper()}{command.ABOUT[1:]}.", allow_abbrev=False
        )
        for names, settings in command.ARGUMENTS:
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
        known = [name for names, _ in (*VERBS[args.verb].ARGUMENTS, *COMMON) for name in names if name.startswith("--")]
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
