"""genkit: tokenizers, generators, samplers and honest metrics for images, video and 3D shapes, composing on the same tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> module, imported on first use: neither `import genkit` nor `genkit --help` imports torch.
_LAZY = {
    "AutoPipeline": "genkit.pipeline",
    "AutoTokenizer": "genkit.pipeline",
    "GeneratorPipeline": "genkit.pipeline",
    "TokenizerPipeline": "genkit.pipeline",
    "evaluate": "genkit.evaluation.evaluate",
    "sample": "genkit.sampling",
    "train": "genkit.training",
    # diffusers looks these up here to decide how a component of a saved pipeline is loaded.
    "DiffusionPipeline": "diffusers",
    "ModelMixin": "diffusers",
    "SchedulerMixin": "diffusers",
}

__all__ = [
    "AutoPipeline",
    "AutoTokenizer",
    "GeneratorPipeline",
    "TokenizerPipeline",
    "__version__",
    "evaluate",
    "sample",
    "train",
]

if TYPE_CHECKING:
    from genkit.evaluation.evaluate import evaluate
    from genkit.pipeline import AutoPipeline, AutoTokenizer, GeneratorPipeline, TokenizerPipeline
    from genkit.sampling import sample
    from genkit.training import train


def __getattr__(name: str) -> Any:
    import importlib

    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name[:1].isupper():
        # A saved pipeline names its parts ["genkit", "VQ"]: short names survive a file that moves.
        from genkit import registry

        for section in ("tokenizer", "backbone"):
            for word in registry.words(section):
                if word.replace("_", "") == name.lower():
                    return registry.find(section, word)
    raise AttributeError(f"module 'genkit' has no attribute '{name}'")
