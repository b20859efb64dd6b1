"""The compiled CPU kernels: which library serves this processor, and how its functions are called.

Every genkit/kernels/<op>/cpu.cpp is compiled with the package, once per instruction set (see setup.py), to _cpu_base.so, _cpu_avx2.so and _cpu_avx512.so
beside it. They hold plain C functions of pointers and numbers, called through ctypes; torch is imported first, so that they share its OpenMP threads and
`torch.set_num_threads` counts for them too.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from genkit.errors import UsageError

KERNELS = Path(__file__).parent / "kernels"
SETS = ("base", "avx2", "avx512")  # each includes those before it


class Missing(Exception):
    """Why there is no library; its text completes "the path cpu cannot run: "."""


def instruction_set() -> str:
    """The best set that this processor has; GENKIT_CPU_SET names a lesser one."""
    has = {"AVX512": 2, "AVX2": 1}.get(torch.backends.cpu.get_cpu_capability().upper(), 0)
    asked = os.environ.get("GENKIT_CPU_SET", SETS[has])
    if asked not in SETS[: has + 1]:
        raise UsageError(f"GENKIT_CPU_SET={asked}: this processor runs {', '.join(SETS[: has + 1])}")
    return asked


@cache
def library(op: str) -> ctypes.CDLL:
    """The compiled kernels of an operation. Raises Missing with the reason."""
    wanted = SETS[: SETS.index(instruction_set()) + 1]
    for name in reversed(wanted):
        path = KERNELS / op / f"_cpu_{name}.so"
        if path.exists():
            try:
                return ctypes.CDLL(str(path))
            except OSError as error:
                raise Missing(f"{path.name} does not load ({error})") from None
    raise Missing(
        "its library was not built; install a C++ compiler with OpenMP (g++) and install genkit again (pip install -e .)"
    )


@cache
def function(op: str, name: str, signature: str) -> Callable[..., None]:
    """A C function of a library, returning nothing.

    Args:
        signature: one letter per argument: "p" a tensor (contiguous, or None for a null pointer), "i" int64, "f" float, "d" double.
    """
    found = getattr(library(op), name)
    found.argtypes = [
        {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float, "d": ctypes.c_double}[letter]
        for letter in signature
    ]
    found.restype = None

    def call(*arguments: torch.Tensor | int | float | None) -> None:
        found(*(a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments))

    return call
