"""Foreign weights into our modules, by rules for their names. Strict both ways: every place is filled, every key is used or ignored with a reason.

A rule is a pair (pattern of our key, where its value comes from). The pattern is a regular expression for the whole key; the source is

    "encoder.down.{0}.{1}"           their key, with the groups of the pattern put in
    ("{0}.q.{1}", "{0}.k.{1}")       several of their keys, one below the other along the first axis
    lambda level, name: ...          a function of the groups that returns one of the above
    None                             nothing: the value our module was made with stays

and the first pattern that fits a key decides.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from genkit.errors import GenkitError

Source = str | tuple[str, ...] | Callable[..., Any] | None
Rules = Sequence[tuple[str, Source]]

_LISTED = 6  # keys named in a message


def fill(model: nn.Module, state: Mapping[str, Tensor], rules: Rules, ignored: Mapping[str, str], what: str) -> None:
    """Load foreign weights into a module.

    Shapes must be equal but for axes of length 1 (a linear layer fits a 1x1 convolution); other precisions are converted.

    Args:
        state: their weights by their keys.
        ignored: pattern of their keys -> why they are not needed.
        what: whose weights they are, for messages.

    Raises: GenkitError that names, in their words, the keys that are unknown, missing or of another shape.
    """
    own = model.state_dict()
    values: dict[str, Tensor] = {}
    used: set[str] = set()
    missing: list[str] = []
    misshapen: list[str] = []
    for key, target in own.items():
        theirs = source_of(key, rules)
        used.update(theirs)
        if lacking := [name for name in theirs if name not in state]:
            missing += lacking
        elif theirs:
            parts = [state[name] for name in theirs]
            found = parts[0] if len(parts) == 1 else torch.cat(parts)
            if _long_axes(found.shape) == _long_axes(target.shape):
                values[key] = found.reshape(target.shape).to(target.dtype)
            else:
                shapes = " + ".join(str(list(part.shape)) for part in parts)
                misshapen.append(f"{' + '.join(theirs)} ({shapes}, expected {list(target.shape)} in all)")
    unknown = [name for name in state if name not in used and not reason(name, ignored)]
    problems = [("unknown", sorted(unknown)), ("missing", sorted(set(missing))), ("another shape", misshapen)]
    if any(names for _, names in problems):
        told = "; ".join(f"{word}: {_list(names)}" for word, names in problems if names)
        raise GenkitError(f"these weights are not those of {what}: {told}")
    model.load_state_dict({**own, **values})


def spread(model: nn.Module, foreign: Mapping[str, Tensor], rules: Rules, what: str) -> dict[str, Tensor]:
    """The inverse of `fill`: our weights by their keys, in their shapes.

    Args:
        foreign: what theirs look like, by key.

    Raises: GenkitError for a place of theirs that nothing of ours fills, or the other way round.
    """
    found: dict[str, Tensor] = {}
    unplaced: list[str] = []
    for key, value in model.state_dict().items():
        names = source_of(key, rules)
        if any(name not in foreign for name in names):
            unplaced += [name for name in names if name not in foreign]
            continue
        rows = [foreign[name].shape[0] for name in names]
        for name, part in zip(names, value.split(rows) if names else (), strict=True):
            found[name] = part.reshape(foreign[name].shape).to(foreign[name].dtype)
    missing = sorted(name for name in foreign if name not in found)
    if unplaced or missing:
        told = f"no place for {_list(sorted(unplaced))}" if unplaced else f"nothing for {_list(missing)}"
        raise GenkitError(f"these weights do not make {what}: {told}")
    return found


def source_of(key: str, rules: Rules) -> tuple[str, ...]:
    """Their keys that make up the value of one of ours; empty where the value our module was made with stays."""
    for pattern, source in rules:
        if match := re.fullmatch(pattern, key):
            found = source(*match.groups()) if callable(source) else source
            names = () if found is None else (found,) if isinstance(found, str) else found
            return tuple(name.format(*match.groups()) for name in names)
    raise AssertionError(f"no rule for {key}")


def reason(key: str, ignored: Mapping[str, str]) -> str | None:
    """Why a key of theirs is not needed, or None for one that is."""
    return next((why for pattern, why in ignored.items() if re.fullmatch(pattern, key)), None)


def shape(state: Mapping[str, Tensor], key: str, what: str) -> torch.Size:
    """The shape of a weight that sizes are read from. Raises GenkitError that names a missing one."""
    if key not in state:
        raise GenkitError(f"these weights are not those of {what}: missing: {key}")
    return state[key].shape


def count(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many of prefix.format(0), prefix.format(1), ... begin a key, without a gap."""
    found = 0
    while has(state, prefix.format(found)):
        found += 1
    return found


def has(state: Mapping[str, Tensor], prefix: str) -> bool:
    """Whether a key begins like this."""
    return any(key.startswith(prefix) for key in state)


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Options that stand in nested sections of a config (model.vq_model, dataset.preprocessing) by their own names, which have one meaning wherever they stand."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        found |= flat(value) if isinstance(value, Mapping) else {name: value}
    return found


def _long_axes(shape: torch.Size) -> list[int]:
    return [length for length in shape if length != 1]


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
