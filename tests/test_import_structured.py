"""Importers of tokenizers whose ids have a structure: official outputs, every kind recognised by its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from genkit.errors import GenkitError
from genkit.importers import dqvae as import_dqvae
from genkit.importers import titok as import_titok
from genkit.importers import var_vqvae as import_var
from genkit.importers.names import source_of
from genkit.tokenizers.dqvae import DQVAE
from genkit.tokenizers.titok import TiTok
from genkit.tokenizers.var_vq import VarVq
from tests import golden, golden_structured
from tests.quantising import after_step
from tests.structured import KINDS, SCALES, SMALL, images

HERE = Path(__file__).parent
IMPORTERS = {"var_vqvae": import_var, "titok": import_titok, "dqvae": import_dqvae}


@pytest.mark.parametrize("system", IMPORTERS)
@torch.no_grad()
def test_official_outputs_are_reproduced(system: str) -> None:
    case = golden.load(HERE / "golden" / f"{system}.safetensors")
    got = getattr(golden_structured, f"run_{system}")(case)
    for name, expected in case.outputs.items():
        assert golden.compare(expected, got[name], case.tolerance)[2] == "ok", name


@pytest.mark.parametrize("system", IMPORTERS)
def test_importers_name_missing_and_unknown_keys_together(system: str) -> None:
    case = golden.load(HERE / "golden" / f"{system}.safetensors")
    gone = next(key for key in case.weights if key.endswith(("mid.block_1.norm1.bias", "transformer.1.ln_1.bias")))
    weights = {key: value for key, value in case.weights.items() if key != gone} | {"surplus.weight": torch.ones(1)}
    with pytest.raises(GenkitError) as raised:
        IMPORTERS[system].convert(weights, case.config)
    assert "\n" not in str(raised.value)
    assert f"missing: {gone}" in str(raised.value)
    assert "unknown: surplus.weight" in str(raised.value)


@pytest.mark.parametrize("system", IMPORTERS)
def test_other_weights_are_refused(system: str) -> None:
    with pytest.raises(GenkitError, match="these weights are not those of"):
        IMPORTERS[system].convert({"weight": torch.ones(3, 3)})


def exported(model: nn.Module, rules: Any) -> dict[str, Tensor]:
    """Our weights under their names."""
    state: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        theirs = source_of(key, rules)
        value = value.squeeze(0) if key.endswith("codebook.embed") else value
        parts = value.chunk(len(theirs)) if theirs else ()
        state |= dict(zip(theirs, parts, strict=True))
    return state


@pytest.mark.parametrize(
    ("options", "phi", "official"),
    [
        ({"num_phi": 1}, "quantize.quant_resi.qresi.{1}", {}),
        ({"num_phi": 3, "stem": 32}, "quantize.quant_resi.qresi_ls.{0}.{1}", {"quant_resi": -0.5}),
        ({"num_phi": 4, "cosine": True}, "quantize.quant_resi.{0}.{1}", {"using_znorm": True}),
        ({"phi_ratio": 0.0, "latent_kernel": 1}, "", {"quant_resi": 0}),
        ({"phi_ratio": 0.25, "num_blocks": 2}, "quantize.quant_resi.qresi_ls.{0}.{1}", {"quant_resi": 0.25}),
    ],
)
@torch.no_grad()
def test_every_kind_of_var_tokenizer_is_recognised_by_its_weights(
    options: dict[str, Any], phi: str, official: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    made = VarVq(image_channels=3, **SMALL | {"patch_sizes": SCALES, "stride": 2, "widths": (64, 32)} | options).eval()
    for conv in made.quantizer.phi:
        nn.init.normal_(conv.weight, std=0.2)  # so that another one in its place would show
    state = exported(made, import_var.rules(2, phi))
    again = import_var.convert(state, {"v_patch_nums": list(SCALES), **official})
    x = images(2, 3, 8, 8)
    assert torch.equal(again.encode(x).ids, made.encode(x).ids)
    torch.testing.assert_close(again(x)[0], made(x)[0])


@pytest.mark.parametrize(
    ("options", "official"),
    [
        ({"cosine": False}, {"model": {"vq_model": {"use_l2_norm": False, "num_heads": 4}}}),
        (
            {"num_heads": 2, "decoder_dim": 12, "decoder_depth": 1, "decoder_heads": 2, "decoder_stride": 8},
            {"num_heads": 2},
        ),
        ({"dim": 128, "num_heads": 2}, {}),
        ({"proxy_codes": 20, "pixel_widths": (32, 64, 64), "pixel_blocks": 1, "pixel_channels": 6}, {"num_heads": 4}),
    ],
)
@torch.no_grad()
def test_every_kind_of_titok_is_recognised_by_its_weights(options: dict[str, Any], official: dict[str, Any]) -> None:
    torch.manual_seed(0)
    made = TiTok(image_channels=3, **KINDS["tokens"][1] | options).eval()
    state = exported(made, import_titok.rules(len(options.get("pixel_widths", ()))))
    again = import_titok.convert(state, official)
    x = images(2, 3, 16, 16)
    assert torch.equal(again.encode(x).ids, made.encode(x).ids)
    torch.testing.assert_close(again(x)[0], made(x)[0])


@pytest.mark.parametrize(
    ("options", "official"),
    [
        ({"router": "feature", "router_groups": 4}, {"encoderconfig": {"router": {"normalization_type": "group-4"}}}),
        ({"router": "feature", "router_groups": 0, "router_is_deep": False, "stem": 32}, {}),
        (
            {"router": "entropy", "thresholds": (2.4626,), "positions": "waves"},
            {"fine_grain_ratito": 0.25, "latent_size": 8},
        ),
        (
            {
                "router": "feature",
                "router_groups": 2,
                "num_grains": 3,
                "targets": (0.3, 0.3),
                "stride": 1,
                "image_size": 8,
            },
            {"norm": "group-2"},
        ),
        (
            {"router": "entropy", "thresholds": (1.0,), "decoder_widths": (32, 32), "attention": (1, 2)},
            {"threshold": 1.0},
        ),
    ],
)
@torch.no_grad()
def test_every_kind_of_dqvae_is_recognised_by_its_weights(options: dict[str, Any], official: dict[str, Any]) -> None:
    torch.manual_seed(0)
    made = DQVAE(image_channels=3, **KINDS["deep grains"][1] | {"widths": (64, 32, 64)} | options).eval()
    grains = ("coarse", "median", "fine") if made.num_grains == 3 else ("coarse", "fine")
    waves = "decoder.position_bias" if options.get("positions") == "waves" else "decoder.position_bias_fourier"
    state = exported(
        made, import_dqvae.rules(3 - made.num_grains + 1, grains, waves, options.get("router_is_deep", True))
    )
    table = state["quantize.codebook.weight"]
    state["quantize.codebook.weight"] = torch.cat([table, torch.zeros(1, table.shape[1])])  # with their row of padding
    again = import_dqvae.convert(state, official)
    x = images(2, 3, made.image_size, made.image_size)
    assert torch.equal(again.grain(x), made.grain(x))
    assert torch.equal(again.encode(x).ids, made.encode(x).ids)
    torch.testing.assert_close(again(x)[0], made(x)[0])


@torch.no_grad()
def test_an_imported_tokenizer_can_be_trained_on(tmp_path: Path) -> None:
    case = golden.load(HERE / "golden" / "var_vqvae.safetensors")
    tokenizer = import_var.convert(case.weights, case.config).train()
    before = tokenizer.quantizer.codebook.embed.clone()
    tokenizer(case.inputs["image"])
    after_step(tokenizer)
    moved = (tokenizer.quantizer.codebook.embed - before).norm() / before.norm()
    assert 0 < moved < 0.2  # follows the data, is not clustered anew
