"""Prepare a folder of meshes once, on all cores: what the dataset `meshes` would do file by file while a model waits."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from genkit import registry
from genkit.console import Progress
from genkit.errors import GenkitError, UsageError

_dataset: Any = None  # of a worker


def prepare(path: str, overrides: Sequence[str] = (), *, workers: int | None = None) -> dict[str, Any]:
    """Prepare every mesh that is not prepared yet; interrupted, the same call goes on.

    Args:
        path: a folder of meshes, or a recipe whose data section is of type meshes.
        overrides: "key=value" of that section: repair=true, up=z, resolution=64, num_distances=0, cache=FOLDER.
        workers: processes; None = one for each core.

    Returns: plain data: "path", "meshes", "prepared" now, "found" already there, "failed" [{"key", "reason"}], "cache", "seconds", "per_minute".
    Raises: UsageError for a wrong key, and a path without meshes; GenkitError when a process dies.
    """
    if workers is not None and workers < 1:
        raise UsageError(f"--workers {workers}: at least one process is needed")
    spec = _spec(path, overrides)
    data = registry.build("data", spec)
    todo = [i for i in range(len(data)) if not data.place(i).exists()]
    failed: list[dict[str, str]] = []
    started = time.perf_counter()
    number = min(workers or os.cpu_count() or 1, max(1, len(todo)))
    with Progress(total=len(data), unit="meshes", title="prepare", initial=len(data) - len(todo)) as progress:
        for index, problem in _run(spec, todo, number):
            if problem:
                key = data.keys[index]
                failed.append({"key": key, "reason": problem.removeprefix(f"{data.path / key}: ")})
                progress.line(f"left out {key}: {failed[-1]['reason']}")
            progress.advance(1)
    seconds = time.perf_counter() - started
    done = len(todo) - len(failed)
    return {
        "path": str(data.path),
        "meshes": len(data),
        "prepared": done,
        "found": len(data) - len(todo),
        "failed": sorted(failed, key=lambda item: item["key"]),
        "cache": str(data.cache),
        "seconds": seconds,
        "per_minute": done / seconds * 60 if done else 0.0,
    }


def render(found: dict[str, Any]) -> str:
    """The result for people."""
    speed = f", {found['per_minute']:.0f} a minute" if found["prepared"] else ""
    lines = [
        f"{found['meshes']:,} meshes of {found['path']}: {found['prepared']:,} prepared{speed}, {found['found']:,} were there, in {found['cache']}"
    ]
    lines += [f"left out {item['key']}: {item['reason']}" for item in found["failed"]]
    return "\n".join(lines)


def _spec(path: str, overrides: Sequence[str]) -> dict[str, Any]:
    import yaml

    section: dict[str, Any] = {"type": "meshes", "path": path}
    if not Path(path).is_dir():
        from genkit import config, recipes

        section = dict(config.load(recipes.resolve(path))["data"])
        if section["type"] != "meshes":
            raise UsageError(f"the data of {path} are of type {section['type']}; only meshes are prepared")
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"{text} is not KEY=VALUE")
        try:
            section[name.removeprefix("data.")] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UsageError(f"{text}: {value!r} is no value in YAML") from None
    return registry.check("data", section, "data")


def _run(spec: dict[str, Any], todo: list[int], workers: int) -> Iterable[tuple[int, str]]:
    """(index, problem or nothing) of each, as they come."""
    if workers == 1:
        _start(spec)
        yield from map(_one, todo)
        return
    # Fresh processes: forked ones would inherit torch's threads in whatever state they are.
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(spec,)) as pool:
            yield from pool.map(_one, todo, chunksize=1)
    except BrokenProcessPool:
        raise GenkitError(
            "a process that prepared meshes died, perhaps for want of memory; run again with --workers 1"
        ) from None


def _start(spec: dict[str, Any]) -> None:
    global _dataset
    if multiprocessing.parent_process() is not None:
        import torch

        torch.set_num_threads(1)
    _dataset = registry.build("data", spec)


def _one(index: int) -> tuple[int, str]:
    try:
        _dataset.prepare(index)
    except GenkitError as error:
        return index, str(error)
    return index, ""
