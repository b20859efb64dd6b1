"""The one loop that trains tokenizers and generators.

Everything that decides a step - which samples, their noise, the learning rate - is a function of the seed and of the samples seen. A run may
therefore stop anywhere and continue with the same numbers, and the number of processes does not change the maths.
"""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from genkit import config as configs
from genkit import files, recipes
from genkit.checkpoint import Run
from genkit.console import Progress
from genkit.data.loader import batches
from genkit.errors import GenkitError
from genkit.evaluation.judging import is_due, judge
from genkit.job import Job, set_up
from genkit.nn.packed import multiplied
from genkit.optim import learning_rate
from genkit.rng import Rng
from genkit.snapshots import draw, save


class Stopped(GenkitError):
    """A signal ended training after a checkpoint was saved. Exit code 130 for Ctrl-C, else 85: run the same command to continue."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def train(
    config: str | Path | Mapping[str, Any],
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    name: str | None = None,
    out: str | Path = "runs",
    device: str | None = None,
) -> Run:
    """Train what a recipe describes, or continue it: the same call again resumes.

    Args:
        config: a recipe's path or name, or its content as a mapping.
        overrides: "key=value" texts, or a mapping of dotted keys.
        name: of the run; by default the recipe's name. The run directory is out/name.
        device: "cpu", "cuda", "mps"; by default the best there is.

    Raises:
        UsageError: something in the recipe is wrong, or the run was started with another config.
        Stopped: a signal arrived; a checkpoint was saved.
        GenkitError: the disk is full, the loss is not finite, ...
    """
    if not isinstance(config, Mapping):
        config = recipes.resolve(str(config))
    resolved = configs.resolve(config, overrides, name)
    source = None if isinstance(config, Mapping) else Path(config).read_text(encoding="utf-8")
    job = set_up(resolved, source, Path(out), device)
    with (
        multiplied(job.model),
        stop_signals() as stop,
        Progress(
            total=job.total_samples,
            unit="images",
            title=resolved["name"],
            initial=job.counters.samples,
        ) as progress,
    ):
        loop(job, progress, stop)
    return job.run


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that receives the first signal asking to stop; a second Ctrl-C interrupts at once."""
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    try:
        kept = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    except ValueError:  # not the main thread: a notebook's or server's own handling stays
        kept = {}
    try:
        yield received
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def loop(job: Job, progress: Progress, stop: list[int]) -> None:
    """Fetch, loss, backward, step, average, log, save - until `num_samples` are seen or a signal arrives."""
    settings, log, counters, accelerator = job.config["train"], job.config["log"], job.counters, job.accelerator
    meter = Meter()
    bad_in_a_row = 0
    if counters.samples < job.total_samples and counters.step == 0:
        draw(job)
    if is_due(job):  # interrupted after the checkpoint was saved and before its report was written
        judge(job, progress)
    for batch in fetch(job):
        with accelerator.accumulate(job.wrapped):
            rng = Rng.at(settings["seed"], int(batch["position"][0]), len(batch["position"]), accelerator.device)
            cond = job.cond_of(batch)
            with accelerator.autocast():
                target = job.target_of(batch)
                losses = job.objective(job.wrapped, target, cond, job.layout_of(batch, target), rng)
                loss = torch.stack([value.mean() for name, value in losses.items() if name[0] != "_"]).sum()
            accelerator.backward(loss)
            meter.add(loss, losses)
            if not accelerator.sync_gradients:
                continue
            for group in job.optimizer.param_groups:
                group["lr"] = learning_rate(settings, counters.samples + settings["batch_size"])
            norm = accelerator.clip_grad_norm_(job.model.parameters(), settings["clip"] or float("inf"))
            finite = bool(torch.isfinite(norm))
            if finite or accelerator.scaler is not None:
                job.optimizer.step()  # an fp16 scaler must see the overflow to lower its scale; it skips the step itself
            job.optimizer.zero_grad(set_to_none=True)
            for module in job.model.modules():
                if hasattr(module, "after_step"):
                    module.after_step()
            if hasattr(job.objective, "after_step"):
                job.objective.after_step()
        counters.step += 1
        counters.samples += settings["batch_size"]
        meter.samples += settings["batch_size"]
        if finite:
            bad_in_a_row = 0
            if job.ema is not None:
                job.ema.update(counters.step)
        else:
            bad_in_a_row += 1
            counters.skipped_steps += 1
            progress.line(f"step {counters.step}: loss {loss.item():.4g} is not finite; step skipped")
            if bad_in_a_row >= settings["max_bad_steps"]:
                raise give_up(job, batch, losses)
        progress.advance(settings["batch_size"])
        done = counters.samples >= job.total_samples
        stopping = heard(accelerator, stop)
        if counters.step % log["every_steps"] == 0 or done or stopping:
            report(job, progress, meter, float(norm))
        if counters.step % log["sample_every_steps"] == 0 or done:
            draw(job)
        if counters.step % log["save_every_steps"] == 0 or done or stopping or is_due(job):
            save(job)
        if stopping and not done:
            code = 130 if stopping == signal.SIGINT else 85
            raise Stopped(
                f"stopped by {signal.Signals(stopping).name} after {counters.samples} of {job.total_samples} samples; "
                f"saved {job.run.last}; the same command continues",
                code,
            )
        if is_due(job):
            judge(job, progress)


