"""What is saved of a model while it trains: checkpoints, and pictures of where it is."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from genkit import checkpoint, files, images, registry, shapes
from genkit.data.loader import batches, read_all
from genkit.job import Job
from genkit.nn.latents import LatentStats
from genkit.pipeline import GeneratorPipeline, TokenizerPipeline
from genkit.rng import sample_seeds

_LATENT_IMAGES = 512  # that a tokenizer's latents are measured on when it is saved


def save(job: Job) -> None:
    """A checkpoint: the pipeline as people load it, and what is needed to continue."""
    checkpoint.save(
        job.run,
        job.counters,
        write_pipeline=lambda folder: write_pipeline(job, folder),
        optimizer=job.optimizer.optimizer,
        objective=job.objective,
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
        condition=config["condition"],
        run_config=config,
        told=job.condition,
    )


def write_pipeline(job: Job, folder: Path) -> None:
    part = "tokenizer" if job.tokenizer is None else "backbone"
    with scaled(job):
        pipeline_of(job).save_pretrained(folder)
    if job.ema is not None:
        with job.ema.applied(), scaled(job):
            job.model.save_pretrained(folder / part, variant="ema")


@contextlib.contextmanager
def scaled(job: Job) -> Iterator[None]:
    """A tokenizer whose latents have unit variance by its present weights, inside the block; a generator's backbone as it is.

    What is saved is scaled, what is trained is not: when a run is saved must not change how it goes on.
    """
    if not hasattr(job.model, "set_latent_stats"):
        yield
        return
    job.model.eval()
    stats = LatentStats()
    count = min(len(job.dataset), _LATENT_IMAGES)
    shuffled = batches(job.dataset, batch_size=64, seed=job.config["train"]["seed"], start=0, stop=count)
    with torch.no_grad():
        for batch in shuffled:
            stats.add(job.model.encode(batch["x"].to(job.accelerator.device)).z)
    job.model.set_latent_stats(*(value.to(job.accelerator.device) for value in stats.result()))
    try:
        yield
    finally:
        job.model.reset_latent_stats()
        job.model.train()


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
        if hasattr(job.tokenizer or job.model, "meshes"):
            picture = shapes.picture(job, validation(job), count)
        elif job.tokenizer is None:
            x = next(iter(read_all(validation(job), batch_size=count)))["x"][:count].to(job.accelerator.device)
            rebuilt = job.model(x)[0].clamp(-1, 1)
            rows = torch.cat([x, rebuilt, (x - rebuilt).abs() - 1])
            picture = images.grid(rows, columns=len(x), row_names=("image", "reconstruction", "|difference|"))
        else:
            pipeline = pipeline_of(job)
            labels = pipeline.each_class(0, count)
            seeds = sample_seeds(job.config["train"]["seed"], 0, count)
            picture = images.grid(
                pipeline.generate(labels, seeds), columns=min(count, len(labels[labels >= 0].unique()) or 10)
            )
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
