"""`genkit import --from vector-quantize-pytorch`: a state dict of a bare quantiser becomes a tokenizer that does what the original does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import genkit
from genkit.errors import GenkitError, UsageError
from genkit.importing import import_weights

peer = pytest.importorskip("vector_quantize_pytorch")

NAME = "vector-quantize-pytorch"
# Class, its arguments, and those of them that the weights do not show.
CASES = [
    ("VectorQuantize", {"dim": 6, "codebook_size": 17}, ()),
    ("VectorQuantize", {"dim": 6, "codebook_size": 17, "codebook_dim": 3, "layernorm_after_project_in": True}, ()),
    ("VectorQuantize", {"dim": 6, "codebook_size": 17, "heads": 2, "separate_codebook_per_head": True}, ()),
    ("VectorQuantize", {"dim": 6, "codebook_size": 17, "codebook_dim": 2, "heads": 3}, ("heads",)),
    ("VectorQuantize", {"dim": 6, "codebook_size": 17, "use_cosine_sim": True}, ("use_cosine_sim",)),
    ("ResidualVQ", {"dim": 6, "codebook_size": 17, "num_quantizers": 3}, ()),
    ("ResidualVQ", {"dim": 6, "codebook_size": 17, "num_quantizers": 3, "codebook_dim": 3}, ()),
    ("GroupedResidualVQ", {"dim": 6, "codebook_size": 17, "num_quantizers": 2, "groups": 2}, ()),
    ("FSQ", {"levels": [8, 5, 5], "dim": 6}, ("levels",)),
    ("FSQ", {"levels": [8, 5, 5]}, ("levels",)),
    ("FSQ", {"levels": [5, 5, 5], "orthogonal_rotation": True}, ("levels", "orthogonal_rotation")),
    ("ResidualFSQ", {"levels": [8, 5, 5], "dim": 6, "num_quantizers": 2}, ("levels", "num_quantizers")),
    ("LFQ", {"codebook_size": 16, "dim": 6}, ()),
    ("LFQ", {"codebook_size": 16, "dim": 6, "num_codebooks": 2}, ()),
    ("LFQ", {"codebook_size": 16, "dim": 4, "has_projections": True}, ()),
    ("LFQ", {"codebook_size": 16, "dim": 6, "cosine_sim_project_in": True}, ("cosine_sim_project_in",)),
    ("ResidualLFQ", {"codebook_size": 16, "dim": 6, "num_quantizers": 2}, ()),
    ("GroupedResidualLFQ", {"codebook_size": 16, "dim": 6, "num_quantizers": 2, "groups": 2}, ()),
]


def original(word: str, options: dict[str, object]) -> torch.nn.Module:
    torch.manual_seed(0)
    module = getattr(peer, word)(**options).eval()
    if word.endswith(("VectorQuantize", "VQ")):  # a fresh table of several levels is one and the same for all
        for name, value in module.state_dict().items():
            if name.endswith("initted"):
                value.fill_(True)
            elif name.endswith("_codebook.embed"):
                drawn = torch.randn(value.shape)
                value.copy_(torch.nn.functional.normalize(drawn, dim=-1) if options.get("use_cosine_sim") else drawn)
    return module


@pytest.mark.parametrize(("word", "options", "hidden"), CASES)
def test_an_imported_quantiser_is_a_tokenizer_that_gives_what_the_original_gives(word, options, hidden, tmp_path):
    module = original(word, options)
    torch.save(module.state_dict() or {"nothing": torch.empty(0)}, tmp_path / "state.pt")
    file = tmp_path / "state.pt"
    if not module.state_dict():
        from safetensors.torch import save_file

        save_file({}, file := tmp_path / "state.safetensors")
    config = {name: options[name] for name in hidden}
    found = import_weights(file, NAME, tmp_path / "out", config=config, check=True)
    assert found["check"]["same_ids"] == 1
    assert found["check"]["largest_difference"] < 1e-5
    tokenizer = genkit.AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    x = torch.randn(2, tokenizer.channels, 5, 7)
    codes, ids, *_ = module(x.flatten(2).mT)
    encoded = tokenizer.encode(x)
    torch.testing.assert_close(encoded.z.flatten(2).mT, codes, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(tokenizer.decode(encoded.z), encoded.z)
    assert torch.equal(tokenizer.codes(encoded.ids), encoded.z)
    if not word.startswith("Grouped"):
        assert torch.equal(encoded.ids.flatten(2).mT.squeeze(-1), ids)


def refused(tmp_path: Path, state: dict[str, torch.Tensor], config: dict[str, object] | None = None) -> str:
    torch.save(state, tmp_path / "state.pt")
    (tmp_path / "options.json").write_text(json.dumps(config or {}))
    with pytest.raises((GenkitError, UsageError)) as caught:
        import_weights(tmp_path / "state.pt", NAME, tmp_path / "out", config=tmp_path / "options.json", check=True)
    assert not (tmp_path / "out").exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_does_not_fit_is_named(tmp_path):
    state = original("VectorQuantize", {"dim": 6, "codebook_size": 17, "codebook_dim": 3}).state_dict()
    assert "unknown: more" in refused(tmp_path, {**state, "more": torch.ones(1)})
    lacking = {key: value for key, value in state.items() if key != "project_in.bias"}
    assert "missing: project_in.bias" in refused(tmp_path, lacking)
    assert "did you mean 'heads'" in refused(tmp_path, state, {"head": 2})
    assert "class: VQ of vector-quantize-pytorch is not known" in refused(tmp_path, state, {"class": "VQ"})


def test_what_weights_do_not_show_has_to_be_told(tmp_path):
    fsq = original("FSQ", {"levels": [8, 5, 5], "dim": 6}).state_dict()
    assert "do not show its levels; --config FILE with levels" in refused(tmp_path, fsq)
    cosine = original("VectorQuantize", {"dim": 6, "codebook_size": 17, "use_cosine_sim": True}).state_dict()
    assert "all codes have length 1, as with use_cosine_sim" in refused(tmp_path, cosine)
    assert "looked for _codebook.embed" in refused(tmp_path, {"encoder.weight": torch.ones(3)})


def test_images_are_not_for_it(tmp_path):
    from PIL import Image

    from genkit import coding

    torch.save(original("LFQ", {"codebook_size": 16, "dim": 6}).state_dict(), tmp_path / "state.pt")
    import_weights(tmp_path / "state.pt", NAME, tmp_path / "out")
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(UsageError, match="takes grids of vectors of 6 numbers, no images"):
        coding.encode(str(tmp_path / "out"), str(tmp_path / "a.png"), str(tmp_path / "x.gtk"))


def test_a_check_against_the_original_finds_wrong_options(tmp_path, monkeypatch):
    from genkit.importers import vector_quantize_pytorch as importer

    state = original("VectorQuantize", {"dim": 6, "codebook_size": 17}).state_dict()
    told = importer.told
    calls = iter([False, True])  # the import believes other options than the comparison
    monkeypatch.setattr(
        importer, "told", lambda *args: (told(*args)[0], told(*args)[1] | {"use_cosine_sim": next(calls)})
    )
    assert "of the ids differ from those of VectorQuantize" in refused(tmp_path, state)
