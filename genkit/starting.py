"""Weights that training starts from: those of another run, or of an imported model."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

from genkit.errors import UsageError

_NAMED = 3  # parameters that an error lists


def start_from(model: Any, source: str, part: str, new: list[str]) -> None:
    """Give a network that is about to be trained the weights of the same one elsewhere, averaged ones where there are some.

    Args:
        source: a run, a checkpoint or a pipeline folder.
        part: "tokenizer" or "backbone".
        new: patterns of parameters and buffers that stay as they were made ("label.*").

    Raises: UsageError where there is no such part, or its parameters are not those of the network but for the new ones.
    """
    from genkit.pipeline import open_run

    pipeline: Any = open_run(source)
    if not hasattr(pipeline, "backbone") and part == "backbone":
        raise UsageError(f"train.init={source} is a tokenizer, and this recipe trains a generator; name a generator")
    theirs = getattr(pipeline, part).state_dict()
    own = model.state_dict()

    def is_new(name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in new)

    for pattern in new:
        if not any(fnmatchcase(name, pattern) for name in own):
            raise UsageError(
                f"train.init_new: nothing in the {part} is called {pattern!r}; its parameters are {_some(list(own))}"
            )
    wanted = {name for name in own if not is_new(name)}
    given = {name for name in theirs if not is_new(name)}
    shapes = [
        f"{name} is {list(theirs[name].shape)} there and {list(own[name].shape)} here"
        for name in own
        if name in wanted & given and theirs[name].shape != own[name].shape
    ]
    problems = [
        f"{text}: {_some(names)}"
        for text, names in (
            ("of other shapes", shapes),
            ("missing there", sorted(wanted - given)),
            ("unknown here", sorted(given - wanted)),
        )
        if names
    ]
    if problems:
        raise UsageError(
            f"train.init={source} does not fit this {part}: {'; '.join(problems)}. Set the section {part} as it was there, or name in train.init_new "
            "what is to start afresh"
        )
    model.load_state_dict({name: theirs[name] for name in wanted}, strict=False)
    if hasattr(model, "reset_latent_stats"):
        model.reset_latent_stats()  # a tokenizer is trained on its codes as they are


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
