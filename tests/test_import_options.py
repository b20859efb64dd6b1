"""Options of the originals that their weights do not tell: read from the config, or refused by name."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from genkit.errors import GenkitError, UsageError
from genkit.nn.layout import dense_layout
from tests.golden import load, runners

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("system", ["var", "mar"])
def test_the_epsilon_of_norms_is_read(system: str) -> None:
    case = load(GOLDEN / f"{system}.safetensors")
    name = {"var": "logits", "mar": "decoder"}[system]
    case.config["norm_eps"] = 0.1
    with torch.no_grad():
        got = runners()[system](case)[name]
    assert (got - case.outputs[name]).abs().max() > 1e-2 * case.outputs[name].abs().max()


def test_diffusers_dit_without_biases_is_that_with_zeros() -> None:
    case = load(GOLDEN / "dit_diffusers.safetensors")
    convert = import_module("genkit.importers.diffusers_dit").convert
    biases = [key for key in case.weights if any(f".to_{part}.bias" in key for part in "qkv")]
    zeros = case.weights | {key: torch.zeros_like(case.weights[key]) for key in biases}
    bare = {key: value for key, value in case.weights.items() if key not in biases}
    x, t, cond = case.inputs["hidden_states"], case.inputs["timestep"], {"label": case.inputs["class_labels"] % 10}
    expected, got = (
        convert(state, case.config | {"attention_bias": bias})(x, t, cond, dense_layout((8, 8)))
        for state, bias in ((zeros, True), (bare, False))
    )
    assert torch.equal(got, expected)
    exact = convert(bare, case.config | {"attention_bias": False, "activation_fn": "gelu"})
    assert 0 < (exact(x, t, cond, dense_layout((8, 8))) - got).abs().max() < 1
    with pytest.raises(GenkitError, match=r"missing: .*to_k\.bias"):
        convert(bare, case.config)


def test_the_scale_of_attention_logits_is_read() -> None:
    case = load(GOLDEN / "recap.safetensors")
    heads = case.config["num_heads"]
    widths = {key: value.clone() for key, value in case.weights.items()}
    for key, value in widths.items():
        if ".attn.qkv." in key:
            value[: len(value) // 3] /= 2  # queries half as long, and logits of twice the scale
    case = replace(case, weights=widths)
    case.config["qk_scale"] = 2 * (case.config["embed_dim"] // heads) ** -0.5
    with torch.no_grad():
        got = runners()["recap"](case)["full_cond"]
    torch.testing.assert_close(got, case.outputs["full_cond"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("importer", "golden"), [("uvit_bert", "maskgit_uvitbert"), ("autonat", "recap")])
def test_a_single_block_is_a_network(importer: str, golden: str) -> None:
    case = load(GOLDEN / f"{golden}.safetensors")
    weights = {key: value for key, value in case.weights.items() if not key.startswith(("in_blocks", "out_blocks"))}
    network = import_module(f"genkit.importers.{importer}").convert(weights, case.config)
    ids = torch.zeros(1, 1, *network.config["grid"], dtype=torch.int64)
    assert len(network.blocks) == 1
    assert network(ids, None, {}, dense_layout(tuple(network.config["grid"]))).isfinite().all()


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("taming_vqgan", {"ddconfig": {"double_z": True}}, "double_z=True"),
    ("taming_vqgan", {"ddconfig": {"resamp_with_conv": False}}, "resamp_with_conv=False"),
    ("taming_vqgan", {"ddconfig": {"give_pre_end": True}}, "give_pre_end=True"),
    ("taming_vqgan", {"ddconfig": {"in_channels": 4, "out_ch": 3}}, "in_channels=4 beside out_ch=3"),
    ("diffusers_dit", {"activation_fn": "geglu"}, "activation_fn=geglu"),
    ("diffusers_dit", {"norm_elementwise_affine": True}, "norm_elementwise_affine=True"),
    ("dimsum", {"block_type": "raw"}, "block_type=raw"),
    ("llamagen_gpt", {"model_type": "t2i"}, "model_type=t2i"),
    ("llamagen_gpt", {"cls_token_num": 120}, "cls_token_num=120"),
    ("llamagen_vq", {"norm_type": "batch"}, "norm_type=batch"),
]


@pytest.mark.parametrize(("importer", "options", "told"), REFUSED)
def test_what_is_refused_is_named(importer: str, options: dict[str, Any], told: str) -> None:
    case = load(GOLDEN / f"{'dit_diffusers' if importer == 'diffusers_dit' else importer}.safetensors")
    with pytest.raises(UsageError, match=told):
        import_module(f"genkit.importers.{importer}").convert(case.weights, case.config | options)
