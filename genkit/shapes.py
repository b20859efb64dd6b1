"""The straight line of shapes: what is drawn while they train, and from a trained run to mesh files."""

from __future__ import annotations

from typing import Any

import torch

from genkit.rng import sample_seeds


def picture(job: Any, held_out: Any, count: int) -> Any:
    """Where training is: reconstructions of held-out shapes, or samples from the same seeds every time, shaded."""
    from genkit.meshes.pictures import contact_sheet

    count = min(count, 12)
    if job.tokenizer is None:
        batch = held_out.__getitems__(list(range(min(count, len(held_out)))))
        device = job.accelerator.device
        tokens = job.model.encode(batch["points"].to(device), batch["normals"].to(device))
        return contact_sheet(job.model.meshes(tokens), columns=min(count, 6))
    from genkit.job import pipeline_of

    labels = torch.arange(count) % len(job.class_names) if job.class_names else torch.full((count,), -1)
    seeds = sample_seeds(job.config["train"]["seed"], 0, count)
    found: Any = pipeline_of(job).generate(labels, seeds)
    return contact_sheet(found, columns=min(count, 6))
