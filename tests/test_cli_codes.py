"""The verbs encode and decode, by a tokenizer that keeps what it is given; what they call has tests of its own."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from genkit import cli
from genkit.errors import GenkitError, UsageError


@pytest.fixture
def coder(monkeypatch):
    """A run whose tokenizer has one level of 256 codes, the grey values themselves, on 4x6 images with stride 2."""
    import torch
    from torch import nn

    from genkit import pipeline
    from genkit.interfaces import Encoded

    class Grey(nn.Module):
        num_levels, codebook_size, stride, channels = 1, 256, 2, 1

        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(127.5))
            self.config = {"image_channels": 1}

        def encode(self, x):
            ids = ((x[:, :, ::2, ::2] + 1) * self.scale).round().long()
            return Encoded(z=ids.float(), ids=ids)

        def codes(self, ids):
            return ids / self.scale - 1

        def decode(self, z):
            return z.repeat_interleave(2, -1).repeat_interleave(2, -2)

    tokenizer = Grey()
    run = SimpleNamespace(tokenizer=tokenizer, run_config={"data": {"type": "folder", "size": [4, 6]}}, device="cpu")
    monkeypatch.setattr(pipeline, "open_run", lambda path, **_: run)
    return tokenizer


@pytest.fixture
def pictures(tmp_path):
    from PIL import Image

    folder = tmp_path / "pictures"
    (folder / "b").mkdir(parents=True)
    for i, name in enumerate(["a.png", "b/a.png", "b/c.jpg"]):
        Image.fromarray(np.full((4, 6), 40 * i, np.uint8)).save(folder / name)
    (folder / "broken.png").write_bytes(b"not a picture")
    return folder


def test_encode_and_decode_give_the_images_back(coder, pictures, tmp_path, capsys):
    from PIL import Image

    codes, out = str(tmp_path / "codes.npz"), tmp_path / "out"
    assert cli.main(["encode", "runs/x", str(pictures), "-o", codes, "--batch-size", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["images"], found["tokens"], list(found["skipped"])) == (3, 6, ["broken.png"])
    assert found["bits_per_pixel"] == pytest.approx(6 * 8 / 24)
    assert found["entropy_bits_per_pixel"] == pytest.approx(np.log2(3) * 6 / 24, rel=0.05)
    assert np.load(codes)["ids"].dtype == np.uint16
    assert cli.main(["decode", "runs/x", codes, "-o", str(out)]) == 0
    assert sorted(p.relative_to(out).as_posix() for p in out.rglob("*.png")) == ["a.png", "b/a.png", "b/c.png"]
    assert np.asarray(Image.open(out / "b" / "a.png")).tolist() == np.full((4, 6), 40).tolist()


def test_encode_of_one_file(coder, pictures, tmp_path):
    from genkit.coding import encode, read

    assert encode("run", str(pictures / "b" / "c.jpg"), str(tmp_path / "one.npz"))["images"] == 1
    assert read(str(tmp_path / "one.npz"))["names"] == ["c.jpg"]


def test_a_continuous_tokenizer_has_nothing_to_encode(coder, pictures, tmp_path):
    from genkit.coding import encode

    coder.num_levels = 0
    with pytest.raises(UsageError, match="continuous latents"):
        encode("run", str(pictures), str(tmp_path / "codes.npz"))


def test_codes_of_another_tokenizer_are_refused(coder, pictures, tmp_path):
    from genkit.coding import decode, encode

    path = str(tmp_path / "codes.npz")
    encode("run", str(pictures), path)
    coder.scale.data += 1
    with pytest.raises(GenkitError, match="was written by tokenizer"):
        decode("run", path, str(tmp_path / "out"))


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-40])


def _empty(path):
    path.write_bytes(b"")


def _change(**changes):
    def change(path):
        with np.load(path) as stored:
            content = dict(stored)
        np.savez(path, **{**content, **changes})

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "is not a complete codes file"),
        (_empty, "is not a complete codes file"),
        (Path.unlink, "no such codes file"),
        (_change(version=np.int64(99)), "has format version 99"),
        (_change(ids=np.full((3, 1, 2, 3), 300)), "is not a complete codes file"),
        (_change(ids=np.zeros((2, 1, 2, 3), np.uint16)), "is not a complete codes file"),
        (_change(names=np.array([object()] * 3)), "is not a complete codes file"),
        (_change(version=np.array("x")), "is not a complete codes file"),
    ],
)
def test_a_damaged_codes_file_is_one_line(coder, pictures, tmp_path, damage, message):
    from genkit.coding import encode, read

    path = tmp_path / "codes.npz"
    encode("run", str(pictures), str(path))
    damage(path)
    with pytest.raises(GenkitError, match=message) as caught:
        read(str(path))
    assert "\n" not in str(caught.value)


def test_a_codes_file_cannot_write_outside_its_folder(coder, pictures, tmp_path):
    from genkit.coding import decode, encode

    path = tmp_path / "codes.npz"
    encode("run", str(pictures), str(path))
    _change(names=np.array(["../../up.png", "/abs.png", "../../up.png"]))(path)
    out = tmp_path / "deep" / "out"
    decode("run", str(path), str(out))
    assert sorted(p.relative_to(tmp_path / "deep").as_posix() for p in tmp_path.joinpath("deep").rglob("*.png")) == [
        "out/abs.png",
        "out/up-2.png",
        "out/up.png",
    ]
