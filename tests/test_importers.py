"""Official weights: equal outputs, nothing dropped or invented, files read without running what is in them."""

from __future__ import annotations

import contextlib
import json
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from genkit import importing
from genkit.errors import GenkitError, UsageError
from genkit.foreign import read_weights
from genkit.importers import diffusers_kl, diffusers_vq, llamagen_vq, maskgit_vqgan, taming_kl, taming_vqgan
from genkit.importers.names import fill
from genkit.importing import import_weights, importers
from genkit.pipeline import open_run
from tests import golden, golden_vqgan

HERE = Path(__file__).parent
SYSTEMS = {"taming_vqgan": taming_vqgan, "llamagen_vq": llamagen_vq, "maskgit_vqgan": maskgit_vqgan}


@pytest.fixture(scope="module")
def cases() -> dict[str, Any]:
    return {system: golden.load(HERE / "golden" / f"{system}.safetensors") for system in SYSTEMS}


# --- stored outputs of the official code


@pytest.mark.parametrize("system", SYSTEMS)
@torch.no_grad()
def test_official_outputs_are_reproduced(cases: dict[str, Any], system: str) -> None:
    case = cases[system]
    got = getattr(golden_vqgan, f"run_{system}")(case)
    assert got.keys() == case.outputs.keys()
    for name, expected in case.outputs.items():
        error, allowed, verdict = golden.compare(expected, got[name], case.tolerance / 10)
        assert verdict == "ok", f"{name}: {error} > {allowed}"


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_key_that_is_missing_is_named(cases: dict[str, Any], system: str) -> None:
    weights = cases[system].weights
    sized = ["encoder.conv_in.weight", "encoder.conv_out.weight", "quantize.embedding.weight", "decoder.conv_in.weight"]
    firsts = [key for key in weights if key.endswith(".0.conv1.weight")]  # where widths are read from
    for key in {*sized, *firsts, *list(weights)[::12]}:
        with torch.device("meta"), pytest.raises(GenkitError) as caught:  # where making a network costs nothing
            SYSTEMS[system].convert({k: v for k, v in weights.items() if k != key}, cases[system].config)
        assert f"missing: {key}" in str(caught.value), key
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("key", ["extra.weight", "encoder.down.7.block.0.conv1.weight", "quantize.embedding.bias"])
def test_a_key_too_many_is_named(cases: dict[str, Any], system: str, key: str) -> None:
    with pytest.raises(GenkitError, match=f"unknown: {key}"):
        SYSTEMS[system].convert({**cases[system].weights, key: torch.zeros(1)}, cases[system].config)


@pytest.mark.parametrize("system", SYSTEMS)
def test_another_shape_is_named_with_both(cases: dict[str, Any], system: str) -> None:
    key = "encoder.norm_out.weight"
    with pytest.raises(GenkitError, match=r"another shape: encoder\.norm_out\.weight \(\[31\], expected \[32\]"):
        SYSTEMS[system].convert({**cases[system].weights, key: torch.zeros(31)}, cases[system].config)


@pytest.mark.parametrize("system", SYSTEMS)
def test_weights_of_something_else_are_refused(system: str) -> None:
    with pytest.raises(GenkitError, match=r"missing: encoder\.conv_in\.weight"):
        SYSTEMS[system].convert({"layer.weight": torch.zeros(3, 3)}, {})


def test_keys_that_serve_training_alone_are_ignored(cases: dict[str, Any]) -> None:
    extra = {
        "loss.discriminator.main.0.weight": torch.zeros(2),
        "loss.perceptual_loss.lin0.model.1.weight": torch.zeros(2),
    }
    taming_vqgan.convert({**cases["taming_vqgan"].weights, **extra})
    llamagen_vq.convert({**cases["llamagen_vq"].weights, "quantize.codebook_used": torch.zeros(65_536)})
    with pytest.raises(GenkitError, match=r"unknown: loss\.discriminator"):
        llamagen_vq.convert({**cases["llamagen_vq"].weights, **extra})


def test_a_gumbel_vqgan_is_refused_by_name() -> None:
    with pytest.raises(GenkitError, match="Gumbel"):
        taming_vqgan.convert(
            {"quantize.embed.weight": torch.zeros(2, 2), "quantize.proj.weight": torch.zeros(2, 2, 1, 1)}
        )


