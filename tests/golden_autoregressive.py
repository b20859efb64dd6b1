"""Runners of the golden files of autoregressive networks: official weights through the importers, official outputs by name."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from genkit.nn.layout import dense_layout
from genkit.nn.rope import rope_table
from genkit.nn.sequence import behind_prefix

Outputs = dict[str, Tensor]


def run_llamagen_gpt(case: Any) -> Outputs:
    from genkit.importers.llamagen_gpt import convert

    network = convert(case.weights, case.config)
    ids, told = case.inputs["idx"], case.inputs["cond_idx"]
    if told.is_floating_point():  # states of a text
        cond = {"context": told[:, : network.prefix]}
        if "emb_masks" in case.inputs:
            cond["said"] = case.inputs["emb_masks"] > 0
    else:
        cond = {"label": torch.where(told == case.config["num_classes"], -1, told)}
    layout = dense_layout((math.isqrt(case.config["block_size"]),) * 2)
    cache: dict[Any, Any] = {}
    one_by_one = [network.next_logits(ids[:, :0], cond, layout, cache, last=network.prefix)]
    one_by_one += [network.next_logits(ids[:, : n + 1], cond, layout, cache) for n in range(ids.shape[1])]
    mixer = network.blocks[0].mixer
    turns = rope_table(behind_prefix(layout, network.prefix, "zero").coords, mixer.head_dim, mixer.rope_base)
    return {
        "logits": network.next_logits(ids, cond, layout, last=ids.shape[1] + network.prefix),
        "logits_cached": torch.cat(one_by_one, dim=1),
        "freqs_cis": torch.stack([part[0, :, 0] for part in turns], dim=-1),
    }


def run_var(case: Any) -> Outputs:
    from genkit.importers.var import convert

    network = convert(case.weights, case.config)
    label = case.inputs["label_B"]
    cond = {"label": torch.where(label == case.config["num_classes"], -1, label)}
    return {
        "logits": network(
            case.inputs["x_BLCv_wo_first_l"], None, cond, dense_layout((network.config["patch_sizes"][-1],) * 2)
        )
    }
