"""Runners of the golden files of linear attention: values and, where stored, gradients of the published definitions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Outputs = dict[str, Tensor]


def run_gla(case: Any) -> Outputs:
    from genkit.kernels.gla.op import gla

    def f(q: Tensor, k: Tensor, v: Tensor, gk: Tensor, initial_state: Tensor | None = None) -> Outputs:
        o, state = gla(q, k, v, gk, initial_state=initial_state, return_state=True)
        return {"o": o, "final_state": state}

    return _with_gradients(f, case)


def run_ssd(case: Any) -> Outputs:
    from genkit.kernels.ssd.op import ssd

    def f(X: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_states: Tensor | None = None) -> Outputs:
        before = None if initial_states is None else initial_states.squeeze(1).mT
        Y, state = ssd(C, B, X, A, initial_state=before, return_state=True)
        return {"Y": Y, "final_state": state.mT}

    return _with_gradients(f, case)


def run_retention(case: Any) -> Outputs:
    from genkit.kernels.retention.causal import retention

    def f(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
        o = retention(*(x.transpose(1, 2) for x in (q, k, v)))
        assert isinstance(o, Tensor)
        return {"o": o.transpose(1, 2)}

    return _with_gradients(f, case)


def run_vssd_kernel(case: Any) -> Outputs:
    """y and its gradients; the mixer and the block around it are not here."""
    from genkit.kernels.vssd.op import vssd

    sign = -1 if case.config["ssd_positive_dA"] else 1

    def f(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Outputs:
        groups = num_groups(case.config)
        q, k = (y.unflatten(-1, (groups, -1)) for y in (C, B))
        return {"y": vssd(q, k, x, sign * dt * A, skip=D)}

    return _with_gradients(f, case)


def num_groups(config: dict[str, Any]) -> int:
    """Of a vssd file; -1 is the original's word for as many as heads."""
    return config["heads"] if config["ngroups"] == -1 else config["ngroups"]


def _with_gradients(f: Callable[..., Outputs], case: Any) -> Outputs:
    """Outputs of f(**inputs), and grad_<input> of the sum of every output times upstream_<output> where it is stored."""
    taken = inspect.signature(f).parameters
    inputs = {name: value for name, value in case.inputs.items() if name in taken}
    names = [name for name in inputs if f"grad_{name}" in case.outputs]
    with torch.enable_grad():
        leaves = {name: inputs[name].clone().requires_grad_() for name in names}
        outputs = f(**inputs | leaves)
        total = torch.stack([(case.inputs[f"upstream_{name}"] * value).sum() for name, value in outputs.items()]).sum()
        gradients = torch.autograd.grad(total, list(leaves.values()))
    return {name: value.detach() for name, value in outputs.items()} | {
        f"grad_{name}": value for name, value in zip(names, gradients, strict=True)
    }
