"""Runners of the golden files of quantisers: official weights through the importers, official outputs by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

Outputs = dict[str, Tensor]


def run_rvq(case: Any) -> Outputs:
    from genkit.importers.vector_quantize_pytorch_tables import import_grouped_residual_vq, import_residual_vq

    importers = {"ResidualVQ": import_residual_vq, "GroupedResidualVQ": import_grouped_residual_vq}
    outputs: Outputs = {}
    for name, kind, imported in _modules(case, importers):
        codes, ids = imported.quantize(case.inputs[f"x_{name}"])
        outputs |= {f"{name}_quantized": codes, f"{name}_indices": ids, f"{name}_decoded": imported.decode(ids)}
        if kind == "ResidualVQ":
            # One level at a time, before the projection: [Q, B, *grid, d].
            codebook, grid = imported.quantizer.codebook, ids.shape[:-1]
            rows = ids.flatten(0, -2).T  # [Q, N]
            outputs[f"{name}_all_codes"] = torch.stack(
                [codebook.codes(own[None], level)[0].reshape(*grid, -1) for level, own in enumerate(rows)]
            )
    return outputs


def run_fsq(case: Any) -> Outputs:
    from genkit.importers import vector_quantize_pytorch_fixed as importer
    from genkit.nn.scalar import bound

    importers = {
        "FSQ": importer.import_fsq,
        "ResidualFSQ": importer.import_residual_fsq,
        "GroupedResidualFSQ": importer.import_grouped_residual_fsq,
    }
    outputs: Outputs = {}
    for name, kind, imported in _modules(case, importers):
        x = case.inputs[f"x_{name}"]
        codes, ids = imported.quantize(x)
        outputs |= {f"{name}_quantized": codes, f"{name}_indices": ids, f"{name}_decoded": imported.decode(ids)}
        if kind == "FSQ" and f"{name}_bounded" in case.outputs:
            # The original's `bound` also rounds, and is the plain one whichever variant the module itself is.
            quantizer = imported.quantizer
            is_first = x.ndim >= 4 if imported.is_channels_first is None else imported.is_channels_first
            rows = quantizer.project_in(x.movedim(1, -1) if is_first else x).unflatten(-1, (quantizer.num_groups, -1))
            rounded = bound(rows, quantizer.levels).round() / (quantizer.levels // 2)
            bounded = quantizer.project_out(rounded.flatten(-2))
            outputs[f"{name}_bounded"] = bounded.movedim(-1, 1) if is_first else bounded
    return outputs


def run_lfq(case: Any) -> Outputs:
    from genkit.importers import vector_quantize_pytorch_fixed as importer

    importers = {
        "LFQ": importer.import_lfq,
        "ResidualLFQ": importer.import_residual_lfq,
        "GroupedResidualLFQ": importer.import_grouped_residual_lfq,
    }
    outputs: Outputs = {}
    for name, _, imported in _modules(case, importers):
        codes, ids = imported.quantize(case.inputs[f"x_{name}"])
        outputs |= {f"{name}_quantized": codes, f"{name}_indices": ids, f"{name}_decoded": imported.decode(ids)}
    return outputs


def _modules(case: Any, importers: dict[str, Callable[..., Any]]) -> Iterator[tuple[str, str, Any]]:
    """(name, kind, imported) of every module of a file."""
    for name, (kind, options) in case.config["modules"].items():
        if kind not in importers:
            raise ValueError(f"module {name} is a {kind}, expected {' or '.join(importers)}")
        weights = {key[len(name) + 1 :]: value for key, value in case.weights.items() if key.startswith(f"{name}.")}
        yield name, kind, importers[kind](options, weights)
