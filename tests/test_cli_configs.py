"""Verbs that look at configs, recipes and runs: config, ls, init, show."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from genkit import cli, recipes, show
from genkit.errors import UsageError

# Configs and recipes


def test_config_check_and_show(recipe, capsys):
    assert cli.main(["config", "check", str(recipe()), "train.lr=2e-4"]) == 0
    assert capsys.readouterr().out.startswith("toy is fine: tokenizer outside_parts:Codes")
    assert cli.main(["config", "show", str(recipe()), "train.lr=2e-4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["train"]["lr"] == 2e-4


def test_config_diff_takes_recipes_and_runs(recipe, run_directory, capsys):
    other = recipe(recipe().read_text().replace("0.5", "0.75"), "other.yaml")
    assert cli.main(["config", "diff", str(run_directory), str(other)]) == 0
    assert "tokenizer.beta: 0.5 -> 0.75" in capsys.readouterr().out
    assert cli.main(["config", "diff", str(run_directory), str(run_directory)]) == 0
    assert capsys.readouterr().out == "no differences\n"


def test_config_explain_names_type_default_and_meaning(capsys):
    assert cli.main(["config", "explain", "train.ema"]) == 0
    out = capsys.readouterr().out
    for word in ("train.ema", "float or null", "0.999", "decay per optimiser step"):
        assert word in out


def test_config_explain_reads_constructors(capsys):
    assert cli.main(["config", "explain", "data.folder.size", "--json"]) == 0
    (key,) = json.loads(capsys.readouterr().out)
    assert key["default"] == "required"
    assert key["about"].startswith("pixels per side")


def test_explain_reads_argument_lists_with_continuation_lines(outside):
    from genkit import explain

    found = {key.path.rpartition(".")[2]: key.about for key in explain.keys("data", f"{outside}:Pixels")}
    assert found["size"] == "pixels per side, or (Y, X)."
    assert found["path"] == found["root"] == "where the files lie."
    assert found["flip"] == ""


@pytest.mark.parametrize("key", ["trian.lr", "train.lrr", "data.folder.sise", "train.lr.deep"])
def test_config_explain_of_an_unknown_key_is_a_usage_error(key, capsys):
    assert cli.main(["config", "explain", key]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_config_schema_lists_sections_and_parts(capsys):
    assert cli.main(["config", "schema"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sections"]["train"]["num_samples"]["default"] == "required"
    assert found["parts"]["data"]["folder"]["keys"]["size"]["about"]


def test_ls_lists_everything_or_one_kind(capsys):
    assert cli.main(["ls", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == set(recipes.KINDS)
    assert cli.main(["ls", "data"]) == 0
    assert "folder" in capsys.readouterr().out


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """Two recipes that come with the package, one on top of the other."""
    folder = tmp_path / "package" / "configs"
    (folder / "toy").mkdir(parents=True)
    (folder / "base.yaml").write_text("# What both share.\ntrain: {num_samples: 1}\n")
    (folder / "toy" / "vq-small.yaml").write_text(
        "# Small. # really\nextends: ../base.yaml  # kept\nname: small # why\n"
    )
    monkeypatch.setattr(recipes, "FOLDER", folder)
    return folder


@pytest.mark.parametrize(
    "word", ["toy/vq-small", "vq-small", "configs/toy/vq-small.yaml", "./configs/toy/vq-small.yaml"]
)
def test_a_recipe_is_found_by_any_of_its_names(shipped, word):
    assert recipes.resolve(word) == shipped / "toy" / "vq-small.yaml"


def test_an_unknown_recipe_names_the_nearest(shipped):
    with pytest.raises(UsageError, match=r"no such recipe: vq-smal; did you mean 'vq-small'?"):
        recipes.resolve("vq-smal")


def test_init_copies_comments_and_keeps_the_parent(shipped, tmp_path, monkeypatch, capsys):
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    assert cli.main(["init", "vq-small", "mine.yaml"]) == 0
    text = Path("mine.yaml").read_text()
    assert text.startswith("# Small. # really\n")
    assert text.endswith("  # kept\nname: small # why\n")
    parent = text.splitlines()[1].split()[1]
    assert (work / parent).resolve() == shipped / "base.yaml"


def test_init_does_not_overwrite(shipped, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("vq-small.yaml").write_text("mine")
    assert cli.main(["init", "vq-small"]) == 1
    assert "vq-small.yaml exists" in capsys.readouterr().err
    assert Path("vq-small.yaml").read_text() == "mine"


# Runs


def test_show_says_what_is_known_of_a_run(run_directory, capsys):
    assert cli.main(["show", str(run_directory)]) == 0
    out = capsys.readouterr().out
    for word in ("50 of 100 samples (50%)", "loss", "0.25", "last: 0000005", "0000005-ema.png", "psnr", "21.5"):
        assert word in out


def test_show_of_a_run_that_has_just_begun(run_directory):
    for name in ("metrics.jsonl", "eval/0000005.json", "samples/0000005-ema.png"):
        (run_directory / name).unlink()
    found = show.summary(str(run_directory))
    assert found["metrics"] == {}
    assert "0 of 100" in show.render(found)


def test_show_names_the_nearest_run(run_directory):
    with pytest.raises(UsageError, match=r"does not exist; did you mean 'toy'?"):
        show.summary(str(run_directory.parent / "tooy"))


def test_ls_runs(run_directory, capsys):
    assert cli.main(["ls", "runs", "-o", str(run_directory.parent), "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == [str(run_directory)]
