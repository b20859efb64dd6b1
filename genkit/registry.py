"""From a word in a config to the part it names.

`type: vq` in the section `tokenizer` is the class `Vq`/`VQ` of the file genkit/tokenizers/vq.py: the word is the file, the class is the one
whose name equals the word without case and underscores, its keyword-only constructor is the schema. `mypkg.part:Class` names a part outside
the tree. Files of a family folder that hold no such class are helpers, not parts.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import math
import typing
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from genkit.errors import UsageError, nearest

# Config section -> folder of the family, and the constructor arguments that are measured and passed by code, never typed by a user.
FAMILIES: dict[str, tuple[str, frozenset[str]]] = {
    "data": ("data", frozenset()),
    "tokenizer": ("tokenizers", frozenset({"image_channels"})),
    "backbone": (
        "backbones",
        frozenset(
            {
                *("channels", "codebook_size", "num_levels", "num_classes", "grid", "patch_sizes", "num_grains"),
                *("bits", "full_depth", "code_depth"),
            }
        ),
    ),
    "mixer": ("mixers", frozenset({"dim", "layer"})),
    "condition": ("conditions", frozenset({"tokenizer", "grid", "class_names", "data", "folder"})),
    "objective": ("objectives", frozenset()),
    "sampler": ("samplers", frozenset({"reuse"})),
    "reuse": ("reuse", frozenset()),
    "metrics": ("metrics", frozenset()),
}


class Nested:
    """Marks a constructor argument that is itself a part: `mixer: Annotated[dict, Nested("mixer")]`."""

    def __init__(self, section: str):
        self.section = section


MixerSpec = Annotated[dict[str, Any] | list[dict[str, Any]], Nested("mixer")]


def _same(name: str, word: str) -> bool:
    return name.lower() == word.replace("_", "").lower()


@cache
def words(section: str) -> dict[str, str]:
    """Every word a config may use in this section, with the first line of its file. Parses the files; imports nothing."""
    folder = Path(__file__).parent / FAMILIES[section][0]
    found = {}
    for path in sorted(folder.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.ClassDef) and _same(node.name, path.stem) for node in tree.body):
            found[path.stem] = (ast.get_docstring(tree) or "").split("\n")[0]
    return found


def find(section: str, word: str, where: str = "") -> type:
    """The class behind a word. Raises UsageError with the nearest known word."""
    place = f" [{where}]" if where else ""
    folder = FAMILIES[section][0]
    if ":" in word:
        module_name, _, name = word.partition(":")
        try:
            cls = getattr(importlib.import_module(module_name), name)
            if not inspect.isclass(cls):
                raise ImportError(f"{name} is no class")
            return cls
        except (ImportError, AttributeError) as error:
            raise UsageError(f"{section}.type={word}: {error}{place}") from error
    if word not in words(section):
        raise UsageError(f"{section}.type={word} is not a {section}; {nearest(word, list(words(section)))}{place}")
    module = importlib.import_module(f"genkit.{folder}.{word}")
    return next(value for name, value in vars(module).items() if inspect.isclass(value) and _same(name, word))


@cache
def options(cls: type) -> dict[str, inspect.Parameter]:
    """The keyword-only constructor arguments of a part, with evaluated annotations."""
    init = inspect.unwrap(cls.__init__)  # type: ignore[misc]
    hints = typing.get_type_hints(init, include_extras=True)
    return {
        name: parameter.replace(annotation=hints.get(name, Any))
        for name, parameter in inspect.signature(init).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def check(section: str, spec: Any, path: str, where: typing.Callable[[str], str] = lambda path: "") -> dict[str, Any]:
    """The spec of one part with every default filled in and every value of its declared type.

    Args:
        spec: the mapping under a section, or under a nested part; must have `type`.
        path: dotted name of the mapping, for messages: "backbone.mixer".
        where: dotted name -> where it was set, "recipe.yaml:7" or "command line".

    Raises: UsageError for an unknown, missing or wrongly typed key.
    """
    from pydantic import TypeAdapter, ValidationError

    if not isinstance(spec, dict) or not isinstance(spec.get("type"), str):
        raise UsageError(
            f"{path} must be a mapping with a `type`, found {spec!r}; {_list(section)} {_at(where(path))}".rstrip()
        )
    cls = find(section, spec["type"], where(f"{path}.type"))
    given = FAMILIES[section][1]
    accepted = {name: option for name, option in options(cls).items() if name not in given}
    for name in spec:
        if name in given and name in options(cls):
            raise UsageError(
                f"{path}.{name} is measured from the data and the tokenizer; remove it {_at(where(f'{path}.{name}'))}".rstrip()
            )
        if name != "type" and name not in accepted:
            raise UsageError(
                f"unknown key {path}.{name}; {nearest(name, list(accepted))} {_at(where(f'{path}.{name}'))}".rstrip()
            )
    checked: dict[str, Any] = {"type": spec["type"]}
    for name, option in accepted.items():
        nested = nested_part(option.annotation)
        value = spec.get(name)
        if name not in spec or (value is None and not accepts_null(option.annotation)):
            if option.default is inspect.Parameter.empty:
                raise UsageError(
                    f"{path}.{name} is missing ({path}.type={spec['type']} needs it) {_at(where(path))}".rstrip()
                )
            value = option.default
            if nested is None:
                checked[name] = _plain(value)
                continue
        if nested is not None and value is not None:
            many = isinstance(value, list)
            if value == []:
                raise UsageError(f"{path}.{name} is an empty list {_at(where(f'{path}.{name}'))}".rstrip())
            parts = [
                check(nested.section, part, f"{path}.{name}[{i}]" if many else f"{path}.{name}", where)
                for i, part in enumerate(value if many else [value])
            ]
            checked[name] = parts if many else parts[0]
            continue
        try:
            checked[name] = _plain(TypeAdapter(option.annotation).validate_python(value))
            if not _is_finite(checked[name]):
                raise UsageError(
                    f"{path}.{name}={value!r}: numbers must be finite {_at(where(f'{path}.{name}'))}".rstrip()
                )
        except ValidationError as error:
            problem = error.errors()[0]
            raise UsageError(
                f"{path}.{name}={value!r}: {problem['msg'].lower()} {_at(where(f'{path}.{name}'))}".rstrip()
            ) from None
    return checked


def build(section: str, spec: dict[str, Any], **given: Any) -> Any:
    """Construct a part from its checked spec; of `given`, it receives what its constructor names."""
    cls = find(section, spec["type"])
    named = options(cls)
    arguments = {name: value for name, value in spec.items() if name != "type"}
    return cls(**arguments, **{name: value for name, value in given.items() if name in named})


def maker(section: str, spec: dict[str, Any] | list[dict[str, Any]]) -> typing.Callable[..., Any]:
    """A nested part as a function: `mixer = maker("mixer", spec)`, then `mixer(dim=768, layer=3)`.

    A list is a pattern repeated through the depth: layer `i` gets entry `i mod len`.
    """

    def make(**given: Any) -> Any:
        chosen = spec[given["layer"] % len(spec)] if isinstance(spec, list) else spec
        return build(section, chosen, **given)

    return make


def nested_part(annotation: Any) -> Nested | None:
    """The mark of a nested part, also of one that may be null."""
    marked = (annotation, *typing.get_args(annotation))
    return next((m for a in marked for m in getattr(a, "__metadata__", ()) if isinstance(m, Nested)), None)


def accepts_null(annotation: Any) -> bool:
    """Whether null is a value of this type; where it is not, null in a config means the default."""
    return annotation in (Any, None) or type(None) in typing.get_args(annotation)


def _plain(value: Any) -> Any:
    """Tuples become lists: a checked config is what YAML and JSON can hold."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _is_finite(value: Any) -> bool:
    """False for a number, or one within lists, that is nan or infinite."""
    if isinstance(value, list):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _list(section: str) -> str:
    return f"{section} types: {', '.join(words(section))}"


def _at(place: str) -> str:
    return f"[{place}]" if place else ""
