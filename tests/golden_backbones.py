"""Runners of the golden files of diffusion networks: official weights through the importers, official outputs by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
    y_cfg = torch.cat([y[:2], torch.full_like(y[:2], case.config["num_classes"])])
    return {
        "forward": call(network, x, t, y),
        "forward_with_cfg": guided(network, x, t, y_cfg, case.inputs["cfg_scale"], 3),
    }


def run_dit_diffusers(case: Any) -> Outputs:
    from genkit.importers.diffusers_dit import convert

    network = convert(case.weights, case.config)
    return {"sample": call(network, *(case.inputs[name] for name in ("hidden_states", "timestep", "class_labels")))}
