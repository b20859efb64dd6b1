"""Runs as others load them: diffusers' own parts compute the same, and what they cannot hold is told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.pipelines.dit import pipeline_dit

from genkit import AutoPipeline, GeneratorPipeline, registry
from genkit.cli import main
from genkit.exporting import export
from genkit.importers import diffusers_dit, diffusers_kl
from genkit.nn.layout import dense_layout

PLAIN = {"type": "attention", "num_heads": 2, "qk_norm": False, "rope": False}


def part(section: str, spec: dict[str, Any], **given: Any) -> Any:
    torch.manual_seed(0)
    module = registry.build(section, registry.check(section, spec, section), **given)
    for parameter in module.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return module.eval()


def dit(num_classes: int = 5, **options: Any) -> Any:
    spec = {"type": "dit", "dim": 32, "depth": 2, "freq_shift": 1, "mixer": PLAIN, **options}
    return part("backbone", spec, channels=4, num_classes=num_classes, grid=(8, 8))


def klgan(**options: Any) -> Any:
    spec = {"type": "klgan", "widths": [32, 32], "num_blocks": 1, "attention": [1], "channels": 4, **options}
    tokenizer = part("tokenizer", spec, image_channels=3)
    tokenizer.set_latent_stats(torch.linspace(-1, 1, 4), torch.linspace(0.5, 3, 4))
    return tokenizer


def pipeline(backbone: Any, tokenizer: Any, **options: Any) -> GeneratorPipeline:
    objective = registry.check("objective", {"type": "diffusion", "schedule": "cosine", **options}, "objective")
    sampler = registry.check("sampler", {"type": "scheduler", "name": "DDIMScheduler", "num_steps": 4}, "sampler")
    names = [f"class {i}" for i in range(backbone.config["num_classes"])]
    return GeneratorPipeline(tokenizer, backbone, objective, {**sampler, "guidance": 2.5}, [8, 8], names, {"name": "x"})


@pytest.mark.parametrize("options", [{}, {"learn_sigma": True, "own_conditions": True, "mlp_norm_eps": 1e-5}])
def test_a_transformer_goes_there_and_back(options):
    network = dit(**options)
    theirs = diffusers_dit.export(network)
    x, label = torch.randn(3, 4, 8, 8), torch.tensor([0, 4, -1])
    k = torch.tensor([0.0, 500.0, 999.0])
    found = theirs(x, timestep=k, class_labels=torch.where(label < 0, 1000, label)).sample
    wanted = network(x, k, {"label": label}, dense_layout((8, 8)))
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-5)
    again = diffusers_dit.convert(theirs.state_dict(), dict(theirs.config))
    assert again.config["own_conditions"] == network.config["own_conditions"]
    torch.testing.assert_close(again.blocks[1].mlp.up.weight, network.blocks[1].mlp.up.weight)


@pytest.mark.parametrize("options", [{}, {"neck": None}, {"attention": [], "mid_attention": False, "norm_groups": 16}])
def test_an_autoencoder_goes_there(options):
    tokenizer = klgan(**options)
    theirs = diffusers_kl.export(tokenizer)
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    z = tokenizer.encode(x).z
    torch.testing.assert_close(theirs.encode(x).latent_dist.mean, z, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(theirs.decode(z).sample, tokenizer.decode(z), atol=2e-4, rtol=1e-4)
    assert theirs.config.scaling_factor == 1


@pytest.mark.parametrize("options", [{}, {"prediction": "v"}])
def test_their_pipeline_draws_the_same_pictures_without_genkit(tmp_path, monkeypatch, options):
    ours = pipeline(dit(learn_sigma=not options), klgan(), **options)
    ours.save_pretrained(tmp_path / "run")
    found = export(tmp_path / "run", tmp_path / "out", to="diffusers-dit")
    assert found["parts"]["vae"] == "AutoencoderKL"
    theirs = DiTPipeline.from_pretrained(tmp_path / "out")
    theirs.set_progress_bar_config(disable=True)
    assert theirs.get_label_ids(["class 3"]) == [3]
    noise: list[torch.Tensor] = []
    kept = GeneratorPipeline.generate

    def start(*args: Any, **kwargs: Any) -> torch.Tensor:
        from genkit.rng import Rng

        noise.append(Rng([3, 4]).fork("start").normal(4, 8, 8))
        return noise[0]

    monkeypatch.setattr(pipeline_dit, "randn_tensor", start)
    pictures = theirs([3, 0], guidance_scale=2.5, num_inference_steps=4, output_type="pt").images
    wanted = (kept(ours, torch.tensor([3, 0]), [3, 4]) + 1) / 2
    assert len(noise) == 1
    torch.testing.assert_close(pictures, wanted, atol=1e-4, rtol=0)


def test_a_generator_of_pixels_gives_transformer_and_scheduler(tmp_path):
    network = part(
        "backbone",
        {"type": "dit", "dim": 32, "depth": 1, "freq_shift": 1, "mixer": PLAIN},
        channels=3,
        num_classes=2,
        grid=(8, 8),
    )
    pixels = registry.build("tokenizer", registry.check("tokenizer", {"type": "pixels"}, "t"), image_channels=3)
    pipeline(network, pixels).save_pretrained(tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--to", "diffusers-dit"]) == 0
    assert DiTTransformer2DModel.from_pretrained(tmp_path / "out" / "transformer").config.in_channels == 3
    scheduler: Any = DDIMScheduler.from_pretrained(tmp_path / "out" / "scheduler")
    alpha = registry.build("objective", {"type": "diffusion", "schedule": "cosine"}).path.alpha(torch.tensor(0.5))
    assert float(scheduler.alphas_cumprod[499]) == pytest.approx(float(alpha) ** 2, rel=1e-4)
    assert not issubclass(AutoencoderKL, type(pixels))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixer": {**PLAIN, "rope": True}}, r"backbone\.mixer="),
        ({"mixer": {"type": "mamba"}}, r"backbone\.mixer="),
        ({"mixer": [PLAIN, PLAIN]}, r"backbone\.mixer="),
        ({"freq_shift": 0}, r"backbone\.freq_shift=0, and there it is always 1"),
        ({"gelu": "none"}, r"backbone\.gelu=none"),
        ({"positions": "table"}, r"backbone\.positions=table"),
        ({"mlp_ratio": 2.0}, r"backbone\.mlp_ratio"),
        ({"num_classes": 0}, r"backbone\.num_classes=0"),
        ({"context_dim": 8}, r"backbone\.context_dim=8, and there it is always null"),
    ],
)
def test_what_a_transformer_cannot_hold_is_told(tmp_path, capsys, options, message):
    pipeline(dit(**options), klgan()).save_pretrained(tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--to", "diffusers-dit"]) == 2
    text = capsys.readouterr().err
    assert __import__("re").search(message, text), text
    assert len(text.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", ["fit", "flow", "kl", "word", "there"])
def test_what_cannot_be_exported_is_told(tmp_path, capsys, case):
    backbone, tokenizer, words = dit(), klgan(), ["--to", "diffusers-dit"]
    if case == "fit":
        backbone = part(
            "backbone", {"type": "fit", "dim": 16, "depth": 1, "num_heads": 2}, channels=4, num_classes=2, grid=(8, 8)
        )
    if case == "kl":
        tokenizer = part(
            "tokenizer", {"type": "kl", "stride": 2, "width": 8, "num_blocks": 1, "channels": 4}, image_channels=3
        )
    ours = pipeline(backbone, tokenizer)
    if case == "flow":
        ours.register_to_config(objective=registry.check("objective", {"type": "flow"}, "o"))
    if case == "word":
        words = ["--to", "diffusers-dti"]
    if case == "there":
        (tmp_path / "out").mkdir()
    ours.save_pretrained(tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), *words]) == 2
    message = {
        "fit": "only backbone.type=dit",
        "flow": "objective.type=flow",
        "kl": "klgan can be one, this is a KL",
        "word": "did you mean 'diffusers-dit'",
        "there": "exists; choose another folder",
    }
    assert message[case] in capsys.readouterr().err


def test_a_pipeline_is_loaded_in_a_fresh_process_and_draws_the_same(tmp_path):
    ours = pipeline(dit(), klgan())
    ours.save_pretrained(tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    code = (
        "import sys, torch, genkit.pipeline\n"
        "from diffusers import DiffusionPipeline\n"
        "pipe = DiffusionPipeline.from_pretrained(sys.argv[1])\n"
        "x = pipe(class_labels=[1, 2], generator=torch.Generator().manual_seed(0), output_type='pt', size=(24, 16)).images\n"
        "torch.save(x, sys.argv[2])\n"
    )
    file = tmp_path / "x.pt"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out"), str(file)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    pipe = AutoPipeline.from_pretrained(Path(tmp_path / "run"))
    wanted = pipe(class_labels=[1, 2], generator=torch.Generator().manual_seed(0), output_type="pt", size=(24, 16))
    assert wanted.images.shape == (2, 3, 24, 16)
    torch.testing.assert_close(torch.load(file), wanted.images, atol=1e-6, rtol=0)
