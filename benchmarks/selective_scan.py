"""The selective scan against mambapy's parallel scan and a loop over tokens, the causal convolution against torch's; time, memory and growth.

`genkit bench selective_scan` times the pairs. `python benchmarks/selective_scan.py` prints what is no pair of times: peak memory of either side, each in a
process of its own, growth with the length, and how close to the machine's limit the kernels come.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv1d, silu, softplus

from genkit.bench import Case
from genkit.kernels.causal_conv1d.op import causal_conv1d
from genkit.kernels.selective_scan.op import selective_scan

B, D, R, K = 2, 384, 16, 4  # batch, channels, states, taps
LENGTHS = (256, 1024, 4096, 16384)
FORWARD_GOAL, LOOP_GOAL, TRAIN_GOAL, CONV_GOAL = 35, 20, 25, 2
OPERATIONS = 22  # of one state and step: 11 instructions of the multiply-add unit, 8 of them for the power of 2
GROWTH = 4.6  # 4 times the tokens may take so many times as long
PEER_TRAINS_TO = 4096  # its backward pass at 16384 tokens holds 10 GB

Scan = Callable[..., Tensor]


def cases(quick: bool) -> Iterable[Case]:
    """Equal inputs for both sides: softplus of the steps with their bias, the scan, the skip; no gate, which the peer leaves to its caller."""
    peer = f"mambapy {importlib.metadata.version('mambapy')}" if _has_peer() else "mambapy"
    torch_name = f"torch {torch.__version__}"
    size = f"B{B} D{D} R{R}"
    for N in LENGTHS[:2] if quick else LENGTHS:
        x = inputs(N)
        name = f"selective scan {size} N{N}"
        yield Case(f"{name}, forward", peer, FORWARD_GOAL, forward(ours, x), _or_why(lambda x=x: forward(peers, x)))  # type: ignore[misc]
        if N <= PEER_TRAINS_TO:
            both = _or_why(lambda x=x: training(peers, x))  # type: ignore[misc]
            yield Case(f"{name}, forward and backward", peer, TRAIN_GOAL, training(ours, x), both)
        if N <= LENGTHS[1]:
            yield Case(f"{name}, forward", "a loop over tokens in torch", LOOP_GOAL, forward(ours, x), forward(loop, x))
        if N // 4 in LENGTHS:
            yield _growth(name, x, inputs(N // 4))
        y = filter_inputs(N)
        name = f"causal convolution, SiLU, B{B} D{D} K{K} N{N}"
        yield Case(f"{name}, forward", torch_name, CONV_GOAL, forward(our_filter, y), forward(torch_filter, y))
        yield Case(
            f"{name}, forward and backward", torch_name, CONV_GOAL, training(our_filter, y), training(torch_filter, y)
        )


def _growth(name: str, long: dict[str, Tensor], short: dict[str, Tensor]) -> Case:
    run = forward(ours, short)
    case = f"{name} in the time of 4 x N{short['u'].shape[1]}, forward"
    return Case(case, "four times the shorter one", 4 / GROWTH, forward(ours, long), lambda: [run() for _ in range(4)])


def inputs(N: int) -> dict[str, Tensor]:
    """As a fresh Mamba layer has them: A = -1 ... -R, steps of 0.001 to 0.1 after softplus."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    step = torch.exp(torch.rand(D, generator=random) * 4.6 - 6.9)
    return {
        "u": normal(B, N, D),
        "delta": normal(B, N, D) * 0.5,
        "A": -torch.arange(1.0, R + 1).repeat(D, 1),
        "B": normal(B, N, R),
        "C": normal(B, N, R),
        "D_skip": torch.ones(D),
        "delta_bias": step + torch.log(-torch.expm1(-step)),
    }


def ours(**x: Any) -> Tensor:
    y = selective_scan(**x, delta_softplus=True)
    assert isinstance(y, Tensor)
    return y


def peers(*, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D_skip: Tensor, delta_bias: Tensor) -> Tensor:
    """What mambapy's MambaBlock.ssm does with pscan=True."""
    from mambapy.pscan import pscan

    d = softplus(delta + delta_bias)[..., None]  # [B, N, D, 1]
    h = pscan(torch.exp(d * A), d * B[:, :, None] * u[..., None])  # [B, N, D, R]
    return (h @ C[..., None]).squeeze(3) + D_skip * u


