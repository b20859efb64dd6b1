"""Compare genkit with stored outputs of published systems: `python tests/golden.py FILE...`.

A golden file holds the weights of a system under their official names, inputs, and the outputs of the official code (see load). The weights
go through the system's importer, as a user's would. One row per output: file, output, largest absolute error, tolerance, ok or FAIL.
Exit code 1 on any FAIL, an unknown system or a file that cannot be read.

A system is known when this file has, or takes from its neighbours golden_*.py, a function `run_<system>` that takes a Case and returns outputs
by name.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # test the checkout this file belongs to, installed or not

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tests.golden_autoregressive import run_llamagen_gpt, run_var  # noqa: F401
from tests.golden_backbones import run_dimsum, run_dit, run_dit_diffusers, run_fit, run_fitv2  # noqa: F401 - found by name
from tests.golden_frechet import run_frechet  # noqa: F401
from tests.golden_kernels_attn import run_octformer_attention, run_rettention_kernel  # noqa: F401
from tests.golden_kernels_gla import run_gla, run_retention, run_ssd, run_vssd_kernel  # noqa: F401
from tests.golden_kernels_rec import run_aaren, run_convs5, run_s5  # noqa: F401
from tests.golden_kernels_sscan import run_selective_scan  # noqa: F401
from tests.golden_masked import run_mar, run_maskgit_imagebert, run_maskgit_uvitbert, run_recap, run_recap_mar  # noqa: F401
from tests.golden_mixers import run_vssd  # noqa: F401
from tests.golden_octree import run_octformer, run_octgpt, run_octree  # noqa: F401
from tests.golden_quantisers import run_fsq, run_lfq, run_rvq  # noqa: F401
from tests.golden_rettention import run_rettention  # noqa: F401
from tests.golden_structured import run_dqvae, run_titok, run_var_vqvae  # noqa: F401
from tests.golden_vqgan import run_llamagen_vq, run_maskgit_vqgan, run_taming_vqgan  # noqa: F401

Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One golden file. `tolerance` is relative to the largest absolute value of each output."""

    system: str
    config: dict[str, Any]  # constructor arguments of the official code
    weights: dict[str, Tensor]
    inputs: dict[str, Tensor]
    outputs: Outputs
    tolerance: float


@dataclass(frozen=True)
class Row:
    """The verdict on one output, or on a file as a whole."""

    file: str
    output: str
    error: float | None
    tolerance: float | None
    verdict: str  # "ok", or "FAIL" and why


def load(path: Path) -> Case:
    """Read `weight/NAME`, `input/NAME`, `output/NAME` and the metadata. Half-precision weights are widened; the cast is exact."""
    parts: dict[str, dict[str, Tensor]] = {"weight": {}, "input": {}, "output": {}}
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        for key in file.keys():
            part, _, name = key.partition("/")
            if part not in parts or not name:
                raise ValueError(f"tensor {key} is neither weight/, input/ nor output/")
            parts[part][name] = file.get_tensor(key)
    if lacking := [word for word in ("system", "config", "tolerance") if word not in metadata]:
        raise ValueError(f"the metadata lack {', '.join(lacking)}")
    weights = {name: w.float() if w.is_floating_point() else w for name, w in parts["weight"].items()}
    config, tolerance = json.loads(metadata["config"]), float(metadata["tolerance"])
    return Case(metadata["system"], config, weights, parts["input"], parts["output"], tolerance)


def select(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix, without it."""
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def run_vq(case: Case) -> Outputs:
    from genkit.importers.vector_quantize_pytorch_tables import import_vector_quantize

    outputs: Outputs = {}
    for name, (kind, options) in case.config["modules"].items():
        if kind != "VectorQuantize":
            raise ValueError(f"module {name} is a {kind}, expected VectorQuantize")
        imported = import_vector_quantize(options, select(case.weights, f"{name}."))
        codes, ids = imported.quantize(case.inputs[f"x_{name}"])
        outputs |= {f"{name}_quantized": codes, f"{name}_indices": ids, f"{name}_decoded": imported.decode(ids)}
        if imported.quantizer.is_shared:
            # The original looks every head's id up in the one table and returns them side by side, [B, *grid, H, d]: no merging.
            codes = imported.quantizer.codebook.codes(ids.reshape(1, -1)).reshape(*ids.shape, -1)
            outputs[f"{name}_decoded"] = imported.from_rows(codes)
    return outputs


def runners() -> dict[str, Callable[[Case], Outputs]]:
    """System -> its runner: every function of this file named run_<system>."""
    return {name[4:]: value for name, value in globals().items() if name.startswith("run_")}


def compare(expected: Tensor, got: Tensor, tolerance: float) -> tuple[float, float, str]:
    """(largest absolute error, what is allowed, verdict). Integers and booleans must be equal."""
    if expected.shape != got.shape:
        return float("nan"), tolerance, f"FAIL shape {list(got.shape)}, expected {list(expected.shape)}"
    if expected.is_floating_point() != got.is_floating_point():
        return float("nan"), tolerance, f"FAIL {got.dtype}, expected {expected.dtype}"
    difference = (
        (expected.double() - got.double()).abs().masked_fill(expected == got, 0)
    )  # equal infinities differ by 0
    error = difference.max().item() if difference.numel() else 0.0
    finite = expected.double().abs()
    finite = finite[finite.isfinite()]
    scale = finite.max().item() if finite.numel() else 1.0
    allowed = tolerance * scale if expected.is_floating_point() else 0.0
    return error, allowed, "ok" if error <= allowed else "FAIL"  # nan is not <=


@torch.no_grad()
def check(path: Path) -> Iterator[Row]:
    """The rows of one file."""
    try:
        case = load(path)
    except (OSError, SafetensorError, ValueError) as error:
        yield Row(path.name, "-", None, None, f"FAIL cannot be read: {' '.join(str(error).split())}")
        return
    known = runners()
    if case.system not in known:
        yield Row(path.name, "-", None, None, f"FAIL unknown system '{case.system}'; known: {', '.join(sorted(known))}")
        return
    if not case.outputs:
        yield Row(path.name, "-", None, None, "FAIL the file holds no outputs")
    try:
        got = known[case.system](case)
    except (
        Exception
    ) as error:  # whatever went wrong, every output of this file has failed and the next file is still checked
        got, reason = {}, f"FAIL {type(error).__name__}: {' '.join(str(error).split())}"
    else:
        reason = f"FAIL run_{case.system} does not produce it"
    for name, expected in sorted(case.outputs.items()):
        if name in got:
            yield Row(path.name, name, *compare(expected, got[name], case.tolerance))
        else:
            yield Row(path.name, name, None, None, reason)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    failures = 0
    for path in parser.parse_args(arguments).files:
        for row in check(path):
            numbers = [f"{value:9.2e}" if value is not None else f"{'-':>9}" for value in (row.error, row.tolerance)]
            print(f"{row.file:28} {row.output:28} {numbers[0]} {numbers[1]}  {row.verdict}")
            failures += row.verdict != "ok"
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
