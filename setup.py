"""Compiles the CPU kernels: every genkit/kernels/<op>/cpu.cpp, once per instruction set, as a plain shared library with a C interface.

Everything else about the package is in pyproject.toml. The libraries are optional: without a compiler the package installs, plain torch serves, and
`genkit env` says so.
"""

import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

KERNELS = Path("genkit", "kernels")
# Instruction set -> flags; genkit/native.py picks the best one that the processor has. Elsewhere than on x86-64 the compiler's default serves.
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
SETS = (
    {"base": [], "avx2": ["-march=x86-64-v3"], "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"]}
    if IS_X86
    else {"base": []}
)
# What -ffast-math allows but for what NaN and infinity need: these must come out of a kernel as they went in.
FAST = ["-O3", "-std=c++17", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros"]
FAST += ["-fassociative-math", "-freciprocal-math", "-fno-semantic-interposition"]


class BuildLibraries(build_ext):
    """No Python interface: the file needs no Python version in its name, and one build serves all of them."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"


setup(
    cmdclass={"build_ext": BuildLibraries},
    ext_modules=[
        Extension(
            f"genkit.kernels.{source.parent.name}._cpu_{name}",
            sources=[str(source)],
            include_dirs=[str(KERNELS)],
            depends=[str(header) for header in [*KERNELS.glob("*.h"), *source.parent.glob("*.h")]],
            extra_compile_args=[*FAST, *flags],
            extra_link_args=["-fopenmp"],
            language="c++",
            optional=True,
        )
        for source in sorted(KERNELS.glob("*/cpu.cpp"))
        for name, flags in SETS.items()
    ],
)
