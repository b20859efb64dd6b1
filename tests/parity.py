"""Every path of a kernel operation against its reference: values and all gradients."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Outputs = Tensor | tuple[Tensor, ...]


def gradients(call: Callable[..., Outputs], inputs: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Outputs "out0", "out1", ... of call(**inputs), and the gradient "d<name>" of a fixed random weighting of them for every floating input."""
    leaves = {k: v.detach().clone().requires_grad_() if _is_number(v) else v for k, v in inputs.items()}  # type: ignore[union-attr]
    outputs = call(**leaves)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    random = torch.Generator().manual_seed(7)
    total = torch.zeros((), dtype=torch.float64, device=outputs[0].device)
    for o in outputs:
        weights = torch.randn(o.shape, generator=random, dtype=torch.complex128 if o.is_complex() else torch.float64)
        total = total + (weights.to(o) * o).real.sum()
    names = [k for k, v in leaves.items() if v is not None and v.requires_grad]
    found = torch.autograd.grad(total, [leaves[k] for k in names])  # type: ignore[arg-type,type-var]
    return {f"out{i}": o.detach() for i, o in enumerate(outputs)} | {
        f"d{k}": g for k, g in zip(names, found, strict=True)
    }


def assert_agrees(
    call: Callable[..., Outputs], path: str, inputs: dict[str, Tensor | None], rtol: float = 2e-5, **options: Any
) -> None:
    """call(path=path) gives what call(path="reference") gives in float64, each tensor to `rtol` of its largest absolute value."""
    double = {k: _doubled(v) for k, v in inputs.items()}
    expected = gradients(lambda **x: call(**x, path="reference", **options), double)
    device = os.environ["GENKIT_TEST_DEVICE"] if path == "triton" else "cpu"
    found = gradients(
        lambda **x: call(**x, path=path, **options), {k: v if v is None else v.to(device) for k, v in inputs.items()}
    )
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        error = (found[name].to(value) - value).abs().max() / value.abs().max().clamp_min(1e-30)
        assert error <= rtol, f"{name} by {path}: off by {error:.2e} of its largest value"


def _is_number(x: Tensor | None) -> bool:
    return x is not None and (x.is_floating_point() or x.is_complex())


def _doubled(x: Tensor | None) -> Tensor | None:
    return x.to(torch.complex128 if x.is_complex() else torch.float64) if _is_number(x) else x  # type: ignore[union-attr]
