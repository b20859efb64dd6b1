"""Sampling that starts from a part of an image, from the command line, and imported masked generators."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from genkit import config, registry
from genkit.cli import main
from genkit.editing import mask_of
from genkit.errors import UsageError
from genkit.importing import import_weights
from genkit.pipeline import GeneratorPipeline, TokenizerPipeline, open_run

GRID, SIZE = (4, 4), 16
TOKENIZERS: dict[str, dict[str, Any]] = {
    "vq": {"type": "vq", "stride": 4, "width": 8, "num_blocks": 1, "channels": 8, "codebook_size": 16},
    "rvq": {
        "type": "rvq",
        "stride": 4,
        "width": 8,
        "num_blocks": 1,
        "channels": 8,
        "codebook_size": 16,
        "num_levels": 2,
    },
    "kl": {"type": "kl", "stride": 4, "width": 8, "num_blocks": 1, "channels": 4},
}
SMALL = {"dim": 16, "depth": 1}
# Tokenizer, backbone, objective, sampler.
GENERATORS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "masked": ("vq", {"type": "masked", **SMALL}, "masked", {"type": "masked", "num_steps": 4}),
    "recap": (
        "rvq",
        {"type": "bert", **SMALL},
        "masked",
        {"type": "masked", "num_steps": 4, "reuse": {"type": "recap"}},
    ),
    "mage": ("vq", {"type": "mage", **SMALL, "decoder_depth": 1}, "masked", {"type": "masked", "num_steps": 4}),
    "mar": (
        "kl",
        {"type": "mar", **SMALL, "buffer_size": 2, "head_width": 16, "head_depth": 1},
        "mar",
        {"type": "mar", "num_steps": 4, "head_steps": 2, "reuse": {"type": "recap", "light": 2}},
    ),
    "resgen": ("rvq", {"type": "resgen", **SMALL}, "resgen", {"type": "resgen", "num_steps": 4}),
    "flow": (
        "kl",
        {"type": "dit", **SMALL, "patch_size": 1, "mixer": {"type": "attention", "num_heads": 2}},
        "flow",
        {"type": "euler", "num_steps": 2},
    ),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One pipeline of each kind, never trained."""
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    coders = {
        name: registry.build("tokenizer", registry.check("tokenizer", spec, "tokenizer"), image_channels=1).eval()
        for name, spec in TOKENIZERS.items()
    }
    for name, (coder, backbone, objective, sampler) in GENERATORS.items():
        recipe = config.resolve(
            {
                "data": {"type": "fashion"},
                "tokenizer": {"from": "runs/x"},
                "backbone": backbone,
                "objective": {"type": objective},
                "sampler": sampler,
                "train": {"num_samples": 1},
            }
        )
        network = registry.build(
            "backbone",
            recipe["backbone"],
            channels=coders[coder].channels,
            codebook_size=coders[coder].codebook_size,
            num_levels=coders[coder].num_levels,
            num_classes=2,
            grid=GRID,
        )
        plain = json.loads(json.dumps(recipe))
        GeneratorPipeline(
            coders[coder],
            network,
            objective=plain["objective"],
            sampler=plain["sampler"],
            grid=list(GRID),
            class_names=["A", "B"],
            run_config=plain,
        ).save_pretrained(folder / name)
    return folder


