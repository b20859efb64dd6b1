"""Which parts go together: what a sampler draws, a backbone answers, a tokenizer makes and a kind of reuse serves, against what an objective learns."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from genkit import registry
from genkit.errors import UsageError

# What samplers draw, by what they call.
DRAWN = {
    "Predict": "noisy latents",
    "PredictIds": "ids that were masked",
    "PredictNext": "ids in sequence",
    "PredictTokens": "continuous tokens",
    "PredictMixture": "sums of codes",
    "PredictTree": "octrees",
}


def check_sampler(section: Mapping[str, Any], objective: Mapping[str, Any], place: str = "") -> None:
    """Raises UsageError for a sampler that draws something else than the objective learns. What a sampler calls and what an objective gives is read from
    their signatures (genkit.interfaces.Predict); where one does not say, nothing is checked."""
    asked, given = _asked(section["type"]), _annotation(registry.find("objective", objective["type"]), "predictor")
    if asked == given or {asked, given} & {"", "Any"}:
        return
    fitting = [name for name in registry.words("sampler") if _asked(name) == given]
    at = f" [{place}]" if place else ""
    raise UsageError(
        f"sampler.type={section['type']} draws {DRAWN.get(asked, asked)}, and objective.type={objective['type']} learns {DRAWN.get(given, given)}; "
        f"samplers that go with it: {', '.join(fitting) or 'none'}{at}"
    )


def check_backbone(section: Mapping[str, Any], objective: Mapping[str, Any], place: str = "") -> None:
    """Raises UsageError for a backbone that does not answer what the objective asks; where one does not say, nothing is checked."""
    given = getattr(registry.find("backbone", section["type"]), "answers", None)
    asked = getattr(registry.find("objective", objective["type"]), "asks", None)
    if given == asked or None in (given, asked):
        return
    backbones = [w for w in registry.words("backbone") if getattr(registry.find("backbone", w), "answers", "") == asked]
    objectives = [w for w in registry.words("objective") if getattr(registry.find("objective", w), "asks", "") == given]
    at = f" [{place}]" if place else ""
    raise UsageError(
        f"objective.type={objective['type']} learns {asked}, and backbone.type={section['type']} is made for {given}; backbones that go with the objective: "
        f"{', '.join(backbones) or 'none'}; objectives that go with the backbone: {', '.join(objectives) or 'none'}{at}"
    )


def check_tokenizer(objective: Any, tokenizer: Any, word: str) -> None:
    """Raises UsageError for a tokenizer that does not make what the objective learns: octrees, ids at all, or ids on the grid of its latents."""
    asked, made = getattr(objective, "asks", None), type(tokenizer).__name__
    is_tree = hasattr(tokenizer, "code_depth")
    if asked is not None and is_tree != (asked == "octrees"):
        raise UsageError(
            f"objective.type={word} learns {asked}, and the tokenizer {made} makes {'octrees' if is_tree else 'none'}; take "
            + ("objective.type=octree_masked" if is_tree else "the tokenizer octree_vq")
            + ", or another recipe"
        )
    if objective.target != "ids" or is_tree:
        return
    if not tokenizer.num_levels:
        raise UsageError(
            f"objective.type={word} learns ids, and the tokenizer {made} makes continuous latents; take a tokenizer with a codebook (vq, rvq, fsq, ...), or "
            "an objective of latents: flow, diffusion, edm, mar"
        )


def check_reuse(section: Mapping[str, Any], objective: Mapping[str, Any], place: str = "") -> None:
    """Raises UsageError where the kind of reuse in a checked section `sampler` cannot serve this sampler or objective."""
    if section.get("reuse") is None:
        return
    word = section["reuse"]["type"]
    sampler, kind = registry.find("sampler", section["type"]), registry.find("reuse", word)
    target = getattr(registry.find("objective", objective["type"]), "target", "z")
    at = f" [{place}]" if place else ""
    if hasattr(kind, "start"):  # wraps the model of samplers that know nothing of it
        if target == "ids":
            raise UsageError(
                f"sampler.reuse.type={word} serves latents; objective.type={objective['type']} learns ids{at}"
            )
        if getattr(sampler, "is_adaptive", False):
            raise UsageError(
                f"sampler.reuse.type={word} needs the same steps for all samples, and sampler.type={section['type']} chooses them for each; use another sampler{at}"
            )
    elif "reuse" not in registry.options(sampler):
        served = [
            name for name in registry.words("sampler") if "reuse" in registry.options(registry.find("sampler", name))
        ]
        raise UsageError(
            f"sampler.reuse.type={word} serves sampler.type={' or '.join(served)}, found {section['type']}{at}"
        )


def _asked(sampler: str) -> str:
    """The kind of predictor that a sampler calls."""
    return _annotation(registry.find("sampler", sampler), "__call__", 1)


def _annotation(cls: Any, method: str, parameter: int | None = None) -> str:
    """Of the return value or of a parameter, as it is written; empty where there is none."""
    function = getattr(cls, method, None)
    if not inspect.isfunction(function):
        return ""
    signature = inspect.signature(function)
    found = signature.return_annotation if parameter is None else [*signature.parameters.values()][parameter].annotation
    return found if isinstance(found, str) else ""
