"""Runners of the golden files of elementwise recurrences: prefix softmax, S5, ConvS5."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Outputs = dict[str, Tensor]


def run_aaren(case: Any) -> Outputs:
    from genkit.kernels.aaren.op import aaren

    with torch.enable_grad():
        q, k, v = (case.inputs[name].clone().requires_grad_() for name in ("q", "k", "v"))
        scores = torch.einsum("hd,bhnd->bnh", q, k) * q.shape[-1] ** -0.5
        o = aaren(scores, v.transpose(1, 2)).transpose(1, 2)  # type: ignore[union-attr]
        gradients = torch.autograd.grad((case.inputs["upstream_o"] * o).sum(), (q, k, v))
    # The log denominator of every prefix is the state's; one token at a time.
    state, logs = None, []
    for t in range(k.shape[2]):
        _, state = aaren(
            scores[:, t : t + 1].detach(), v[:, :, t : t + 1].detach().transpose(1, 2), state=state, return_state=True
        )
        logs.append(state[0])
    return {
        "o": o.detach(),
        "scores": scores.detach().mT,
        "running_max": scores.detach().mT.cummax(-1).values,
        "log_denominator": torch.stack(logs, -1),
        **dict(zip(("grad_q", "grad_k", "grad_v"), gradients, strict=True)),
    }


def run_s5(case: Any) -> Outputs:
    from genkit.kernels.s5.op import discretise, s5

    w = case.weights
    real = w["Lambda_re"].clamp_max(-1e-4) if case.config["clip_eigs"] else w["Lambda_re"]
    step = case.config["step_rescale"] * w["log_step"][:, 0].exp()
    decay, B = discretise(
        torch.complex(real, w["Lambda_im"]), torch.view_as_complex(w["B"]), step, case.config["discretization"]
    )
    with torch.enable_grad():
        u = case.inputs["u"].clone().requires_grad_()
        y = s5(
            u[None],
            decay,
            B,
            torch.view_as_complex(w["C"]),
            w["D"],
            is_conjugate=case.config["conj_sym"],
            is_bidirectional=case.config["bidirectional"],
        )[0]
        (grad,) = torch.autograd.grad((case.inputs["upstream"] * y).sum(), u)
    return {"y": y.detach(), "grad_u": grad}


def run_convs5(case: Any) -> Outputs:
    from genkit.kernels.convscan.op import convscan
    from genkit.nn.convs5 import ConvS5Layer

    layer = _convs5_layer(case, ConvS5Layer)
    u = case.inputs["u"].permute(1, 4, 0, 2, 3)  # [B, D, F, Y, X]
    start = torch.complex(case.inputs["x0_re"], case.inputs["x0_im"]).permute(0, 3, 1, 2)
    decay, B, C = layer.ssm.system()
    y, last = layer.ssm(u, start)
    state, frames = start, []
    for t in range(u.shape[2]):
        frame, state = layer.ssm(u[:, :, t : t + 1], state)
        frames.append(frame)
    # The published sequential mode is the plain loop; ours is the reference path, put in the place of the fast one.
    slow, _ = convscan(u, decay, B, C, state=start, return_state=True, path="reference")
    rest = layer.ssm.skip(u.transpose(1, 2).flatten(0, 1)) + slow.transpose(1, 2).flatten(0, 1)
    sequential = torch.nn.functional.gelu(layer.ssm.norm(rest), approximate="tanh").unflatten(0, (u.shape[0], -1))
    back = lambda z: z.permute(2, 0, 3, 4, 1)  # noqa: E731 - to frames first, channels last
    return {
        "A_bar_re": decay.real,
        "A_bar_im": decay.imag,
        "B_bar_re": B.real.flatten(1),
        "B_bar_im": B.imag.flatten(1),
        "last_state_re": last.permute(0, 2, 3, 1).real,
        "last_state_im": last.permute(0, 2, 3, 1).imag,
        "ssm_parallel": back(y),
        "ssm_stepwise": back(torch.cat(frames, 2)),
        "ssm_sequential": back(sequential.transpose(1, 2)),
        "layer_out": back(layer(u, start)[0]),
    }


def _convs5_layer(case: Any, Layer: Any) -> Any:
    """Published names: conv kernels are [k, k, in, out], B is [P, in k k, 2], C [k, k, P, out, 2]."""
    config, w = case.config, case.weights
    P, dim, k = config["ssm_size"] // 2, config["U"], config["k_B"]
    layer = Layer(
        dim=dim,
        state_size=config["ssm_size"],
        num_blocks=config["blocks"],
        kernel_size=k,
        num_groups=config["num_groups"],
    )
    conv = "seq.C_D_conv.Conv_0"
    layer.load_state_dict(
        {
            "ssm.eigenvalues": torch.stack([w["seq.Lambda_re"], w["seq.Lambda_im"]], -1),
            "ssm.log_step": w["seq.log_step"][:, 0],
            "ssm.B": w["seq.B"].view(P, dim, k, k, 2),
            "ssm.C": w["seq.C"].permute(3, 2, 0, 1, 4),
            "ssm.skip.weight": w[f"{conv}.kernel"].permute(3, 2, 0, 1),
            "ssm.skip.bias": w[f"{conv}.bias"],
            "ssm.norm.weight": w["seq.C_D_conv.GroupNorm_0.scale"],
            "ssm.norm.bias": w["seq.C_D_conv.GroupNorm_0.bias"],
            "norm.weight": w["norm.scale"],
            "norm.bias": w["norm.bias"],
        }
    )
    return layer
