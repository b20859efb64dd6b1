"""Mistakes on the command line, and the untrained runs that they are made with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from genkit import config
from genkit.cli import main
from genkit.pipeline import GeneratorPipeline

Captured = pytest.CaptureFixture[str]


def told_error(capsys: Captured, *words: str) -> str:
    """What wrong usage is answered with."""
    assert main(list(words)) == 2, capsys.readouterr()
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def draw(run: Path, out: Path, *words: str) -> int:
    """Two samples of a run into a folder; the exit code."""
    return main(["sample", str(run), "-n", "2", "-q", "-o", str(out), "--device", "cpu", *words])


def assert_refused(capsys: Captured, run: Path, out: Path, words: list[str], message: str) -> None:
    """A request for samples is answered by one line, and leaves nothing."""
    assert draw(run, out, *words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not out.exists()


def save_untrained(folder: Path, tokenizer: Any, network: Any, sections: Mapping[str, Any], grid: list[int]) -> None:
    """A generator of the classes A and B as training would save it.

    Args:
        sections: of its recipe, those that say how it draws.
    """
    recipe = {**sections, "tokenizer": {"from": "runs/x"}, "train": {"num_samples": 1}}
    plain = json.loads(json.dumps(config.resolve(recipe)))
    GeneratorPipeline(
        tokenizer,
        network,
        objective=plain["objective"],
        sampler=plain["sampler"],
        grid=grid,
        class_names=["A", "B"],
        run_config=plain,
    ).save_pretrained(folder)
