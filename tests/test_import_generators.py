"""Published diffusion networks become generators that every verb takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from genkit import importing, registry
from genkit.errors import UsageError
from genkit.importing import import_weights
from genkit.pipeline import TokenizerPipeline, open_run
from tests.text_encoders import save_encoder

pytestmark = pytest.mark.usefixtures("paths_of_users")
GOLDEN = Path(__file__).parent / "golden"
# Golden file, importer, and what its pipeline samples by.
CASES = {
    "dit": ("dit", {"type": "ancestral", "variance": "learned", "guidance": 1.5, "guidance_channels": 3}),
    "sit": ("dit", {"type": "heun", "guidance": 1.5, "guidance_channels": 3}),
    "diffusers-dit": ("dit_diffusers", {"type": "ancestral", "variance": "learned", "guidance_channels": None}),
    "fit": ("fitv2", {"type": "heun", "guidance_channels": 3}),
    "dimsum": ("dimsum", {"type": "heun", "guidance": 1.4, "guidance_channels": None}),
}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A tiny autoencoder of 4 channels and stride 2, never trained."""
    torch.manual_seed(0)
    part = registry.build(
        "tokenizer",
        {"type": "klgan", "widths": [8, 8], "num_blocks": 1, "channels": 4, "norm_groups": 4},
        image_channels=3,
    )
    TokenizerPipeline(part.eval(), run_config={"name": "kl"}).save_pretrained(tmp_path / "kl")
    return tmp_path / "kl"


def weights_of(name: str, target: Path) -> tuple[Path, dict[str, Any]]:
    """The weights of a golden file as a file of their own, and the config of the original."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        tensors = {key[7:]: file.get_tensor(key) for key in file.keys() if key.startswith("weight/")}
        config = json.loads(file.metadata()["config"])
    save_file(tensors, target)
    return target, config


@pytest.mark.parametrize("source", CASES)
def test_an_imported_network_draws_images(tmp_path: Path, tokenizer: Path, source: str) -> None:
    name, sampler = CASES[source]
    file, config = weights_of(name, tmp_path / "w.safetensors")
    size = 32 if name == "dimsum" else 16
    found = import_weights(
        file,
        source,
        tmp_path / "run",
        config=config,
        check=True,
        tokenizer=tokenizer,
        size=size if name == "fitv2" else None,
    )
    assert found["check"]["image"] == [1, 3, size, size]
    json.dumps(found)
    assert f"{found['parameters']:,} parameters" in importing.render(found)
    pipeline = open_run(tmp_path / "run")
    assert pipeline.sampler.items() >= sampler.items()
    assert pipeline.num_classes == 10
    assert pipeline.run_config["imported"] == {"from": source, "file": "w.safetensors"}
    images = pipeline.generate(torch.tensor([3, 9]), [1, 2], steps=2)
    assert images.shape == (2, 3, size, size)
    again = pipeline.generate(torch.tensor([9]), [2], steps=2)
    torch.testing.assert_close(again[0], images[1], atol=1e-4, rtol=1e-4)


def test_a_generator_needs_its_tokenizer(tmp_path: Path, tokenizer: Path) -> None:
    file, config = weights_of("dit", tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match="give the tokenizer that makes images of them"):
        import_weights(file, "dit", tmp_path / "run", config=config)
    with pytest.raises(UsageError, match="--size 15 is no multiple of the tokenizer's stride 2"):
        import_weights(file, "dit", tmp_path / "run", config=config, tokenizer=tokenizer, size=15)
    other = registry.build("tokenizer", {"type": "pixels"}, image_channels=3)
    TokenizerPipeline(other, run_config={"name": "pixels"}).save_pretrained(tmp_path / "pixels")
    with pytest.raises(UsageError, match="channels of its latents: 3, this network needs 4"):
        import_weights(file, "dit", tmp_path / "run", config=config, tokenizer=tmp_path / "pixels")
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_needs_none(tmp_path: Path, tokenizer: Path) -> None:
    file, config = weights_of("taming_vqgan", tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match="are a tokenizer themselves; leave it out"):
        import_weights(file, "taming-vqgan", tmp_path / "run", config=config, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("source", "name", "part"),
    [
        (
            "llamagen-gpt",
            "llamagen_gpt",
            {"type": "vq", "stride": 4, "width": 8, "num_blocks": 1, "channels": 8, "codebook_size": 96},
        ),
        (
            "var",
            "var",
            {
                "type": "var_vq",
                "patch_sizes": [1, 2, 3, 4],
                "stride": 4,
                "width": 8,
                "num_blocks": 1,
                "channels": 16,
                "codebook_size": 64,
            },
        ),
    ],
)
def test_an_imported_generator_of_sequences_draws_images(
    tmp_path: Path, source: str, name: str, part: dict[str, Any]
) -> None:
    coder = registry.build("tokenizer", part, image_channels=3)
    TokenizerPipeline(coder.eval(), run_config={"name": "ids"}).save_pretrained(tmp_path / "ids")
    file, config = weights_of(name, tmp_path / "w.safetensors")
    options: dict[str, Any] = {"config": config, "check": True, "tokenizer": tmp_path / "ids"}
    found = import_weights(file, source, tmp_path / "run", **options)
    assert found["check"]["image"] == [1, 3, 16, 16]
    pipeline = open_run(tmp_path / "run")
    assert pipeline.sampler["type"] == "autoregressive"
    assert pipeline.generate(torch.tensor([3, 9]), [1, 2]).shape == (2, 3, 16, 16)
    coder = registry.build("tokenizer", {**part, "codebook_size": 32}, image_channels=3)
    TokenizerPipeline(coder.eval(), run_config={"name": "ids"}).save_pretrained(tmp_path / "few")
    with pytest.raises(UsageError, match=r"codes: 32, this network needs (96|64)"):
        import_weights(file, source, tmp_path / "other", config=config, tokenizer=tmp_path / "few")


def test_an_imported_generator_is_told_texts(tmp_path: Path) -> None:
    part = {"type": "vq", "stride": 4, "width": 8, "num_blocks": 1, "channels": 8, "codebook_size": 40}
    coder = registry.build("tokenizer", part, image_channels=3)
    TokenizerPipeline(coder.eval(), run_config={"name": "ids"}).save_pretrained(tmp_path / "ids")
    file, config = weights_of("llamagen_gpt_t2i", tmp_path / "w.safetensors")
    options: dict[str, Any] = {"config": config, "tokenizer": tmp_path / "ids"}
    import_weights(file, "llamagen-gpt", tmp_path / "usual", **options)
    condition = {"type": "captions", "encoder": "google/flan-t5-xl", "length": 10, "files": False}
    assert open_run(tmp_path / "usual").condition == condition

    save_encoder(tmp_path / "t5", "t5", width=20)
    config |= {"t5_path": str(tmp_path), "t5_model_type": "t5"}
    found = import_weights(file, "llamagen-gpt", tmp_path / "run", **options, check=True)
    assert found["check"]["image"] == [1, 3, 12, 12]
    pipeline, nobody = open_run(tmp_path / "run"), torch.full((3,), -1)
    assert (pipeline.sampler["guidance"], pipeline.sampler["top_k"], pipeline.num_classes) == (7.5, 40, 0)
    images = pipeline.generate(nobody, [0, 0, 0], texts=["a red hat", "a red hat", "hat"])
    torch.testing.assert_close(images[0], images[1], atol=1e-4, rtol=1e-4)
    assert (images[2] - images[0]).abs().max() > 1e-2
