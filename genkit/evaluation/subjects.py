"""What can be evaluated: a generator, a tokenizer, a set of images - each as numbered batches that metrics are fed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from genkit import registry
from genkit.data.sizes import named_size, parse_size, show_size
from genkit.errors import GenkitError, UsageError
from genkit.metrics import emoji_net, fashion_net, sources
from genkit.metrics.features import locate
from genkit.metrics.image_arrays import from_npz
from genkit.metrics.image_files import from_folder, from_zip
from genkit.metrics.image_set import Images
from genkit.metrics.protocols import Labels
from genkit.rng import Rng, sample_seeds
from genkit.weights import module_sha256


@dataclass
class Subject:
    """What is evaluated.

    Attributes:
        kind: "generator", "tokenizer" or "images".
        batch: (first, last) -> what metrics are fed of the samples first .. last - 1, by keyword.
        count: how many there are; None = as many as are asked for.
        shape: of one image, (C, Y, X).
        labels: how the samples' classes were chosen, in words; empty where nothing was chosen.
        about: the other words of the report line, complete once every image has been read.
        data: config section that "train" and "val" mean splits of; None = there is no run.
        reference: what metrics that compare sets use unless told otherwise.
        metrics: what is measured unless something else is asked for.
        notes: what a reader must know, complete once every image has been read.
        gather: under torch.distributed, makes about and notes those of all processes; all must call it.
        identity: hashes and counters for the record.
        record: where the report belongs; None = nowhere unless asked.
    """

    kind: str
    batch: Callable[[int, int], dict[str, Any]]
    count: int | None
    shape: tuple[int, ...]
    about: Callable[[], list[str]]
    data: dict[str, Any] | None
    metrics: list[dict[str, Any]]
    reference: str = "train"
    labels: str = ""
    modules: list[torch.nn.Module] = field(default_factory=list)
    notes: Callable[[], list[str]] = list
    gather: Callable[[], None] = lambda: None
    identity: dict[str, Any] = field(default_factory=dict)
    record: Path | None = None


@dataclass(frozen=True)
class Sampling:
    """How a generator is asked for samples. None = the sampler's own."""

    seed: int
    steps: int | None
    guidance: float | None
    labels: Labels
    size: str | Sequence[int] | None = None
    rope: Mapping[str, Any] | None = None
    sampler: Sequence[str] = ()

    @property
    def suffix(self) -> str:
        """What tells reports of one checkpoint apart in their file names: "-steps8-guidance2"; empty for the sampler's own."""
        parts = [("steps", self.steps), ("guidance", self.guidance), ("seed", self.seed or None)]
        named = "".join(f"-{name}{value:g}" for name, value in parts if value is not None)
        named += "".join(f"-{re.sub(r'[^A-Za-z0-9_.]+', '-', change).strip('-')}" for change in self.sampler)
        return named + ("-random" if self.labels == "random" else "") + named_size(self.size, self.rope)


def open_subject(target: Any, sampling: Sampling, *, ema: bool, device: torch.device, weights: str | None) -> Subject:
    """Find out what the target is.

    Raises: UsageError for something that cannot be evaluated.
    """
    if not isinstance(target, str | Path):
        return _of_pipeline(target, sampling, weights)
    path = Path(target)
    if path.suffix.lower() == ".npz":
        return _of_images(from_npz(path), weights, path)
    if not path.exists():
        raise UsageError(f"{path} does not exist; give a run, a folder or zip of images, an npz, or meshes")
    if path.suffix.lower() == ".zip":
        return _of_images(from_zip(path, fashion_net.FashionCNN.class_names), weights, path)
    if not path.is_dir():
        raise UsageError(
            f"{path} is not something that can be evaluated; give a run, a folder or zip of images, an npz, or meshes (obj, ply, stl, off, glb)"
        )
    if any(
        (path / name).exists() for name in ("config.resolved.yaml", "model_index.json", "pipeline/model_index.json")
    ):
        from genkit.pipeline import open_run

        pipe = open_run(path, ema=ema, device=device)
        subject = _of_pipeline(pipe, sampling, weights)
        if "run" in subject.identity:
            checkpoint = pipe.folder.parent
            suffix = ("" if ema else "-raw") + (sampling.suffix if subject.kind == "generator" else "")
            subject.record = checkpoint.parent.parent / "eval" / f"{checkpoint.name}{suffix}.json"
        return subject
    return _of_images(from_folder(path, fashion_net.FashionCNN.class_names), weights, path)


