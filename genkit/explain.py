"""What a config may hold: every key with its type, default and meaning, read from constructors and fixed sections."""

from __future__ import annotations

import inspect
import re
import types
import typing
from dataclasses import dataclass
from typing import Annotated, Any

from genkit import config, registry
from genkit.errors import UsageError, nearest

# Sections whose keys are fields of a pydantic model; `sampler` has both a model and parts.
_FIXED: dict[str, Any] = {**config.FIXED, "sampler": config.Sampler}


@dataclass(frozen=True)
class Key:
    """One key of a config."""

    path: str  # "train.lr", "tokenizer.vq.codebook_size": a part's key carries the part's word
    type: str
    default: str  # "required" where there is none
    about: str
    nested: str | None = None  # the section whose parts may stand here


def keys(section: str, word: str | None = None) -> list[Key]:
    """Every key of a section, or of one of its parts. Imports the parts."""
    found = []
    if word is None and section in _FIXED:
        for name, field in _FIXED[section].model_fields.items():
            default = "required" if field.is_required() else _value(field.default)
            nested = registry.nested_part(field.annotation)
            about, inner = field.description or "", nested.section if nested else None
            found.append(Key(f"{section}.{name}", _name(field.annotation), default, about, inner))
    if section in registry.FAMILIES:
        for part in [word] if word else registry.words(section):
            found.extend(_part_keys(section, part))
    return found


def explain(path: str) -> list[Key]:
    """The keys a dotted name may mean: "train.lr", "tokenizer.codebook_size", "backbone.mixer.num_heads".

    Raises: UsageError with the nearest key.
    """
    section, *rest = re.sub(r"\[\d+\]", "", path).split(".")
    known = sorted({*_FIXED, *registry.FAMILIES})
    if section not in known:
        raise UsageError(f"no section {section}; {nearest(section, known)}")
    word = rest.pop(0) if section in registry.FAMILIES and rest and rest[0] in registry.words(section) else None
    candidates = keys(section, word)
    while rest:
        name = rest.pop(0)
        if name == "type" and not rest and section in registry.FAMILIES:
            return [Key(path, "a word", "required", ", ".join(registry.words(section)))]
        matching = [key for key in candidates if key.path.rpartition(".")[2] == name]
        if not matching:
            raise UsageError(
                f"no key {path}; {nearest(name, sorted({key.path.rpartition('.')[2] for key in candidates}))}"
            )
        if rest:
            inner = {key.nested for key in matching if key.nested}
            if not inner:
                raise UsageError(f"no key {path}: {matching[0].path} is {matching[0].type}, which has no keys")
            candidates = [key for nested in sorted(inner) for key in keys(nested)]
        else:
            candidates = matching
    return candidates


def schema() -> dict[str, Any]:
    """Everything a recipe may hold, as plain data: section -> keys, and family -> word -> keys."""

    def plain(found: list[Key]) -> dict[str, dict[str, Any]]:
        return {
            key.path.rpartition(".")[2]: {"type": key.type, "default": key.default, "about": key.about, **_parts(key)}
            for key in found
        }

    def _parts(key: Key) -> dict[str, Any]:
        return {"parts": key.nested} if key.nested else {}

    sections = {name: plain([key for key in keys(name) if key.path.count(".") == 1]) for name in _FIXED}
    families = {
        section: {
            word: {"about": about, "keys": plain(_part_keys(section, word))}
            for word, about in registry.words(section).items()
        }
        for section in registry.FAMILIES
    }
    return {"sections": sections, "parts": families}


def _part_keys(section: str, word: str) -> list[Key]:
    cls = registry.find(section, word)
    about = _arguments(inspect.getdoc(cls)) | _arguments(inspect.getdoc(cls.__init__))  # type: ignore[misc]
    given = registry.FAMILIES[section][1]
    return [
        Key(
            path=f"{section}.{word}.{name}",
            type=_name(option.annotation),
            default="required" if option.default is inspect.Parameter.empty else _value(option.default),
            about=about.get(name, ""),
            nested=nested.section if (nested := registry.nested_part(option.annotation)) else None,
        )
        for name, option in registry.options(cls).items()
        if name not in given
    ]


def _arguments(text: str | None) -> dict[str, str]:
    """The `Args:` of a docstring: "name: what it is", or "one, two: what they are"; continuation lines are joined."""
    block = re.search(r"(?m)^Args:\n((?:[ \t]+.*\n?|\n)+)", text or "")
    found: dict[str, str] = {}
    names: list[str] = []
    for line in inspect.cleandoc("\n" + block[1]).splitlines() if block else []:
        start = re.match(r"(\w+(?:, \w+)*):\s*(.*)", line)
        if start:
            names = start[1].split(", ")
            found.update(dict.fromkeys(names, start[2]))
        elif names and line.strip():
            found.update({name: f"{found[name]} {line.strip()}" for name in names})
    return found


def _name(annotation: Any) -> str:
    """A type as a person writes it: int, list of int, "a" or "b", mapping."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        nested = next((m for m in args[1:] if isinstance(m, registry.Nested)), None)
        many = ", or a list of them" if any(typing.get_origin(arg) is list for arg in typing.get_args(args[0])) else ""
        return f"a {nested.section}{many}" if nested else _name(args[0])
    if origin is typing.Literal:
        return " or ".join(map(str, args))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_name(arg) for arg in args)
    if origin in (list, tuple) and args:
        return "list of " + " ".join(dict.fromkeys(_name(arg) for arg in args if arg is not Ellipsis))
    if annotation is type(None):
        return "null"
    return {dict: "mapping", str: "text", Any: "anything"}.get(
        origin or annotation, getattr(origin or annotation, "__name__", str(annotation))
    )


def _value(value: Any) -> str:
    return (
        {None: "null", True: "true", False: "false"}.get(value, str(value))
        if isinstance(value, bool | None)
        else str(value)
    )