def fetch(job: Job) -> Iterator[dict[str, Any]]:
    """The rest of the run's samples in micro-batches, on the device."""
    settings = job.config["train"]
    return batches(
        job.dataset,
        batch_size=settings["batch_size"],
        seed=settings["seed"],
        start=job.counters.samples,
        stop=job.total_samples,
        rank=job.accelerator.process_index,
        world_size=job.accelerator.num_processes,
        micro_batch_size=settings["micro_batch_size"],
        num_workers=settings["num_workers"],
        one_size=settings["one_size_batches"],
        device=job.accelerator.device,
    )


class Meter:
    """Means of what was logged since the last line. Sums stay on the device: one synchronisation per line, not per step."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0
        self.samples = 0
        self.started = time.perf_counter()

    def add(self, loss: Tensor, losses: dict[str, Tensor]) -> None:
        for name, value in [("loss", loss), *losses.items()]:
            mean = value.detach().float().mean()
            self.sums[name] = self.sums[name] + mean if name in self.sums else mean
        self.count += 1

    def read(self, accelerator: Accelerator) -> tuple[dict[str, float], int, float]:
        """Means over all processes, the samples they cover and the seconds those took; starts anew."""
        values = accelerator.reduce(
            torch.stack(list(self.sums.values())) / max(1, self.count), reduction="mean"
        ).tolist()
        means = {name.lstrip("_"): value for name, value in zip(self.sums, values, strict=True)}
        samples, seconds = self.samples, time.perf_counter() - self.started
        self.__init__()  # type: ignore[misc]
        return means, samples, seconds


def report(job: Job, progress: Progress, meter: Meter, grad_norm: float) -> None:
    """One line of metrics: to metrics.jsonl, to the screen, to tensorboard where it is installed."""
    counters, settings = job.counters, job.config["train"]
    means, samples, seconds = meter.read(job.accelerator)
    counters.seconds += seconds
    line = {
        "step": counters.step,
        "samples": counters.samples,
        **means,
        "lr": learning_rate(settings, counters.samples),
        "grad_norm": grad_norm,
        "images_per_s": samples / seconds,
        **{
            name: value
            for module in job.model.modules()
            if hasattr(module, "stats")
            for name, value in module.stats().items()
        },
    }
    job.run.metrics = line
    if not job.accelerator.is_main_process:
        return
    with (job.run.path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    progress.report(line)
    with (job.run.path / "log.txt").open("a") as file:
        file.write(progress.text(line) + "\n")
    if job.board is not None:
        for name, value in line.items():
            job.board.add_scalar(name, value, counters.samples)
        job.board.flush()


def heard(accelerator: Accelerator, stop: list[int]) -> int:
    """The signal to stop, agreed by all processes: every one must save at the same step."""
    number = stop[0] if stop else 0
    if accelerator.num_processes == 1:
        return number
    return int(accelerator.gather(torch.tensor([number], device=accelerator.device)).max())


def give_up(job: Job, batch: dict[str, Any], losses: dict[str, Tensor]) -> GenkitError:
    """The error for a loss that stays not finite, with what is needed to look into it saved beside the run."""
    dump = job.run.path / f"bad-step-{job.counters.step:07d}.json"
    values = {name: value.detach().float().flatten().tolist() for name, value in losses.items()}
    files.write_json(
        dump,
        {
            "step": job.counters.step,
            "index": batch["index"].tolist(),
            "losses": {k: list(map(str, v)) for k, v in values.items()},
        },
    )
    kept = f"the last checkpoint is {job.run.last}" if job.run.last else "there is no checkpoint yet"
    return GenkitError(
        f"the loss was not finite for {job.config['train']['max_bad_steps']} steps in a row (step {job.counters.step}); {kept}; "
        f"the samples are in {dump}. A lower train.lr or train.clip usually helps"
    )