def suitable_net(shape: tuple[int, ...], weights: str | None, data: str | None = None) -> str:
    """A net that comes with the package where one can take the images, unless weights of another one are named."""
    if weights is None and fashion_net.takes(shape):
        return "fashion-cnn"
    return "emoji-cnn" if weights is None and data == "emoji" and emoji_net.takes(shape) else "inception-2015"


def _of_pipeline(pipe: Any, sampling: Sampling, weights: str | None) -> Subject:
    config = pipe.run_config or {}
    if not config.get("data"):
        raise UsageError(
            f"this {type(pipe).__name__} does not know the data it was trained on (run_config is empty); evaluate its run"
        )
    if hasattr(pipe, "generate"):
        return _of_generator(pipe, config, sampling, weights)
    if hasattr(pipe, "tokenizer"):
        return _of_tokenizer(pipe, config, weights)
    raise UsageError(
        f"a {type(pipe).__name__} can neither generate nor reconstruct; give a generator's or a tokenizer's pipeline"
    )


def _of_generator(pipe: Any, config: dict[str, Any], sampling: Sampling, weights: str | None) -> Subject:
    """Sample i has the class i mod num_classes, or one drawn by its own seed."""
    classes = pipe.told.classes() if hasattr(pipe, "told") else range(pipe.num_classes)

    size = None if sampling.size is None else parse_size(sampling.size)
    data = config["data"] if size is None else sources.at_size(config["data"], size)
    asked: dict[str, Any] = {"size": list(size)} if size is not None else {}
    asked |= {"rope": dict(sampling.rope)} if sampling.rope else {}
    changes: dict[str, Any] = {"sampler": list(sampling.sampler)} if sampling.sampler else {}

    def batch(first: int, last: int) -> dict[str, Any]:
        seeds = sample_seeds(sampling.seed, first, last - first)
        if not classes:
            label = torch.full((last - first,), -1)
        elif sampling.labels == "random":
            label = torch.tensor(classes)[Rng(seeds).fork("label").integers(len(classes), 1)[:, 0]]
        else:
            label = torch.tensor(classes)[torch.arange(first, last) % len(classes)]
        fake = pipe.generate(label, seeds, steps=sampling.steps, guidance=sampling.guidance, **asked, **changes)
        return {"fake": fake, "label": label}

    sampler = getattr(pipe, "sampler", None) or config["sampler"]
    if changes:
        sampler = pipe.chosen_sampler(sampling.sampler)
    steps = sampling.steps if sampling.steps is not None else sampler.get("num_steps")
    guidance = sampling.guidance if sampling.guidance is not None else sampler.get("guidance")
    modules = _modules(pipe)
    sha = _sha(modules)
    about = [
        f"{_weights_word(pipe)} weights sha {sha[:8]}",
        f"{sampler['type']} steps={steps} guidance={guidance}",
        f"seed {sampling.seed}",
    ]
    about += [f"sampler {' '.join(sampling.sampler)}"] if changes else []
    about += [f"size {show_size(size)}"] if size is not None else []
    about += [f"rope {' '.join(f'{key}={value}' for key, value in sampling.rope.items())}"] if sampling.rope else []
    if size is not None:
        pipe.grid_of(size)
    shape = tuple(sources.from_spec(data).shape)
    metrics = [dict(spec) for spec in config.get("metrics") or []]
    if not metrics:
        net = suitable_net(shape, weights, config["data"]["type"])
        metrics = [{"type": "frechet", "features": net}]
        if net == "fashion-cnn" and tuple(pipe.class_names) == fashion_net.FashionCNN.class_names:
            metrics.append({"type": "class_accuracy"})
    return Subject(
        "generator",
        batch,
        None,
        shape,
        lambda: about,
        data,
        metrics,
        labels=sampling.labels if classes else "none",
        modules=modules,
        notes=lambda: _judge_notes(config["data"]),
        identity=_place(pipe)
        | _budget(pipe)
        | {"weights_sha256": sha, "sampler": sampler["type"], "num_steps": steps, "guidance": guidance}
        | asked
        | ({"sampler_changes": changes["sampler"]} if changes else {}),
    )