def test_codes_are_normalised_as_the_config_says(cases: dict[str, Any]) -> None:
    weights = cases["llamagen_vq"].weights
    ids = torch.arange(128).reshape(1, 1, 8, 16)
    raw = llamagen_vq.convert(weights, {"codebook_l2_norm": False}).codes(ids)
    torch.testing.assert_close(raw.squeeze(0).flatten(1).T, weights["quantize.embedding.weight"])
    unit = llamagen_vq.convert(weights).codes(ids)
    torch.testing.assert_close(unit, raw / raw.norm(dim=1, keepdim=True))
    with pytest.raises(UsageError, match="norm_type=batch"):
        llamagen_vq.convert(weights, {"norm_type": "batch"})


def test_an_imported_codebook_stays_where_it_is_until_it_is_used(cases: dict[str, Any]) -> None:
    case = cases["taming_vqgan"]
    tokenizer = taming_vqgan.convert(case.weights).train()
    before = tokenizer.quantizer.codebook.embed.clone()
    tokenizer(case.inputs["image"])  # an uninitialised codebook would be clustered here
    assert torch.equal(tokenizer.quantizer.codebook.embed, before)


# --- the same networks made by diffusers


def network_options(seed: int) -> dict[str, Any]:
    """Random tiny sizes: one to four levels, attention anywhere, one to three blocks, one to four groups."""
    draw = random.Random(seed)
    groups = draw.choice([1, 2, 4])
    widths = [2 * groups * draw.choice([1, 2, 3]) for _ in range(draw.randint(1, 4))]
    channels = draw.choice([1, 3])
    return {
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": widths,
        "down_block_types": [draw.choice(["", "Attn"]) + "DownEncoderBlock2D" for _ in widths],
        "up_block_types": [draw.choice(["", "Attn"]) + "UpDecoderBlock2D" for _ in widths],
        "layers_per_block": draw.randint(1, 3),
        "norm_num_groups": groups,
        "latent_channels": draw.choice([1, 3, 4]),
        "mid_block_add_attention": draw.random() < 0.6,
        "scaling_factor": draw.choice([0.2, 1.5]),
    }


