"""`genkit config`."""

from __future__ import annotations

import argparse

from genkit import console
from genkit.errors import UsageError
from genkit.verbs.answer import Answer
from genkit.verbs.arguments import argument

ABOUT = "look at configs: check or show one, diff two, explain a key, or print the schema of all"
ARGUMENTS = (
    argument("action", choices=["check", "show", "diff", "explain", "schema"]),
    argument(
        "words",
        metavar="WORD",
        nargs="*",
        help="check, show: RECIPE [KEY=VALUE ...]; diff: A B; explain: KEY; a run directory stands for its config",
    ),
)


def run(args: argparse.Namespace) -> Answer:
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
