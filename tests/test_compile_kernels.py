"""Kernels compiled for GPUs that are not there; in processes of their own, where Triton does not interpret."""

from __future__ import annotations

import importlib.util
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


def test_what_does_not_compile_is_told():
    code = """
import os, runpy, sys
os.environ.pop("TRITON_INTERPRET", None)
from genkit.kernels.block_sparse_attention import triton as kernels

found = next(v for v in kernels.variants() if v["name"].startswith("forward bf16, 32 wide"))
found["constexprs"]["BK"] = 24  # no power of 2
kernels.variants = lambda: [found]
sys.argv = [sys.argv[1], "block_sparse_attention"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    run = compile_kernels(code=code)
    assert run.returncode == 1, run.stdout
    assert "sm_80 does not compile, sm_90 does not compile" in run.stdout
    assert "power of 2" in run.stderr


@pytest.mark.parametrize(
    ("shared", "spills", "code", "message"),
    [
        (163 * 1024, 0, 0, ""),
        (1024, 8, 1, "sm_80 some kernel: spills"),
        (164 * 1024, 0, 1, "sm_80 some kernel: too much shared memory"),
    ],
)
def test_the_gate(shared, spills, code, message, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("compile_kernels", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, script)  # its dataclass looks its module up
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", ""))  # the script takes it away
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "operations", lambda: ["some"])
    monkeypatch.setattr(script, "variants", lambda op: [{"name": "kernel"}])
    monkeypatch.setattr(
        script, "compile_one", lambda op, index, arch: script.Row(op, "kernel", arch, 4, 99, shared, spills, True, "")
    )
    assert script.main([]) == code
    found = capsys.readouterr().err
    assert message in found
    assert bool(found) == bool(code)


def test_unknown_operations_are_named():
    run = compile_kernels("block_sparse_atention")
    assert run.returncode == 2
    assert "no operation 'block_sparse_atention' with a Triton path; there are " in run.stderr
