"""The whole line, as small as it goes: every phase runs, the second call continues instead of starting over."""

import json

import pytest

from genkit import quickstart, training
from tests.tiny import GENERATOR, TOKENIZER


@pytest.fixture
def small(tmp_path, monkeypatch):
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    for name, recipe in (("vq-fashion", TOKENIZER), ("masked-fashion", GENERATOR)):
        (recipes / f"{name}.yaml").write_text(json.dumps({**recipe, "name": name}))  # JSON is YAML
    monkeypatch.setattr(quickstart, "RECIPES", recipes)
    monkeypatch.setattr(quickstart, "IMAGES_PER_CLASS", 1)
    monkeypatch.setattr(quickstart, "EVALUATED", 140)
    return tmp_path / "runs"


def test_every_phase_leaves_its_figures_and_pictures(small):
    found = quickstart.quickstart(out=small)
    names = " ".join(row["metric"] for row in found["figures"])
    for figure in ("PSNR", "rFD", "codebook usage", "FD (", "class accuracy"):
        assert figure in names
    assert all(row["protocol"] for row in found["figures"])
    assert (small / "quickstart-samples/grid.png").stat().st_size > 500
    assert len(list((small / "quickstart-samples").glob("0*.png"))) == 10
    text = quickstart.render(found)
    assert "together" in text
    assert "train generator" in text


def test_second_call_continues(small, monkeypatch):
    first = quickstart.quickstart(out=small)
    steps = []
    monkeypatch.setattr(training, "report", lambda *args: steps.append(args))
    assert quickstart.quickstart(out=small) == first
    assert not steps
