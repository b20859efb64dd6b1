"""Token caches: what is written equals what the tokenizer made, and nothing but a whole cache is ever taken for one."""

from __future__ import annotations

import errno
import json
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from genkit.data import cache
from genkit.data.folder import Folder
from genkit.data.loader import batches
from genkit.data.memory import InMemory
from genkit.data.tokens import Tokens
from genkit.errors import GenkitError, UsageError
from genkit.interfaces import Encoded


class Blocks:
    """Toy tokenizer, stride 2: the mean of each 2x2 block, in two levels of grey steps."""

    channels, stride, num_levels = 1, 2, 2

    def __init__(self, codebook_size: int = 8):
        self.codebook_size = codebook_size

    def encode(self, x):
        z = torch.nn.functional.avg_pool2d(x.mean(1, keepdim=True), 2)
        first = ((z + 1) / 2 * (self.codebook_size - 1)).round().long()
        return Encoded(z, torch.cat([first, self.codebook_size - 1 - first], 1))


class Continuous(Blocks):
    num_levels = 0

    def encode(self, x):
        return Encoded(super().encode(x).z, None)


class Failing(Blocks):
    def encode(self, x):
        raise KeyboardInterrupt


def images(count: int = 10, seed: int = 0, shape: tuple[int, int, int] = (1, 4, 6)) -> InMemory:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)
    return InMemory(pixels, np.arange(count) % 2, [f"k{i}" for i in range(count)], ["even", "odd"], "test")


def test_tokens_are_those_of_the_tokenizer_in_order(tmp_path):
    dataset, tokenizer = images(), Blocks()
    expected = tokenizer.encode(dataset.__getitems__(range(10))["x"]).ids
    steps = []
    out = cache.build(
        tokenizer, dataset, tmp_path / "c", tokenizer_fingerprint="t", batch_size=4, progress=lambda *n: steps.append(n)
    )
    tokens = Tokens(path=str(out))
    batch = tokens.__getitems__([7, 0, 9])
    assert torch.equal(batch["ids"], expected[[7, 0, 9]])
    assert batch["ids"].dtype == batch["label"].dtype == torch.int64
    assert (batch["label"].tolist(), batch["key"]) == ([1, 0, 1], ["k7", "k0", "k9"])
    assert torch.equal(tokens[7]["ids"], expected[7])
    assert steps == [(4, 10), (8, 10), (10, 10)]
    assert (tokens.info.shape, tokens.info.class_names) == ((1, 4, 6), ("even", "odd"))
    assert next(batches(tokens, batch_size=4, seed=0))["ids"].shape == (4, 2, 2, 3)


def test_meta_measures_latents_and_codebook_use(tmp_path):
    dataset, tokenizer = images(50), Blocks()
    meta = Tokens(
        path=str(cache.build(tokenizer, dataset, tmp_path / "c", tokenizer_fingerprint="t", batch_size=7))
    ).meta
    encoded = tokenizer.encode(dataset.__getitems__(range(50))["x"])
    np.testing.assert_allclose(meta["latent_mean"], [encoded.z.double().mean()], rtol=1e-9)
    np.testing.assert_allclose(meta["latent_std"], [encoded.z.double().std(unbiased=False)], rtol=1e-9)
    p = torch.bincount(encoded.ids[:, 0].flatten(), minlength=8).double() / encoded.ids[:, 0].numel()
    assert meta["perplexity"] == pytest.approx(float(torch.special.entr(p).sum().exp()))
    assert meta["codebook_usage"] == pytest.approx(float((p > 0).double().mean()))
    assert (meta["grid"], meta["stride"], meta["codebook_size"], meta["num_levels"]) == ([2, 3], 2, 8, 2)


@pytest.mark.parametrize(("size", "dtype"), [(256, np.uint16), (2**16, np.uint16), (2**16 + 1, np.int32)])
def test_ids_are_stored_in_the_smallest_type_that_holds_them(tmp_path, size, dtype):
    dataset = InMemory(np.array([[0, 255]], np.uint8).repeat(2, 0).repeat(2, 1)[None, None], np.zeros(1), ["k"], [], "")
    out = cache.build(Blocks(size), dataset, tmp_path / "c", tokenizer_fingerprint="t")
    assert np.load(out / "ids.npy").dtype == dtype
    assert Tokens(path=str(out))[0]["ids"][0].tolist() == [[0, size - 1]]


def test_continuous_latents_are_stored_as_they_are(tmp_path):
    dataset = images()
    tokens = Tokens(path=str(cache.build(Continuous(), dataset, tmp_path / "c", tokenizer_fingerprint="t")))
    assert torch.equal(tokens.__getitems__([3])["z"], Continuous().encode(dataset.__getitems__([3])["x"]).z)
    assert "perplexity" not in tokens.meta


def test_corrupt_images_are_left_out_of_the_cache(tmp_path):
    for i in range(5):
        (tmp_path / "data").mkdir(exist_ok=True)
        Image.fromarray(np.full((4, 4), 55 * i, np.uint8)).save(tmp_path / "data" / f"{i}.png")
    (tmp_path / "data" / "2.png").write_bytes(b"broken")
    dataset = Folder(path=str(tmp_path / "data"), size=4)
    tokens = Tokens(path=str(cache.build(Blocks(), dataset, tmp_path / "c", tokenizer_fingerprint="t", batch_size=1)))
    assert tokens.__getitems__(range(len(tokens)))["key"] == ["0.png", "1.png", "3.png", "4.png"]
    assert tokens[3]["ids"].unique().tolist() == [1, 6]  # of grey 220 / 255, and its complement
    for path in (tmp_path / "data").iterdir():
        path.write_bytes(b"broken")
    with pytest.raises(GenkitError, match="none of the 5 samples could be decoded"):
        cache.build(Blocks(), Folder(path=str(tmp_path / "data"), size=4), tmp_path / "d", tokenizer_fingerprint="t")
    assert not (tmp_path / "d").exists()


