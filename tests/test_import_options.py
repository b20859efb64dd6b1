"""Options of the originals that their weights do not tell: read from the config, or refused by name."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from genkit import registry
from genkit.errors import GenkitError, UsageError
from genkit.importers import dqvae
from genkit.importing import import_weights
from genkit.nn.grain_networks import FeatureRouter
from genkit.nn.layout import dense_layout
from genkit.tokenizers.nfig import NFIG
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
    ("taming_vqgan", {"ddconfig": None, "model": {"params": {"ddconfig": {"double_z": True}}}}, "double_z=True"),
    ("dqvae", {"decoderconfig": {"params": {"give_pre_end": True}}}, "give_pre_end=True"),
    ("dqvae", {"encoderconfig": {"params": {"resamp_with_conv": False}}}, "resamp_with_conv=False"),
    ("diffusers_dit", {"activation_fn": "geglu"}, "activation_fn=geglu"),
    ("diffusers_dit", {"norm_elementwise_affine": True}, "norm_elementwise_affine=True"),
    ("dimsum", {"block_type": "raw"}, "block_type=raw"),
    ("llamagen_gpt", {"model_type": "t2i"}, "model_type=t2i.*are told a class"),
    ("llamagen_gpt_t2i", {"model_type": "c2i"}, "model_type=c2i.*are told a text"),
    ("llamagen_gpt_t2i", {"cls_token_num": 13}, "between 1 and the 12 that the weights have"),
    ("llamagen_gpt", {"cls_token_num": 120}, "cls_token_num=120"),
    ("llamagen_vq", {"norm_type": "batch"}, "norm_type=batch"),
]


@pytest.mark.parametrize(("importer", "options", "told"), REFUSED)
def test_what_is_refused_is_named(importer: str, options: dict[str, Any], told: str) -> None:
    case = load(GOLDEN / f"{'dit_diffusers' if importer == 'diffusers_dit' else importer}.safetensors")
    with pytest.raises(UsageError, match=told):
        import_module(f"genkit.importers.{importer.removesuffix('_t2i')}").convert(case.weights, case.config | options)


def test_perceptrons_of_llamagen_may_be_narrow() -> None:
    """ffn_dim_multiplier below 1: what is left out is as good as zeros."""
    case = load(GOLDEN / "llamagen_gpt.safetensors")
    narrow, zeroed = dict(case.weights), dict(case.weights)
    for key, value in case.weights.items():
        if key.endswith(("w1.weight", "w3.weight")):
            narrow[key] = value[:96]
            zeroed[key] = torch.cat([value[:96], torch.zeros_like(value[96:])])
        elif key.endswith("w2.weight"):
            narrow[key] = value[:, :96]
    with torch.no_grad():
        got, expected = (runners()["llamagen_gpt"](replace(case, weights=w))["logits"] for w in (narrow, zeroed))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_the_activation_of_the_router_is_read() -> None:
    torch.manual_seed(0)
    channels, grains = 8, 3
    features = [torch.randn(1, channels, 4 * 2**g, 4 * 2**g) for g in range(grains)]
    router = FeatureRouter(channels=channels, num_grains=grains, norm_groups=0, hidden=24, activation="relu")
    first, last = router.gate[0], router.gate[-1]
    pooled = torch.cat([torch.nn.functional.adaptive_avg_pool2d(h, 4) for h in features], 1).movedim(1, -1)
    expected = last(first(pooled).clamp_min(0)).movedim(-1, 1)  # type: ignore[operator]
    torch.testing.assert_close(router(torch.empty(0), features), expected)

    case = load(GOLDEN / "dqvae.safetensors")
    router_keys = FeatureRouter(channels=16, num_grains=2, norm_groups=4, hidden=32).state_dict()
    weights = {key: value for key, value in case.weights.items() if not key.startswith("encoder.router")}
    for i, word in enumerate(("coarse", "fine")):
        for kind in ("weight", "bias"):
            weights[f"encoder.router.feature_norm_{word}.{kind}"] = router_keys[f"norms.{i}.{kind}"]
    weights |= {f"encoder.router.{key}": value for key, value in router_keys.items() if key.startswith("gate.")}
    for gate, activation in (("2layer-fc-ReLu", "relu"), ("2layer-fc-SiLu", "silu")):
        config = case.config | {"normalization_type": "group-4", "gate_type": gate}
        assert dqvae.convert(weights, config).config["router_activation"] == activation


def test_scales_of_var_may_come_twice() -> None:
    case = load(GOLDEN / "var_vqvae.safetensors")
    sizes = [1, 2, 3, 3, 6]
    tokenizer = import_module("genkit.importers.var_vqvae").convert(case.weights, case.config | {"v_patch_nums": sizes})
    with torch.no_grad():
        encoded = tokenizer.encode(case.inputs["image"])
        torch.testing.assert_close(tokenizer.codes(encoded.ids), encoded.z)
    assert encoded.ids.shape[-1] == sum(side**2 for side in sizes)
    with pytest.raises(UsageError, match="must rise, from"):
        NFIG(image_channels=3, patch_sizes=(1, 2, 2, 4))
    with pytest.raises(UsageError, match="must rise, or stay"):
        import_module("genkit.importers.var_vqvae").convert(
            case.weights, case.config | {"v_patch_nums": [1, 3, 2, 4, 6]}
        )


def drawn(importer: str, golden: str, options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What a config says of drawing, as the importer reads it; checked as a recipe is."""
    case = load(GOLDEN / f"{golden}.safetensors")
    part = import_module(f"genkit.importers.{importer}")
    config = case.config | options
    found = part.sampling(part.convert(case.weights, config), config)
    sampler = {key: value for key, value in found["sampler"].items() if not key.startswith("guidance")}
    registry.check("sampler", sampler, "sampler")
    registry.check("objective", found["objective"], "objective")
    return found


