"""What the training loop works on: every part built, the run directory open, the last checkpoint restored."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

from genkit import caching, checkpoint, files, registry
from genkit import config as configs
from genkit.checkpoint import Counters, Run
from genkit.data.cache import check_size
from genkit.ema import Ema
from genkit.errors import UsageError
from genkit.fitting import check_tokenizer
from genkit.interfaces import Cond, Layout
from genkit.nn.grid_tokenizer import latent_grid
from genkit.nn.layout import dense_layout, padded_layout
from genkit.optim import adamw
from genkit.rng import derive
from genkit.starting import start_from


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
    condition: Any  # what a generator is told; None when a tokenizer is trained
    layout: Layout | None
    class_names: tuple[str, ...]
    counters: Counters
    board: Any = None  # tensorboard writer, on the main process

    def layout_of(self, batch: dict[str, Any], target: Any) -> Layout | None:
        """Where the cells of a batch lie; of samples in sizes of their own, which of them are real."""
        if "size" not in batch:
            return self.layout
        return padded_layout(tuple(target.shape[2:]), batch["size"])

    def target_of(self, batch: dict[str, Any]) -> Any:
        """What of a batch the objective learns. A cache of ids serves objectives of latents too: codes are looked up as they are needed."""
        word = self.objective.target
        if word == "batch":
            return batch
        if word != "z" or "z" in batch or "ids" not in batch:
            return batch[word]
        z = self.tokenizer.codes(batch["ids"])
        layout = self.layout_of(batch, z)
        assert layout is not None
        return z if layout.valid is None else torch.where(layout.valid.unflatten(1, z.shape[2:]).unsqueeze(1), z, 0)

    def cond_of(self, batch: dict[str, Any]) -> Cond:
        """What a generator is told of a batch; nothing when a tokenizer is trained."""
        return {} if self.condition is None else self.condition.of_batch(batch)

    @property
    def total_samples(self) -> int:
        """`num_samples` in whole batches."""
        train = self.config["train"]
        return -(-train["num_samples"] // train["batch_size"]) * train["batch_size"]


def set_up(config: configs.Config, source: str | None, out: Path, device: str | None) -> Job:
    """Build every part, open the run directory, restore the last checkpoint."""
    settings = config["train"]
    accelerator = make_accelerator(settings, device)
    torch.manual_seed(settings["seed"])  # initial weights, the same in every process
    random.seed(settings["seed"])  # code outside the project
    objective = registry.build("objective", config["objective"])
    tokenizer, layout, condition = None, None, None
    if config.task == "tokenize":
        dataset = registry.build("data", config["data"])
        if dataset.info.unit:
            raise UsageError(
                f"a tokenizer is trained on images of one size, and these have sizes of their own ({dataset.info.source}); "
                "set data.aspect=crop or data.sizes=null; generators may use the others with it"
            )
        model = registry.build("tokenizer", config["tokenizer"], image_channels=dataset.info.shape[0])
        check_size(dataset.info.shape, model.stride)
        if hasattr(objective, "prepare"):
            objective.prepare(dataset.info.shape, accelerator.device)
        class_names = dataset.info.class_names
        run = open_on_main(accelerator, out, config, source)
    else:
        tokenizer, fingerprint = caching.tokenizer_of(config, accelerator.device)
        check_tokenizer(objective, tokenizer, config["objective"]["type"])
        if hasattr(objective, "bind"):
            objective.bind(tokenizer)
        run = open_on_main(accelerator, out, config, source)
        with accelerator.main_process_first():
            dataset = caching.token_dataset(config, tokenizer, fingerprint, out.parent / "cache", accelerator.device)
        grid = tuple(dataset.meta["grid"])
        if objective.target == "z":
            grid = latent_grid(tokenizer, grid)
        class_names = tuple(dataset.info.class_names)
        layout = dense_layout(grid, device=accelerator.device)
        condition = registry.build(
            "condition",
            config["condition"],
            tokenizer=tokenizer,
            grid=grid,
            class_names=class_names,
            data=config["data"],
            folder=run.path,
        )
        if hasattr(condition, "prepare"):
            with accelerator.main_process_first():
                condition.prepare(len(dataset))
        model = backbone_of(config, tokenizer, condition.takes, grid)
        check_sizes(model, dataset, config, tokenizer.channels)
    last, part = run.last, "tokenizer" if config.task == "tokenize" else "backbone"
    if last is None and settings["init"]:
        start_from(model, settings["init"], part, settings["init_new"])
    torch.manual_seed(derive(settings["seed"], accelerator.process_index))  # dropout, another mask in every process
    model.to(accelerator.device)
    optimizer = adamw(model, settings)
    ema = Ema(model, settings["ema"]) if settings["ema"] is not None else None
    counters = Counters()
    if last is not None:
        if ema is not None:
            ema.load(checkpoint.load_weights(model, last / "pipeline" / part, variant="ema"))
        checkpoint.load_weights(model, last / "pipeline" / part)
        if hasattr(model, "reset_latent_stats"):
            model.reset_latent_stats()
        counters = checkpoint.load_state(
            last, optimizer=optimizer, objective=objective, scaler=accelerator.scaler, rank=accelerator.process_index
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
        condition,
        layout,
        class_names,
        counters,
    )
    if accelerator.is_main_process:
        record_start(job)
        job.board = tensorboard(run)
    return job


def backbone_of(job_config: configs.Config, tokenizer: Any, takes: Mapping[str, int], grid: tuple[int, ...]) -> Any:
    """The network of a generator, with what follows from its tokenizer and its condition. Raises UsageError where they do not fit."""
    named = ("patch_sizes", "num_grains", "bits", "full_depth", "code_depth")  # that not every tokenizer has
    return registry.build(
        "backbone",
        told(job_config, takes),
        channels=tokenizer.channels,
        codebook_size=tokenizer.codebook_size,
        num_levels=tokenizer.num_levels,
        num_classes=takes["num_classes"],
        grid=grid,
        **{name: getattr(tokenizer, name, None) for name in named},
    )


def told(job_config: configs.Config, takes: Mapping[str, int]) -> dict[str, Any]:
    """The section `backbone` with the options that follow from the section `condition`.

    Raises: UsageError for a backbone that has no such option, or another value of it.
    """
    spec, word = dict(job_config["backbone"]), job_config["condition"]["type"]
    options = registry.options(registry.find("backbone", spec["type"]))
    for name, value in takes.items():
        if name == "num_classes":
            continue
        if name not in options:
            able = [w for w in registry.words("backbone") if name in registry.options(registry.find("backbone", w))]
            raise UsageError(
                f"condition.type={word} needs a backbone with {name}, and {spec['type']} has none; backbones that do: {', '.join(able)}"
            )
        if spec.get(name) not in (None, value):
            raise UsageError(
                f"backbone.{name}={spec[name]}, but condition.type={word} gives {value}; remove it from the recipe"
            )
        spec[name] = value
    return spec


def check_sizes(backbone: Any, dataset: Any, job_config: configs.Config, channels: int) -> None:
    """Raises UsageError for samples in sizes of their own that a generator cannot be trained on."""
    unit = dataset.info.unit // dataset.meta["stride"]  # cells
    if not unit:
        return
    if job_config["objective"]["type"] not in ("flow", "diffusion", "edm"):
        raise UsageError(
            f"objective.type={job_config['objective']['type']} is trained on images of one size; those in sizes of their own are for flow, diffusion "
            "and edm. Set data.aspect=crop or data.sizes=null"
        )
    for side in getattr(backbone, "sides", ()):
        if unit % side:
            raise UsageError(
                f"sides of these images are multiples of {dataset.info.unit} pixels, {unit} cells, which patches of {side} do not fill; "
                f"set data.unit, or the sides in data.sizes, to multiples of {dataset.meta['stride'] * side}, or another backbone.patch_size"
            )
    if job_config["train"]["one_size_batches"]:
        return
    grid = tuple(dataset.meta["grid"])
    sizes = torch.tensor([grid, (unit, *grid[1:])])
    was_training = backbone.training
    try:
        with torch.no_grad():
            backbone.eval()(
                torch.zeros(2, channels, *grid),
                torch.full((2,), 0.5),
                {"label": torch.tensor([-1, -1])},
                padded_layout(grid, sizes),
            )
    except UsageError as error:
        raise UsageError(
            f"backbone.type={job_config['backbone']['type']} cannot be trained on batches of several sizes: {error}. The backbones fit and "
            "fit_interleaved take them, and dit with such mixers; or set train.one_size_batches=true: every batch then has images of one size"
        ) from None
    finally:
        backbone.train(was_training)


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


def tensorboard(run: Run) -> Any:
    """A writer where tensorboard is installed, else None: it mirrors metrics.jsonl, which is the record."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(run.path / "tb"))
