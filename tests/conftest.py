"""What every test finds: no network, no leftovers of another test, and a set of parts that lie outside the tree."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", choices=["cpu", "cuda"], help="where the kernels are tested")


def pytest_configure(config: pytest.Config) -> None:
    """Without a GPU Triton's kernels run in its interpreter; that is decided when their files are imported, so here."""
    os.environ["GENKIT_TEST_DEVICE"] = config.getoption("device")
    if config.getoption("device") == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"


# The same examples every time: a suite that is green or red by chance says nothing. HYPOTHESIS_PROFILE=search looks for new ones.
settings.register_profile("same", derandomize=True)
settings.register_profile("search")
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the command line sets it

PARTS = '''
from typing import Literal

from genkit.registry import MixerSpec


class Pixels:
    """Data.

    Args:
        size: pixels per side,
            or (Y, X).
        path, root: where the files lie.
    """

    def __init__(self, *, size: int | tuple[int, int] = 8, path: str = "here", root: str | None = None, flip: bool = False):
        self.size = size


class Codes:
    def __init__(self, *, image_channels: int, codebook_size: int = 16, beta: float = 0.25, kind: Literal["ema", "plain"] = "ema"):
        self.image_channels, self.codebook_size, self.beta = image_channels, codebook_size, beta


class OtherCodes:
    def __init__(self, *, image_channels: int, levels: list[int]):
        self.levels = levels


class Mix:
    def __init__(self, *, dim: int, layer: int, num_heads: int = 2):
        self.dim, self.layer, self.num_heads = dim, layer, num_heads


class Net:
    def __init__(self, *, mixer: MixerSpec, width: int = 8, codebook_size: int, grid: tuple[int, ...]):
        self.mixer, self.width, self.codebook_size, self.grid = mixer, width, codebook_size, grid


class Loss:
    def __init__(self, *, weight: float = 1.0):
        self.weight = weight


class Steps:
    def __init__(self, *, num_steps: int = 4):
        self.num_steps = num_steps


class Score:
    def __init__(self, *, count: int = 10):
        self.count = count
'''

TOKENIZER = """\
# A tokenizer for tests.
data: {type: 'outside_parts:Pixels'}
tokenizer:
  type: outside_parts:Codes
  beta: 0.5
objective: {type: 'outside_parts:Loss'}
train:
  num_samples: 100
  lr: 1e-4
"""

GENERATOR = """\
# A generator for tests.
data: {type: 'outside_parts:Pixels'}
tokenizer: {from: runs/codes}
backbone:
  type: outside_parts:Net
  mixer: {type: 'outside_parts:Mix', num_heads: 4}
objective: {type: 'outside_parts:Loss'}
sampler: {type: 'outside_parts:Steps', guidance: 2}
metrics:
  - type: outside_parts:Score
train: {num_samples: 100}
"""


@pytest.fixture(autouse=True)
def _speaks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """-q silences a process for good; a test is not a process."""
    from genkit import console

    monkeypatch.setattr(console, "_quiet", False)
    monkeypatch.delenv("RANK", raising=False)


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The module `outside_parts`: one small part per family, not in the tree."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "outside_parts.py").write_text(PARTS)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "outside_parts", raising=False)
    return "outside_parts"


@pytest.fixture
def recipe(tmp_path: Path, outside: str) -> Callable[..., Path]:
    """Write a recipe made of outside parts: recipe("tokenizer"), recipe("generator") or recipe(text, "name.yaml")."""

    def write(text: str = "tokenizer", name: str = "toy.yaml") -> Path:
        path = tmp_path / name
        path.write_text({"tokenizer": TOKENIZER, "generator": GENERATOR}.get(text, text))
        return path

    return write


@pytest.fixture
def run_directory(recipe: Callable[..., Path], tmp_path: Path) -> Path:
    """A run as training leaves it, of 100 samples, half done."""
    from genkit import config

    run = tmp_path / "runs" / "toy"
    (run / "checkpoints" / "0000005" / "state").mkdir(parents=True)
    (run / "checkpoints" / "last").symlink_to("0000005")
    (run / "config.resolved.yaml").write_text(config.dump(config.load(recipe())))
    (run / "metrics.jsonl").write_text('{"step": 1, "samples": 10}\n{"step": 5, "samples": 50, "loss": 0.25}\n{"st')
    (run / "samples").mkdir()
    (run / "samples" / "0000005-ema.png").write_bytes(b"")
    (run / "eval").mkdir()
    (run / "eval" / "0000005.json").write_text('{"rows": [{"metric": "psnr", "value": 21.5}], "settings": {"a": 1}}')
    return run


@pytest.fixture
def paths_of_users(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels run as they do for a user: Triton's interpreter, which the tests of kernels ask for, would take minutes elsewhere."""
    monkeypatch.setattr("genkit.dispatch.is_interpreting", lambda: False)
