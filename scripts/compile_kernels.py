"""Compile every Triton kernel ahead of time for sm_80 (A100) and sm_90 (H100), without a GPU: `python scripts/compile_kernels.py [NAME...] [--out FILE]`.

A kernel that spills registers to memory, or needs more shared memory than the device has, would run many times slower or not at all; this finds both
before anybody launches it. What is compiled is what each genkit/kernels/<op>/triton.py lists in `variants()`: dictionaries with

    kernel, name                    the kernel function and what is special about this variant
    signature, constexprs           parameter -> type ("*bf16", "i32", "constexpr"), and the values of the constants
    num_warps, num_stages           as launched; and maxnreg, the most registers of a thread (optional)
    aligned                         names of the integers that are multiples of 16 (optional). Pointers are taken to be aligned to 16 bytes, as torch's are.

Exit code 1 when a variant does not compile, spills, or exceeds the shared memory.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

SHARED_KB = {80: 163, 90: 227}  # what a block may use
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Row:
    """What one variant takes on one device; `error` = why it does not compile, else empty."""

    op: str
    name: str
    arch: int
    warps: int
    registers: int
    shared: int  # bytes
    spills: int  # bytes stored and loaded
    uses_tensor_cores: bool
    error: str

    @property
    def verdict(self) -> str:
        if self.error:
            return "does not compile"
        if self.spills:
            return "spills"
        return "too much shared memory" if self.shared > SHARED_KB[self.arch] * 1024 else "ok"


def operations() -> list[str]:
    """Those with a Triton path."""
    return sorted(path.parent.name for path in (ROOT / "genkit" / "kernels").glob("*/triton.py"))


def variants(op: str) -> list[dict[str, Any]]:
    return importlib.import_module(f"genkit.kernels.{op}.triton").variants()


def compile_one(op: str, index: int, arch: int) -> Row:
    """The resources of variants(op)[index], by the assembler that Triton itself uses."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    variant = variants(op)[index]
    kernel = variant["kernel"]
    while not isinstance(kernel, triton.JITFunction):
        kernel = kernel.fn  # under autotune or heuristics
    names = kernel.arg_names
    signature = {name: variant["signature"][name] for name in names}
    aligned = {name for name, kind in signature.items() if kind.startswith("*")} | set(variant.get("aligned", ()))
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    options = {name: variant[name] for name in ("num_warps", "num_stages", "maxnreg") if name in variant}
    try:
        source = ASTSource(fn=kernel, signature=signature, constexprs=variant["constexprs"], attrs=attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        log = assemble(compiled.asm["ptx"], arch)
    except Exception as error:  # whatever the compiler throws belongs in the table
        while error.__cause__ is not None:
            error = error.__cause__  # type: ignore[assignment]
        text = str(error).strip()
        return Row(op, variant["name"], arch, variant["num_warps"], 0, 0, 0, False, text or type(error).__name__)
    registers = max(int(n) for n in re.findall(r"Used (\d+) registers", log))
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", log))
    uses = re.search(r"wgmma\.mma_async|mma\.sync", compiled.asm["ptx"]) is not None
    return Row(op, variant["name"], arch, variant["num_warps"], registers, compiled.metadata.shared, spills, uses, "")


def assemble(ptx: str, arch: int) -> str:
    """What ptxas reports about the text of a kernel."""
    import triton

    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        target = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
        command = [str(ptxas), "-v", "--regAllocOptLevel=2", f"--gpu-name={target}", str(source), "-o", os.devnull]
        return subprocess.run(command, check=True, capture_output=True, text=True).stderr


def table(rows: list[Row]) -> str:
    """For people: one line per variant, both devices beside each other."""
    lines = [
        "| operation | kernel | warps | sm_80: registers | shared KB | spilled B | sm_90: registers | shared KB | spilled B | tensor cores | verdict |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row.arch != 80:
            continue
        other = next(r for r in rows if (r.op, r.name, r.arch) == (row.op, row.name, 90))
        numbers = [f"{r.registers} | {r.shared / 1024:.1f} | {r.spills}" for r in (row, other)]
        verdicts = {f"sm_{r.arch} {r.verdict}" for r in (row, other) if r.verdict != "ok"}
        verdict = ", ".join(sorted(verdicts)) or "ok"
        cores = "yes" if row.uses_tensor_cores and other.uses_tensor_cores else "no"
        lines.append(f"| {row.op} | {row.name} | {row.warps} | {' | '.join(numbers)} | {cores} | {verdict} |")
    return "\n".join(lines)


def document(rows: list[Row]) -> str:
    import triton

    return (
        "# What the Triton kernels take\n\n"
        f"Compiled ahead of time by `python scripts/compile_kernels.py --out docs/results/kernels_gpu.md` with Triton {triton.__version__}, without a GPU: "
        "these are the compiler's figures, not measurements of speed. Limits: 255 registers per thread without spilling, shared memory "
        f"{SHARED_KB[80]} KB per block on sm_80 and {SHARED_KB[90]} KB on sm_90.\n\n" + table(rows) + "\n"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("operations", nargs="*", metavar="NAME", help="operations to compile; none = all")
    parser.add_argument("--only", default="", help="variants whose name holds this text")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--out", type=Path, help="write the table to this file as well")
    asked = parser.parse_args(arguments)
    os.environ.pop(
        "TRITON_INTERPRET", None
    )  # decided when the kernels are imported: interpreted functions do not compile
    known = operations()
    if unknown := sorted(set(asked.operations) - set(known)):
        print(f"no operation '{unknown[0]}' with a Triton path; there are {', '.join(known)}", file=sys.stderr)
        return 2
    tasks = [
        (op, index, arch)
        for op in asked.operations or known
        for index, variant in enumerate(variants(op))
        if asked.only in variant["name"]
        for arch in SHARED_KB
    ]
    if asked.jobs > 1:
        with multiprocessing.get_context("spawn").Pool(asked.jobs) as pool:
            rows = pool.starmap(compile_one, tasks, chunksize=1)
    else:
        rows = [compile_one(*task) for task in tasks]
    if not rows:
        print("no variant has that text in its name", file=sys.stderr)
        return 2
    print(table(rows))
    if asked.out:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(document(rows), encoding="utf-8")
    failed = [row for row in rows if row.verdict != "ok"]
    for row in failed:
        print(f"sm_{row.arch} {row.op} {row.name}: {row.verdict} {row.error}".rstrip(), file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
