"""YAML + key=value -> checked plain data, and messages that say what, where and what to do."""

from __future__ import annotations

import pytest

from genkit import config
from genkit.errors import UsageError


def test_defaults_are_filled_in(recipe):
    loaded = config.load(recipe())
    assert loaded["name"] == "toy"
    assert loaded["tokenizer"]["codebook_size"] == 16
    assert loaded["train"]["batch_size"] == 64
    assert loaded["log"]["keep"] == 2
    assert loaded.task == "tokenize"


def test_a_backbone_makes_it_a_generator(recipe):
    loaded = config.load(recipe("generator"))
    assert loaded.task == "generate"
    assert loaded["sampler"]["guidance"] == 2.0
    assert loaded["sampler"]["num_steps"] == 4


def test_1e_4_is_a_number(recipe):
    assert config.load(recipe())["train"]["lr"] == 1e-4


@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), ("-2E3", -2000.0), ("1.5e3", 1500.0), ("5", 5), ("1e", "1e")]
)
def test_parse_reads_scientific_numbers(text, value):
    parsed = config.parse(text)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "  beta: 0.5\n  codebok_size: 4",
            r"unknown key tokenizer\.codebok_size; did you mean 'codebook_size'\? \[toy\.yaml:6\]",
        ),
        ("  beta: much", r"tokenizer\.beta='much'.*number.*\[toy\.yaml:5\]"),
        ("  beta: 0.5\nlogs: {}", r"unknown section logs; did you mean 'log'\? \[toy\.yaml:6\]"),
        ("  beta: 0.5\nlog: {keeep: 1}", r"unknown key log\.keeep; did you mean 'keep'\? \[toy\.yaml:6\]"),
        ("  beta: 0.5\nlog: {keep: 0}", r"log\.keep=0: .*greater than or equal to 1 \[toy\.yaml:6\]"),
        ("  beta: 0.5\nlog: 3", r"log must be a mapping, found 3 \[toy\.yaml:6\]"),
        ("  beta: 0.5\n  beta: 0.6", r"tokenizer\.beta is written twice \[toy\.yaml:6\]"),
        ("  beta: 0.5\ndata: {type: folder}", r"data is written twice \[toy\.yaml:6\]"),
        ("  beta: [1", r"toy\.yaml:\d+ is not valid YAML"),
    ],
)
def test_a_mistake_is_one_line_with_the_key_and_the_place(recipe, line, message):
    text = recipe().read_text()
    with pytest.raises(UsageError, match=message) as caught:
        config.load(recipe(text.replace("  beta: 0.5", line)))
    assert "\n" not in str(caught.value)


def test_a_mistake_on_the_command_line_says_so(recipe):
    with pytest.raises(UsageError, match=r"unknown key train\.lrr; did you mean 'lr'\? \[command line: train\.lrr=1\]"):
        config.load(recipe(), ["train.lrr=1"])


def test_a_mistake_in_a_metric_is_placed(recipe):
    text = recipe("generator").read_text().replace("outside_parts:Score", "outside_parts:Score\n    cuont: 3")
    with pytest.raises(UsageError, match=r"unknown key metrics\[0\]\.cuont; .*\[toy\.yaml:\d+\]"):
        config.load(recipe(text))


@pytest.mark.parametrize("section", ["data", "train"])
def test_a_missing_section_is_named(recipe, section):
    lines = recipe().read_text().splitlines()
    kept = [line for line in lines if not line.startswith((section, "  num_samples", "  lr"))]
    with pytest.raises(UsageError, match=f"no section `{section}`"):
        config.load(recipe("\n".join(kept)))


@pytest.mark.parametrize("section", ["data", "tokenizer", "objective", "sampler", "metrics", "train"])
def test_a_section_of_the_wrong_kind_is_a_usage_error(recipe, section):
    with pytest.raises(UsageError, match=section):
        config.load(recipe("generator"), [f"{section}=word"])


def test_a_generator_needs_a_trained_tokenizer(recipe):
    with pytest.raises(UsageError, match=r"tokenizer: \{from: runs/NAME\}"):
        config.load(recipe("generator"), ["tokenizer={type: 'outside_parts:Codes'}"])


def test_missing_file_and_wrong_content(recipe, tmp_path):
    with pytest.raises(UsageError, match="no such recipe"):
        config.load(tmp_path / "nothing.yaml")
    with pytest.raises(UsageError, match="must be a mapping of sections, found list"):
        config.load(recipe("- 1\n"))
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="cannot be read"):
        config.load(tmp_path / "bytes.yaml")


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.lr=3e-4", "train.lr", 3e-4),
        ("tokenizer.beta=null", "tokenizer.beta", 0.25),
        ("train.lr=null", "train.lr", 1e-3),
        ("train.ema=null", "train.ema", None),
        ("data.size=[4, 6]", "data.size", [4, 6]),
        ("log.keep=7", "log.keep", 7),
        ("name=other", "name", "other"),
    ],
)
def test_an_override_sets_appends_or_resets(recipe, override, key, value):
    assert config.flatten(config.load(recipe(), [override]))[key] == value


