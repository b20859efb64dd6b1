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
    # With both directions there are two C or, where C was drawn as complex numbers at once, one of double width.
    C = w["C"] if "C" in w else torch.cat([w["C1"], w["C2"]], 1)
    with torch.enable_grad():
        u = case.inputs["u"].clone().requires_grad_()
        y = s5(
            u[None],
            decay,
            B,
            torch.view_as_complex(C),
            w["D"],
            is_conjugate=case.config["conj_sym"],
            is_bidirectional=case.config["bidirectional"],
        )[0]
        (grad,) = torch.autograd.grad((case.inputs["upstream"] * y).sum(), u)
    return {"y": y.detach(), "grad_u": grad}


def run_convs5(case: Any) -> Outputs:
    from genkit.nn.convs5 import ConvS5Layer

    layer = _convs5_layer(case, ConvS5Layer)
    u = case.inputs["u"].permute(1, 4, 0, 2, 3)  # [B, D, F, Y, X]
    start = torch.complex(case.inputs["x0_re"], case.inputs["x0_im"]).permute(0, 3, 1, 2)
    decay, B, _ = layer.ssm.system()
    y, last = layer.ssm(u, start)
    state, frames = start, []
    for t in range(u.shape[2]):
        frame, state = layer.ssm(u[:, :, t : t + 1], state)
        frames.append(frame)
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
        # The published sequential mode is the plain loop, which is our reference path.
        "ssm_sequential": back(layer.ssm(u, start, path="reference")[0]),
        "layer_out": back(layer(u, start)[0]),
    }


def _convs5_layer(case: Any, Layer: Any) -> Any:
    """Published names: conv kernels are [k, k, in, out], dense ones [in, out], B is [P, in k k, 2], C [k, k, P, out, 2]."""
    config, w = case.config, dict(case.weights)
    heads = {"standard": "skip", "resnet": "resnet", "half_glu": "half_glu"}
    layer = Layer(
        dim=config["U"],
        state_size=config["ssm_size"],
        num_blocks=config["blocks"],
        kernel_size=[config[k] for k in ("k_B", "k_C", "k_D")],
        head=heads.get(config["C_D_config"], "none"),  # the original leaves out what it has no such word for
        activation=config["activation"],
        excite=config["squeeze_excite"],
        num_groups=config["num_groups"],
        clip=config["clip_eigs"],
        norm=("before" if config["prenorm"] else "after") if config["use_norm"] else "none",
        has_skip=config["per_layer_skip"],
    )
    ours = {
        "ssm.eigenvalues": torch.stack([w.pop("seq.Lambda_re"), w.pop("seq.Lambda_im")], -1),
        "ssm.log_step": w.pop("seq.log_step")[:, 0],
        "ssm.B": w.pop("seq.B").view_as(layer.ssm.B),
        "ssm.C": w.pop("seq.C").permute(3, 2, 0, 1, 4),
    }
    is_resnet = config["C_D_config"] == "resnet"
    parts = {
        "Conv_0": "convs.0" if is_resnet else "skip",
        "Conv_1": "convs.1",
        "GroupNorm_0": "norms.0" if is_resnet else "norm",
        "GroupNorm_1": "norms.1",
        "SEBlock_0.reduce": "excite.reduce",
        "SEBlock_0.expand": "excite.expand",
        "Dense_0": "gate",
        "norm": "norm",
    }
    for name, value in w.items():
        path, _, kind = name.rpartition(".")
        head = path.removeprefix("seq.C_D_conv.")
        ours_path = path if head == path else f"ssm.head.{parts[head]}"
        is_kernel = kind == "kernel"
        ours[f"{ours_path}.{'bias' if kind == 'bias' else 'weight'}"] = (
            value.movedim((-1, -2), (0, 1)) if is_kernel else value
        )
    layer.load_state_dict(ours)
    return layer