@pytest.fixture
def image(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    return tmp_path / "image.png"


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


@pytest.mark.parametrize("name", [name for name in GENERATORS if name != "flow"])
def test_kept_pixels_stay_and_the_others_are_drawn(runs: Path, image: Path, tmp_path: Path, name: str) -> None:
    command = ["sample", str(runs / name), "-n", "2", "--labels", "A,B", "--device", "cpu"]
    assert main([*command, "--known", str(image), "--keep", "left", "-o", str(tmp_path / "out")]) == 0
    given, first, second = read(image), read(tmp_path / "out" / "000000.png"), read(tmp_path / "out" / "000001.png")
    for drawn in (first, second):
        assert (drawn[:, : SIZE // 2] == given[:, : SIZE // 2]).all()
        assert (drawn[:, SIZE // 2 :] != given[:, SIZE // 2 :]).any()
    record = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert record["known"]["keep"] == "left"
    # Tokens that are kept are the image's: asked with all but one token known, the model cannot change those.
    alone = ["sample", str(runs / name), "-n", "1", "--labels", "B", "--known", str(image), "--keep", "left"]
    assert main([*alone, "--seed", "5", "--device", "cpu", "-o", str(tmp_path / "alone")]) == 0


@pytest.mark.parametrize(
    ("keep", "rows", "columns"),
    [
        ("left", slice(None), slice(0, 8)),
        ("right", slice(None), slice(8, 16)),
        ("top", slice(0, 8), slice(None)),
        ("bottom", slice(8, 16), slice(None)),
        ("center", slice(4, 12), slice(4, 12)),
        ("2:7,3:16", slice(2, 7), slice(3, 16)),
        ("box 2:7, 3:16", slice(2, 7), slice(3, 16)),
    ],
)
def test_masks_by_words(keep: str, rows: slice, columns: slice) -> None:
    expected = torch.zeros(16, 16, dtype=torch.bool)
    expected[rows, columns] = True
    assert torch.equal(mask_of(keep, (16, 16)), expected)
    assert torch.equal(mask_of(f"not {keep}", (16, 16)), ~expected)


def test_masks_are_joined_and_read_from_images(tmp_path: Path) -> None:
    both = mask_of("left+top", (16, 16))
    assert torch.equal(both, mask_of("left", (16, 16)) | mask_of("top", (16, 16)))
    Image.fromarray((both.numpy() * 255).astype(np.uint8)).save(tmp_path / "mask.png")
    assert torch.equal(mask_of(str(tmp_path / "mask.png"), (16, 16)), both)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("masked", ["--keep", "left"], "--known IMAGE and --keep MASK go together"),
        ("masked", ["--known", "{image}"], "--known IMAGE and --keep MASK go together"),
        ("masked", ["--known", "{small}", "--keep", "left"], "has 12x16 pixels, the generator draws 16x16"),
        ("masked", ["--known", "{image}", "--keep", "{small}"], "has 12x16 pixels, the image 16x16"),
        ("masked", ["--known", "{image}", "--keep", "0:99,0:4"], "does not lie in an image of 16x16"),
        ("masked", ["--known", "{image}", "--keep", "lefft"], "'lefft' is neither a file nor a mask"),
        ("masked", ["--known", "{image}", "--keep", "left+right"], "nothing is left to draw"),
        ("masked", ["--known", "{image}", "--keep", "1:3,1:3"], "keeps no token whole (a token is 4x4 pixels)"),
        ("masked", ["--known", "missing.png", "--keep", "left"], "cannot be read as an image"),
        ("flow", ["--known", "{image}", "--keep", "left"], "this one was trained with flow"),
        ("masked", ["--steps", "17"], "sampler.num_steps=17, but a sample has 16 tokens"),
        ("resgen", ["--sampler", "reuse.type=recap"], "sampler.reuse.type=recap serves sampler.type=mar or masked"),
    ],
)
def test_what_does_not_fit_is_one_line(
    runs: Path,
    image: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    options: list[str],
    message: str,
) -> None:
    small = tmp_path / "small.png"
    Image.fromarray(np.zeros((12, 16), dtype=np.uint8)).save(small)
    filled = [option.format(image=image, small=small) for option in options]
    code = main(["sample", str(runs / name), "-n", "1", "--device", "cpu", "-o", str(tmp_path / "out"), *filled])
    assert code == 2
    assert message in " ".join(capsys.readouterr().err.split())


# Published masked generators


def weights_of(name: str, target: Path) -> dict[str, Any]:
    with safe_open(Path(__file__).parent / "golden" / f"{name}.safetensors", "pt") as file:
        save_file({key[7:]: file.get_tensor(key) for key in file.keys() if key.startswith("weight/")}, target)
        return json.loads(file.metadata()["config"])


@pytest.fixture(scope="module")
def coders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coders")
    torch.manual_seed(0)
    ids: dict[str, Any] = {"type": "vq", "stride": 2, "width": 8, "num_blocks": 1, "channels": 8, "codebook_size": 64}
    row: dict[str, Any] = {"type": "titok", "image_size": 16, "num_tokens": 16, "dim": 16, "depth": 1, "num_heads": 2}
    specs: dict[str, dict[str, Any]] = {
        "grid": ids,
        "row": row | {"codebook_size": 64},
        "short": row | {"codebook_size": 64, "num_tokens": 8},
        "latents": {"type": "kl", "stride": 2, "width": 8, "num_blocks": 1, "channels": 16},
    }
    for name, spec in specs.items():
        part = registry.build("tokenizer", spec, image_channels=3).eval()
        TokenizerPipeline(part, run_config={"name": name}).save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize(
    ("golden", "source", "coder", "sampler"),
    [
        ("maskgit_imagebert", "image-bert", "row", {"confidence": "logit", "guidance_over": "steps"}),
        ("maskgit_uvitbert", "uvit-bert", "row", {"confidence": "logit", "softmax_end": 0.0}),
        ("recap", "autonat", "grid", {"schedule": "pow2.5", "softmax_end": 0.75}),
        ("mar", "mar", "latents", {"type": "mar", "guidance_schedule": "linear"}),
    ],
)
def test_an_imported_masked_generator_draws_images(
    coders: Path, tmp_path: Path, golden: str, source: str, coder: str, sampler: dict[str, Any]
) -> None:
    options = weights_of(golden, tmp_path / "w.safetensors")
    found = import_weights(
        tmp_path / "w.safetensors",
        source,
        tmp_path / "run",
        config=options,
        tokenizer=coders / coder,
        check=golden != "mar",
    )
    pipeline = open_run(tmp_path / "run")
    assert pipeline.sampler.items() >= sampler.items()
    assert pipeline.num_classes == 10
    assert found["parameters"] > 0
    steps = ["num_steps=3", "head_steps=2"] if golden == "mar" else ["num_steps=3"]
    x = pipeline.generate(torch.tensor([3, 9]), [1, 2], sampler=steps)
    assert x.shape[1] == 3
    assert x.isfinite().all()
    again = pipeline.generate(torch.tensor([9]), [2], sampler=steps)
    torch.testing.assert_close(again[0], x[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("golden", "source", "coder", "message"),
    [
        ("maskgit_imagebert", "image-bert", "short", r"makes a row of 8 tokens, this network was trained on \(16,\)"),
        ("maskgit_imagebert", "image-bert", "grid", r"makes a grid of tokens.*this network was trained on \(16,\)"),
        ("recap", "autonat", "row", r"makes a row of 16 tokens, this network was trained on \(4, 4\)"),
        ("recap", "autonat", "latents", "codes: 0, this network needs 64"),
    ],
)
def test_a_tokenizer_whose_tokens_do_not_fit_is_refused(
    coders: Path, tmp_path: Path, golden: str, source: str, coder: str, message: str
) -> None:
    options = weights_of(golden, tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match=message):
        import_weights(tmp_path / "w.safetensors", source, tmp_path / "run", config=options, tokenizer=coders / coder)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("golden", "source"),
    [("maskgit_imagebert", "image_bert"), ("maskgit_uvitbert", "uvit_bert"), ("recap", "autonat"), ("mar", "mar")],
)
def test_every_key_is_needed_and_known(golden: str, source: str) -> None:
    import importlib

    from genkit.errors import GenkitError

    importer = importlib.import_module(f"genkit.importers.{source}")
    with safe_open(Path(__file__).parent / "golden" / f"{golden}.safetensors", "pt") as file:
        state = {key[7:]: file.get_tensor(key).float() for key in file.keys() if key.startswith("weight/")}
        options = json.loads(file.metadata()["config"])
    with pytest.raises(GenkitError, match=r"unknown: extra\.weight"):
        importer.convert({**state, "extra.weight": torch.zeros(1)}, options)
    for lost in sorted(state)[:: len(state) // 3]:
        with pytest.raises(GenkitError, match="missing"):
            importer.convert({key: value for key, value in state.items() if key != lost}, options)
