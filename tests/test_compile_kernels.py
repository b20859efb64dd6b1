"""Kernels compiled for GPUs that are not there; in processes of their own, where Triton does not interpret."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "compile_kernels.py"

pytest.importorskip("triton.backends.nvidia")


def compile_kernels(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT)] if code is None else [sys.executable, "-c", code, str(SCRIPT)]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, env=os.environ, timeout=280)


def test_a_kernel_is_compiled_for_both_devices(tmp_path):
    out = tmp_path / "table.md"
    run = compile_kernels("block_sparse_attention", "--only", "forward bf16, 32 wide, blocks of 16", "--out", str(out))
    assert run.returncode == 0, run.stderr
    (line,) = [line for line in out.read_text().splitlines() if "32 wide" in line]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[0] == "block_sparse_attention"
    assert 0 < int(cells[3]) <= 255
    assert 0 < int(cells[6]) <= 255
    assert cells[5] == cells[8] == "0"
    assert cells[-2:] == ["yes", "ok"]


# Runs the script with one variant in place of all: as many constants as WHAT says.
GATE = """
import runpy, sys
from genkit.kernels.block_sparse_attention import triton as kernels

found = next(v for v in kernels.variants() if v["name"].startswith("forward bf16, 32 wide"))
found["constexprs"] |= WHAT
found |= {"num_warps": 1, "num_stages": STAGES}
kernels.variants = lambda: [found]
script = sys.argv[1]
sys.argv = [script, "block_sparse_attention"]
runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"SIZE": 64, "BM": 64, "BN": 64, "BK": 32, "BV": 64}, "spills"),
        ({"BK": 24}, "does not compile"),
    ],
)
def test_the_gate_closes(what, message):
    code = "import os; os.environ.pop('TRITON_INTERPRET', None)" + GATE.replace("WHAT", repr(what))
    run = compile_kernels(code=code.replace("STAGES", "2"))
    assert run.returncode == 1, run.stdout
    assert message in run.stdout
    assert message in run.stderr


def test_unknown_operations_are_named():
    run = compile_kernels("block_sparse_atention")
    assert run.returncode == 2
    assert "no operation 'block_sparse_atention' with a Triton path; there are " in run.stderr
