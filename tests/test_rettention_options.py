"""Re-ttention in the attention of diffusers: its options, by dense scores of every step in double precision."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import group_norm, linear

from genkit.errors import UsageError
from tests.golden_rettention import run_rettention

CONFIG = {"query_dim": 24, "heads": 3, "dim_head": 4, "seq": 20, "sparsity": 0.3, "start_step": 4, "steps": 4}


def case(**options: Any) -> Any:
    torch.manual_seed(0)
    dim, inner = CONFIG["query_dim"], CONFIG["heads"] * CONFIG["dim_head"]
    weights = {f"to_{part}.weight": torch.randn(inner, dim) * 0.4 for part in "qkv"}
    weights["to_out.0.weight"] = torch.randn(dim, inner) * 0.4
    if options.get("out_bias", True):
        weights["to_out.0.bias"] = torch.randn(dim)
    if options.get("norm_num_groups"):
        weights |= {"group_norm.weight": torch.rand(dim) + 0.5, "group_norm.bias": torch.randn(dim)}
    inputs = {f"hidden_{k}": torch.randn(2, CONFIG["seq"], dim) for k in range(CONFIG["steps"])}
    inputs |= {name: torch.randn(6, CONFIG["seq"], 4) for name in "qkv"} | {"ratio": torch.rand(6, CONFIG["seq"], 1)}
    return SimpleNamespace(config=CONFIG | options, weights=weights, inputs=inputs)


def dense(case: Any) -> dict[str, Tensor]:
    """Steps 4 to 7: full; full, from which ratio and residual are kept; and two that live on them."""
    config, w = case.config, {name: value.double() for name, value in case.weights.items()}
    H, N = config["heads"], config["seq"]
    place = torch.arange(N)
    band = (place[:, None] - place).abs() <= int(N * config["sparsity"]) // 2
    outputs, kept, ratio = {}, None, None
    for k in range(config["steps"]):
        x = h = case.inputs[f"hidden_{k}"].double()
        if "group_norm.weight" in w:
            groups, affine = config["norm_num_groups"], (w["group_norm.weight"], w["group_norm.bias"])
            h = group_norm(h.transpose(1, 2), groups, *affine, eps=config.get("eps", 1e-5)).transpose(1, 2)
        q, key, v = (linear(h, w[f"to_{part}.weight"]).unflatten(2, (H, -1)).transpose(1, 2) for part in "qkv")
        scores = (q @ key.mT / config["dim_head"] ** 0.5).exp()

        def behind(probabilities: Tensor, x: Tensor = x, v: Tensor = v) -> Tensor:
            y = linear((probabilities @ v).transpose(1, 2).flatten(2), w["to_out.0.weight"], w.get("to_out.0.bias"))
            return (y + x * config.get("residual_connection", False)) / config.get("rescale_output_factor", 1.0)

        if k < 2:
            ratio = (scores * band).sum(-1, keepdim=True) / scores.sum(-1, keepdim=True)
        near = scores * band / (scores * band).sum(-1, keepdim=True)
        if k < 2:
            outputs[f"out_{k}"] = behind(scores / scores.sum(-1, keepdim=True))
        if k == 1:
            kept = outputs["out_1"] - behind(near * ratio)
        if k > 1:
            outputs[f"out_{k}"] = behind(near * ratio) + kept
            ratio = ratio + 0.04
        outputs[f"ratio_after_{k}"] = ratio.flatten(0, 1)
        if k:
            outputs[f"residual_after_{k}"] = kept
    return outputs


@pytest.mark.parametrize(
    "options",
    [
        {"residual_connection": True},
        {"rescale_output_factor": 1.7},
        {"residual_connection": True, "rescale_output_factor": 0.5, "norm_num_groups": 6, "eps": 1e-2},
        {"out_bias": False, "norm_num_groups": 4, "cross_attention_dim": None, "only_cross_attention": False},
    ],
)
@torch.no_grad()
def test_the_options_of_the_attention_are_its_own(options):
    given = case(**options)
    found = run_rettention(given)
    for name, expected in dense(given).items():
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize(("name", "value"), [("spatial_norm_dim", 8), ("kv_heads", 1), ("is_causal", True)])
def test_other_options_are_refused_by_name(name, value):
    with pytest.raises(UsageError, match=f"{name}={value} of the attention that Re-ttention runs is not supported"):
        run_rettention(case(**{name: value}))
