"""The loop: resume equals never having stopped, signals, bad losses, full disks, changed configs, processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from genkit.errors import GenkitError, UsageError
from genkit.training import Stopped, train
from tests.tiny import GENERATOR, TOKENIZER


@pytest.fixture
def tokenizer_run(tmp_path):
    return train(TOKENIZER, {"train.num_samples": 64}, out=tmp_path / "runs")


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: raw and averaged weights, optimiser, random state."""
    found = {}
    for file in sorted(checkpoint.rglob("*.safetensors")):
        found |= {f"{file.relative_to(checkpoint)}/{name}": value for name, value in load_file(file).items()}
    return found


def assert_same(a: Path, b: Path) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


def assert_close(a: Path, b: Path) -> None:
    """Equal but for the order of sums: Adam divides by the root of the second moment, which enlarges rounding where gradients are tiny."""
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(
            first[name], second[name], rtol=2e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def start(config: dict, out: Path, *overrides: str, processes: int = 1) -> subprocess.Popen:
    """Training in a process of its own, which tests may kill."""
    recipe = out.parent / f"{config['name']}-{processes}.json"
    recipe.write_text(json.dumps(config))  # JSON is YAML
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*launcher, "-m", "genkit", "train", str(recipe), "--device", "cpu", "--out", str(out), *overrides]
    return subprocess.Popen(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen) -> str:
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0, text
    return text


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)


