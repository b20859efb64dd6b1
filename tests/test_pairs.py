"""Every kind of generator on every kind of tokenizer: it works, or one error says what fits."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from genkit import config, editing, registry
from genkit.errors import UsageError
from genkit.fitting import check_tokenizer
from genkit.job import backbone_of
from genkit.nn.grid_tokenizer import image_sides, latent_grid
from genkit.nn.layout import dense_layout
from genkit.pipeline import GeneratorPipeline
from genkit.rng import Rng

LIGHT = {"stride": 4, "width": 8, "num_blocks": 1, "channels": 8, "codebook_size": 16}
TOKENIZERS: dict[str, dict[str, Any]] = {
    "vq": LIGHT,
    "rvq": {**LIGHT, "num_levels": 3},
    "fsq": {"stride": 4, "width": 8, "num_blocks": 1, "levels": [3, 3]},
    "kl": {"stride": 4, "width": 8, "num_blocks": 1, "channels": 4},
    "var_vq": {**LIGHT, "patch_sizes": [1, 2, 4]},
    "dqvae": {**LIGHT, "image_size": 16},
    "titok": {
        **{"image_size": 16, "stride": 8, "num_tokens": 4, "dim": 16, "depth": 1, "num_heads": 2},
        **{"channels": 8, "codebook_size": 16},
    },
}
ATTENTION = {"type": "attention", "num_heads": 2}
SMALL: dict[str, Any] = {"dim": 16, "depth": 1}
MIXED = {**SMALL, "mixer": ATTENTION}
HEADS = {**SMALL, "num_heads": 2}
UNMASK = {"type": "masked", "num_steps": 2, "guidance": 2.0}
NEXT = {"type": "autoregressive", "guidance": 2.0}
EULER = {"type": "euler", "num_steps": 2, "guidance": 2.0}
# backbone -> its options, objective, sampler.
GENERATORS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "masked": (MIXED, {"type": "masked"}, {**UNMASK, "num_steps": 4, "reuse": {"type": "recap"}}),
    "bert": (HEADS, {"type": "masked"}, UNMASK),
    "uvit": ({**HEADS, "depth": 2}, {"type": "masked"}, UNMASK),
    "mage": ({**HEADS, "decoder_depth": 1}, {"type": "masked", "min_masked": 0.5, "dropped": 0.5}, UNMASK),
    "gpt": ({**SMALL, "multiple_of": 8}, {"type": "next_token"}, NEXT),
    "rq": ({**SMALL, "head_depth": 1}, {"type": "next_token"}, NEXT),
    "var": ({**SMALL, "mixer": {"type": "scale_attention", "num_heads": 2}}, {"type": "next_scale"}, NEXT),
    "dq": ({"dim": 16, "position_depth": 1, "content_depth": 1}, {"type": "next_code"}, NEXT),
    "resgen": ({**MIXED, "components": 4, "rank": 2}, {"type": "resgen"}, {**UNMASK, "type": "resgen"}),
    "mar": (
        {**HEADS, "buffer_size": 2, "head_width": 16, "head_depth": 1},
        {"type": "mar"},
        {"type": "mar", "num_steps": 2, "head_steps": 2, "guidance": 2.0},
    ),
    "dit": ({**MIXED, "patch_size": 1}, {"type": "flow"}, EULER),
    "dimsum": ({**HEADS, "patch_size": 1, "fusion_heads": 2}, {"type": "flow"}, EULER),
    "fit": ({**HEADS, "patch_size": 1}, {"type": "flow"}, EULER),
}
CONTINUOUS = "learns ids, and the tokenizer KL makes continuous latents; take a tokenizer with a codebook"


@cache
def tokenizer(word: str) -> Any:
    """Untrained; a batch has shown it where its codes should begin."""
    torch.manual_seed(0)
    spec = registry.check("tokenizer", {"type": word, **TOKENIZERS[word]}, "tokenizer")
    made = registry.build("tokenizer", spec, image_channels=1)
    made.train().encode(images())
    return made.eval().requires_grad_(False)


def images() -> torch.Tensor:
    return torch.rand(6, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def recipe(word: str, objective: dict[str, Any], sampler: dict[str, Any], options: dict[str, Any]) -> config.Config:
    return config.check(
        {
            "name": "pair",
            "data": {"type": "fashion"},
            "tokenizer": {"from": "runs/nothing"},
            "backbone": {"type": word, **options},
            "objective": objective,
            "sampler": sampler,
            "train": {"num_samples": 6, "batch_size": 6},
        }
    )


def run(generator: str, tokenizer_word: str) -> torch.Tensor:
    """A step of training, then samples: what genkit.job and genkit.training do, without files."""
    options, objective_spec, sampler = GENERATORS[generator]
    job, tokens = recipe(generator, objective_spec, sampler, options), tokenizer(tokenizer_word)
    objective = registry.build("objective", job["objective"])
    check_tokenizer(objective, tokens, job["objective"]["type"])
    if hasattr(objective, "bind"):
        objective.bind(tokens)
    encoded = tokens.encode(images())
    target = encoded.ids if objective.target == "ids" else encoded.z
    grid = tuple(target.shape[2:])
    torch.manual_seed(0)
    backbone = backbone_of(job, tokens, {"num_classes": 3}, grid)
    cond = {"label": torch.arange(6) % 3}
    losses = objective(backbone, target, cond, dense_layout(grid), Rng.at(0, 0, 6))
    total = sum(value.mean() for name, value in losses.items() if not name.startswith("_"))
    total.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in backbone.parameters())
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    pipe = GeneratorPipeline(tokens, backbone.eval(), job["objective"], job["sampler"], grid, ["a", "b", "c"])
    x = pipe.generate(torch.tensor([0, 2]), [1, 2])
    torch.testing.assert_close(pipe.generate(torch.tensor([2]), [2]), x[1:], atol=1e-4, rtol=0)
    return x


def refusal(generator: str, word: str) -> str | None:
    """What is said of a pair that does not fit; None = it fits."""
    objective = GENERATORS[generator][1]["type"]
    if objective == "next_scale" and word != "var_vq":
        return (
            r"objective\.type=next_scale needs a tokenizer that codes scale after scale|learns ids, and the tokenizer"
        )
    if objective == "next_code" and word != "dqvae":
        return r"objective\.type=next_code needs a tokenizer whose ids vary in density|learns ids, and the tokenizer"
    if generator == "dimsum" and word == "titok":
        return "a grid of two axes"
    if objective in ("flow", "mar"):
        return None
    if word == "kl":
        return CONTINUOUS
    if generator == "gpt" and word == "rvq":
        return r"backbone\.type=gpt draws one id per place, the tokenizer makes 3; use backbone\.type=rq"
    if generator == "resgen" and word in ("fsq", "var_vq"):
        return "needs a tokenizer whose codes come from codebooks and add up"
    return None


@pytest.mark.parametrize("generator", GENERATORS)
def test_every_generator_works_on_a_tokenizer_or_says_what_fits(generator):
    for word in TOKENIZERS:
        expected = refusal(generator, word)
        if expected is not None:
            with pytest.raises(UsageError, match=expected):
                run(generator, word)
            continue
        x = run(generator, word)
        assert x.shape == (2, 1, 16, 16), word
        assert x.isfinite().all(), word


@pytest.mark.parametrize(
    ("backbone", "objective", "message"),
    [
        ("gpt", "masked", "learns masked ids, and backbone.type=gpt is made for next ids.* bert, mage, masked, uvit; .*: next_token"),
        ("masked", "next_token", "backbones that go with the objective: gpt, rq; objectives that go with the backbone: masked"),
        ("gpt", "next_scale", "learns scales, .*: var; "),
        ("dit", "mar", "learns continuous tokens, .*: mar; .*: diffusion, edm, flow"),
        ("mar", "flow", "learns noisy latents, .*: dimsum, dit, fit, fit_interleaved; .*: mar"),
    ],
)  # fmt: skip
def test_a_backbone_that_does_not_answer_the_objective(backbone, objective, message):
    with pytest.raises(UsageError, match=message):
        recipe(backbone, {"type": objective}, {"type": "euler"}, {})


@pytest.mark.parametrize(
    ("backbone", "sampler", "message"),
    [
        ("masked", "autoregressive", "draws ids in sequence, and objective.type=masked learns ids that were masked; .*: masked$"),
        ("gpt", "masked", "draws ids that were masked, .*: autoregressive, beam, jacobi$"),
        ("mar", "euler", "draws noisy latents, and objective.type=mar learns continuous tokens; .*: mar$"),
        ("resgen", "masked", "learns sums of codes; .*: resgen$"),
        ("dit", "resgen", "learns noisy latents; .*: ancestral, dopri5"),
    ],
)  # fmt: skip
def test_a_sampler_that_draws_something_else(backbone, sampler, message):
    options, objective, _ = GENERATORS[backbone]
    with pytest.raises(UsageError, match=message):
        recipe(backbone, objective, {"type": sampler}, options)


def test_tokens_in_a_row_know_the_size_of_their_images():
    row, scales, grid = tokenizer("titok"), tokenizer("var_vq"), tokenizer("dqvae")
    assert image_sides(row, (4,)) == image_sides(scales, (21,)) == [16, 16]
    assert image_sides(grid, (2, 4)) == [8, 16]
    assert (latent_grid(scales, (21,)), latent_grid(row, (4,)), latent_grid(grid, (2, 4))) == ((4, 4), (4,), (2, 4))


def test_octrees_and_grids_are_not_taken_for_each_other():
    trees = SimpleNamespace(code_depth=4, num_levels=0)
    with pytest.raises(
        UsageError, match=r"learns masked ids, and the tokenizer SimpleNamespace makes octrees; .*octree_masked"
    ):
        check_tokenizer(registry.build("objective", {"type": "masked"}), trees, "masked")
    objective = registry.build("objective", {"type": "octree_masked"})
    check_tokenizer(objective, trees, "octree_masked")
    with pytest.raises(
        UsageError, match="learns octrees, and the tokenizer VQ makes none; take the tokenizer octree_vq"
    ):
        check_tokenizer(objective, tokenizer("vq"), "octree_masked")


@pytest.mark.parametrize(("objective", "dtype"), [("masked", torch.int64), ("mar", torch.float32)])
def test_a_start_holds_what_the_generator_draws(objective, dtype, tmp_path):
    """The tokenizer has ids and latents; one that draws latents starts from latents."""
    Image.new("L", (16, 16), 200).save(tmp_path / "x.png")
    pipe = SimpleNamespace(objective={"type": objective}, tokenizer=tokenizer("vq"), grid=(4, 4), device="cpu")
    start = editing.read(pipe, tmp_path / "x.png", "left").start
    assert start.dtype == dtype
    holes = start < 0 if dtype == torch.int64 else start.isnan()
    assert holes[..., 2:].all()
    assert not holes[..., :2].any()
