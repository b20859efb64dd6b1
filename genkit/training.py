"""Set-up and the one loop that trains tokenizers and generators.

Everything that decides a step - which samples, their noise, the learning rate - is a function of the seed and of the samples seen. A run may
therefore stop anywhere and continue with the same numbers, and the number of processes does not change the maths.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor

from genkit import caching, checkpoint, files, images, registry
from genkit import config as configs
from genkit.checkpoint import Counters, Run
from genkit.console import Progress
from genkit.data.cache import check_size
from genkit.data.loader import batches, read_all
from genkit.ema import Ema
from genkit.errors import GenkitError, UsageError
from genkit.interfaces import Layout
from genkit.nn.layout import dense_layout
from genkit.optim import adamw, learning_rate
from genkit.pipeline import GeneratorPipeline, TokenizerPipeline
from genkit.rng import Rng, sample_seeds


class Stopped(GenkitError):
    """A signal ended training after a checkpoint was saved. Exit code 130 for Ctrl-C, else 85: run the same command to continue."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


@dataclass
class Job:
    """Everything the loop touches."""

    config: configs.Config
    run: Run
    accelerator: Accelerator
    model: Any  # the trained module; `wrapped` is what is called, so that gradients are synchronised
    wrapped: Any
    optimizer: Any
    ema: Ema | None
    objective: Any
    dataset: Any
    tokenizer: Any  # frozen, of a generator; None when a tokenizer is trained
    layout: Layout | None
    class_names: tuple[str, ...]
    counters: Counters
    board: Any = None  # tensorboard writer, on the main process

    @property
    def total_samples(self) -> int:
        """`num_samples` in whole batches."""
        train = self.config["train"]
        return -(-train["num_samples"] // train["batch_size"]) * train["batch_size"]


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
        config: a recipe's path, or its content as a mapping.
        overrides: "key=value" texts, or a mapping of dotted keys.
        name: of the run; by default the recipe's name. The run directory is out/name.
        device: "cpu", "cuda", "mps"; by default the best there is.

    Raises:
        UsageError: something in the recipe is wrong, or the run was started with another config.
        Stopped: a signal arrived; a checkpoint was saved.
        GenkitError: the disk is full, the loss is not finite, ...
    """
    resolved = configs.resolve(config, overrides, name)
    source = None if isinstance(config, Mapping) else Path(config).read_text(encoding="utf-8")
    job = set_up(resolved, source, Path(out), device)
    with (
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


def set_up(config: configs.Config, source: str | None, out: Path, device: str | None) -> Job:
    """Build every part, open the run directory, restore the last checkpoint."""
    settings = config["train"]
    accelerator = make_accelerator(settings, device)
    torch.manual_seed(settings["seed"])  # initial weights, dropout
    random.seed(settings["seed"])  # code outside the project
    objective = registry.build("objective", config["objective"])
    tokenizer, layout = None, None
    if config.task == "tokenize":
        dataset = registry.build("data", config["data"])
        model = registry.build("tokenizer", config["tokenizer"], image_channels=dataset.info.shape[0])
        check_size(dataset.info.shape, model.stride)
        class_names = dataset.info.class_names
        run = open_on_main(accelerator, out, config, source)
    else:
        tokenizer, fingerprint = caching.tokenizer_of(config, accelerator.device)
        run = open_on_main(accelerator, out, config, source)
        with accelerator.main_process_first():
            dataset = caching.token_dataset(config, tokenizer, fingerprint, out.parent / "cache", accelerator.device)
        grid = tuple(dataset.meta["grid"])
        class_names = tuple(dataset.info.class_names)
        layout = dense_layout(grid, device=accelerator.device)
        model = registry.build(
            "backbone",
            config["backbone"],
            channels=tokenizer.channels,
            codebook_size=tokenizer.codebook_size,
            num_levels=tokenizer.num_levels,
            num_classes=len(class_names),
            grid=grid,
        )
    model.to(accelerator.device)
    optimizer = adamw(model, settings)
    ema = Ema(model, settings["ema"]) if settings["ema"] is not None else None
    counters = Counters()
    last = run.last
    if last is not None:
        part = "tokenizer" if config.task == "tokenize" else "backbone"
        if ema is not None:
            ema.load(checkpoint.load_weights(model, last / "pipeline" / part, variant="ema"))
        checkpoint.load_weights(model, last / "pipeline" / part)
        counters = checkpoint.load_state(
            last, optimizer=optimizer, scaler=accelerator.scaler, rank=accelerator.process_index
        )
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    wrapped.train()
    job = Job(
        config,
        run,
        accelerator,
        model,
        wrapped,
        optimizer,
        ema,
        objective,
        dataset,
        tokenizer,
        layout,
        class_names,
        counters,
    )
    if accelerator.is_main_process:
        record_start(job)
        job.board = tensorboard(run)
    return job


def make_accelerator(settings: dict[str, Any], device: str | None) -> Accelerator:
    """Device, precision and gradient accumulation, from the `train` section and the processes there are."""
    use_cpu = device == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    if device not in (None, "cpu") and use_cpu:
        raise UsageError(f"--device {device}: there is no such device here; `genkit env` shows what there is")
    precision = {"fp32": "no", "auto": "no"}.get(settings["precision"], settings["precision"])
    if settings["precision"] == "auto" and not use_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported():
        precision = "bf16"
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if use_cpu and processes > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", processes))))
    per_process = settings["batch_size"] // processes
    micro = settings["micro_batch_size"] or per_process
    if micro == 0 or settings["batch_size"] % (processes * micro):
        raise UsageError(
            f"train.batch_size={settings['batch_size']} is not {processes} processes x micro_batch_size={micro} x a whole number; "
            "change one of them"
        )
    return Accelerator(
        cpu=use_cpu,
        mixed_precision=precision,
        gradient_accumulation_steps=per_process // micro,
        # Codebooks are kept identical by their own reductions; broadcasting every buffer each step would only cost time.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )


def open_on_main(accelerator: Accelerator, out: Path, config: configs.Config, source: str | None) -> Run:
    """The run directory, made by the main process and seen by all."""
    with accelerator.main_process_first():
        return checkpoint.open_run_folder(out / config["name"], config, source)


def record_start(job: Job) -> None:
    """Append versions and machine to env.json; drop metrics that a resumed run will write again."""
    from genkit import env

    path = job.run.path / "env.json"
    starts = json.loads(path.read_text()) if path.exists() else []
    files.write_json(path, [*starts, {"step": job.counters.step, **env.collect()}])
    kept = [line for line in job.run.history if line["step"] <= job.counters.step]
    files.write_text(job.run.path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))


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
    for batch in fetch(job):
        with accelerator.accumulate(job.wrapped):
            rng = Rng.at(settings["seed"], int(batch["position"][0]), len(batch["position"]), accelerator.device)
            cond = {"label": batch["label"]} if job.tokenizer is not None else {}
            with accelerator.autocast():
                losses = job.objective(job.wrapped, batch[job.objective.target], cond, job.layout, rng)
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
        if counters.step % log["save_every_steps"] == 0 or done or stopping:
            save(job)
        if stopping and not done:
            code = 130 if stopping == signal.SIGINT else 85
            raise Stopped(
                f"stopped by {signal.Signals(stopping).name} after {counters.samples} of {job.total_samples} samples; "
                f"saved {job.run.last}; the same command continues",
                code,
            )


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


def save(job: Job) -> None:
    """A checkpoint: the pipeline as people load it, and what is needed to continue."""
    checkpoint.save(
        job.run,
        job.counters,
        write_pipeline=lambda folder: write_pipeline(job, folder),
        optimizer=job.optimizer.optimizer,
        scaler=job.accelerator.scaler,
        rank=job.accelerator.process_index,
        barrier=job.accelerator.wait_for_everyone,
        keep=job.config["log"]["keep"],
    )


def pipeline_of(job: Job) -> TokenizerPipeline | GeneratorPipeline:
    """The model being trained, as a pipeline that shares its weights."""
    config = json.loads(json.dumps(job.config))
    if job.tokenizer is None:
        return TokenizerPipeline(job.model, run_config=config)
    assert job.layout is not None
    assert job.layout.grid is not None
    return GeneratorPipeline(
        job.tokenizer,
        job.model,
        objective=config["objective"],
        sampler=config["sampler"],
        grid=list(job.layout.grid),
        class_names=list(job.class_names),
        run_config=config,
    )


def write_pipeline(job: Job, folder: Path) -> None:
    part = "tokenizer" if job.tokenizer is None else "backbone"
    pipeline_of(job).save_pretrained(folder)
    if job.ema is not None:
        with job.ema.applied():
            job.model.save_pretrained(folder / part, variant="ema")


@contextlib.contextmanager
def averaged(job: Job) -> Iterator[None]:
    """The model in eval mode with averaged weights, inside the block."""
    job.model.eval()
    with job.ema.applied() if job.ema is not None else contextlib.nullcontext(), torch.no_grad():
        yield
    job.model.train()


def draw(job: Job) -> None:
    """A picture of where training is: reconstructions beside their images, or samples from the same seeds every time."""
    if not job.accelerator.is_main_process:
        return
    kind = "ema" if job.ema is not None else "raw"
    path = job.run.path / "samples" / f"{job.counters.step:07d}-{kind}.png"
    count = job.config["log"]["num_images"]
    record: dict[str, Any] = {"step": job.counters.step, "weights": kind}
    with averaged(job):
        if job.tokenizer is None:
            x = next(iter(read_all(validation(job), batch_size=count)))["x"][:count].to(job.accelerator.device)
            rebuilt = job.model(x)[0].clamp(-1, 1)
            rows = torch.cat([x, rebuilt, (x - rebuilt).abs() - 1])
            picture = images.grid(rows, columns=len(x), row_names=("image", "reconstruction", "|difference|"))
        else:
            pipeline = pipeline_of(job)
            labels = torch.arange(count) % len(job.class_names) if job.class_names else torch.full((count,), -1)
            seeds = sample_seeds(job.config["train"]["seed"], 0, count)
            picture = images.grid(pipeline.generate(labels, seeds), columns=min(count, len(job.class_names) or 10))
            record |= {"labels": labels.tolist(), "seeds": seeds, "sampler": job.config["sampler"]}
    images.write_png(path, picture)
    files.write_json(path.with_suffix(".json"), record)


def validation(job: Job) -> Any:
    """Images the tokenizer is not trained on where the dataset has a split for them, else the training images."""
    spec = job.config["data"]
    if "split" in spec and spec["split"] == "train":
        held_out = registry.build("data", {**spec, "split": "val"})
        if len(held_out):
            return held_out
    return job.dataset


def tensorboard(run: Run) -> Any:
    """A writer where tensorboard is installed, else None: it mirrors metrics.jsonl, which is the record."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(run.path / "tb"))
