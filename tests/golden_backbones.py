"""Runners of the golden files of diffusion networks: official weights through the importers, official outputs by name."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from genkit.interfaces import Layout
from genkit.nn.layout import dense_layout

Outputs = dict[str, Tensor]


def call(network: Any, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """y counts classes from 0 and the null class last, as the originals do."""
    label = torch.where(y == network.config["num_classes"], -1, y)
    return network(x, t, {"label": label}, dense_layout(tuple(x.shape[2:])))


def guided(network: Any, x: Tensor, t: Tensor, y: Tensor, strength: Tensor | float, channels: int) -> Tensor:
    """The originals' forward_with_cfg: labels above, null labels below, the first half of x for both; only the first channels are guided."""
    half = x[: len(x) // 2]
    label, null = call(network, torch.cat([half, half]), t, y).chunk(2)
    eps = torch.lerp(null[:, :channels], label[:, :channels], torch.as_tensor(strength))
    return torch.cat([torch.cat([eps, eps]), torch.cat([label[:, channels:], null[:, channels:]])], dim=1)


def run_dit(case: Any) -> Outputs:
    from genkit.importers.dit import convert

    network = convert(case.weights, case.config)
    x, t, y = (case.inputs[name] for name in ("x", "t", "y"))
    outputs = {"forward": call(network, x, t, y)}
    if network.config["null_class"]:
        y_cfg = torch.cat([y[:2], torch.full_like(y[:2], case.config["num_classes"])])
        outputs["forward_with_cfg"] = guided(network, x, t, y_cfg, case.inputs["cfg_scale"], 3)
    return outputs


def run_dit_diffusers(case: Any) -> Outputs:
    from genkit.importers.diffusers_dit import convert

    network = convert(case.weights, case.config)
    return {"sample": call(network, *(case.inputs[name] for name in ("hidden_states", "timestep", "class_labels")))}


def fit_layout(inputs: dict[str, Tensor]) -> Layout:
    """Theirs has (column, row); ours (row, column)."""
    return Layout(coords=inputs["grid"].flip(1).transpose(1, 2).float(), grid=None, valid=inputs["mask"] > 0)


def power_cosine(strength: Tensor, power: Tensor, t: Tensor) -> Tensor:
    """Guidance that grows from 1 at data to its full strength at noise, [B]; t = 1 is data."""
    return 1 + (strength - 1) * (1 - torch.cos(torch.pi * (1 - t) ** power)) / 2


def run_fit(case: Any) -> Outputs:
    from genkit.importers.fit import convert

    network = convert(case.weights, case.config)
    is_sit = case.config.get("use_sit", False)  # then tokens are [B, N, C] in and out
    x, t, y, layout = case.inputs["x"], case.inputs["t"], case.inputs["y"], fit_layout(case.inputs)
    x = x.transpose(1, 2) if is_sit else x
    cond = {"label": torch.where(y == case.config["num_classes"], -1, y)}
    times = {"forward": t}
    if "t_int" in case.inputs:
        whole = case.inputs["t_int"]
        shift = case.config.get("time_shifting", 1)
        is_late = shift * whole / (1 + (shift - 1) * whole) > 1  # what the original limits is the shifted time
        head = torch.where(is_late, torch.ones_like(whole), whole)
        times |= {"forward_t_int_noclamp": whole, "forward_t_int_head": head}
    outputs = {name: network(x, t, cond, layout) for name, t in times.items()}
    return {name: value.transpose(1, 2) if is_sit else value for name, value in outputs.items()}


def run_fitv2(case: Any) -> Outputs:
    from genkit.importers.fit import convert

    outputs = run_fit(case)
    network = convert(case.weights, case.config)
    if not network.config["null_class"]:
        return outputs
    is_sit = case.config.get("use_sit", False)
    x, t, y, layout = case.inputs["x"], case.inputs["t"], case.inputs["y"], fit_layout(case.inputs)
    x = x.transpose(1, 2) if is_sit else x
    null, strength = torch.full_like(y, -1), case.inputs["cfg_scale"]
    out = outputs["forward"].transpose(1, 2) if is_sit else outputs["forward"]
    poor = network(x, t, {"label": null}, layout)
    cells = 3 * case.config["patch_size"] ** 2  # tokens hold the channel slowest: these are the first three
    grown = power_cosine(strength, case.inputs["scale_pow"], t)[:, None, None]
    for name, w in (("forward_with_cfg", strength), ("forward_with_cfg_pow", grown)):
        guided = torch.lerp(poor[:, :cells], out[:, :cells], w)
        both = torch.cat([torch.cat([guided, half[:, cells:]], dim=1) for half in (out, poor)])
        outputs[name] = both.transpose(1, 2) if is_sit else both
    return outputs


@patch(
    "genkit.dispatch.is_interpreting", lambda: False
)  # tests of kernels ask for Triton's interpreter, which takes minutes here
def run_dimsum(case: Any) -> Outputs:
    from genkit.backbones.dimsum import window_order
    from genkit.importers.dimsum import convert
    from genkit.nn.wavelet import haar_packet, inverse_haar_packet

    network = convert(case.weights, case.config)
    x, t, y, seq = (case.inputs[name] for name in ("x", "t", "y", "seq"))
    block, seen = network.blocks[0], {}

    def keep(module: Any, *names: str) -> None:
        def hook(module: Any, args: Any, out: Any) -> None:
            for name, value in zip(names, out if isinstance(out, tuple) else (out,), strict=True):
                seen.setdefault(name, value[:1])  # of the first call, the first sample

        module.register_forward_hook(hook)

    def keep_inputs(module: Any, args: Any, out: Any) -> None:
        seen.setdefault("block0_freq", args[1][:1])

    keep(block, "block0", "block0_residual")
    if len(network.blocks) > 1:
        keep(network.blocks[1], "block1", "block1_residual")
    keep(block.spatial, "block0_spatial")
    if network.shared is not None:
        keep(network.shared, "first_shared_attn")
    block.fusion.register_forward_hook(keep_inputs)  # the frequency branch as a whole ends where the fusion begins
    outputs = {"forward": call(network, x, t, y)}
    seen.pop("block1_residual", None)
    grid = tuple(length // side for length, side in zip(x.shape[2:], network.sides, strict=True))
    channels = case.config["in_channels"]
    if network.config["null_class"]:
        t_cfg, null = torch.cat([t[:2], t[:2]]), torch.full_like(y[:2], case.config["num_classes"])
        y_cfg, strength = torch.cat([y[:2], null]), case.inputs["cfg_scale"]
        grown = power_cosine(strength, case.inputs["scale_pow"], t[:2])[:, None, None, None]
        outputs["forward_with_cfg"] = guided(network, x, t_cfg, y_cfg, strength, channels)
        outputs["forward_with_adacfg"] = guided(network, x, t_cfg, y_cfg, grown, channels)
    bands = haar_packet(seq, grid)
    return (
        outputs
        | seen
        | {
            "dwt_seq": bands,
            "idwt_of_dwt": inverse_haar_packet(bands, grid),
            "local_scan_row": window_order(*grid, False).visit(seq),
            "local_scan_col": window_order(*grid, True).visit(seq),
        }
    )
