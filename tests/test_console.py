"""What people read while a verb works: progress, tables, durations."""

from __future__ import annotations

import sys

import pytest

from genkit import console


def test_progress_prints_lines_where_there_is_no_terminal(capsys):
    with console.Progress(100, "images", "vq") as progress:
        progress.advance(50, loss=0.5)
        progress.report({"step": 5, "samples": 50, "loss": 0.25})
        progress.line("saved")
        progress.advance(50)
        progress.report({"step": 10, "samples": 100, "loss": 0.125})
    first, saved, last = capsys.readouterr().err.splitlines()
    assert first == "vq 50/100 images, 0 s left: step 5  loss 0.25"
    assert saved == "saved"
    assert last == "vq 100/100 images: step 10  loss 0.125"


def test_progress_draws_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with console.Progress(100, "images", "vq", initial=20) as progress:
        progress.advance(40)
        progress.report({"loss": 0.25, "lr": 1e-3})
        progress.line("a step was skipped")
        progress.log("not shown beside a bar")
        progress.advance(40)
    err = capsys.readouterr().err
    for word in ("vq", "100/100", "images/s", "loss 0.25", "a step was skipped"):
        assert word in err
    assert "not shown" not in err


@pytest.mark.parametrize("quiet", [True, False])
def test_progress_can_be_silent(capsys, monkeypatch, quiet):
    monkeypatch.setattr(console, "_quiet", quiet)
    with console.Progress(10, "images", "vq", enabled=quiet) as progress:
        progress.advance(5)
        progress.report({"loss": 1.0})
        progress.line("event")
    assert capsys.readouterr().err == ""


def test_table_aligns_numbers_right_and_words_left():
    assert console.table([("a", 1), ("long", 22.5)], ("name", "n")) == "name     n\n----  ----\na        1\nlong  22.5"
    assert console.table([]) == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.7, "1 min 00 s"), (125, "2 min 05 s"), (7260, "2 h 01 min")]
)
def test_durations_are_read_by_people(seconds, text):
    assert console.duration(seconds) == text
