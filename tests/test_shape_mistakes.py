"""Mistakes around shapes on the command line: what a generator decodes to, references that are not there, steps without tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from genkit.backbones.octgpt import OctGPT
from genkit.cli import main
from genkit.meshes import storage
from genkit.meshes.marching_cubes import marching_cubes
from genkit.tokenizers.octree_vq import OctreeVQ
from tests.mistakes import assert_refused, draw, save_untrained

TOKENIZER: dict[str, Any] = {
    "depth": 4,
    "full_depth": 2,
    "bits": 4,
    "encoder_channels": [8, 16],
    "encoder_blocks": [1, 1],
    "inner_channels": [16, 16],
    "inner_blocks": [1, 1],
    "decoder_channels": [16, 16, 8],
    "decoder_blocks": [1, 1, 1],
}
BACKBONE: dict[str, Any] = {"dim": 24, "depth": 2, "num_heads": 2, "window": 16, "dilation": 2, "buffer": 4}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generators of shapes that were never trained: one that decodes to anything, to nothing, to what is no number."""
    folder = tmp_path_factory.mktemp("runs")
    sections = {
        "data": {"type": "shapes"},
        "backbone": {"type": "octgpt", **BACKBONE},
        "objective": {"type": "octree_masked"},
        "sampler": {"type": "octree_masked", "num_steps": 2},
    }
    for name, distance in (("any", None), ("nothing", 1.0), ("nan", float("nan"))):
        torch.manual_seed(0)
        coder = OctreeVQ(**TOKENIZER).eval()
        for head in coder.value_heads if distance is not None else ():
            torch.nn.init.zeros_(head.last.weight)
            head.last.bias.data[3] = distance
        network = OctGPT(bits=4, full_depth=2, code_depth=3, num_classes=2, **BACKBONE).eval()
        save_untrained(folder / name, coder, network, sections, [1])
    return folder


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--resolution", "0"], "--resolution 0 is too coarse"),
        (["--resolution", "-4"], "--resolution -4 is too coarse"),
        (["--keep", "left"], "--keep are for images; this model draws shapes"),
        (["--format", "PLYY"], "--format PLYY is not known"),
        (["--steps", "513"], "sampler.num_steps=513, but the last depth has at most 512 tokens"),
        (["--sampler", "num_steps=[65, 4]"], "depth 1 of 2 has at most 64 tokens"),
        (["--sampler", "num_steps=[4, 513]"], "depth 2 of 2 has at most 512 tokens"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert_refused(capsys, runs / "any", tmp_path / "out", words, message)


def test_functions_without_a_surface_and_without_numbers(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert draw(runs / "nothing", tmp_path / "nothing", "--resolution", "8") == 0
    assert "000000.ply has no surface and was not written" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "nothing").iterdir()} == {"samples.json", "grid.png"}
    assert draw(runs / "nan", tmp_path / "nan", "--resolution", "8") == 1
    error = capsys.readouterr().err
    assert "a function that is not finite at 729 of 729 places" in error
    assert "Error:" not in error
    assert not (tmp_path / "nan").exists()


def test_a_saved_pipeline_of_shapes_is_evaluated_as_shapes(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    axis = torch.linspace(-1, 1, 9)
    ball = torch.cartesian_prod(axis, axis, axis).norm(dim=1).view(9, 9, 9) - 0.7
    for name in ("a", "b"):
        storage.save(marching_cubes(ball), tmp_path / "balls" / f"{name}.ply")
    command = ["eval", str(runs / "nothing"), "-q", "-n", "2", "--device", "cpu", "--json"]
    assert main([*command, "--ref", str(tmp_path / "balls")]) == 0
    rows = {row["metric"]: row["value"] for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["empty"] == 1
    assert main([*command, "--metrics", "frechet"]) == 2
    assert "is for images; shapes are measured in one way" in capsys.readouterr().err
    for word in ("nowhere", str(tmp_path / "nowhere.ply")):
        assert main([*command, "--ref", word]) == 2
        assert f"--ref {word} is neither train nor val of a run" in capsys.readouterr().err
    (tmp_path / "text.txt").write_text("x")
    assert main([*command, "--ref", str(tmp_path / "text.txt")]) == 2
    assert ".txt is not a format of meshes" in capsys.readouterr().err


def test_preparing_nothing_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.obj").write_bytes(b"")
    command = ["data", "prepare", str(tmp_path), "--workers", "1", f"cache={tmp_path / 'cache'}", "-q"]
    assert main(command) == 1
    assert "left out a.obj: empty file" in capsys.readouterr().out
    assert main([*command, "repair=[1"]) == 2
    assert "'[1' is no value in YAML" in capsys.readouterr().err
