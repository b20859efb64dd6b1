"""The run directory: what a run writes, how it is saved and found again.

    runs/NAME/ config.yaml config.resolved.yaml env.json metrics.jsonl log.txt samples/ eval/
      checkpoints/0005000/pipeline/   a diffusers pipeline, usable as it is; averaged weights as variant `ema`
      checkpoints/0005000/state/      optimiser, counters, random state of each process
      checkpoints/last -> 0005000     and best -> the one with the best evaluation, where there are some

A checkpoint is written under a temporary name, synced, renamed; only then does `last` move and are old ones removed. Everything is safetensors
or JSON.
"""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from genkit import config as configs
from genkit import files
from genkit.errors import GenkitError, UsageError, nearest


@dataclass
class Counters:
    """Where a run is. `samples` is the unit of progress: all processes together."""

    step: int = 0
    samples: int = 0
    skipped_steps: int = 0  # losses or gradients that were not finite
    seconds: float = 0.0  # spent training, over all starts


@dataclass
class Run:
    """A run directory that exists, by its path."""

    path: Path
    metrics: dict[str, float] = field(default_factory=dict)  # the last line of metrics.jsonl

    @property
    def config(self) -> dict[str, Any]:
        return configs.parse((self.path / "config.resolved.yaml").read_text(encoding="utf-8"))

    @property
    def history(self) -> list[dict[str, float]]:
        """Every line of metrics.jsonl."""
        file = self.path / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    @property
    def last(self) -> Path | None:
        """The newest complete checkpoint."""
        link = self.path / "checkpoints" / "last"
        return link.resolve() if link.exists() else None

    @property
    def pipeline(self) -> Any:
        """The newest checkpoint as a pipeline, with averaged weights where there are some."""
        from genkit.pipeline import open_run

        return open_run(self.path)


def find_run(path: str | Path) -> Run:
    """The run at a path. Raises UsageError with the nearest existing run."""
    folder = Path(path)
    if (folder / "config.resolved.yaml").is_file():
        return Run(folder)
    near = sorted(p.parent.name for p in folder.parent.glob("*/config.resolved.yaml")) if folder.parent.is_dir() else []
    hint = nearest(folder.name, near) if near else "train one with `genkit train RECIPE`"
    what = "is not a run directory (it has no config.resolved.yaml)" if folder.exists() else "does not exist"
    raise UsageError(f"run {folder} {what}; {hint}")


def open_run_folder(path: Path, config: configs.Config, source: str | None) -> Run:
    """Create the run directory, or reopen one whose config is the same, or in which nothing has happened yet.

    Raises: UsageError with the differences when the config changed.
    """
    resolved = path / "config.resolved.yaml"
    if resolved.is_file():
        changes = configs.diff(_with_new_options(Run(path).config), config, free=configs.FREE)
        if changes and _has_begun(path):
            listed = "\n  ".join(changes)
            from_here = f" (train.init={path} starts it from these weights)" if Run(path).last else ""
            raise UsageError(
                f"run {path} was started with another config:\n  {listed}\n"
                f"undo the change to continue it, choose another --name to start a new run{from_here}, or remove {path}"
            )
    elif (path / "checkpoints").exists():
        raise UsageError(
            f"{path} holds checkpoints but no config.resolved.yaml; choose another --name or restore the file"
        )
    path.mkdir(parents=True, exist_ok=True)
    if source is not None:
        files.write_text(path / "config.yaml", source)
    files.write_text(resolved, configs.dump(config))
    return Run(path)


def _with_new_options(config: dict[str, Any]) -> dict[str, Any]:
    """The config of a run with the defaults of options that did not exist when it was started."""
    try:
        return configs.check(copy.deepcopy(config))
    except UsageError:  # an option of it is gone: the difference will say which
        return config


def _has_begun(path: Path) -> bool:
    """Whether a run has anything that another config would spoil. One that ended at its first mistake has not: the corrected command may take its name."""
    metrics = path / "metrics.jsonl"
    has_metrics = metrics.exists() and metrics.stat().st_size > 0
    return has_metrics or any((path / name).exists() for name in ("checkpoints", "samples"))


@contextmanager
def _saving(what: str, previous: Path | None) -> Iterator[None]:
    """Turn a failed write (a full disk, a lost mount) into one line that says what is still there."""
    try:
        yield
    except Exception as error:
        kept = f"the previous checkpoint {previous} is intact" if previous else "no earlier checkpoint exists"
        raise GenkitError(
            f"{what} could not be saved: {error}; {kept}. Free some space and run the same command again"
        ) from error


