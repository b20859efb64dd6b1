"""The golden runner: passes on the files in tests/golden, fails on anything broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests import golden

HERE = Path(__file__).parent
FILES = sorted((HERE / "golden").glob("*.safetensors"))


def rewrite(
    source: Path, target: Path, change: dict[str, torch.Tensor | None] | None = None, **metadata: str | None
) -> Path:
    """A copy with some tensors replaced (None = left out) and some metadata replaced."""
    with safe_open(source, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()} | (change or {})
        texts = (file.metadata() or {}) | metadata
    save_file(
        {key: value for key, value in tensors.items() if value is not None},
        target,
        {key: value for key, value in texts.items() if value is not None},
    )
    return target


def tensor(path: Path, key: str) -> torch.Tensor:
    with safe_open(path, "pt") as file:
        return file.get_tensor(key)


VQ = HERE / "golden" / "vq.safetensors"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_stored_output_is_reproduced(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = golden.main([str(path)])
    lines = capsys.readouterr().out.splitlines()
    assert code == 0, "\n".join(lines)
    assert len(lines) == len(golden.load(path).outputs)
    assert all(line.endswith("  ok") for line in lines)


def failures(path: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert golden.main([str(path)]) == 1
    return [line for line in capsys.readouterr().out.splitlines() if "FAIL" in line]


def test_a_changed_weight_fails_what_depends_on_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = "weight/plain._codebook.embed"
    path = rewrite(VQ, tmp_path / "a.safetensors", {key: tensor(VQ, key) * 1.001})
    assert {line.split()[1] for line in failures(path, capsys)} == {"plain_decoded", "plain_quantized"}


def test_integers_must_be_equal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = tensor(VQ, "output/plain_indices").clone()
    ids[0, 0] += 1
    path = rewrite(VQ, tmp_path / "a.safetensors", {"output/plain_indices": ids}, tolerance="10")
    assert [line.split()[1] for line in failures(path, capsys)] == ["plain_indices"]


def test_an_output_nobody_makes_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = rewrite(VQ, tmp_path / "a.safetensors", {"output/plain_entropy": torch.zeros(2)})
    (line,) = failures(path, capsys)
    assert "plain_entropy" in line
    assert "run_vq does not produce it" in line


def test_another_shape_fails_with_both_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    codes = tensor(VQ, "output/plain_quantized")
    path = rewrite(VQ, tmp_path / "a.safetensors", {"output/plain_quantized": codes[:1].clone()})
    (line,) = failures(path, capsys)
    assert "shape [2, 20, 16], expected [1, 20, 16]" in line


def test_not_a_number_fails() -> None:
    nan, one = torch.tensor([float("nan")]), torch.ones(1)
    assert golden.compare(one, nan, 1e-4)[2] == "FAIL"
    assert golden.compare(nan, one, 1e-4)[2] == "FAIL"
    infinite = torch.tensor([float("inf"), 1.0])
    assert golden.compare(infinite, infinite.clone(), 1e-4) == (0.0, 1e-4, "ok")
    assert (
        golden.compare(torch.tensor([100.0]), torch.tensor([100.005]), 1e-4)[2] == "ok"
    )  # relative to the largest value


@pytest.mark.parametrize("key", ["weight/plain._codebook.embed", "weight/lowdim.project_in.bias"])
def test_a_missing_weight_fails_every_output_and_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    lines = failures(rewrite(VQ, tmp_path / "a.safetensors", {key: None}), capsys)
    assert len(lines) == len(golden.load(VQ).outputs)
    assert all(key.partition(".")[2] in line for line in lines)


def test_unknown_system_is_named_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = rewrite(VQ, tmp_path / "a.safetensors", system="perpetuum")
    (line,) = failures(path, capsys)
    assert "unknown system 'perpetuum'; known: " in line
    assert "vq" in line.partition("known: ")[2].split(", ")


@pytest.mark.parametrize("content", [b"", b"no such format", None])
def test_a_file_that_cannot_be_read_fails_and_the_next_is_still_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    path = tmp_path / "a.safetensors"
    if content is not None:
        path.write_bytes(content)
    assert golden.main([str(path), str(VQ)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "FAIL cannot be read" in lines[0]
    assert len(lines) == 1 + len(golden.load(VQ).outputs)
    assert all(line.endswith("  ok") for line in lines[1:])


def test_a_file_without_a_system_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = failures(rewrite(VQ, tmp_path / "a.safetensors", system=None), capsys)
    assert "the metadata lack system" in line


def test_heads_on_one_table_are_returned_side_by_side() -> None:
    peer = pytest.importorskip("vector_quantize_pytorch")
    torch.manual_seed(0)
    outputs, weights, inputs, modules = {}, {}, {}, {}
    for name, options in {
        "rows": {"dim": 6, "codebook_size": 9, "codebook_dim": 3, "heads": 2},
        "image": {"dim": 6, "codebook_size": 9, "codebook_dim": 3, "heads": 2, "accept_image_fmap": True},
    }.items():
        module = peer.VectorQuantize(**options).eval()
        inputs[f"x_{name}"] = torch.randn(2, 6, 3, 4) if name == "image" else torch.randn(2, 5, 6)
        codes, ids, _ = module(inputs[f"x_{name}"])
        outputs |= {
            f"{name}_quantized": codes,
            f"{name}_indices": ids,
            f"{name}_decoded": module.get_output_from_indices(ids),
        }
        weights |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
        modules[name] = ["VectorQuantize", options]
    got = golden.run_vq(golden.Case("vq", json.loads(json.dumps({"modules": modules})), weights, inputs, outputs, 1e-4))
    assert got.keys() == outputs.keys()
    for name, expected in outputs.items():
        assert golden.compare(expected, got[name], 1e-5)[2] == "ok", name
