"""Runner of the golden file of the selective scan: the published layout [B, D, N] in, values and gradients in that layout out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Outputs = dict[str, Tensor]


@torch.enable_grad()
def run_selective_scan(case: Any) -> Outputs:
    """Published names: A [D, R], B and C [B, R, N], [B, G, R, N] or [D, R], last_state [B, D, R]; u, delta, z and out [B, D, N].

    Beside a complex A, B and C of the tokens may be [..., 2 N] with real and imaginary parts as neighbours.
    """
    from genkit.dispatch import Operation
    from genkit.kernels.selective_scan.op import selective_scan

    ours = {"D": "D_skip"}
    leaves = {name: x.clone().requires_grad_() for name, x in case.inputs.items() if not name.startswith("upstream_")}
    is_complex = leaves["A"].is_complex()
    numbers = {
        name: torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        if is_complex and name in ("B", "C") and x.is_floating_point()
        else x
        for name, x in leaves.items()
    }
    ready = {
        ours.get(name, name): x.moveaxis(-1, 1) if name in ("u", "delta", "z", "B", "C") and x.ndim > 2 else x
        for name, x in numbers.items()
    }
    # Not by Triton's interpreter, which is the first choice of the tests and takes half a minute for this.
    path = "cpu" if Operation("selective_scan").table()["cpu"] == "ready" and not is_complex else "torch"
    softplus = case.config.get("delta_softplus", case.config.get("softplus", True))
    y, last = selective_scan(**ready, delta_softplus=softplus, return_state=True, path=path)
    out = y.moveaxis(1, -1)
    total = (out * case.inputs["upstream_out"]).sum() + (last * case.inputs["upstream_last_state"]).sum().real
    gradients = torch.autograd.grad(total, list(leaves.values()))
    return {"out": out.detach(), "last_state": last.detach()} | {
        f"grad_{name}": g for name, g in zip(leaves, gradients, strict=True)
    }
