"""Runners of the golden files of whole mixers: official weights under their official names."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear

from tests.golden_kernels_gla import num_groups, run_vssd_kernel

Outputs = dict[str, Tensor]


def run_vssd(case: Any) -> Outputs:
    """The sum with its gradients, the mixer, and the block: two positional convolutions, the mixer and an MLP, all residual."""
    from genkit.mixers.grids import depthwise, spatially
    from genkit.mixers.vssd import VSSD
    from genkit.nn.layout import dense_layout

    config, weights, x = case.config, case.weights, case.inputs["block_in"]
    grid = (config["H"], config["W"])
    mixer = VSSD(
        dim=config["dim"],
        layer=0,
        num_heads=config["heads"],
        state_size=config["d_state"],
        expand=config["ssd_expansion"],
        num_groups=num_groups(config),
        is_positive=config["ssd_positive_dA"],
        kernel_size=weights["attn.conv2d.weight"].shape[-1],
        has_bias="attn.in_proj.bias" in weights,
        has_conv_bias="attn.conv2d.bias" in weights,
    )
    # Initial states, where theirs has them, are read by its causal form alone.
    mine = {
        name[5:]: value for name, value in weights.items() if name.startswith("attn.") and "init_states" not in name
    }
    mixer.load_state_dict(mine)

    def convolved(name: str, x: Tensor) -> Tensor:
        conv = depthwise(config["dim"], 3)
        conv.load_state_dict({part: weights[f"{name}.{part}"] for part in ("weight", "bias")})
        return x + spatially(conv, x, grid)

    def normed(name: str, x: Tensor) -> Tensor:
        return layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    def mapped(name: str, x: Tensor) -> Tensor:
        return linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    outputs = run_vssd_kernel(case) | {"mixer": mixer(x, dense_layout(grid))}
    x = convolved("cpe1", x)
    x = x + mixer(normed("norm1", x), dense_layout(grid))
    x = convolved("cpe2", x)
    outputs["block"] = x + mapped("mlp.fc2", gelu(mapped("mlp.fc1", normed("norm2", x))))
    return outputs