def test_how_a_config_draws_is_read() -> None:
    generator = {"randomize_temperature": 2.0, "guidance_scale": 1.5, "guidance_decay": "constant", "num_steps": 4}
    sampler = drawn("uvit_bert", "maskgit_uvitbert", {"model": {"generator": generator}})["sampler"]
    assert (sampler["temperature"], sampler["num_steps"]) == (2.0, 4)
    assert (sampler["guidance"], sampler["guidance_schedule"], sampler["guidance_power"]) == (2.5, "constant", 1.0)
    assert sampler["softmax_temperature"] == pytest.approx(2.0 * 3 / 4)
    cosine = {"guidance_decay": "power-cosine", "guidance_scale": 6.9, "guidance_scale_pow": 2.0}
    sampler = drawn("image_bert", "maskgit_imagebert", cosine)["sampler"]
    assert (sampler["guidance"], sampler["guidance_schedule"], sampler["guidance_power"]) == (6.9, "cosine", 2.0)
    with pytest.raises(UsageError, match="guidance_decay=sudden"):
        drawn("image_bert", "maskgit_imagebert", {"guidance_decay": "sudden"})

    training = {"diffusion_batch_mul": 2, "label_drop_prob": 0.3, "mask_ratio_min": 0.5}
    found = drawn("mar", "mar", {"num_sampling_steps": "25", **training})
    assert found["sampler"]["head_steps"] == 25
    assert found["objective"] == {"type": "mar", "repeats": 2, "cond_drop": 0.3, "min_masked": 0.5}
    with pytest.raises(UsageError, match="num_sampling_steps=ddim50"):
        drawn("mar", "mar", {"num_sampling_steps": "ddim50"})

    model = {"num_iters": [9, 8, 7, 6], "start_temperature": [1.0, 0.9, 0.8, 0.7], "remask_stage": 0.5}
    sampler = drawn("octgpt", "octgpt", {"MODEL": {"OctGPT": model}})["sampler"]
    assert (sampler["num_steps"], sampler["temperature"], sampler["remask_from"]) == ([7, 6], [0.8, 0.7], 0.5)
    sampler = drawn("octgpt", "octgpt", {"num_iters": 5, "start_temperature": 1.5})["sampler"]
    assert (sampler["num_steps"], sampler["temperature"]) == (5, 1.5)


def test_dropout_for_fine_tuning_is_read() -> None:
    for importer, golden, name in (("image_bert", "maskgit_imagebert", "dropout"), ("mar", "mar", "proj_dropout")):
        case = load(GOLDEN / f"{golden}.safetensors")
        convert = import_module(f"genkit.importers.{importer}").convert
        assert convert(case.weights, case.config | {name: 0.3}).config["dropout"] == 0.3


WRONG: list[tuple[str, str, dict[str, Any]]] = [
    ("llamagen-gpt", "llamagen_gpt", {"n_head": "four"}),
    ("llamagen-gpt", "llamagen_gpt", {"n_head": [4]}),
    ("mar", "mar", {"patch_size": 0}),
    ("image-bert", "maskgit_imagebert", {"image_grid": 16}),
    ("autonat", "recap", {"img_size": float("nan")}),
    ("var-vqvae", "var_vqvae", {"v_patch_nums": [[1, 1], [2, 2], [3, 3], [4, 4], [6, 6]]}),
    ("octgpt", "octgpt", {"patch_size": "wide"}),
]


@pytest.mark.parametrize(("source", "golden", "options"), WRONG)
def test_options_of_another_kind_are_one_error(
    tmp_path: Path, source: str, golden: str, options: dict[str, Any]
) -> None:
    case = load(GOLDEN / f"{golden}.safetensors")
    save_file(case.weights, tmp_path / "w.safetensors")
    with pytest.raises(GenkitError) as caught:
        import_weights(tmp_path / "w.safetensors", source, tmp_path / "out", config=case.config | options)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_weights_of_another_model_are_one_error_and_nulls_are_nothing(tmp_path: Path) -> None:
    case = load(GOLDEN / "llamagen_gpt.safetensors")
    save_file({key: value.flatten()[0].clone() for key, value in case.weights.items()}, tmp_path / "w.safetensors")
    with pytest.raises(GenkitError, match=r"cannot be read as llamagen-gpt .*; it is another model$"):
        import_weights(tmp_path / "w.safetensors", "llamagen-gpt", tmp_path / "out")
    save_file(case.weights, tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match="give a --config with n_head"):
        import_weights(tmp_path / "w.safetensors", "llamagen-gpt", tmp_path / "out", config={"n_head": None})
