"""Recipes at the sizes of papers make networks with as many weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from genkit import config, registry

FOLDER = Path(__file__).parents[1] / "genkit" / "configs"
# With 1000 classes and latents of 32x32x4. Of the papers' counts, what is not trained here is taken off: tables of fixed positions (DiT), projections
# that the released code computes and throws away (DiMSUM).
WEIGHTS = {
    "dit-s-2": 32_865_056,
    "dit-b-2": 130_315_808,
    "dit-l-2": 457_840_672,
    "dit-xl-2": 674_834_720,
    "sit-xl-2": 674_834_720 - 16 * 1153,
    "fitv2-b-2": 128_149_072,
    "fitv2-xl-2": 671_045_776,
    "dimsum-l-2": 459_916_304 - 32 * (1024 + 1) * 1024,
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_published_recipe_makes_the_published_network(name):
    recipe = config.load(FOLDER / f"{name}.yaml")
    with torch.device("meta"):
        network = registry.build("backbone", recipe["backbone"], channels=4, num_classes=1000, grid=(32, 32))
    assert sum(parameter.numel() for parameter in network.parameters()) == WEIGHTS[name]
    assert network.out_channels == (8 if name.startswith("dit") else 4)