def _of_tokenizer(pipe: Any, config: dict[str, Any], weights: str | None) -> Subject:
    """Reconstructions of the validation split, or of the training images where there is none."""
    tokenizer, data = pipe.tokenizer, config["data"]
    notes = []
    try:
        images, split = sources.from_spec(data, "val"), "val"
    except UsageError:
        images, split = sources.from_spec(data), "train"
        notes.append(
            f"the data have no validation split; measured on the images the tokenizer was trained on ({images.name})"
        )
    parameter = next(tokenizer.parameters(), torch.zeros(()))

    def batch(first: int, last: int) -> dict[str, Any]:
        x, label = images.read(first, last)
        with torch.no_grad():
            encoded = tokenizer.encode(x.to(parameter.device))
            rebuilt = tokenizer.decode(encoded.z).clamp(-1, 1)
        return {
            "real": x,
            "fake": rebuilt,
            "label": label,
            "ids": encoded.ids,
            "codebook_size": tokenizer.codebook_size,
        }

    metrics: list[dict[str, Any]] = [dict(spec) for spec in config.get("metrics") or []]
    if not metrics:
        net: str | None = suitable_net(images.shape, weights, data["type"])
        if net == "inception-2015":
            try:
                locate(net, weights)
            except GenkitError as error:
                net = None
                notes.append(f"no rFID: {error}")
        metrics = [{"type": "reconstruction", "features": net}]
        if tokenizer.codebook_size:
            metrics.append({"type": "codebook"})
    modules = _modules(pipe)
    sha = _sha(modules)
    return Subject(
        "tokenizer",
        batch,
        images.count,
        images.shape,
        lambda: [f"{_weights_word(pipe)} weights sha {sha[:8]}", images.about],
        data,
        metrics,
        reference=split,
        modules=modules,
        notes=lambda: [*notes, *images.notes, *_judge_notes(data)],
        gather=images.gather,
        identity=_place(pipe) | {"weights_sha256": sha},
    )


def _of_images(images: Images, weights: str | None, path: Path) -> Subject:
    def batch(first: int, last: int) -> dict[str, Any]:
        x, label = images.read(first, last)
        return {"fake": x} | ({"label": label} if images.has_labels else {})

    net = suitable_net(images.shape, weights)
    metrics = [{"type": "frechet", "features": net}]
    if net == "fashion-cnn" and images.has_labels:
        metrics.append({"type": "class_accuracy"})
    return Subject(
        "images",
        batch,
        images.count,
        images.shape,
        lambda: [f"{images.name} sha {images.sha[:8]}"],
        None,
        metrics,
        notes=lambda: list(images.notes),
        gather=images.gather,
        record=_beside(path),
    )


def _beside(path: Path) -> Path:
    """NAME.eval.json beside a folder or file of images: relative where the path is, so that it is printed as it was given."""
    named = path if path.name not in ("", "..") else path.resolve()
    return named.with_name(f"{named.name if named.is_dir() else named.stem}.eval.json")


def _judge_notes(data: dict[str, Any]) -> list[str]:
    """The feature net must not have learnt from the images a model is trained on; here it has."""
    if data["type"] != "fashion" or data.get("source") == "embedded":
        return []
    if "full" not in registry.build("data", data).info.source:
        return []
    return [
        "fashion-cnn-v1 was trained on the same 60,000 images as this run; set data.source=embedded for an independent judge"
    ]


def _place(pipe: Any) -> dict[str, Any]:
    """Which run and how far it was, for a pipeline that is a checkpoint of one."""
    checkpoint = Path(getattr(pipe, "folder", ".")).parent
    if not (checkpoint.parent.parent / "config.resolved.yaml").is_file() or not checkpoint.name.isdigit():
        return {}
    step = int(checkpoint.name)
    batch_size = pipe.run_config["train"]["batch_size"]
    return {"run": checkpoint.parent.parent.resolve().name, "step": step, "samples": step * batch_size}


def _budget(pipe: Any) -> dict[str, Any]:
    """What a generator was given, beside the samples it was trained on: its tokenizer and its weights."""
    backbone, tokenizer = getattr(pipe, "backbone", None), getattr(pipe, "tokenizer", None)
    found = {} if backbone is None else {"parameters": sum(p.numel() for p in backbone.parameters())}
    return found if tokenizer is None else found | {"tokenizer_sha256": module_sha256(tokenizer)}


def _modules(pipe: Any) -> list[torch.nn.Module]:
    parts = getattr(pipe, "components", {}).values()
    return [part for part in parts if isinstance(part, torch.nn.Module)]


def _weights_word(pipe: Any) -> str:
    return getattr(pipe, "weights_variant", "given")


def _sha(modules: list[torch.nn.Module]) -> str:
    """Hash of all of them: two evaluations with the same one looked at the same model."""
    return hashlib.sha256("".join(map(module_sha256, modules)).encode()).hexdigest()
