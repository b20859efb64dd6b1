"""Checkpoints and configs as others save them. Nothing that is written in a file is imported or run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genkit.errors import GenkitError, UsageError

# Where checkpoints keep their weights; the averaged ones come first, which people evaluate.
_TABLES = ("ema", "model_ema", "state_dict", "model")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


def read_weights(path: Path) -> tuple[dict[str, Any], list[str]]:
    """(tensors by key, names of what else is in it and was not read) of a checkpoint, or of the one in a folder.

    Raises: UsageError when there is none; GenkitError when it is damaged or holds no weights.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from torch import Tensor

    file = _weights_of(path) if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"{file} does not exist; give a file of weights ({', '.join(_WEIGHTS)}) or a folder with one")
    if file.suffix == ".safetensors":
        try:
            return load_file(file), []
        except (SafetensorError, OSError) as error:
            raise GenkitError(f"{file} is not a readable safetensors file: {' '.join(str(error).split())}") from None
    stored, left_out = _unpickle(file)
    table = _table(stored, file)
    tensors = {key: value for key, value in table.items() if isinstance(value, Tensor)}
    return tensors, left_out + sorted(str(key) for key in table if key not in tensors)


def read_config(path: Path, config: str | Path | Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The options of the original: a mapping, a YAML or JSON file, or by default the config.json beside the weights, if there is one."""
    from genkit import config as configs

    if isinstance(config, Mapping):
        return config
    beside = (path if path.is_dir() else path.parent) / "config.json"
    file = Path(config) if config is not None else beside
    if config is None and not beside.is_file():
        return None
    try:
        found = configs.parse(file.read_text(encoding="utf-8"))
    except Exception as error:  # a missing file, bytes that are no text, text that is no YAML
        raise UsageError(f"--config {file} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(found, Mapping):
        raise UsageError(f"--config {file} must be a mapping of options, found {type(found).__name__}")
    return found


def _weights_of(folder: Path) -> Path:
    """The one file of weights in a folder, safetensors before others, without those of another precision or averages."""
    found = [p for p in sorted(folder.iterdir()) if p.suffix in _WEIGHTS and p.suffixes[:-1] == []]
    found = [p for p in found if p.suffix == ".safetensors"] or found
    if len(found) != 1:
        names = ", ".join(p.name for p in found) or "none"
        raise UsageError(f"{folder} must hold one file of weights, found {names}; name the file itself")
    return found[0]


class _Inert:
    """Stands for every class of a checkpoint that is no tensor: it takes what it is given and does nothing."""

    def __init__(self, *args: Any, **options: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _unpickle(file: Path) -> tuple[Any, list[str]]:
    """A torch file, and the names of classes in it that were replaced by stand-ins. Nothing in the file is imported or run.

    Training frameworks store objects of their own beside the weights, which torch's safe reader refuses. It may make harmless stand-ins
    instead; what it refuses even so (a `posix.system`) is no checkpoint.
    """
    import torch

    try:
        others = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:  # the format before torch 1.6, or no torch file at all: the reader below says which
        others = []
    stand_ins: list[Any] = [(type(name.rpartition(".")[2], (_Inert,), {}), name) for name in others]
    try:
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(file, map_location="cpu", weights_only=True), sorted(others)
    except Exception as error:  # the reader raises many types on broken or hostile bytes
        reason = " ".join(str(error).split()).split(". ")[0][:200]
        held = f" (it holds {', '.join(sorted(others)[:5])})" if others else ""
        raise GenkitError(
            f"{file} cannot be read as weights alone{held}: {reason}; save its state dict as safetensors where it was made"
        ) from None


def _table(stored: Any, file: Path) -> Mapping[str, Any]:
    """The table of weights within a checkpoint: the object itself, or the first of the usual entries that is there."""
    from torch import Tensor

    table = stored
    while isinstance(table, Mapping) and (
        name := next((n for n in _TABLES if isinstance(table.get(n), Mapping)), None)
    ):
        table = table[name]
    if not isinstance(table, Mapping) or not any(isinstance(value, Tensor) for value in table.values()):
        held = ", ".join(map(str, list(stored)[:8])) if isinstance(stored, Mapping) else f"a {type(stored).__name__}"
        raise GenkitError(
            f"{file} holds no table of weights, found {held or 'nothing'}; looked for {', '.join(_TABLES)}"
        )
    return table
