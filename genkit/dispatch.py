"""Chooses how a kernel operation is computed, and can say why.

An operation is a folder genkit/kernels/<op>/ whose files are its paths, each with a function named as the operation and the same arguments:

    triton      GPU; by order only, any tensor under the Triton interpreter (TRITON_INTERPRET=1 from the start)
    cpu         C++ compiled with the package
    torch       plain torch, fast where it runs; serves where the others cannot
    reference   plain torch that mirrors the equation: the specification, for any device and dtype

and, where there is anything to refuse, `refuses(...)` of the same arguments -> why this path cannot take them, or None. The public function is in op.py:
it checks the arguments once and calls the Operation.

The first path in this order that refuses nothing is taken, and the choice is logged once. `path="cpu"`, or GENKIT_KERNEL=cpu for all operations that
have such a path, or GENKIT_KERNEL=gla=torch,linrec=reference for some, is an order: what cannot run raises with the reason, nothing falls back.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from genkit import native
from genkit.errors import UsageError, nearest

PATHS = ("triton", "cpu", "torch", "reference")  # in the order of preference
_KERNELS = Path(__file__).parent / "kernels"
_log = logging.getLogger("genkit.kernels")


# Read once: what torch.compile looks through must not read folders.
_OPERATIONS = sorted(path.parent.name for path in _KERNELS.glob("*/op.py"))


def operations() -> list[str]:
    """Every operation with a public function."""
    return list(_OPERATIONS)


class Operation:
    """The paths of one operation: `linrec = Operation("linrec")`, then `linrec(path, a, b, ...)`.

    What is here is found once, when it is made: calls stay plain enough for torch.compile to see through.
    """

    def __init__(self, name: str):
        self.name = name
        self.paths = tuple(path for path in PATHS if (_KERNELS / name / f"{path}.py").exists())
        self._missing = {path: _missing(name, path) for path in self.paths}
        modules = {path: self._import(path) for path in self.paths if self._missing[path] is None}
        self._functions: dict[str, Callable[..., Any]] = {
            path: getattr(module, name) for path, module in modules.items()
        }
        self._refuses = {path: getattr(module, "refuses", _nothing) for path, module in modules.items()}
        self._logged: set[str] = set()

    def _import(self, path: str) -> Any:
        return importlib.import_module(f"genkit.kernels.{self.name}.{path}")

    def __call__(self, path: str | None, *args: Any, **kwargs: Any) -> Any:
        """The result by the chosen path.

        Args:
            path: one of PATHS, or None to choose.
            args, kwargs: as the paths take them; the first of args is a tensor on the device that counts.

        Raises: UsageError when a path was asked for that cannot run, with the reason.
        """
        return self._functions[self.choose(path, *args, **kwargs)](*args, **kwargs)

    def choose(self, path: str | None, *args: Any, **kwargs: Any) -> str:
        """The path a call takes."""
        asked = path or self._ordered()
        if asked is not None:
            reason = self.refusal(asked, *args, **kwargs)
            if reason is not None:
                origin = "" if path else f" [GENKIT_KERNEL={os.environ.get('GENKIT_KERNEL')}]"
                raise UsageError(f"{self.name}: the path {asked} cannot run: {reason}{origin}")
            return asked
        reasons: list[str] = []
        for name in self.paths:
            reason = self.refusal(name, *args, **kwargs)
            if name == "triton" and args[0].device.type != "cuda":
                reason = reason or "its interpreter is slow and serves only where it is asked for"
            if reason is None:
                if not torch.compiler.is_compiling() and name not in self._logged:
                    self._logged.add(name)
                    _log.info("%s runs by %s%s", self.name, name, "".join(f"; {r}" for r in reasons))
                return name
            reasons.append(f"not by {name}: {reason}")
        raise UsageError(f"{self.name} cannot run: " + "; ".join(reasons))

    def refusal(self, path: str, *args: Any, **kwargs: Any) -> str | None:
        """Why a path cannot take these arguments; None = it can."""
        if path not in self.paths:
            return f"there is no such path; {nearest(path, self.paths)}"
        missing = self._missing[path]
        if missing is not None:
            return missing
        device = args[0].device.type
        if path == "triton" and device != "cuda" and not is_interpreting():
            return f"it needs tensors on a GPU; these are on {device}"
        if path == "cpu" and device != "cpu":
            return f"it needs tensors on the CPU; these are on {device}"
        return self._refuses[path](*args, **kwargs)

    def table(self) -> dict[str, str]:
        """Path -> "ready", or why it cannot run here."""
        return {path: self._missing[path] or "ready" for path in self.paths}

    def _ordered(self) -> str | None:
        """What GENKIT_KERNEL orders for this operation; None = nothing."""
        order = os.environ.get("GENKIT_KERNEL")
        if not order:
            return None
        found = None
        for part in order.split(","):
            name, is_for_one, path = part.rpartition("=")
            if path not in PATHS:
                raise UsageError(f"GENKIT_KERNEL={order}: no path '{path}'; {nearest(path, PATHS)}")
            if is_for_one and name not in operations():
                raise UsageError(f"GENKIT_KERNEL={order}: no operation '{name}'; {nearest(name, operations())}")
            if name == self.name or (not is_for_one and path in self.paths and found is None):
                found = path
        return found


def is_interpreting() -> bool:
    """Whether Triton's kernels run in Python on any device. It counts when their files are imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _missing(name: str, path: str) -> str | None:
    """Why a path cannot run on this machine, whatever the arguments; None = it can."""
    if path == "triton":
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if not torch.cuda.is_available() and not is_interpreting():
            return "there is no GPU (TRITON_INTERPRET=1, set from the start, runs it in Python, slowly)"
    if path == "cpu":
        try:
            native.library(name)
        except native.Missing as error:
            return str(error)
    return None


def _nothing(*args: Any, **kwargs: Any) -> str | None:
    return None
