"""Word in a config -> file -> class -> part."""

from __future__ import annotations

import pytest

from genkit import registry
from genkit.errors import UsageError


@pytest.mark.parametrize("section", registry.FAMILIES)
def test_every_word_names_a_class_with_a_keyword_only_constructor(section):
    for word, about in registry.words(section).items():
        assert about, f"{section} {word}: the file has no docstring"
        cls = registry.find(section, word)
        assert cls.__name__.lower() == word.replace("_", "")
        registry.options(cls)


def test_files_without_a_class_of_their_name_are_no_parts():
    assert "memory" not in registry.words("data")
    assert "folder" in registry.words("data")


def test_unknown_word_names_the_nearest():
    with pytest.raises(UsageError, match=r"data\.type=foldr is not a data; did you mean 'folder'\? \[r\.yaml:3\]"):
        registry.find("data", "foldr", "r.yaml:3")


def test_part_outside_the_tree(outside):
    assert registry.find("tokenizer", f"{outside}:Codes").__name__ == "Codes"


@pytest.mark.parametrize("word", ["outside_parts:Nothing", "no_such_module_at_all:Part", "os:getcwd"])
def test_missing_part_outside_the_tree_is_a_usage_error(outside, word):
    with pytest.raises(UsageError, match=f"tokenizer.type={word}"):
        registry.find("tokenizer", word)


def test_options_are_the_keyword_only_arguments_with_evaluated_types(outside):
    options = registry.options(registry.find("tokenizer", f"{outside}:Codes"))
    assert list(options) == ["image_channels", "codebook_size", "beta", "kind"]
    assert options["beta"].annotation is float
    assert options["beta"].default == 0.25


def test_options_see_through_decorated_constructors():
    from diffusers import ConfigMixin
    from diffusers.configuration_utils import register_to_config

    class Wrapped(ConfigMixin):
        config_name = "config.json"

        @register_to_config
        def __init__(self, *, width: int = 3):
            pass

    assert registry.options(Wrapped)["width"].annotation is int


def test_check_fills_in_defaults_and_converts(outside):
    checked = registry.check("tokenizer", {"type": f"{outside}:Codes", "beta": "3e-4"}, "tokenizer")
    assert checked == {"type": f"{outside}:Codes", "codebook_size": 16, "beta": 3e-4, "kind": "ema"}


def test_check_returns_what_yaml_can_hold(outside):
    assert registry.check("data", {"type": f"{outside}:Pixels", "size": [4, 6]}, "data")["size"] == [4, 6]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"codebok_size": 3}, r"unknown key tokenizer\.codebok_size; did you mean 'codebook_size'\?"),
        ({"codebook_size": "many"}, r"tokenizer\.codebook_size='many'.*integer"),
        ({"kind": "other"}, r"tokenizer\.kind='other'.*'ema' or 'plain'"),
        ({"image_channels": 3}, r"tokenizer\.image_channels is measured from the data"),
    ],
)
def test_check_names_the_key_that_is_wrong_and_where_it_was_set(outside, spec, message):
    with pytest.raises(UsageError, match=message + r".*\[here\]"):
        registry.check("tokenizer", {"type": f"{outside}:Codes", **spec}, "tokenizer", lambda path: "here")


def test_check_names_a_missing_key(outside):
    with pytest.raises(UsageError, match=r"tokenizer\.levels is missing"):
        registry.check("tokenizer", {"type": f"{outside}:OtherCodes"}, "tokenizer")


@pytest.mark.parametrize("spec", [None, "vq", 3, [], {}, {"type": 3}])
def test_a_part_without_a_type_is_a_usage_error(spec):
    with pytest.raises(UsageError, match="must be a mapping with a `type`"):
        registry.check("tokenizer", spec, "tokenizer")


def test_nested_parts_are_checked_under_their_own_name(outside):
    net = {"type": f"{outside}:Net", "mixer": {"type": f"{outside}:Mix", "num_head": 4}}
    with pytest.raises(UsageError, match=r"unknown key backbone\.mixer\.num_head; did you mean 'num_heads'\?"):
        registry.check("backbone", net, "backbone")
    net["mixer"] = [{"type": f"{outside}:Mix"}, {"type": f"{outside}:Mix", "num_heads": "x"}]
    with pytest.raises(UsageError, match=r"backbone\.mixer\[1\]\.num_heads='x'"):
        registry.check("backbone", net, "backbone")


def test_an_empty_pattern_of_nested_parts_is_a_usage_error(outside):
    with pytest.raises(UsageError, match=r"backbone\.mixer is an empty list"):
        registry.check("backbone", {"type": f"{outside}:Net", "mixer": []}, "backbone")


def test_a_nested_part_by_default_is_as_complete_as_one_written_down(outside):
    module = __import__(outside)

    class Deep:
        def __init__(self, *, mixer: registry.MixerSpec = {"type": f"{outside}:Mix"}):  # noqa: B006
            self.mixer = mixer

    module.Deep = Deep
    Deep.__init__.__annotations__["mixer"] = registry.MixerSpec
    short = registry.check("backbone", {"type": f"{outside}:Deep"}, "backbone")
    assert short["mixer"] == {"type": f"{outside}:Mix", "num_heads": 2}


def test_null_means_the_default_unless_null_is_a_value(outside):
    assert registry.check("tokenizer", {"type": f"{outside}:Codes", "beta": None}, "tokenizer")["beta"] == 0.25
    assert registry.check("data", {"type": f"{outside}:Pixels", "root": None}, "data")["root"] is None


def test_build_gives_a_part_what_its_constructor_names(outside):
    spec = registry.check("tokenizer", {"type": f"{outside}:Codes", "beta": 1}, "tokenizer")
    part = registry.build("tokenizer", spec, image_channels=3, nobody_asked=1)
    assert (part.image_channels, part.beta, part.codebook_size) == (3, 1.0, 16)


def test_maker_repeats_a_list_of_parts_through_the_depth(outside):
    specs = [{"type": f"{outside}:Mix", "num_heads": 1}, {"type": f"{outside}:Mix", "num_heads": 5}]
    make = registry.maker("mixer", specs)
    assert [make(dim=8, layer=i).num_heads for i in range(5)] == [1, 5, 1, 5, 1]
    assert registry.maker("mixer", specs[1])(dim=8, layer=2).layer == 2
