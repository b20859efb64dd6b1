"""Golden runners of attention over blocks and in windows of octree nodes; see golden.py."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import linear

from genkit.kernels.block_sparse_attention import pattern, rules
from genkit.kernels.block_sparse_attention.op import block_sparse_attention
from genkit.kernels.octree_attention.op import octree_attention
from genkit.kernels.octree_attention.windows import is_seen, to_windows

if TYPE_CHECKING:
    from tests.golden import Case, Outputs


def run_rettention_kernel(case: Case) -> Outputs:
    """Their ratio of denominators is exp(lse of the band - lse of all)."""
    q, k, v = (case.inputs[name][None] for name in "qkv")  # [1, H, N, K]
    N = q.shape[2]
    rule = rules.band(N, int(N * case.config["sparsity"]) // 2)
    full, full_lse = block_sparse_attention(q, k, v, pattern.build(N, 16))
    sparse, sparse_lse = block_sparse_attention(q, k, v, pattern.build(rule, 16))
    return {
        "full_out": full[0],
        "full_ratio": (sparse_lse - full_lse).exp()[0, ..., None],
        "mask": rule.dense().float(),
        "sparse_out": case.inputs["ratio"] * sparse[0],
    }


def run_octformer_attention(case: Case) -> Outputs:
    config, data = case.config, case.inputs["data"]
    xyz, batch_ids = case.inputs["xyz"], case.inputs["batch_ids"]
    window = config["patch_size"]
    outputs: Outputs = {}
    for block, dilation, suffix in ((0, 1, "block0"), (1, config["dilation"], "block1_dilated")):
        weight = {
            name.removeprefix(f"blocks.{block}.attention."): w
            for name, w in case.weights.items()
            if name.startswith(f"blocks.{block}.")
        }
        relative = _relative(xyz, window, dilation)
        q, k, v = (
            linear(data, weight["qkv.weight"], weight["qkv.bias"]).unflatten(1, (3, config["num_heads"], -1)).unbind(1)
        )
        bias = _bias(weight["rpe.rpe_table"], relative, window, dilation)
        o = octree_attention(q, k, v, batch_ids, window=window, dilation=dilation, bias=bias)
        outputs[f"attention_{suffix}"] = linear(o.flatten(1), weight["proj.weight"], weight["proj.bias"])
        outputs["rel_pos" if dilation == 1 else "dilate_pos"] = relative[:2]
    outputs["patch_mask_blocked"] = ~is_seen(batch_ids, None, window, dilation=1, shift=0)
    return outputs


def _relative(xyz: Tensor, window: int, dilation: int) -> Tensor:
    """[W, window, window, 3], query minus key."""
    place = to_windows(xyz, window, dilation=dilation)
    return place[:, :, None] - place[:, None]


def _bias(table: Tensor, relative: Tensor, window: int, dilation: int) -> Tensor:
    """[W, H, window, window]: the sum over three axes of a table of clamped distances."""
    reach = int(0.8 * window * math.sqrt(dilation))
    rows = relative.clamp(-reach, reach) + reach + torch.arange(3) * (2 * reach + 1)
    return table[rows].sum(3).permute(0, 3, 1, 2)
