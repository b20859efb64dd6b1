"""Mistakes on the command line of `sample`: one line each, and the folder is as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from genkit import config, registry
from genkit.errors import UsageError
from genkit.pipeline import GeneratorPipeline
from genkit.rng import sample_seeds
from tests.mistakes import assert_refused, draw, save_untrained


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A masked generator of two classes, never trained."""
    folder = tmp_path_factory.mktemp("run") / "masked"
    torch.manual_seed(0)
    spec = {"type": "vq", "stride": 4, "width": 8, "num_blocks": 1, "channels": 8, "codebook_size": 16}
    coder = registry.build("tokenizer", registry.check("tokenizer", spec, "tokenizer"), image_channels=1).eval()
    sections = {
        "data": {"type": "fashion"},
        "backbone": {"type": "masked", "dim": 16, "depth": 1},
        "objective": {"type": "masked"},
        "sampler": {"type": "masked", "num_steps": 2},
    }
    network = registry.build(
        "backbone",
        sections["backbone"],
        channels=coder.channels,
        codebook_size=coder.codebook_size,
        num_levels=coder.num_levels,
        num_classes=2,
        grid=(4, 4),
    )
    save_untrained(folder, coder, network, sections, [4, 4])
    return folder


MISTAKES = [
    (["--batch-size", "0"], "batch_size=0 must be at least 1"),
    (["--batch-size", "-1"], "batch_size=-1 must be at least 1"),
    (["--seed", "2147483648"], "seed 2147483648 is out of range"),
    (["--seed", str(-(2**40))], "is out of range"),
    (["--steps", "0"], "a sampler takes at least one step"),
    (["--steps", "17"], "sampler.num_steps=17, but a sample has 16 tokens"),
    (["--guidance", "nan"], "guidance nan must be at least 0, and finite"),
    (["--guidance", "inf"], "guidance inf must be at least 0, and finite"),
    (["--sampler", "temperature=.nan"], "sampler.temperature=nan: numbers must be finite"),
    (["--sampler", "temperature=.inf"], "sampler.temperature=inf: numbers must be finite"),
    (["--sampler", "schedule=pow0"], "sampler.schedule=pow0 is not a schedule"),
    (["--device", "nowhere"], "nowhere cannot be used here"),
    (["--caption", "red"], "captions were given, and this generator was trained on classes alone"),
    (["--format", "glb"], "are for shapes; this model draws images"),
    (["--resolution", "32"], "are for shapes; this model draws images"),
    (["--turntable"], "are for shapes; this model draws images"),
    (["--size", "32x16"], "the learned positions are for a grid of (4, 4)"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert_refused(capsys, run, tmp_path / "out", words, message)


def test_after_a_mistake_the_same_folder_can_be_drawn_into(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert draw(run, out, "--steps", "17") == 2
    assert draw(run, out) == 0
    assert {path.name for path in out.iterdir()} == {"000000.png", "000001.png", "grid.png", "samples.json"}
    # What is there already is not thrown away by a later mistake.
    (out / "000001.png").unlink()
    assert draw(run, out, "--steps", "17") == 2
    assert (out / "000000.png").exists()
    assert (out / "samples.json").exists()
    assert draw(run, out) == 0


def test_a_failure_between_files_keeps_what_is_there(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, calls = GeneratorPipeline.generate, []

    def generate(self: GeneratorPipeline, *args: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("memory")
        return whole(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(GeneratorPipeline, "generate", generate)
    assert draw(run, tmp_path / "out", "--batch-size", "1") == 1
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"000000.png", "samples.json"}
    assert draw(run, tmp_path / "out", "--batch-size", "1") == 0  # goes on
    assert len(calls) == 3


def test_folders_of_others_are_left_alone(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    assert draw(run, tmp_path / "file") == 2
    assert "is a file; give -o a folder" in capsys.readouterr().err
    out = tmp_path / "out"
    out.mkdir()
    (out / "samples.json").write_text("{")
    assert draw(run, out) == 2
    assert "holds other samples" in capsys.readouterr().err
    assert (out / "samples.json").read_text() == "{"
    (out / "samples.json").rename(out / "000000.png")
    assert draw(run, out) == 2
    assert "were not drawn by this command" in capsys.readouterr().err


def test_seeds_fit_64_bits() -> None:
    assert sample_seeds(2**31 - 1, 0, 1) == [2**63 - 2**32]
    with pytest.raises(UsageError, match="seed 2147483648 is out of range"):
        sample_seeds(2**31, 0, 1)
    with pytest.raises(UsageError, match=r"train\.seed"):
        config.resolve(
            {
                "data": {"type": "fashion"},
                "tokenizer": {"type": "vq"},
                "objective": {"type": "reconstruction"},
                "train": {"num_samples": 1, "seed": 2**31},
            }
        )
