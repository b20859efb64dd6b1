"""The verbs encode and decode over runs that were saved."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from genkit import coding
from genkit.backbones.masked import Masked
from genkit.codec import container, model, rate
from genkit.errors import GenkitError, UsageError
from genkit.pipeline import GeneratorPipeline, TokenizerPipeline
from genkit.weights import module_sha256
from tests.coded import tokenizer

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    vq = tokenizer()
    data = {"data": {"type": "folder", "path": "nowhere", "size": [16, 16]}}
    TokenizerPipeline(vq, run_config=data).save_pretrained(folder / "vq")
    TokenizerPipeline(tokenizer(channels=9), run_config=data).save_pretrained(folder / "other")
    torch.manual_seed(1)
    backbone = Masked(codebook_size=64, num_levels=1, num_classes=0, grid=(4, 4), dim=16, depth=1, positions="sincos")
    for parameter in backbone.parameters():
        nn.init.normal_(parameter, std=0.4)
    sampler = {"type": "masked", "guidance": 1.0, "guidance_schedule": "constant"}
    for name, own in (("masked", vq), ("masked-of-other", tokenizer(channels=9))):
        GeneratorPipeline(
            own, backbone, objective={"type": "masked"}, sampler=sampler, grid=[4, 4], run_config=data
        ).save_pretrained(folder / name)
    return SimpleNamespace(**{path.name.replace("-", "_"): str(path) for path in folder.iterdir()})


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    (folder / "b").mkdir()
    rng = np.random.default_rng(0)
    sizes = {"a.png": (16, 16), "b/c.png": (16, 16), "b/d.png": (8, 24), "e.png": (16, 16), "f.png": (12, 12)}
    for name, size in sizes.items():
        small = Image.fromarray(rng.integers(0, 256, (4, 4), dtype=np.uint8))
        small.resize(size[::-1], Image.Resampling.BICUBIC).save(folder / name)
    return folder


def read_all(folder: Path) -> dict[str, np.ndarray]:
    return {path.relative_to(folder).as_posix(): np.asarray(Image.open(path)) for path in sorted(folder.rglob("*.png"))}


PRIORS = ["auto", "uniform", "static", "adaptive", "masked"]


@pytest.mark.parametrize("prior", PRIORS)
def test_images_come_back_as_the_tokenizer_makes_them(runs, photos, tmp_path, prior):
    word = runs.masked if prior == "masked" else prior
    found = coding.encode(runs.vq, str(photos), str(tmp_path / "x.gtk"), prior=word, batch_size=2)
    assert found["images"] == 5
    assert found["bytes"] == (tmp_path / "x.gtk").stat().st_size
    pixels = 3 * 256 + 8 * 24 + 144
    assert found["bits_per_pixel"] == pytest.approx(8 * found["bytes"] / pixels)
    assert 0 < found["payload_bits_per_pixel"] < found["bits_per_pixel"]
    assert found["fixed_bits_per_pixel"] == pytest.approx(6 / 16)
    assert found["prior"] == {"masked": "model", "auto": min(found["tried"], key=found["tried"].get)}.get(prior, prior)
    needed = runs.masked if prior == "masked" else None
    coding.decode(runs.vq, str(tmp_path / "x.gtk"), str(tmp_path / "out"), prior=needed)
    images = read_all(photos)
    decoded = read_all(tmp_path / "out")
    assert list(decoded) == list(images)
    vq = tokenizer()
    for name, image in images.items():
        x = torch.tensor(image)[None, None].float() / 127.5 - 1
        expected = (vq(x)[0].clamp(-1, 1)[0, 0] + 1) * 127.5
        assert np.abs(decoded[name] - expected.numpy()).max() <= 0.51


def test_another_process_with_another_batch_size_does_the_same(runs, photos, tmp_path):
    words = {"uniform": "", "static": "", "adaptive": "", runs.masked: runs.masked}  # prior -> what decoding needs
    here = []
    for i, (word, needed) in enumerate(words.items()):
        path = tmp_path / f"{i}.gtk"
        coding.encode(runs.vq, str(photos), str(path), prior=word, batch_size=3)
        coding.decode(runs.vq, str(path), str(tmp_path / f"here-{i}"), prior=needed or None)
        here.append(path.read_bytes())
    program = (
        "import json, sys, torch\n"
        "torch.set_num_threads(2)\n"
        "from genkit import console, coding\n"
        "console.set_quiet(True)\n"
        "run, photos, folder, words = sys.argv[1:]\n"
        "for i, (word, needed) in enumerate(json.loads(words).items()):\n"
        "    path = f'{folder}/{i}.gtk'\n"
        "    coding.decode(run, path, f'{folder}/there-{i}', prior=needed or None, batch_size=1)\n"
        "    coding.encode(run, photos, path, prior=word, batch_size=1)\n"
    )
    given = [runs.vq, str(photos), str(tmp_path), json.dumps(words)]
    subprocess.run([sys.executable, "-c", program, *given], cwd=ROOT, check=True, capture_output=True)
    for i in range(len(words)):
        assert (tmp_path / f"{i}.gtk").read_bytes() == here[i]
        a, b = read_all(tmp_path / f"here-{i}"), read_all(tmp_path / f"there-{i}")
        assert list(a) == list(b)
        # The ids are equal; a pixel may round otherwise in another batch.
        assert max(np.abs(a[name].astype(int) - b[name]).max() for name in a) <= 1


def test_only_the_asked_images_are_decoded(runs, photos, tmp_path):
    for prior in (runs.masked, "adaptive", "static"):
        coding.encode(runs.vq, str(photos), str(tmp_path / "x.gtk"), prior=prior)
        needed = prior if prior == runs.masked else None
        out = tmp_path / Path(prior).name
        coding.decode(runs.vq, str(tmp_path / "x.gtk"), str(out), only=["b/d.png"], prior=needed)
        assert list(read_all(out)) == ["b/d.png"]
    with pytest.raises(UsageError, match=r"holds no image b/x.png; did you mean 'b/\w.png'"):
        coding.decode(runs.vq, str(tmp_path / "x.gtk"), str(tmp_path), only=["b/x.png"])


def test_a_generator_that_computes_otherwise_is_noticed(runs, photos, tmp_path, monkeypatch):
    coding.encode(runs.vq, str(photos), str(tmp_path / "x.gtk"), prior=runs.masked)
    with pytest.raises(UsageError, match=r"was coded with generator .* name its run with --prior"):
        coding.decode(runs.vq, str(tmp_path / "x.gtk"), str(tmp_path / "out"))
    original = model.weights_of
    monkeypatch.setattr(model, "weights_of", lambda logits: original(logits * 1.01))
    with pytest.raises(GenkitError, match=r"x.gtk cannot be decoded: the generator computes other probabilities here"):
        coding.decode(runs.vq, str(tmp_path / "x.gtk"), str(tmp_path / "out"), prior=runs.masked)
    assert not (tmp_path / "out").exists()


def test_another_tokenizer_or_generator_is_named(runs, photos, tmp_path):
    path = str(tmp_path / "x.gtk")
    coding.encode(runs.vq, str(photos), path)
    ours = module_sha256(tokenizer())[:16]
    theirs = module_sha256(tokenizer(channels=9))[:16]
    with pytest.raises(GenkitError, match=f"was written by tokenizer {ours}, .* holds {theirs}"):
        coding.decode(runs.other, path, str(tmp_path))
    with pytest.raises(UsageError, match=f"makes tokens of tokenizer {theirs}, the codes are of {ours}"):
        coding.encode(runs.vq, str(photos), path, prior=runs.masked_of_other)
    with pytest.raises(UsageError, match="that is a tokenizer's run"):
        coding.encode(runs.vq, str(photos), path, prior=runs.vq)
    with pytest.raises(UsageError, match="no such run, and no word for a prior; did you mean 'static'"):
        coding.encode(runs.vq, str(photos), path, prior="statik")


def test_sizes_that_do_not_fit_are_padded_on_request(runs, tmp_path):
    (tmp_path / "in").mkdir()
    gradient = np.linspace(0, 255, 21 * 13).reshape(21, 13).astype(np.uint8)
    Image.fromarray(gradient).save(tmp_path / "in" / "odd.png")
    Image.fromarray(gradient[:1, :1]).save(tmp_path / "in" / "tiny.png")
    path = str(tmp_path / "x.gtk")
    with pytest.raises(UsageError, match=r"odd.png is 21x13, .* stride, 4 \(nearest that fit: 20x12 or 24x16\); --pad"):
        coding.encode(runs.vq, str(tmp_path / "in"), path)
    coding.encode(runs.vq, str(tmp_path / "in"), path, pad=True)
    assert container.read(Path(path).read_bytes()).header.grids == ((6, 4), (1, 1))
    coding.decode(runs.vq, path, str(tmp_path / "out"))
    assert {name: x.shape for name, x in read_all(tmp_path / "out").items()} == {
        "odd.png": (21, 13),
        "tiny.png": (1, 1),
    }
    coding.encode(runs.vq, str(tmp_path / "in"), path, fit=True)
    assert set(container.read(Path(path).read_bytes()).header.sizes) == {(16, 16)}


def test_colour_is_not_made_grey_in_silence(runs, tmp_path):
    pixels = np.zeros((16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "grey.png")
    coding.encode(runs.vq, str(tmp_path), str(tmp_path / "x.gtk"))  # three equal channels are grey
    pixels[0, 0] = 1, 2, 3
    Image.fromarray(pixels).save(tmp_path / "red.png")
    with pytest.raises(UsageError, match=r"red.png is in colour, but the tokenizer was trained on grey images"):
        coding.encode(runs.vq, str(tmp_path), str(tmp_path / "x.gtk"))


@pytest.mark.parametrize("prior", ["static", "adaptive"])
def test_fewer_codes_make_a_smaller_file(runs, photos, tmp_path, prior):
    sizes = []
    for codes in (4, 16, None):
        path = tmp_path / "x.gtk"
        sizes.append(coding.encode(runs.vq, str(photos), str(path), codes=codes, prior=prior)["payload_bits_per_pixel"])
        coding.decode(runs.vq, str(path), str(tmp_path / f"{codes}"))
        assert len(read_all(tmp_path / f"{codes}")) == 5
    assert sizes[0] < sizes[1] < sizes[2]
    with pytest.raises(UsageError, match="the generator knows the codebook as it was"):
        coding.encode(runs.vq, str(photos), str(path), codes=4, prior=runs.masked)


def test_clusters_that_come_out_otherwise_are_noticed(runs, photos, tmp_path, monkeypatch):
    path = tmp_path / "x.gtk"
    coding.encode(runs.vq, str(photos), str(path), codes=8)
    original = rate.kmeans
    monkeypatch.setattr(rate, "kmeans", lambda *args: (original(*args)[0] + 1, None))
    with pytest.raises(GenkitError, match="clustering the codebook gives other codes here"):
        coding.decode(runs.vq, str(path), str(tmp_path / "out"))


@pytest.mark.parametrize("packets", ["rows", "interleaved"])
def test_lost_packets_are_restored_or_refused(runs, photos, tmp_path, packets):
    path = tmp_path / "x.gtk"
    coding.encode(runs.vq, str(photos), str(path), packets=packets)
    data = bytearray(path.read_bytes())
    data[-2] ^= 4
    path.write_bytes(data)
    with pytest.raises(GenkitError, match=r"x.gtk: \d of 69 ids are lost; fill them in with --restore"):
        coding.decode(runs.vq, str(path), str(tmp_path / "out"))
    for restore in ("nearest", runs.masked):
        found = coding.decode(runs.vq, str(path), str(tmp_path / "out"), restore=restore, lose=0.2, seed=1)
        assert 1 < found["lost"] < found["ids"] == 69
        assert len(read_all(tmp_path / "out")) == 5
    with pytest.raises(UsageError, match="a packet must be readable without the others"):
        coding.encode(runs.vq, str(photos), str(path), packets=packets, prior="adaptive")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packets": "row"}, "--packets row: did you mean 'rows'"),
        ({"out": "x.npz", "codes": 4}, "an npz holds plain ids"),
        ({"codes": 100}, "must be at least 2 and below"),
    ],
)
def test_options_of_encode_that_do_not_go_together(runs, photos, options, message):
    with pytest.raises(UsageError, match=message):
        coding.encode(runs.vq, str(photos), **{"out": "x.gtk"} | options)


@pytest.mark.parametrize("name", ["x.gtk", "x.npz"])
def test_what_is_no_codes_file_is_one_line(runs, tmp_path, name):
    path = tmp_path / name
    with pytest.raises(GenkitError, match="no such codes file"):
        coding.decode(runs.vq, str(path), str(tmp_path))
    path.write_bytes(b"something else entirely")
    with pytest.raises(GenkitError, match=r"is no codes file|is not a complete codes file"):
        coding.decode(runs.vq, str(path), str(tmp_path))
    with pytest.raises(UsageError, match=r"--lose 2 must be in \[0, 1\]"):
        coding.decode(runs.vq, str(path), str(tmp_path), lose=2)


def test_ids_outside_the_codebook_are_named(runs, photos, tmp_path):
    path = tmp_path / "x.npz"
    coding.encode(runs.vq, str(photos), str(path), fit=True)
    stored = dict(np.load(path))
    stored["ids"][0, 0, 0, 0] = 64
    np.savez(path, **stored)
    with pytest.raises(GenkitError, match=r"ids lie in \d+..64, but the codebook has 64 codes, from 0 on"):
        coding.decode(runs.vq, str(path), str(tmp_path))


def test_a_file_takes_little_beside_its_ids(runs, photos, tmp_path):
    found = coding.encode(runs.vq, str(photos / "a.png"), str(tmp_path / "x.gtk"))
    assert found["bytes"] < 80
    assert found["tokens"] == 16
    json.dumps(found)  # the command line prints it