def test_later_overrides_win_and_appending_appends(recipe):
    extra = "metrics+={type: 'outside_parts:Score', count: 3}"
    loaded = config.load(recipe("generator"), ["train.seed=1", extra, "train.seed=2"])
    assert [metric["count"] for metric in loaded["metrics"]] == [10, 3]
    assert loaded["train"]["seed"] == 2


def test_another_type_drops_the_options_of_the_old_one(recipe):
    loaded = config.load(recipe(), ["tokenizer.type=outside_parts:OtherCodes", "tokenizer.levels=[2, 3]"])
    assert loaded["tokenizer"] == {"type": "outside_parts:OtherCodes", "levels": [2, 3]}


def test_the_same_type_again_keeps_the_options(recipe):
    assert config.load(recipe(), ["tokenizer.type=outside_parts:Codes"])["tokenizer"]["beta"] == 0.5


@pytest.mark.parametrize(
    "override",
    ["train.lr", "=3", "train.lr.deep=3", "train.lr=[1", "train.lr=.inf", "metrics.count=1", "tokenizer.from+=x"],
)
def test_an_override_that_makes_no_sense_is_a_usage_error(recipe, override):
    with pytest.raises(UsageError, match=r"\[1|train|metrics|key=value|not a list"):
        config.load(recipe("generator"), [override])


def test_extends_merges_with_the_child_on_top(recipe):
    recipe("tokenizer", "parent.yaml")
    loaded = config.load(recipe("extends: parent.yaml\ntrain: {lr: 5e-4}\n", "child.yaml"))
    assert loaded["name"] == "child"
    assert loaded["train"]["lr"] == 5e-4
    assert loaded["train"]["num_samples"] == 100
    assert loaded["tokenizer"]["beta"] == 0.5


def test_extends_starts_a_part_of_another_type_afresh(recipe):
    recipe("tokenizer", "parent.yaml")
    child = recipe("extends: parent.yaml\ntokenizer: {type: 'outside_parts:OtherCodes', levels: [2]}\n", "child.yaml")
    assert "beta" not in config.load(child)["tokenizer"]


def test_a_mistake_in_the_parent_is_placed_in_the_parent(recipe):
    recipe(recipe().read_text().replace("beta", "betta"), "parent.yaml")
    with pytest.raises(UsageError, match=r"\[parent\.yaml:5\]"):
        config.load(recipe("extends: parent.yaml\n", "child.yaml"))


def test_recipes_that_extend_each_other_are_a_usage_error(recipe):
    recipe("extends: b.yaml\n", "a.yaml")
    with pytest.raises(UsageError, match="extends"):
        config.load(recipe("extends: a.yaml\n", "b.yaml"))


def test_extends_must_be_a_path(recipe):
    with pytest.raises(UsageError, match=r"extends must be the path of a recipe, found 3 \[toy\.yaml:1\]"):
        config.load(recipe("extends: 3\n"))


def test_flatten_goes_into_lists_of_parts_only():
    nested = {"a": {"b": 1, "c": [1, 2]}, "m": [{"type": "x"}, {"type": "y"}], "e": {}}
    assert config.flatten(nested) == {"a.b": 1, "a.c": [1, 2], "m[0].type": "x", "m[1].type": "y", "e": {}}


def test_diff_names_every_changed_key_except_the_free_ones(recipe):
    old = config.load(recipe())
    new = config.load(recipe(), ["train.lr=1", "log.keep=9", "data.root=x"])
    assert config.diff(old, new, free=config.FREE) == ["data.root: None -> x", "train.lr: 0.0001 -> 1.0"]
    assert len(config.diff(old, new)) == 3


def test_digest_depends_on_what_is_computed_only(recipe):
    base = config.digest(config.load(recipe()))
    assert config.digest(config.load(recipe(), ["log.keep=9", "train.num_workers=1"])) == base
    assert config.digest(config.load(recipe(), ["train.seed=1"])) != base


@pytest.mark.parametrize("kind", ["tokenizer", "generator"])
def test_a_dumped_config_loads_as_itself(recipe, kind):
    loaded = config.load(recipe(kind))
    again = config.load(recipe(config.dump(loaded), "again.yaml"))
    assert again == loaded
    assert config.digest(again) == config.digest(loaded)


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", "a b"])
def test_a_name_must_be_a_plain_folder_name(recipe, name):
    with pytest.raises(UsageError, match="must be letters"):
        config.load(recipe(), [f"name={name}"])


@pytest.mark.parametrize("name", ["2024", "1e3", "yes"])
def test_a_name_given_by_code_stays_text(recipe, name):
    assert config.resolve(recipe(), (), name)["name"] == name


def test_the_caller_s_mapping_is_left_alone(recipe):
    given = config.parse(recipe().read_text())
    config.resolve(given, {"train.lr": 1.0})
    assert given["train"]["lr"] == 1e-4
