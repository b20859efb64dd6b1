"""Several processes of one command."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from genkit import cli

ROOT = Path(__file__).parent.parent
WORKER = """
import os, signal, sys, time
from pathlib import Path
rank, folder = os.environ["RANK"], Path(sys.argv[-1])
if sys.argv[2] == "fail":
    sys.exit(7 if rank == "1" else 0)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(85))
(folder / rank).write_text(" ".join([os.environ["WORLD_SIZE"], os.environ["MASTER_PORT"], *sys.argv[1:3]]))
time.sleep(20 if sys.argv[2] == "wait" else 0)
"""


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """`python -m genkit` runs WORKER, in this process's children."""
    (tmp_path / "genkit").mkdir()
    (tmp_path / "genkit" / "__main__.py").write_text(WORKER)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_launch_starts_processes_that_find_each_other(worker):
    from genkit.launch import launch

    assert launch(["train", "go", str(worker)], 3) == 0
    told = {(worker / str(rank)).read_text() for rank in range(3)}
    assert len(told) == 1
    assert told.pop().startswith("3 ")


def test_launch_reports_the_exit_code_of_the_one_that_failed(worker):
    from genkit.launch import launch

    assert launch(["train", "fail", str(worker)], 2) == 7


def test_launch_passes_signals_on(worker):
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from genkit.launch import launch; "
    program += f"sys.exit(launch(['train', 'wait', {str(worker)!r}], 2))"
    process = subprocess.Popen([sys.executable, "-c", program], cwd=worker)
    while not all((worker / rank).exists() for rank in "01"):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=15) == 85


@pytest.mark.parametrize("words", [["--launch", "2"], ["--launch=2"]])
def test_launched_processes_get_the_same_command_without_launch(monkeypatch, tmp_path, words):
    path = tmp_path / "r.yaml"
    path.write_text("")
    calls = []
    monkeypatch.setattr("genkit.launch.launch", lambda words, processes: calls.append((words, processes)) or 85)
    assert cli.main(["train", str(path), *words, "a=1", "--json"]) == 85
    assert calls == [(["train", str(path), "a=1", "--json"], 2)]
