"""Golden runner of Re-ttention: an attention layer from step to step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from genkit.errors import UsageError
from genkit.kernels.block_sparse_attention.op import block_sparse_attention
from genkit.mixers.attention import Attention
from genkit.nn.layout import dense_layout
from genkit.reuse.rettention import Rettention, Statistics, measure
from tests.golden_kernels_attn import run_rettention_kernel

Outputs = dict[str, Tensor]


# Of the run, and of diffusers' Attention what their processor reads.
_READ = {"query_dim", "heads", "dim_head", "seq", "sparsity", "start_step", "steps", "use_ratio"}
_READ |= {"residual_connection", "rescale_output_factor", "norm_num_groups", "eps"}
# What weights show, what acts in training alone, and what their processor does not ask.
_UNREAD = {
    "bias",
    "out_bias",
    "dropout",
    "upcast_attention",
    "upcast_softmax",
    "scale_qk",
    "qk_norm",
    "elementwise_affine",
}


class Layer(nn.Module):
    """The mixer as diffusers' Attention calls it, as a backbone: a group norm in front, behind it the input added and the sum divided."""

    def __init__(self, mixer: Attention, norm: nn.Module, has_residual: bool, factor: float):
        super().__init__()
        self.mixer, self.norm, self.has_residual, self.factor = mixer, norm, has_residual, factor

    def forward(self, x: Tensor, t: Any, cond: Any, layout: Any, cache: Any = None) -> Tensor:
        y = self.mixer(self.normed(x), layout, cache)
        return (y + x if self.has_residual else y) / self.factor

    def normed(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


def run_rettention(case: Any) -> Outputs:
    config, weights = case.config, case.weights
    for name, value in config.items():
        if name not in _READ | _UNREAD and value not in (None, False):
            raise UsageError(f"{name}={value} of the attention that Re-ttention runs is not supported")
    H, first = config["heads"], config["start_step"]
    dim, inner = config["query_dim"], H * config["dim_head"]
    mixer = Attention(dim=dim, layer=0, num_heads=H, head_dim=config["dim_head"], qk_norm=False, rope=False)
    without = {f"to_{part}.bias": torch.zeros(inner) for part in "qkv"} | {"to_out.0.bias": torch.zeros(dim)}
    weights = without | weights  # theirs may be without
    norm: nn.Module = nn.Identity()
    if (groups := config.get("norm_num_groups")) is not None:
        norm = nn.GroupNorm(groups, dim, config.get("eps", 1e-5))
        norm.load_state_dict({kind: weights[f"group_norm.{kind}"] for kind in ("weight", "bias")})
    joined = {f"qkv.{kind}": torch.cat([weights[f"to_{part}.{kind}"] for part in "qkv"]) for kind in ("weight", "bias")}
    mixer.load_state_dict(joined | {f"proj.{kind}": weights[f"to_out.0.{kind}"] for kind in ("weight", "bias")})
    has_ratio = config.get("use_ratio", True)
    reuse = Rettention(density=config["sparsity"], clamp=False, refreshes=3, carry="both" if has_ratio else "residual")
    factor = config.get("rescale_output_factor", 1.0)
    layer = Layer(mixer, norm, config.get("residual_connection", False), factor)
    model = reuse.start(layer)
    model.calls = first
    layout = dense_layout((config["seq"],))
    outputs: Outputs = {}
    for k in range(config["steps"]):
        hidden = case.inputs[f"hidden_{k}"]
        outputs[f"out_{k}"] = model(hidden, None, {}, layout)
        what = reuse.schedule.what(first + k)
        if what == "plain" or not has_ratio:
            # Theirs measures the ratio also where nothing reads it.
            if what != "reuse":
                q, key, v = mixer.qkv(layer.normed(hidden)).unflatten(-1, (3, H, -1)).permute(2, 0, 3, 1, 4)
                unread = measure(q, key, v, reuse.pattern_for(q)[0], None)[1].flatten(0, 1)
            else:
                unread = unread + reuse.ramp
            outputs[f"ratio_after_{k}"] = unread
        if what == "plain":
            continue
        (kept,) = model.kept.values()
        assert isinstance(kept, Statistics)
        ((ratio, residual),) = kept.layers
        if has_ratio:
            outputs[f"ratio_after_{k}"] = ratio.flatten(0, 1).clone()
        # Theirs is kept behind the output projection.
        outputs[f"residual_after_{k}"] = linear(residual.transpose(1, 2).flatten(2), mixer.proj.weight) / factor
    q, key, ratio = (case.inputs[name][None] for name in ("q", "k", "ratio"))
    band = reuse.pattern_for(q)[0]
    # Probabilities are what attention makes of values that are the identity.
    identity = torch.eye(config["seq"]).expand(*q.shape[:2], -1, -1).contiguous()
    outputs["full_probs"] = measure(q, key, identity, band, None)[0][0]
    outputs["sparse_probs"] = (ratio * block_sparse_attention(q, key, identity, band)[0])[0]
    return outputs | run_rettention_kernel(case)
