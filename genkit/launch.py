"""The same command in several processes of one machine.

`accelerate launch` starts one process on a CPU and torchrun hides a worker's exit code; for more than one machine start
scripts/train.py with either of them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from genkit.errors import GenkitError

_GRACE = 30.0  # seconds the other processes get to save or fail once one has ended badly


def launch(words: Sequence[str], processes: int) -> int:
    """Run `genkit WORDS` in `processes` processes that find each other; signals are passed on.

    Returns: 0, else the exit code of the first process that failed.
    """
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        # Without a share each, every process would start a thread per core.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes))),
    }
    command = [sys.executable, "-m", "genkit", *words]
    children = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(processes)
    ]

    def pass_on(number: int, frame: object) -> None:
        # Ctrl-C reaches the whole foreground group by itself; a second copy would interrupt the saving.
        if number != signal.SIGINT:
            for child in children:
                child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        return _wait(children)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def joined(device: str | None) -> Iterator[None]:
    """Inside, the processes that `launch`, torchrun or accelerate started are one torch.distributed group; alone, nothing happens.

    Raises: GenkitError in those that were waiting for a process which failed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu")
    try:
        yield
    except RuntimeError as error:
        if "onnection" not in str(error):  # what gloo says of a peer that has gone
            raise
        raise GenkitError("another process of this launch stopped; its own line says why") from None
    # Only when all went well: it waits for the others, and they may be waiting for this one.
    state.destroy_process_group()


def _wait(children: list[subprocess.Popen[bytes]]) -> int:
    """Wait for all; once one has failed, the others would wait for it for ever: they are ended after a grace period."""
    failed, deadline = 0, float("inf")
    while any(child.poll() is None for child in children):
        codes = [child.returncode for child in children if child.returncode]
        if codes and not failed:
            failed, deadline = codes[0], time.monotonic() + _GRACE
        if time.monotonic() > deadline:
            for child in children:
                child.kill()
        time.sleep(0.05)
    failed = failed or next((child.returncode for child in children if child.returncode), 0)
    return 128 - failed if failed < 0 else failed  # a negative code is the signal that killed it


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
