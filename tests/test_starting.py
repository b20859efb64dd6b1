"""Training that starts from other weights: equal to them at first, resumable, and refused where they do not fit."""

import copy
import shutil

import pytest
import torch

from genkit.checkpoint import point
from genkit.errors import UsageError
from genkit.pipeline import open_run
from genkit.starting import start_from
from genkit.training import train
from tests.tiny import GENERATOR, TOKENIZER


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    tokenizer = train(TOKENIZER, {"train.num_samples": 64}, name="tokenizer", out=out)
    train(
        {**GENERATOR, "tokenizer": {"from": str(tokenizer.path)}}, {"train.num_samples": 64}, name="generator", out=out
    )
    return out


def recipe(runs, part):
    return TOKENIZER if part == "tokenizer" else {**GENERATOR, "tokenizer": {"from": str(runs / "tokenizer")}}


def state(run, part):
    return getattr(open_run(run), part).state_dict()


@pytest.mark.parametrize("part", ["tokenizer", "generator"])
def test_a_step_of_no_length_leaves_the_weights_it_started_from(part, runs, tmp_path):
    options = {"train.init": str(runs / part), "train.num_samples": 1, "train.lr": 1e-12, "train.weight_decay": 0.0}
    train(recipe(runs, part), options, name="tuned", out=tmp_path)
    name = "tokenizer" if part == "tokenizer" else "backbone"
    before, after = state(runs / part, name), state(tmp_path / "tuned", name)
    for key in dict(getattr(open_run(tmp_path / "tuned"), name).named_parameters()):
        torch.testing.assert_close(after[key], before[key], rtol=0, atol=1e-6, msg=key)


def test_what_is_continued_does_not_start_again(runs, tmp_path, monkeypatch):
    options = {"train.init": str(runs / "generator"), "train.num_samples": 128}
    straight = train(recipe(runs, "generator"), options, name="straight", out=tmp_path)
    fresh = train(recipe(runs, "generator"), {"train.num_samples": 128}, name="fresh", out=tmp_path)
    assert straight.metrics["loss"] < fresh.metrics["loss"]
    before = state(straight.path, "backbone")
    shutil.rmtree(straight.last)
    point(straight.path / "checkpoints" / "last", "0000004")

    def start_again(*_):
        raise AssertionError

    monkeypatch.setattr("genkit.job.start_from", start_again)
    again = state(train(recipe(runs, "generator"), options, name="straight", out=tmp_path).path, "backbone")
    assert all(torch.equal(value, before[name]) for name, value in again.items())


def test_new_parameters_stay_as_they_were_made(runs):
    model = copy.deepcopy(open_run(runs / "generator").backbone)
    name, parameter = next(iter(model.named_parameters()))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(7.0)
    start_from(model, str(runs / "generator"), "backbone", [name])
    assert bool((parameter == 7).all())
    others = [p for key, p in model.named_parameters() if key != name]
    assert not any(bool((p == 7).all()) for p in others)


def test_what_does_not_fit_is_named(runs, tmp_path):
    tokenizer = str(runs / "tokenizer")
    with pytest.raises(UsageError, match="is a tokenizer, and this recipe trains a generator"):
        train(recipe(runs, "generator"), {"train.init": tokenizer}, name="a", out=tmp_path)
    wider = {"train.init": tokenizer, "tokenizer.codebook_size": 48}
    with pytest.raises(UsageError, match=r"does not fit this tokenizer: of other shapes: \S+ is \[.*there and"):
        train(TOKENIZER, wider, name="b", out=tmp_path)
    misspelt = {"train.init": tokenizer, "train.init_new": ["lable.*"]}
    with pytest.raises(UsageError, match="nothing in the tokenizer is called 'lable"):
        train(TOKENIZER, misspelt, name="c", out=tmp_path)
    with pytest.raises(UsageError, match="does not exist"):
        train(TOKENIZER, {"train.init": str(runs / "nowhere")}, name="d", out=tmp_path)
