"""A generator's run as something others load: what `genkit export` does.

Any run is a diffusers pipeline of our parts already: `pipeline` copies it, with the weights that are sampled from. `diffusers-dit` turns it into diffusers' own DiTPipeline,
which needs no genkit to be loaded, where its parts can be theirs; where there is a place of theirs that ours do not fit, it says which.
"""

from __future__ import annotations

import importlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

from genkit.errors import GenkitError, UsageError, nearest

KINDS = ("pipeline", "diffusers-dit")
_PREDICTIONS = {"noise": "epsilon", "v": "v_prediction", "x0": "sample"}


def export(run: str | Path, out: str | Path, *, to: str = "pipeline", ema: bool = True) -> dict[str, Any]:
    """Write a run's generator or tokenizer in another form.

    Args:
        run: a run, one of its checkpoints, or a saved pipeline.
        out: folder; it must not exist and appears whole or not at all.
        to: "pipeline": genkit's own, `genkit.AutoPipeline.from_pretrained(out)`, or `DiffusionPipeline.from_pretrained(out)` of diffusers after `import
            genkit.pipeline`, or without that by `custom_pipeline=out, trust_remote_code=True`. "diffusers-dit":
            `diffusers.DiTPipeline.from_pretrained(out)`; of a generator of pixels, which a DiTPipeline cannot be, its transformer and scheduler.
        ema: averaged weights where there are some.

    Returns: out, to, and parts: name -> class.

    Raises: UsageError for an unknown word, an existing `out`, and for what the other form cannot hold.
    """
    from genkit.pipeline import open_run

    if to not in KINDS:
        raise UsageError(f"--to {to} is not known; {nearest(to, list(KINDS))}")
    target = Path(out)
    if target.exists():
        raise UsageError(f"{target} exists; choose another folder or remove it")
    pipe = open_run(run, ema=ema)
    parts: dict[str, Any] = dict(pipe.components) if to == "pipeline" else dit_parts(pipe)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    except OSError as error:
        raise GenkitError(f"{target} cannot be written: {error}") from None
    try:
        if to == "pipeline":
            pipe.save_pretrained(temporary)
            (temporary / "pipeline.py").write_text(f"from genkit.pipeline import {type(pipe).__name__}  # noqa: F401\n")
        else:
            _save_dit(parts, temporary, pipe.class_names)
        temporary.chmod(0o755)
        temporary.rename(target)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise GenkitError(f"{target} cannot be written: {error}") from None
        raise
    return {"out": str(target), "to": to, "parts": {name: type(part).__name__ for name, part in parts.items()}}


def dit_parts(pipe: Any) -> dict[str, Any]:
    """transformer, scheduler, and vae where there are latents. Raises UsageError for parts that diffusers' DiTPipeline has no match for."""
    from diffusers import DDIMScheduler

    if not hasattr(pipe, "generate"):
        raise UsageError("--to diffusers-dit is for generators; this is a tokenizer. Use --to pipeline")
    backbone, objective = pipe.backbone, pipe.objective
    if type(backbone).__name__ != "DiT":
        raise UsageError(
            f"--to diffusers-dit: only backbone.type=dit can be theirs, this is a {type(backbone).__name__}; use --to pipeline"
        )
    if objective["type"] != "diffusion":
        raise UsageError(
            f"--to diffusers-dit: a DiTPipeline walks along the discrete chain (objective.type=diffusion), and this model was trained with "
            f"objective.type={objective['type']}; use --to pipeline"
        )
    path = _built(objective).path
    scheduler = DDIMScheduler(
        num_train_timesteps=path.num_times,
        trained_betas=path.betas().tolist(),
        clip_sample=False,
        prediction_type=_PREDICTIONS[objective["prediction"]],
    )
    transformer = _importer("diffusers_dit").export(backbone)
    parts = {"transformer": transformer, "scheduler": scheduler}
    kind = type(pipe.tokenizer).__name__
    if kind == "KLGAN":
        return parts | {"vae": _importer("diffusers_kl").export(pipe.tokenizer)}
    if kind == "Pixels":
        return parts
    raise UsageError(
        f"--to diffusers-dit: the latents of a DiTPipeline are an AutoencoderKL's; of our tokenizers klgan can be one, this is a {kind}. Use --to pipeline"
    )


def _save_dit(parts: dict[str, Any], folder: Path, class_names: Any) -> None:
    from diffusers import DiTPipeline

    if "vae" in parts:
        names = {str(i): name for i, name in enumerate(class_names)}
        pipeline: Any = DiTPipeline(**parts, id2label=names)
        pipeline.register_to_config(id2label=names)  # which theirs reads, and does not write
        pipeline.save_pretrained(folder)
        return
    for name, part in parts.items():
        part.save_pretrained(folder / name)


def _built(objective: dict[str, Any]) -> Any:
    from genkit import registry

    return registry.build("objective", objective)


def _importer(word: str) -> Any:
    return importlib.import_module(f"genkit.importers.{word}")