def save(
    run: Run,
    counters: Counters,
    *,
    write_pipeline: Callable[[Path], None],
    optimizer: torch.optim.Optimizer,
    objective: Any = None,
    scaler: Any = None,
    rank: int = 0,
    barrier: Callable[[], None] = lambda: None,
    keep: int = 2,
) -> Path:
    """Save a checkpoint. Every process must call this: each writes its own random state.

    Args:
        write_pipeline: writes the weights into a folder; called on the main process only.
        objective: saved too where it has a `state` (a discriminator).
        scaler: the fp16 gradient scaler, if there is one.
        barrier: waits for all processes.
        keep: how many checkpoints stay.

    Raises: GenkitError when the disk is full; the previous checkpoint is then untouched.
    """
    checkpoints = run.path / "checkpoints"
    final = checkpoints / f"{counters.step:07d}"
    temporary = checkpoints / f".saving-{counters.step:07d}"
    previous = run.last
    with _saving(f"checkpoint {final}", previous):
        if rank == 0:
            for stale in checkpoints.glob(".saving-*"):
                shutil.rmtree(stale)
            (temporary / "state").mkdir(parents=True)
        barrier()
        try:
            save_file(_random_state(), temporary / "state" / f"random-{rank}.safetensors")
            if rank == 0:
                write_pipeline(temporary / "pipeline")
                tensors, rest = _flatten_optimizer(optimizer)
                save_file(tensors, temporary / "state" / "optimizer.safetensors")
                if hasattr(objective, "state"):
                    own = {name: value.detach().contiguous() for name, value in objective.state().items()}
                    save_file(own, temporary / "state" / "objective.safetensors")
                counts = {
                    "counters": asdict(counters),
                    "optimizer": rest,
                    "scaler": scaler.state_dict() if scaler else None,
                }
                files.write_json(temporary / "state" / "state.json", counts)
            barrier()
            if rank == 0:
                files.sync_folder(temporary)
                if final.exists():
                    shutil.rmtree(final)
                temporary.rename(final)
                point(checkpoints / "last", final.name)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    if rank == 0:
        complete = sorted(p for p in checkpoints.iterdir() if p.is_dir() and not p.is_symlink() and p.name.isdigit())
        linked = {p.resolve() for p in checkpoints.iterdir() if p.is_symlink()}
        for old in complete[:-keep]:
            if old.resolve() not in linked:
                shutil.rmtree(old)
    barrier()
    return final


def point(link: Path, target: str) -> None:
    """Move a relative link in one step."""
    temporary = link.with_name(f".{link.name}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, link)


def load_state(
    checkpoint: Path, *, optimizer: torch.optim.Optimizer, objective: Any = None, scaler: Any = None, rank: int = 0
) -> Counters:
    """Restore optimiser, objective, counters and this process's random state. Weights are restored with `load_weights`."""
    state = json.loads((checkpoint / "state" / "state.json").read_text())
    _unflatten_optimizer(optimizer, load_file(checkpoint / "state" / "optimizer.safetensors"), state["optimizer"])
    if hasattr(objective, "restore"):
        objective.restore(load_file(checkpoint / "state" / "objective.safetensors"))
    if scaler is not None and state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    own = checkpoint / "state" / f"random-{rank}.safetensors"
    if own.exists():  # a run continued on more processes than before: the new ones keep their fresh state
        _restore_random_state(load_file(own))
    return Counters(**state["counters"])


def load_weights(model: nn.Module, folder: Path, variant: str | None = None) -> dict[str, Tensor]:
    """Load a component's weights strictly and return them.

    Raises: GenkitError when the file holds another architecture, naming the first differences.
    """
    file = folder / ("diffusion_pytorch_model" + (f".{variant}" if variant else "") + ".safetensors")
    if not file.is_file():
        raise GenkitError(
            f"{folder} has no {file.name}; the checkpoint is incomplete: use an earlier one or train again"
        )
    try:
        with safe_open(file, "pt") as handle:
            shapes = {key: tuple(handle.get_slice(key).get_shape()) for key in handle.keys()}
    except Exception as error:
        raise GenkitError(f"{file} is not a readable safetensors file: {error}") from None
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    if shapes != expected:
        missing = sorted(expected.keys() - shapes.keys())
        extra = sorted(shapes.keys() - expected.keys())
        other = [
            f"{k} is {shapes[k]}, expected {expected[k]}"
            for k in sorted(shapes.keys() & expected.keys())
            if shapes[k] != expected[k]
        ]
        problems = [
            f"missing {missing[0]} and {len(missing) - 1} more" if len(missing) > 1 else f"missing {m}"
            for m in missing[:1]
        ]
        problems += [
            f"unknown {extra[0]} and {len(extra) - 1} more" if len(extra) > 1 else f"unknown {e}" for e in extra[:1]
        ]
        problems += [other[0] + (f" and {len(other) - 1} more" if len(other) > 1 else "")] if other else []
        raise GenkitError(
            f"{file} holds another architecture than {type(model).__name__} of this config: {'; '.join(problems)}"
        )
    weights = load_file(file)
    model.load_state_dict(weights)
    return weights


def _flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Optimiser state as tensors by name "index.key" plus JSON-able rest. Hyper-parameters come from the config, not from here."""
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {}
    for index, values in optimizer.state_dict()["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value.contiguous()
            else:
                rest[f"{index}.{key}"] = value
    return tensors, rest


def _unflatten_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], rest: dict[str, Any]) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for name, value in [*tensors.items(), *rest.items()]:
        index, _, key = name.partition(".")
        parameter = parameters[int(index)]
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            # Fused kernels walk parameter and state as flat memory: both must have the same strides (channels-last kernels).
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _random_state() -> dict[str, Tensor]:
    """Global generators. The project draws from genkit.rng; these serve dropout and code outside."""
    version, words, gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["torch"])
    version, *words = state["python"].tolist()
    gauss = state["python_gauss"].tolist()
    random.setstate((version, tuple(words), gauss[0] if gauss else None))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