def test_a_cache_is_reused_only_for_the_same_data_and_tokenizer(tmp_path):
    def get(dataset, tokenizer, fingerprint):
        return cache.find_or_build(tokenizer, dataset, tmp_path, name="toy", tokenizer_fingerprint=fingerprint)

    first = get(images(), Blocks(), "t")
    assert first.name.startswith("toy-")
    assert get(images(), Failing(), "t") == first  # nothing is encoded again
    assert get(images(seed=1), Blocks(), "t") != first
    assert get(images(), Blocks(), "u") != first
    assert len(list(tmp_path.iterdir())) == 3


def test_a_folder_with_another_fingerprint_or_without_meta_is_built_again(tmp_path):
    def get(tokenizer):
        return cache.find_or_build(tokenizer, images(), tmp_path, name="toy", tokenizer_fingerprint="t")

    out = get(Blocks())
    whole = Tokens(path=str(out)).meta
    for damage in (json.dumps(whole | {"tokenizer_fingerprint": "other"}), "not json", None):
        (out / "meta.json").unlink() if damage is None else (out / "meta.json").write_text(damage)
        assert get(Blocks()) == out
        assert Tokens(path=str(out)).meta == whole
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_an_interrupted_build_leaves_nothing_and_keeps_the_old_cache(tmp_path):
    out = cache.build(Blocks(), images(), tmp_path / "c", tokenizer_fingerprint="old")
    for target in (out, tmp_path / "d"):
        with pytest.raises(KeyboardInterrupt):
            cache.build(Failing(), images(), target, tokenizer_fingerprint="new")
    assert Tokens(path=str(out)).meta["tokenizer_fingerprint"] == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_killed_build_is_never_taken_for_a_cache_and_is_cleared_away(tmp_path):
    class Killed(Blocks):
        def encode(self, x):
            os._exit(9)

    pid = os.fork()
    if pid == 0:
        cache.build(Killed(), images(), tmp_path / "c", tokenizer_fingerprint="t")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".c.")
    with pytest.raises(UsageError, match="no such token cache"):
        Tokens(path=str(tmp_path / "c"))
    cache.build(Blocks(), images(), tmp_path / "c", tokenizer_fingerprint="t")
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_full_disk_is_one_clear_line_and_leaves_nothing(tmp_path, monkeypatch):
    def full(self, rows):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache._Rows, "append", full)
    with pytest.raises(GenkitError, match="cannot be written: No space left on device"):
        cache.build(Blocks(), images(), tmp_path / "c", tokenizer_fingerprint="t")
    assert list(tmp_path.iterdir()) == []


def test_a_module_is_used_in_evaluation_mode_and_given_back_as_it_was(tmp_path):
    class Module(torch.nn.Module):
        channels, stride, num_levels, codebook_size = 1, 2, 2, 8

        def encode(self, x):
            assert not self.training
            assert not torch.is_grad_enabled()
            return Blocks().encode(x)

    tokenizer = Module().train()
    cache.build(tokenizer, images(), tmp_path / "c", tokenizer_fingerprint="t")
    assert tokenizer.training


def test_ids_outside_the_codebook_are_refused(tmp_path):
    tokenizer = Blocks(8)
    tokenizer.encode = Blocks(16).encode
    with pytest.raises(GenkitError, match="outside its codebook of 8"):
        cache.build(tokenizer, images(), tmp_path / "c", tokenizer_fingerprint="t")


def test_sizes_that_do_not_fit_the_stride_are_refused_with_sizes_that_do(tmp_path):
    with pytest.raises(UsageError) as error:
        cache.check_size((1, 30, 28), 4)
    assert str(error.value) == "size 30x28 is not divisible by the tokenizer's stride 4; try data.size=28 or 32"
    with pytest.raises(UsageError, match=r"try data\.size=8$"):
        cache.check_size((3, 5, 5), 8)
    cache.check_size((1, 8, 4), 4)
    with pytest.raises(UsageError, match="size 3x6"):
        cache.build(Blocks(), images(shape=(1, 3, 6)), tmp_path / "c", tokenizer_fingerprint="t")


def test_a_damaged_cache_is_one_clear_line(tmp_path):
    out = cache.build(Blocks(), images(), tmp_path / "c", tokenizer_fingerprint="t")
    (out / "keys.json").write_text('["one"]')
    with pytest.raises(UsageError, match="lengths differ"):
        Tokens(path=str(out))
    (out / "ids.npy").write_bytes((out / "ids.npy").read_bytes()[:140])
    with pytest.raises(UsageError, match="not a whole token cache"):
        Tokens(path=str(out))


def test_tokens_travel_to_workers_as_a_path(tmp_path):
    tokens = Tokens(path=str(cache.build(Blocks(), images(500), tmp_path / "c", tokenizer_fingerprint="t")))
    sent = pickle.dumps(tokens)
    assert len(sent) < 500
    assert torch.equal(pickle.loads(sent)[3]["ids"], tokens[3]["ids"])
