"""scripts/quickstart from a fresh checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A copy of the scripts with a virtual environment whose pip and genkit only write down how they were called."""
    for name in ("setup.sh", "quickstart"):
        target = tmp_path / "checkout" / "scripts" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / "scripts" / name).read_bytes())
        target.chmod(0o755)
    (tmp_path / "checkout" / "pyproject.toml").write_text("[project]\n")
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        f"""#!/bin/bash
if [ "$1 $2 $3" = "-m pip --version" ]; then exit 0; fi
if [ "$1 $2" = "-m pip" ]; then echo "pip ${{@: -1}}" >>"{tmp_path}/calls"; exit "${{PIP_EXIT:-0}}"; fi
if [ "$1 $2" = "-m genkit" ]; then echo "genkit ${{*:3}}" >>"{tmp_path}/calls"; exit 0; fi
if [[ "$2" == *sys.prefix* ]]; then echo "{tmp_path}/venv"; exit 0; fi
exec "{sys.executable}" "$@"
"""
    )
    python.chmod(0o755)
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path / "venv"))
    monkeypatch.delenv("GENKIT_EXTRAS", raising=False)
    return tmp_path


def quickstart(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    script = folder / "checkout" / "scripts" / "quickstart"
    return subprocess.run([script, *words], capture_output=True, text=True, cwd="/", env={**os.environ, **environment})


def test_quickstart_installs_once_and_passes_its_options(checkout):
    assert quickstart(checkout, "--seed", "1").returncode == 0
    assert quickstart(checkout).returncode == 0
    assert (checkout / "calls").read_text() == "pip .\ngenkit quickstart --seed 1\ngenkit quickstart\n"


def test_quickstart_installs_again_when_the_dependencies_changed(checkout):
    quickstart(checkout)
    (checkout / "checkout" / "pyproject.toml").write_text("[project]\n# new\n")
    quickstart(checkout)
    assert (checkout / "calls").read_text().count("pip .") == 2


def test_a_failed_installation_is_told_and_tried_again(checkout):
    done = quickstart(checkout, PIP_EXIT="1")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert quickstart(checkout).returncode == 0
    assert (checkout / "calls").read_text().endswith("pip .\ngenkit quickstart\n")
