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


IDS = {"codebook_size": 1024, "num_levels": 1, "grid": (16, 16)}
LATENTS = {"channels": 16, "num_classes": 1000, "grid": (16, 16)}
# What masked generators are built on, and their weights. MAR's paper says 208, 479 and 943 million. MAGE-B has 146.5 million with what its code makes and never
# uses: 999 rows of the vocabulary and their biases, sin-cos tables, a patch embedding and a head of pixels. AutoNAT-L: 193.66 million; the one position of its
# class token is part of the classes here, and the mask has no bias. ResGen is given as 574 to 576 million, its width and depth are not known.
MASKED = {
    "mage-b": ({**IDS, "num_classes": 0}, 144_128_512),
    "mage-l": ({**IDS, "num_classes": 0}, 406_764_544),
    "mar-b": (LATENTS, 207_924_768),
    "mar-l": (LATENTS, 478_326_304),
    "mar-h": (LATENTS, 942_403_104),
    "autonat-l": ({**IDS, "num_classes": 1000}, 193_655_296),
    "maskgit-titok-l32": (
        {"codebook_size": 4096, "num_levels": 1, "num_classes": 1000, "grid": (32,)},
        177_200_896,
    ),
    "resgen-rvq8": ({"channels": 256, "num_levels": 8, "num_classes": 1000, "grid": (8, 8)}, 577_112_769),
}


@pytest.mark.parametrize("name", MASKED)
def test_a_recipe_of_a_masked_generator_makes_the_published_network(name):
    given, weights = MASKED[name]
    recipe = config.load(FOLDER / f"{name}.yaml")
    with torch.device("meta"):
        network = registry.build("backbone", recipe["backbone"], **given)
    assert sum(parameter.numel() for parameter in network.parameters()) == weights


# Of ids: what the tokenizer of each recipe says, and weights as published (LlamaGen 111, 343 and 775 million; VAR 310 and 600 million, 1.0 and 2.0 billion;
# NFIG 310 million). RQ-Transformer has 1.4 billion without its tables of codes, which it takes from its tokenizer; DQ-Transformer 314 million with
# numbers for starts, ends and padding that are not needed here.
OF_VQ16 = {"codebook_size": 16384, "num_levels": 1, "grid": (16, 16)}
OF_SCALES = {"channels": 32, "codebook_size": 4096, "patch_sizes": (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), "grid": (16, 16)}
DRAWN_IN_SEQUENCE = {
    "llamagen-b": (OF_VQ16, 110_888_448),
    "llamagen-l": (OF_VQ16, 342_910_976),
    "llamagen-xl": (OF_VQ16, 774_699_520),
    "var-d16": (OF_SCALES, 310_283_520),
    "var-d20": (OF_SCALES, 600_917_136),
    "var-d24": (OF_SCALES, 1_033_399_360),
    "var-d30": (OF_SCALES, 2_010_020_356),
    "nfig-d16": (OF_SCALES, 310_283_520),
    "rq-transformer-1400m": (
        {"codebook_size": 16384, "num_levels": 4, "grid": (8, 8)},
        1_387_529_728 + 4 * 16384 * 256,
    ),
    "dq-transformer-f8": ({"codebook_size": 1024, "num_levels": 1, "num_grains": 2, "grid": (32, 32)}, 309_118_210),
}


@pytest.mark.parametrize("name", DRAWN_IN_SEQUENCE)
def test_a_published_generator_of_sequences_has_the_published_weights(name):
    tokens, weights = DRAWN_IN_SEQUENCE[name]
    recipe = config.load(FOLDER / f"{name}.yaml")
    with torch.device("meta"):
        network = registry.build("backbone", recipe["backbone"], num_classes=1000, **tokens)
    assert sum(parameter.numel() for parameter in network.parameters()) == weights


def test_a_published_generator_of_neighbours_has_the_weights_of_its_parts():
    """18 layers of 768: attention 4 D^2, attention to 512 channels 2 D^2 + 2 D 512, a gated perceptron 3 D 2048, three norms; ids in and out, one start."""
    recipe = config.load(FOLDER / "rarm.yaml")
    spec = recipe["backbone"] | {"context_dim": 512}  # of CLIP ViT-B/32
    with torch.device("meta"):
        network = registry.build("backbone", spec, num_classes=0, codebook_size=16384, num_levels=1, grid=(16, 16))
    block = 6 * 768**2 + 2 * 768 * 512 + 3 * 768 * 2048 + 3 * 768
    assert sum(p.numel() for p in network.parameters()) == 18 * block + 2 * 16384 * 768 + 2 * 768 == 188_000_256