def randomised(model: nn.Module, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += (0.3 if parameter.ndim > 1 else 0.1) * torch.randn_like(parameter)
    return model.eval()


def picture(options: dict[str, Any]) -> Tensor:
    stride = 2 ** (len(options["block_out_channels"]) - 1)
    return torch.rand(2, options["in_channels"], 2 * stride, 3 * stride) * 2 - 1


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("seed", range(10))
@torch.no_grad()
def test_vqmodel_of_diffusers_is_the_same(seed: int) -> None:
    from diffusers import VQModel

    options = network_options(seed)
    theirs = randomised(VQModel(**options, num_vq_embeddings=19, vq_embed_dim=[None, 2, 5][seed % 3]), seed)
    ours = diffusers_vq.convert(theirs.state_dict(), theirs.config)
    x = picture(options)
    latents = theirs.encode(x).latents
    quantised, _, (_, _, ids) = theirs.quantize(latents)
    encoded = ours.encode(x)
    assert encoded.ids is not None
    assert torch.equal(encoded.ids.flatten(), ids.flatten())
    close(encoded.z, quantised * options["scaling_factor"])
    close(ours.decode(encoded.z), theirs.decode(latents).sample)


@pytest.mark.parametrize("seed", range(10, 20))
@torch.no_grad()
def test_autoencoder_kl_of_diffusers_is_the_same(seed: int) -> None:
    from diffusers import AutoencoderKL

    options = network_options(seed)
    has_projections, shift = seed % 2 == 0, 0.3 if seed % 3 else None
    theirs = randomised(
        AutoencoderKL(
            **options, use_quant_conv=has_projections, use_post_quant_conv=has_projections, shift_factor=shift
        ),
        seed,
    )
    ours = diffusers_kl.convert(theirs.state_dict(), theirs.config)
    x = picture(options)
    posterior = theirs.encode(x).latent_dist
    encoded = ours.encode(x)
    close(encoded.z, (posterior.mean - (shift or 0)) * options["scaling_factor"])
    close(encoded.losses["kl"], posterior.kl() * 1e-6 / x[0].numel())
    close(ours.decode(encoded.z), theirs.decode(posterior.mean).sample)


@torch.no_grad()
def test_statistics_per_channel_become_the_scaling_of_z() -> None:
    from diffusers import AutoencoderKL

    options = {**network_options(3), "latent_channels": 2, "scaling_factor": 0.5}
    theirs = randomised(AutoencoderKL(**options, latents_mean=[1.0, -2.0], latents_std=[3.0, 0.5]), 0)
    ours = diffusers_kl.convert(theirs.state_dict(), theirs.config)
    x = picture(options)
    mean, std = torch.tensor([1.0, -2.0])[:, None, None], torch.tensor([3.0, 0.5])[:, None, None]
    close(ours.encode(x).z, (theirs.encode(x).latent_dist.mean - mean) / std * 0.5)


@torch.no_grad()
def test_attention_under_its_old_names_is_read() -> None:
    from diffusers import AutoencoderKL

    theirs = randomised(AutoencoderKL(**{**network_options(1), "mid_block_add_attention": True}), 0)
    new = theirs.state_dict()
    renamed = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for key, value in new.items():
        for word, former in renamed.items():
            key = key.replace(f".{word}.", f".{former}.")
        old[key] = value
    assert old.keys() != new.keys()
    x = picture(theirs.config)
    expected = diffusers_kl.convert(new, theirs.config).encode(x).z
    assert torch.equal(diffusers_kl.convert(old, theirs.config).encode(x).z, expected)


@torch.no_grad()
def test_kl_autoencoder_under_the_names_of_latent_diffusion() -> None:
    """The weights of taming_vqgan with twice the latent channels and no codes are those of a KL autoencoder."""
    case = golden.load(HERE / "golden" / "taming_vqgan.safetensors")
    twice = ("encoder.conv_out.weight", "encoder.conv_out.bias", "quant_conv.bias")
    weights = {k: torch.cat([v, -v]) if k in twice else v for k, v in case.weights.items() if "quantize" not in k}
    square = weights["quant_conv.weight"]
    weights["quant_conv.weight"] = torch.cat([torch.cat([square, 0 * square], 1), torch.cat([0 * square, square], 1)])
    ours = taming_kl.convert({**weights, "loss.logvar": torch.zeros(())})
    close(ours.encode(case.inputs["image"]).z, case.outputs["pre_quant"])
    close(ours.decode(case.outputs["quant"]), case.outputs["recon"])
    with pytest.raises(GenkitError, match=r"unknown: quantize\.embedding\.weight"):
        taming_kl.convert({**weights, "quantize.embedding.weight": torch.zeros(3, 12)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act_fn": "mish"}, "act_fn=mish"),
        ({"norm_type": "spatial"}, "norm_type=spatial"),
        ({"down_block_types": ["DownBlock2D"]}, "down_block_types holds DownBlock2D"),
    ],
)
def test_options_that_cannot_be_imported_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        diffusers_vq.convert({}, change)
    with pytest.raises(UsageError, match=r"config of a diffusers VQModel is missing"):
        diffusers_vq.convert({})


# --- rules


def test_rules_join_reshape_widen_and_keep() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 1, bias=False), nn.Linear(2, 2, bias=False))
    kept = model[1].weight.clone()
    a, b = torch.randn(1, 2).half(), torch.randn(3, 2).half()
    rules = [(r"0\.(\w+)", ("a.{0}", "b.{0}")), (r"1\..*", None)]
    fill(model, {"a.weight": a, "b.weight": b, "noise": a}, rules, {"noise": "not needed"}, "a test")
    assert torch.equal(model[0].weight.flatten(1), torch.cat([a, b]).float())
    assert torch.equal(model[1].weight, kept)
    with pytest.raises(GenkitError, match=r"those of a test: unknown: c; missing: b\.weight$"):
        fill(model, {"a.weight": a, "c": b}, rules, {}, "a test")


# --- files


