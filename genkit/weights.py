"""Weights: by what hash they are known, where published ones are looked for, how they are read. Nothing is downloaded."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from genkit.errors import GenkitError


@dataclass(frozen=True)
class WeightsFile:
    """A published file of weights. Never downloaded: looked for, and its hash is checked.

    Attributes:
        of: what it holds the weights of, for messages.
        name: of the file.
        url: where it can be had.
        sha256: 64 hex digits.
    """

    of: str
    name: str
    url: str
    sha256: str

    def locate(self, given: str | None = None) -> Path:
        """The file itself.

        Args:
            given: a file of any name, or a folder that holds it; else $GENKIT_WEIGHTS (the same), else the cache folder.

        Raises: GenkitError naming where it can be had and where it belongs.
        """
        if given is not None:
            path = Path(given) / self.name if Path(given).is_dir() else Path(given)
            if not path.is_file():
                raise GenkitError(f"weights of {self.of}: no such file: {path}")
            return path
        named = Path(os.environ.get("GENKIT_WEIGHTS") or os.devnull)
        target = weights_folder() / self.name
        # A file that is named may be another net's: there is one variable for all of them.
        if named.is_file() and (named.name == self.name or file_sha256(named) == self.sha256):
            return named
        for path in (named / self.name, target):
            if path.is_file():
                return path
        raise GenkitError(
            f"the weights of {self.of} are not here and are never downloaded silently: put {self.url} (sha256 {self.sha256}) "
            f"at {target}, or name the file with --weights or GENKIT_WEIGHTS"
        )

    def check(self, path: Path, given: str | None = None) -> str:
        """The file's sha256. Raises GenkitError when it is not the published one, unless the file was given explicitly."""
        found = file_sha256(path)
        if given is None and found != self.sha256:
            hint = f"; get {self.url} again, or name other weights with --weights" if self.url else ""
            raise GenkitError(
                f"{path} is not the {self.of} weights: its sha256 is {found[:16]}..., expected {self.sha256[:16]}...{hint}"
            )
        return found


def read_state(path: Path, of: str) -> dict[str, Tensor]:
    """Tensors of a safetensors or torch file, on the CPU. Raises GenkitError for anything else; nothing but tensors is unpickled."""
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # readers raise many unrelated types on broken bytes
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise GenkitError(f"{path} cannot be read as weights of {of}: {reason}") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise GenkitError(f"{path} cannot be read as weights of {of}: it is not a dictionary of tensors")
    return state


def weights_folder() -> Path:
    """Where weights are kept: $GENKIT_CACHE/weights, else ~/.cache/genkit/weights."""
    return Path(os.environ.get("GENKIT_CACHE") or Path.home() / ".cache" / "genkit") / "weights"


def file_sha256(path: str | Path) -> str:
    """sha256 of a file, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def module_sha256(module: nn.Module) -> str:
    """sha256 over names, types, shapes and bytes of a module's weights, hex: the same hash, the same model."""
    found = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        data = value.detach().cpu().contiguous()
        found.update(f"{name} {data.dtype} {tuple(data.shape)}\n".encode())
        found.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