@pytest.mark.parametrize("kind", ["tokenizer", "generator"])
def test_killed_run_continues_bit_for_bit(kind, tmp_path, tokenizer_run):
    config = TOKENIZER if kind == "tokenizer" else {**GENERATOR, "tokenizer": {"from": str(tokenizer_run.path)}}
    config = {**config, "name": "run"}
    finish(start(config, tmp_path / "straight"))
    slow = start(
        config, tmp_path / "killed", "log.sample_every_steps=1"
    )  # pictures at every step leave time to kill it
    wait_for(tmp_path / "killed/run/checkpoints/last", slow)
    slow.send_signal(signal.SIGKILL)
    slow.wait()
    assert (tmp_path / "killed/run/checkpoints/last").resolve().name == "0000004"
    finish(start(config, tmp_path / "killed"))
    assert_same(tmp_path / "straight/run/checkpoints/last", tmp_path / "killed/run/checkpoints/last")
    steps = [json.loads(line)["step"] for line in (tmp_path / "killed/run/metrics.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6, 8]


def test_signal_saves_and_exit_code_asks_to_requeue(tmp_path):
    process = start(TOKENIZER, tmp_path / "runs", "train.num_samples=100_000")
    wait_for(tmp_path / "runs/vq/checkpoints/last", process)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 85, text
    state = json.loads((tmp_path / "runs/vq/checkpoints/last/state/state.json").read_text())
    last_line = json.loads((tmp_path / "runs/vq/metrics.jsonl").read_text().splitlines()[-1])
    assert state["counters"]["step"] == last_line["step"] > 4
    assert "Traceback" not in text


def test_interrupt_exits_130_after_saving(tmp_path):
    process = start(TOKENIZER, tmp_path / "runs", "train.num_samples=100_000")
    wait_for(tmp_path / "runs/vq/checkpoints/last", process)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 130, text
    assert "same command continues" in text


@pytest.mark.parametrize("kind", ["tokenizer", "generator"])
def test_two_processes_do_not_change_the_maths(kind, tmp_path, tokenizer_run):
    config = TOKENIZER if kind == "tokenizer" else {**GENERATOR, "tokenizer": {"from": str(tokenizer_run.path)}}
    config = json.loads(json.dumps({**config, "name": "run"}))
    if kind == "generator":
        config["backbone"]["dropout"] = 0.0  # the one thing that draws from each process's own generator
    finish(start(config, tmp_path / "one"))
    finish(start(config, tmp_path / "two", processes=2))
    assert_close(tmp_path / "one/run/checkpoints/last/pipeline", tmp_path / "two/run/checkpoints/last/pipeline")


def test_accumulation_does_not_change_the_maths(tmp_path, tokenizer_run):
    config = {**GENERATOR, "tokenizer": {"from": str(tokenizer_run.path)}}
    whole = train(config, {"backbone.dropout": 0}, out=tmp_path / "whole")
    parts = train(config, {"backbone.dropout": 0, "train.micro_batch_size": 4}, out=tmp_path / "parts")
    assert_close(whole.last / "pipeline", parts.last / "pipeline")


def test_changed_config_is_refused_with_the_difference(tmp_path, tokenizer_run):
    with pytest.raises(UsageError, match=r"train\.lr: 0\.001 -> 0\.01"):
        train(TOKENIZER, {"train.num_samples": 64, "train.lr": 0.01}, out=tmp_path / "runs")
    train(TOKENIZER, {"train.num_samples": 64, "log.every_steps": 1}, out=tmp_path / "runs")


def test_a_run_of_a_version_without_an_option_goes_on(tmp_path, tokenizer_run):
    resolved = tokenizer_run.path / "config.resolved.yaml"
    text = resolved.read_text()
    resolved.write_text("".join(line for line in text.splitlines(True) if "max_bad_steps" not in line))
    assert resolved.read_text() != text
    again = train(TOKENIZER, {"train.num_samples": 64}, out=tmp_path / "runs")
    assert again.last == tokenizer_run.last
    with pytest.raises(UsageError, match=r"max_bad_steps: 5 -> 7"):
        train(TOKENIZER, {"train.num_samples": 64, "train.max_bad_steps": 7}, out=tmp_path / "runs")


def test_finished_run_is_left_alone(tmp_path, tokenizer_run):
    before = weights(tokenizer_run.last)
    again = train(TOKENIZER, {"train.num_samples": 64}, out=tmp_path / "runs")
    after = weights(again.last)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_full_disk_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    from genkit import checkpoint

    real = checkpoint.save_file

    def full(tensors, path, *args):
        if "0000008" in str(path) and "optimizer" in str(path):
            raise OSError(28, "No space left on device")
        real(tensors, path, *args)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(GenkitError, match=r"No space left on device.*0000004 is intact"):
        train(TOKENIZER, out=tmp_path / "runs")
    kept = tmp_path / "runs/vq/checkpoints"
    assert sorted(p.name for p in kept.iterdir()) == ["0000004", "last"]
    monkeypatch.undo()
    assert train(TOKENIZER, out=tmp_path / "runs").last.name == "0000008"


def test_checkpoint_of_another_architecture_is_refused(tmp_path, tokenizer_run):
    import yaml

    resolved = tokenizer_run.path / "config.resolved.yaml"
    config = yaml.safe_load(resolved.read_text())
    config["tokenizer"]["codebook_size"] = 32
    resolved.write_text(yaml.safe_dump(config))
    changed = json.loads(json.dumps(TOKENIZER))
    changed["tokenizer"]["codebook_size"] = 32
    with pytest.raises(GenkitError, match=r"another architecture.*expected \(.*32"):
        train(changed, {"train.num_samples": 64}, out=tmp_path / "runs")


def test_loss_that_is_not_finite_is_skipped_then_stops_the_run(tmp_path, monkeypatch):
    from genkit.objectives.reconstruction import Reconstruction

    real = Reconstruction.__call__
    bad_steps = {2, 3}
    calls = []

    def poisoned(self, *args):
        calls.append(None)
        losses = real(self, *args)
        if len(calls) in bad_steps:
            losses = {name: value * float("nan") for name, value in losses.items()}
        return losses

    monkeypatch.setattr(Reconstruction, "__call__", poisoned)
    run = train(TOKENIZER, out=tmp_path / "runs")
    assert json.loads((run.last / "state/state.json").read_text())["counters"]["skipped_steps"] == 2
    assert all(value.isfinite().all() for value in weights(run.last).values())

    bad_steps |= set(range(1, 1000))
    calls.clear()
    with pytest.raises(GenkitError, match="not finite for 5 steps in a row"):
        train(TOKENIZER, out=tmp_path / "again")
    assert list((tmp_path / "again/vq").glob("bad-step-*.json"))


def test_size_that_does_not_fit_the_stride_names_one_that_does(tmp_path):
    with pytest.raises(UsageError, match=r"30x30 is not divisible by .* stride 4; try data.size=28 or 32"):
        train(TOKENIZER, {"data.size": 30}, out=tmp_path / "runs")


def test_missing_tokenizer_run_names_a_near_one(tmp_path, tokenizer_run):
    config = {**GENERATOR, "tokenizer": {"from": str(tmp_path / "runs/vqq")}}
    with pytest.raises(UsageError, match="did you mean 'vq'"):
        train(config, out=tmp_path / "runs")


def test_stopped_has_the_exit_code_of_its_signal():
    assert Stopped("", 85).exit_code == 85


def test_loss_falls_and_pictures_are_written(tmp_path, tokenizer_run):
    config = {**GENERATOR, "tokenizer": {"from": str(tokenizer_run.path)}}
    log = {"log.save_every_steps": 500, "log.every_steps": 20}
    run = train(config, {"train.num_samples": 3200, "train.lr": 5e-3, **log}, out=tmp_path / "runs")
    history = run.history
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    assert {"nll", "accuracy", "lr", "grad_norm", "images_per_s"} <= history[-1].keys()
    assert {"usage", "perplexity", "dead", "psnr"} <= tokenizer_run.history[-1].keys()
    for picture in (run.path / "samples/0000200-ema.png", tokenizer_run.path / "samples/0000004-ema.png"):
        assert picture.stat().st_size > 500
        assert json.loads(picture.with_suffix(".json").read_text())["weights"] == "ema"
