"""Two processes of torch.distributed, for tests that they do what one does."""

import multiprocessing
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch


def run_two(
    work: Callable[[int, list[torch.Tensor]], dict[str, np.ndarray]], batches: list[torch.Tensor], out: Path
) -> list[Any]:
    """What work(rank, its share of every batch) gave in each of two processes. Shares are unequal, 30 rows and the rest, and random states differ."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    arrays = [rows.numpy() for rows in batches]
    workers = [context.Process(target=_process, args=(work, rank, port, arrays, out)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    return [np.load(out / f"{rank}.npz") for rank in range(2)]


def _process(work: Any, rank: int, port: int, batches: list[np.ndarray], out: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(rank)
    found = work(rank, [torch.from_numpy(rows[:30] if rank == 0 else rows[30:]) for rows in batches])
    np.savez(out / f"{rank}.npz", **found)
    torch.distributed.destroy_process_group()