def test_every_importer_is_found_by_its_file(cases: dict[str, Any]) -> None:
    found = importers()
    assert {"taming-vqgan", "taming-kl", "llamagen-vq", "maskgit-vqgan", "diffusers-vq", "diffusers-kl"} <= found.keys()
    assert all(found.values()), "the first line of an importer says whose weights it reads"
    assert "names" not in found


def save_as(path: Path, weights: dict[str, Tensor], top: str | None) -> Path:
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save(weights if top is None else {top: weights, "epoch": 3}, path)
    return path


@pytest.mark.parametrize(
    ("name", "top"),
    [("w.safetensors", None), ("w.pt", None), ("w.ckpt", "state_dict"), ("w.pth", "model"), ("w.pt", "ema")],
)
def test_weights_are_found_in_any_file(tmp_path: Path, cases: dict[str, Any], name: str, top: str | None) -> None:
    weights = cases["llamagen_vq"].weights
    found, _ = read_weights(save_as(tmp_path / name, weights, top))
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[key], weights[key]) for key in weights)


def test_averaged_weights_are_preferred(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.zeros(1)}, "ema": {"w": torch.ones(1)}}, tmp_path / "w.pt")
    assert read_weights(tmp_path / "w.pt")[0]["w"].item() == 1


def test_an_import_is_a_pipeline_that_every_verb_opens(tmp_path: Path, cases: dict[str, Any]) -> None:
    case = cases["taming_vqgan"]
    weights = {**case.weights, "loss.discriminator.main.0.weight": torch.zeros(2)}
    file = save_as(tmp_path / "last.ckpt", weights, "state_dict")
    found = import_weights(
        file, "taming-vqgan", tmp_path / "new" / "run", config={"model": {"resolution": 16}}, check=True
    )
    assert found["tokenizer"] == "vqgan"
    assert found["parameters"] == sum(value.numel() for value in case.weights.values())
    assert list(found["ignored"].values()) == [["loss.discriminator.main.0.weight"]]
    assert found["left_out"] == []
    assert found["check"]["image"] == found["check"]["reconstruction"] == [1, 3, 16, 16]
    assert found["check"]["ids"] == [1, 1, 8, 8]
    assert 0 <= found["check"]["ids_range"][0] <= found["check"]["ids_range"][1] < 96
    assert found["check"]["codes_agree"]
    json.dumps(found)
    told = importing.render(found)
    assert f"{found['parameters']:,} parameters" in told
    assert "1 keys not needed: discriminator" in told
    pipeline = open_run(tmp_path / "new" / "run")
    encoded = pipeline.tokenizer.encode(case.inputs["image"])
    assert torch.equal(encoded.ids.flatten(), case.outputs["indices"])
    assert pipeline.run_config["data"]["size"] == 16
    assert not list((tmp_path / "new").glob(".*")), "nothing temporary is left"