def loop(*, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D_skip: Tensor, delta_bias: Tensor) -> Tensor:
    """One token after another; only forward, because autograd of so many slices takes minutes."""
    d = softplus(delta + delta_bias)
    x, h = d * u, u.new_zeros(u.shape[0], *A.shape)
    y = torch.empty_like(u)
    for t in range(u.shape[1]):
        h = torch.addcmul(x[:, t, :, None] * B[:, t, None], torch.exp(d[:, t, :, None] * A), h)
        y[:, t] = (h @ C[:, t, :, None]).squeeze(2)
    return y + D_skip * u


def filter_inputs(N: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    x, weight = torch.randn(B, N, D, generator=random), torch.randn(D, K, generator=random)
    return {"x": x, "weight": weight, "bias": torch.randn(D, generator=random)}


def our_filter(**x: Any) -> Tensor:
    y = causal_conv1d(**x, activation="silu")
    assert isinstance(y, Tensor)
    return y


def torch_filter(*, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """torch has channels first, so that tokens last have to be turned around and back, as a Mamba layer does."""
    y = conv1d(x.mT, weight[:, None], bias, padding=K - 1, groups=weight.shape[0])
    return silu(y[..., : x.shape[1]]).mT.contiguous()


def forward(scan: Scan, x: dict[str, Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.no_grad():
            return scan(**x)

    return run


def training(scan: Scan, x: dict[str, Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """Forward pass and the gradients of all inputs."""
    leaves = {name: value.clone().requires_grad_() for name, value in x.items()}
    given = torch.randn(next(iter(x.values())).shape, generator=torch.Generator().manual_seed(1))

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(scan(**leaves), list(leaves.values()), given)

    return run


def _has_peer() -> bool:
    return importlib.util.find_spec("mambapy") is not None


def _or_why(make: Callable[[], Callable[[], Any]]) -> Callable[[], Any] | str:
    return make() if _has_peer() else "not installed"


def peak(side: str, N: int) -> float:
    """MiB that one forward and backward pass takes at its peak, beyond what the process held before. Linux; once per process."""
    scan = {"ours": ours, "mambapy": peers}[side]
    training(scan, inputs(64))()  # libraries and threads
    run = training(scan, inputs(N))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is held now
    before = _held()
    run()
    return _held() - before


def _held() -> float:
    """The peak in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def _median(run: Callable[[], Any], times: int = 9) -> float:
    run()
    found = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def main() -> None:
    if len(sys.argv) == 4 and sys.argv[1] == "peak":
        print(peak(sys.argv[2], int(sys.argv[3])))
        return
    for side in ("ours", "mambapy"):
        command = [sys.executable, __file__, "peak", side, "4096"]
        mib = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"peak of forward and backward, N 4096: {side} {mib:.0f} MiB", flush=True)
    square = torch.rand(1024, 1024)
    product = 2 * 1024**3 / _median(lambda: square @ square)
    print(f"a matrix product on {torch.get_num_threads()} threads: {product / 1e9:.0f} GFLOP/s", flush=True)
    seconds = {}
    for N in LENGTHS:
        x, y = inputs(N), filter_inputs(N)
        seconds[N] = _median(forward(ours, x))
        states = B * N * D * R / seconds[N]
        share = OPERATIONS * states / product
        print(
            f"N {N}: scan {seconds[N] * 1e3:.2f} ms, {states / 1e9:.2f} G states/s, {share:.0%} of the product's rate"
        )
        print(f"N {N}: scan with backward {_median(training(ours, x), 5) * 1e3:.2f} ms")
        clone = _median(lambda y=y: y["x"].clone())  # type: ignore[misc]
        filtered, both = _median(forward(our_filter, y)), _median(training(our_filter, y), 5)
        print(
            f"N {N}: convolution {filtered * 1e3:.3f} ms, {clone / filtered:.0%} of the speed of x.clone(); with backward {both * 1e3:.3f} ms",
            flush=True,
        )
    print(f"16384 tokens take {seconds[16384] / seconds[4096]:.2f} times as long as 4096")


if __name__ == "__main__":
    main()
