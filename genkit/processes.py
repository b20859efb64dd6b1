"""This process among those of one launch (genkit.launch, torchrun): its number, its device, sums over all."""

from __future__ import annotations

from typing import Any

import torch


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def own_device() -> torch.device:
    """This process's GPU where there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def sum_over_processes(metrics: list[Any], world: int, device: torch.device) -> None:
    """Add up the states of all processes, in place; a collection that metrics share is added once."""
    if world == 1:
        return
    distinct = {id(value): value for metric in metrics for value in metric.state().values()}
    for value in distinct.values():
        summed = value.to(device) if torch.distributed.get_backend() == "nccl" else value
        torch.distributed.all_reduce(summed)
        if summed is not value:
            value.copy_(summed)
