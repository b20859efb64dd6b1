"""What an evaluation has done so far, kept beside its report, so that the same command goes on where it was interrupted."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from genkit import files

_EVERY_S = 60.0  # between two saves; longer where saving itself takes long
_SHARE = 0.05  # of the time that may go into saving


class Partial:
    """The states of some metrics, and how many of this process's samples they hold.

    Args:
        report: file of the report; None = nothing is kept.
        settings: everything the numbers depend on: a state saved under other settings is not continued.
        rank, world: this process, and how many there are.
    """

    def __init__(self, report: Path | None, settings: dict[str, Any], rank: int, world: int):
        self.path = (
            None if report is None else report.with_name(f".{report.stem}.partial-{rank}-of-{world}.safetensors")
        )
        self.key = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
        self._saved = time.monotonic()
        self._every = _EVERY_S

    def restore(self, metrics: list[Any]) -> int:
        """Put saved states into the metrics; how many samples they have seen, 0 = start."""
        if self.path is None or not self.path.exists():
            return 0
        try:
            with safe_open(self.path, "pt") as file:
                about = file.metadata() or {}
                if about.get("key") != self.key:
                    return 0
                names = json.loads(about["names"])
                for metric, own in zip(metrics, names, strict=True):
                    metric.restore({name: file.get_tensor(alias) for name, alias in own.items()})
                return int(about["done"])
        except (SafetensorError, OSError, KeyError, ValueError):
            return 0  # it was being written when the machine stopped; the report itself never depends on it

    def save(self, metrics: list[Any], done: int) -> None:
        """Keep the states, if the last time is long enough ago."""
        if self.path is None or time.monotonic() - self._saved < self._every:
            return
        started = time.monotonic()
        aliases: dict[int, str] = {}  # metrics may share a collection; it is written once
        tensors: dict[str, Tensor] = {}
        names = []
        for metric in metrics:
            own = {}
            for name, value in metric.state().items():
                alias = aliases.setdefault(id(value), str(len(aliases)))
                tensors[alias] = value.contiguous()
                own[name] = alias
            names.append(own)
        about = {"key": self.key, "done": str(done), "names": json.dumps(names)}
        files.write_bytes(self.path, save(tensors, about))
        self._saved = time.monotonic()
        self._every = max(_EVERY_S, (self._saved - started) / _SHARE)

    def remove(self) -> None:
        """The report is written."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