def test_imported_tokenizers_are_used_like_runs(
    tmp_path: Path, cases: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    from genkit.cli import main
    from genkit.images import to_pil, write_png

    file = save_as(tmp_path / "w.safetensors", cases["maskgit_vqgan"].weights, None)
    run, pictures, codes = (str(tmp_path / name) for name in ("run", "images", "codes"))
    import_weights(file, "maskgit-vqgan", run, size=16, data=pictures)
    for i, image in enumerate(to_pil(torch.rand(3, 3, 20, 20) * 2 - 1)):
        write_png(Path(pictures) / f"{i}.png", image)
    assert main(["encode", run, pictures, "-o", codes]) == 0
    assert main(["decode", run, codes, "-o", str(tmp_path / "decoded")]) == 0
    assert len(list((tmp_path / "decoded").glob("*.png"))) == 3
    assert main(["eval", run, "--device", "cpu"]) == 0
    assert "PSNR" in capsys.readouterr().out


def test_a_diffusers_folder_is_read_with_its_config(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    theirs = randomised(AutoencoderKL(**network_options(5), sample_size=24), 0)
    theirs.save_pretrained(tmp_path / "vae")
    found = import_weights(tmp_path / "vae", "diffusers-kl", tmp_path / "run", check=True)
    assert found["tokenizer"] == "klgan"
    assert found["check"]["image"][2:] == [24, 24]
    assert "ids" not in found["check"]
    x = picture(theirs.config)
    with torch.no_grad():
        z = theirs.encode(x).latent_dist.mean * theirs.config.scaling_factor
    close(open_run(tmp_path / "run").tokenizer.encode(x).z, z)


class Callback:
    """What training frameworks leave in checkpoints."""

    def __init__(self) -> None:
        self.best = 0.5


def test_objects_of_training_frameworks_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loudly(self: Any, state: Any) -> None:
        raise AssertionError("the class in the file was used")

    file = tmp_path / "last.ckpt"
    torch.save({"state_dict": {"w": torch.ones(2)}, "callbacks": {Callback: {"state": Callback()}}}, file)
    monkeypatch.setattr(Callback, "__setstate__", loudly, raising=False)
    weights, left_out = read_weights(file)
    assert weights.keys() == {"w"}
    assert [name.rpartition(".")[2] for name in left_out] == ["Callback"]


class Hostile:
    def __init__(self, call: Any, argument: str):
        self.call, self.argument = call, argument

    def __reduce__(self) -> Any:
        return self.call, (self.argument,)


def test_nothing_written_in_a_file_is_run(tmp_path: Path) -> None:
    import os

    trace = tmp_path / "trace"
    for call, argument in ((os.system, f"touch {trace}"), (exec, f"open({str(trace)!r}, 'w')")):
        torch.save({"state_dict": {"w": torch.ones(2)}, "x": Hostile(call, argument)}, tmp_path / "last.ckpt")
        with contextlib.suppress(GenkitError):  # a stand-in may take its place, which is as good
            read_weights(tmp_path / "last.ckpt")
        (tmp_path / "plain.pt").write_bytes(pickle.dumps(Hostile(call, argument)))
        with pytest.raises(GenkitError, match="cannot be read as weights alone"):
            read_weights(tmp_path / "plain.pt")
    assert not trace.exists()


def test_files_that_hold_no_weights_are_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"no such format")
    (tmp_path / "b.pt").write_bytes(b"\x80\x02garbage")
    (tmp_path / "c.pt").write_bytes(b"")
    torch.save({"epoch": 3}, tmp_path / "d.pt")
    torch.save([torch.ones(2)], tmp_path / "e.pt")
    for name, message in (
        ("a.safetensors", "not a readable safetensors"),
        ("b.pt", "cannot be read as weights alone"),
        ("c.pt", "cannot be read as weights alone"),
        ("d.pt", "holds no table of weights, found epoch"),
        ("e.pt", "holds no table of weights, found a list"),
        ("f.pt", "does not exist"),
    ):
        with pytest.raises(GenkitError, match=message) as caught:
            read_weights(tmp_path / name)
        assert "\n" not in str(caught.value)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UsageError, match="must hold one file of weights, found none"):
        read_weights(empty)


def test_mistakes_leave_nothing_behind(tmp_path: Path, cases: dict[str, Any]) -> None:
    file = save_as(tmp_path / "w.safetensors", cases["taming_vqgan"].weights, None)
    (tmp_path / "there").mkdir()
    for source, out, options, message in (
        ("taming-vqgn", "run", {}, "did you mean 'taming-vqgan'"),
        ("taming-vqgan", "there", {}, "exists; choose another folder"),
        ("taming-vqgan", "run", {"size": 17}, "--size 17 is no multiple of the tokenizer's stride 2"),
        ("taming-vqgan", "run", {"config": tmp_path / "none.yaml"}, "none.yaml cannot be read"),
        ("llamagen-vq", "run", {}, "not those of a LlamaGen tokenizer"),
    ):
        with pytest.raises(GenkitError, match=message):
            import_weights(file, source, tmp_path / out, **options)
    assert {path.name for path in tmp_path.iterdir()} == {"w.safetensors", "there"}
    assert not list((tmp_path / "there").iterdir())


def test_an_import_that_breaks_off_leaves_nothing_behind(
    tmp_path: Path, cases: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from genkit import files

    def full(folder: Path) -> None:
        raise OSError("no space left on device")

    file = save_as(tmp_path / "w.safetensors", cases["taming_vqgan"].weights, None)
    monkeypatch.setattr(files, "sync_folder", full)
    with pytest.raises(GenkitError, match="cannot be written: no space left"):
        import_weights(file, "taming-vqgan", tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]
