"""The recipes that come with genkit: found by a word, listed, copied. And every other name `genkit ls` knows."""

from __future__ import annotations

import os
import re
from pathlib import Path

from genkit import files
from genkit.errors import GenkitError, UsageError, nearest

FOLDER = Path(__file__).parent / "configs"
# Word of `genkit ls` -> section of a config.
PARTS = {
    "tokenizers": "tokenizer",
    "backbones": "backbone",
    "mixers": "mixer",
    "conditions": "condition",
    "objectives": "objective",
    "samplers": "sampler",
    "reuse": "reuse",
    "data": "data",
    "metrics": "metrics",
}
KINDS = ("recipes", *PARTS, "runs")


def recipes() -> dict[str, str]:
    """Name ("toy/vq-fashion") -> the first comment line of the recipe."""
    return {
        path.relative_to(FOLDER).with_suffix("").as_posix(): _about(path) for path in sorted(FOLDER.rglob("*.yaml"))
    }


def resolve(word: str | Path) -> Path:
    """The file a person means: a path, a recipe's name with or without its folder, or a run (its resolved config)."""
    path = Path(word)
    if path.is_dir():
        if (path / "config.resolved.yaml").is_file():
            return path / "config.resolved.yaml"
        raise UsageError(f"{path} is a folder without config.resolved.yaml: neither a recipe nor a run")
    if path.exists():
        return path
    known = list(recipes())
    name = re.sub(r"^(\./)?(genkit/)?(configs/)?|\.yaml$", "", str(word))
    matches = [recipe for recipe in known if name in (recipe, recipe.rpartition("/")[2])]
    if len(matches) == 1:
        return FOLDER / f"{matches[0]}.yaml"
    if matches:
        raise UsageError(f"{word} may be {' or '.join(matches)}; write its folder too")
    short = {recipe.rpartition("/")[2]: recipe for recipe in known}
    close = nearest(name, known if "/" in name else list(short))
    raise UsageError(f"no such recipe: {word}; {close}; `genkit ls recipes` lists them all")


def init(word: str, target: str | None = None) -> Path:
    """Copy a recipe, comments and all, to a new file (default: its own name, here) and return the path.

    Raises: UsageError for an unknown recipe; GenkitError when the file exists.
    """
    source = resolve(word)
    path = Path(target or source.name)
    if path.is_dir():
        path = path / source.name
    if path.exists():
        raise GenkitError(f"{path} exists; name another file: genkit init {word} FILE")
    text = source.read_text(encoding="utf-8")

    def keep_parent(match: re.Match[str]) -> str:
        # `extends:` is relative to the recipe that says it, and the copy lies elsewhere.
        return match[1] + os.path.relpath(source.parent / match[2], path.parent.resolve()) + match[3]

    files.write_text(path, re.sub(r"""(?m)^(extends:\s*["']?)([^\s"'#]+)(["']?)""", keep_parent, text))
    return path


def listing(kind: str, runs: str = "runs") -> dict[str, str]:
    """Every name of one kind with a line about it. Imports no part."""
    if kind == "recipes":
        return recipes()
    if kind == "runs":
        from genkit import show

        return {path.as_posix(): show.headline(path) for path in show.runs(Path(runs))}
    from genkit import registry

    return registry.words(PARTS[kind])


def _about(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        return next((line.lstrip("# ").rstrip() for line in file if line.startswith("#")), "")
