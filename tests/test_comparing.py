"""Reports side by side, and an old report against a new one."""

import json

import pytest

from genkit.cli import main
from genkit.errors import GenkitError, UsageError
from genkit.evaluation.comparing import compare, render, verify
from genkit.evaluation.report import Report
from genkit.training import train
from tests.tiny import GENERATOR, TOKENIZER


def report(path, value, *, comparable="adm, N=10", metric="FID", **settings):
    row = {"metric": metric, "value": value, "better": "lower", "comparable": comparable, "protocol": comparable}
    Report([row], settings={"versions": {}, **settings}).save(path)
    return path


def test_only_comparable_numbers_share_a_table(tmp_path):
    paths = [
        report(tmp_path / "a.json", 1.0),
        report(tmp_path / "b.json", 2.0),
        report(tmp_path / "c.json", 3.0, comparable="quick, N=10"),
    ]
    tables = compare(paths)["tables"]
    assert [table["comparable"] for table in tables] == ["adm, N=10", "quick, N=10"]
    assert tables[0]["rows"] == [{"report": "a", "FID": 1.0}, {"report": "b", "FID": 2.0}]


@pytest.mark.parametrize(
    ("change", "unfair"),
    [
        ({}, []),
        ({"parameters": 1_010_000}, []),
        ({"samples": 200}, ["samples"]),
        ({"tokenizer_sha256": "ff" * 32}, ["tokenizer"]),
    ],
)
def test_the_fair_table_says_what_each_was_given(tmp_path, change, unfair):
    given = {"parameters": 1_000_000, "samples": 100, "tokenizer_sha256": "ab" * 32, "num_steps": 8, "guidance": 2.0}
    paths = [report(tmp_path / "a.json", 1.0, **given), report(tmp_path / "b.json", 2.0, **given | change)]
    found = compare(paths, tmp_path / "out")
    assert found["unfair"] == unfair
    assert [row["report"] for row in found["budget"]] == ["a", "b"]
    assert found["budget"][0]["tokenizer"] == "abababab"
    words = "NOT the same " + unfair[0] if unfair else "the same for all, a fair comparison"
    assert words in render(found)
    assert words in (tmp_path / "out" / "compare.md").read_text()
    assert compare(paths[:1])["budget"] == []


def test_curves_are_drawn_over_what_varies(tmp_path):
    pytest.importorskip("matplotlib")
    for i, steps in enumerate((4, 8, 16)):
        report(tmp_path / f"{i}.json", 1 / steps, run="x", num_steps=steps, guidance=2.0, samples=100)
    found = compare(sorted(tmp_path.glob("*.json")), tmp_path / "out")
    assert [path.rpartition("/")[2] for path in found["files"]] == ["compare.md", "curves.png"]
    assert (tmp_path / "out" / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert "| x/0 | 0.25 |" in (tmp_path / "out" / "compare.md").read_text()


def test_what_is_no_report_is_one_line(tmp_path):
    (tmp_path / "x.json").write_text('{"rows": [1]}')
    with pytest.raises(GenkitError, match=r"x\.json is not a report"):
        compare([tmp_path / "x.json"])
    with pytest.raises(GenkitError, match="no such report"):
        verify(tmp_path / "none.json")
    with pytest.raises(UsageError, match="has no reports in eval/"):
        compare([tmp_path])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A tokenizer and a generator that is evaluated while it trains."""
    out = tmp_path_factory.mktemp("work") / "runs"
    train(TOKENIZER, {"train.num_samples": 64}, out=out)
    metrics = [{"type": "class_accuracy", "count": 20}, {"type": "frechet", "count": 20, "reference": "val"}]
    config = GENERATOR | {"tokenizer": {"from": str(out / "vq")}, "metrics": metrics}
    options = {"train.num_samples": 96, "log.eval_every_steps": 2, "log.keep": 1, "log.best": "FD"}
    return train(config, options, out=out).path


def test_training_writes_a_report_per_evaluation_and_links_the_best(runs):
    reports = {path.stem: Report.load(path) for path in sorted((runs / "eval").glob("*.json"))}
    assert list(reports) == ["0000002", "0000004", "0000006"]
    kept = {path.name for path in (runs / "checkpoints").glob("0*")}
    best = (runs / "checkpoints" / "best").resolve().name
    assert best in kept
    assert kept == {best, "0000006"}
    values = {step: found["FD"] for step, found in reports.items()}
    assert best == min(values, key=lambda step: values[step])
    assert reports["0000004"].settings["samples"] == 64


def test_report_of_training_is_confirmed_and_a_forged_one_is_not(runs, capsys):
    path = runs / "eval" / "0000006.json"
    assert main(["eval", "--verify", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["same"]
    assert found["differences"] == []
    forged = json.loads(path.read_text())
    forged["rows"][1]["value"] *= 0.9
    (runs / "eval" / "forged.json").write_text(json.dumps(forged))
    assert main(["eval", "--verify", str(runs / "eval" / "forged.json")]) == 1
    assert "NO" in capsys.readouterr().out
    (runs / "eval" / "forged.json").unlink()


def test_evaluating_changes_nothing_of_the_training(runs, tmp_path):
    from tests.test_training import assert_same

    config = json.loads((runs / "checkpoints" / "0000006" / "pipeline" / "model_index.json").read_text())["run_config"]
    without = train(
        {k: v for k, v in config.items() if k != "name"}, {"log.eval_every_steps": None}, name="plain", out=tmp_path
    )
    assert_same(without.path / "checkpoints" / "0000006" / "state", runs / "checkpoints" / "0000006" / "state")


def test_steps_and_guidance_have_reports_of_their_own(runs, capsys):
    for steps in ("1", "3"):
        assert main(["eval", str(runs), "--steps", steps, "--metrics", "class_accuracy", "-n", "10", "-q"]) == 0
    assert (runs / "eval" / "0000006-steps1-class_accuracy-10.json").exists()
    capsys.readouterr()
    assert main(["eval", "--compare", str(runs)]) == 0
    shown = capsys.readouterr().out
    assert "masked/0000006-steps3-class_accuracy-10" in shown
    assert shown.count("[") >= 2  # ten samples are not put beside twenty


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval"], "eval takes a run, .* got 0 targets"),
        (["eval", "a", "b"], "got 2 targets; `--compare` takes several"),
        (["eval", "--compare"], "--compare needs runs or reports"),
        (["eval", "--compare", "--verify", "a"], "choose one"),
    ],
)
def test_wrong_targets_are_one_line(words, message, capsys):
    import re

    assert main(words) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.count("\n") == 1
