"""From a trained run, or from images, to numbers that say how they were made.

A line for each step: what is evaluated (`_Subject`), with what it is compared, batches through every metric, sums over processes, report.
Samples are streamed from the sampler and never saved. Sample i has the label and the seed that belong to i, whatever the batch size and the
number of processes.
"""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genkit import files, registry
from genkit.errors import GenkitError, UsageError
from genkit.metrics import fashion_net, sources
from genkit.metrics.features import ImageBatch, file_sha256, locate
from genkit.rng import sample_seeds

DEFAULT_COUNT = 5000  # samples of a generator where no metric says how many


@dataclass
class Report:
    """Numbers with how they were measured.

    Attributes:
        rows: {"metric", "value", "protocol"} each; the protocol names everything that has to be equal for two values to be comparable.
        details: numbers below the rows, by name: "class accuracy: trouser".
        notes: what a reader must know beside the numbers.
        settings: everything needed to repeat the evaluation, versions and hashes included.
    """

    rows: list[dict[str, Any]]
    details: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, metric: str) -> float:
        """A value by the metric's full name, or by the name in front of its brackets: report["FD"] for "FD (fashion-cnn-v1)"."""
        values = self.details | {row["metric"].partition(" (")[0]: row["value"] for row in self.rows}
        return (values | {row["metric"]: row["value"] for row in self.rows})[metric]

    def keys(self) -> list[str]:
        return [row["metric"] for row in self.rows]

    def to_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "details": self.details, "notes": self.notes, "settings": self.settings}

    def save(self, path: str | Path) -> None:
        """Write everything as JSON."""
        files.write_json(Path(path), self.to_dict())

    def __str__(self) -> str:
        """One line per number with its protocol, then the notes."""
        names = [row["metric"] for row in self.rows]
        values = [f"{row['value']:.4g}" for row in self.rows]
        width, digits = max(map(len, names)), max(map(len, values))
        lines = [
            f"{name:{width}}  {value:>{digits}}  [{row['protocol']}]"
            for name, value, row in zip(names, values, self.rows, strict=True)
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


@dataclass
class _Subject:
    """What is evaluated.

    Attributes:
        batch: (first, last) -> what metrics are fed of the samples first .. last - 1, by keyword.
        count: how many there are; None = as many as are asked for.
        about: words of the protocol that follow the number of samples.
        data: config section that "train" and "val" mean splits of; None = there is no run.
        metrics: what is measured unless something else is asked for.
        record: where the report belongs.
    """

    kind: str
    batch: Callable[[int, int], dict[str, Any]]
    count: int | None
    about: list[str]
    data: dict[str, Any] | None
    metrics: list[dict[str, Any]]
    modules: list[torch.nn.Module] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    record: Path | None = None


def evaluate(
    target: Any,
    *,
    reference: str | None = None,
    metrics: Sequence[dict[str, Any] | str] | None = None,
    count: int | None = None,
    weights: str | None = None,
    batch_size: int = 256,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    ema: bool = True,
    device: str | torch.device | None = None,
    out: str | Path | None = None,
) -> Report:
    """Measure a run, a pipeline, a folder of images or an npz of images.

    A generator is sampled with its classes in turn and compared with its training data; a tokenizer reconstructs its validation split; images are
    compared with `reference`. Under torch.distributed every process takes its share of the samples, the sums are added up, and all
    return the same report; the first one writes `out`.

    Args:
        target: path of a run, a pipeline or a folder of images, an npz with arr_0 (uint8 [N, Y, X, C] or [N, C, Y, X]), or a pipeline object.
        reference: instead of the metrics' own: "train" or "val" of the run, a dataset word ("fashion", "fashion:val"), a folder, an
            npz of images or of statistics.
        metrics: specs as in the config section `metrics`, or just their words; by default the run's own, else what suits the target.
        count: samples to generate, or images to take from the front; by default what the metrics say, or all images.
        weights: of the feature net inception-2015: a file, or a folder that holds it.
        seed: sample i is generated from the seed `seed * 2^32 + i`.
        steps, guidance: instead of the sampler's own.
        ema: averaged weights where the target is a path and has some.
        device: by default a path is evaluated on the GPU where there is one, a pipeline object where it is.
        out: file for the report as JSON; of a run directory by default eval/STEP.json in it.

    Raises: UsageError or GenkitError, one line each, for a target, reference or metric that cannot be used.
    """
    if count is not None and count < 1:
        raise UsageError(f"count={count}: at least one image is needed")
    if batch_size < 1:
        raise UsageError(f"batch_size={batch_size} must be at least 1")
    started = time.perf_counter()
    place = _device(target, device)
    subject = _open(target, seed=seed, steps=steps, guidance=guidance, ema=ema, place=place, weights=weights)
    specs = [
        _checked(spec, i, reference, weights) for i, spec in enumerate(subject.metrics if metrics is None else metrics)
    ]
    if not specs:
        raise UsageError(f"nothing to measure on {subject.kind}; name metrics: {', '.join(registry.words('metrics'))}")
    measured = [registry.build("metrics", spec) for spec in specs]
    total = _how_many(subject, count, specs)
    rank, world = _processes()
    if total < world:
        raise UsageError(f"{total} images cannot be shared out over {world} processes; use fewer processes")

    compared = _feed_references(measured, subject.data, rank, world, batch_size, place)
    measuring = time.perf_counter()
    with _evaluating(subject.modules):
        for batch in _batches(subject.batch, rank, world, total, batch_size):
            wrapped = {
                name: ImageBatch(value.to(place)) if name in ("fake", "real") else value
                for name, value in batch.items()
            }
            for metric in measured:
                # A metric with a reference of its own had its real images from there, above.
                metric.update(**{k: v for k, v in wrapped.items() if k != "real" or not hasattr(metric, "reference")})
    seconds = time.perf_counter() - measuring
    for metric in measured:
        _sum_over_processes(metric.state(), world, place)

    report = Report([], notes=list(subject.notes))
    for metric in measured:
        words = [getattr(metric, "protocol", ""), f"N={total}", *subject.about]
        if hasattr(metric, "reference"):
            words.append(f"reference {compared[metric.reference]}")
        protocol = ", ".join(word for word in words if word)
        for name, value in metric.result().items():
            if ": " in name:
                report.details[name] = value
            else:
                report.rows.append({"metric": name, "value": value, "protocol": protocol})
        report.notes += getattr(metric, "notes", list)()
    report.settings = {
        "target": str(target) if isinstance(target, str | Path) else type(target).__name__,
        "kind": subject.kind,
        "metrics": specs,
        "references": compared,
        "feature_nets": {m.net.protocol: m.net.sha256 for m in measured if getattr(m, "net", None) is not None},
        "count": total,
        "seed": seed,
        "steps": steps,
        "guidance": guidance,
        "ema": ema,
        "batch_size": batch_size,
        "processes": world,
        "device": str(place),
        "images_per_second": total / seconds,
        "seconds": time.perf_counter() - started,
        "versions": _versions(),
    }
    out = out or subject.record
    if out is not None and rank == 0:
        report.save(out)
    return report


def _open(
    target: Any,
    *,
    seed: int,
    steps: int | None,
    guidance: float | None,
    ema: bool,
    place: torch.device,
    weights: str | None,
) -> _Subject:
    """Find out what the target is."""
    if not isinstance(target, str | Path):
        return _pipeline_subject(target, seed, steps, guidance, weights)
    path = Path(target)
    if path.suffix == ".npz":
        return _images_subject(sources.from_npz(path), weights)
    if not path.exists():
        raise UsageError(f"{path} does not exist; give a run, a folder of images or an npz")
    if not path.is_dir():
        raise UsageError(f"{path} is not something that can be evaluated; give a run, a folder of images or an npz")
    if any(
        (path / name).exists() for name in ("config.resolved.yaml", "model_index.json", "pipeline/model_index.json")
    ):
        from genkit.pipeline import open_run

        pipe = open_run(path, ema=ema, device=place)
        subject = _pipeline_subject(pipe, seed, steps, guidance, weights)
        if (path / "config.resolved.yaml").exists():
            subject.record = path / "eval" / f"{pipe.folder.parent.name}.json"
        return subject
    return _images_subject(sources.from_folder(path, fashion_net.FashionCNN.class_names), weights)


def _pipeline_subject(pipe: Any, seed: int, steps: int | None, guidance: float | None, weights: str | None) -> _Subject:
    config = pipe.run_config or {}
    if not config.get("data"):
        raise UsageError(
            f"this {type(pipe).__name__} does not know the data it was trained on (run_config is empty); evaluate its run"
        )
    if hasattr(pipe, "generate"):
        return _generator_subject(pipe, config, seed, steps, guidance, weights)
    if hasattr(pipe, "tokenizer"):
        return _tokenizer_subject(pipe, config, weights)
    raise UsageError(
        f"a {type(pipe).__name__} can neither generate nor reconstruct; give a generator's or a tokenizer's pipeline"
    )


def _generator_subject(
    pipe: Any, config: dict[str, Any], seed: int, steps: int | None, guidance: float | None, weights: str | None
) -> _Subject:
    """Samples with the classes in turn: sample i has class i mod num_classes."""
    classes = pipe.num_classes

    def batch(first: int, last: int) -> dict[str, Any]:
        label = torch.arange(first, last) % classes if classes else torch.full((last - first,), -1)
        seeds = sample_seeds(seed, first, last - first)
        return {"fake": pipe.generate(label, seeds, steps=steps, guidance=guidance), "label": label}

    sampler = getattr(pipe, "sampler", None) or config["sampler"]
    steps_used = steps if steps is not None else sampler.get("num_steps")
    guidance_used = guidance if guidance is not None else sampler.get("guidance")
    about = [
        "labels balanced" if classes else "no labels",
        _weights_word(pipe),
        f"{sampler['type']} steps={steps_used} guidance={guidance_used}",
        f"seed {seed}",
    ]
    metrics = [dict(spec) for spec in config.get("metrics") or []]
    if not metrics:
        train = sources.from_spec(config["data"])
        net = _suitable_net(train.shape, weights)
        metrics = [{"type": "frechet", "features": net}]
        if net == "fashion-cnn" and tuple(pipe.class_names) == fashion_net.FashionCNN.class_names:
            metrics.append({"type": "class_accuracy"})
    return _Subject(
        "generator", batch, None, about, config["data"], metrics, _modules(pipe), _judge_notes(config["data"])
    )


def _tokenizer_subject(pipe: Any, config: dict[str, Any], weights: str | None) -> _Subject:
    """Reconstructions of the validation split, or of the training images where there is none."""
    tokenizer, data = pipe.tokenizer, config["data"]
    notes = []
    try:
        images = sources.from_spec(data, "val")
    except UsageError:
        images = sources.from_spec(data)
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
        net: str | None = _suitable_net(images.shape, weights)
        if net == "inception-2015":
            try:
                locate(net, weights)
            except GenkitError as error:
                net = None
                notes.append(f"no rFID: {error}")
        metrics = [{"type": "reconstruction", "features": net}]
        if tokenizer.codebook_size:
            metrics.append({"type": "codebook"})
    about = [_weights_word(pipe), images.about]
    return _Subject(
        "tokenizer", batch, images.count, about, data, metrics, _modules(pipe), [*notes, *_judge_notes(data)]
    )


def _images_subject(images: sources.Images, weights: str | None) -> _Subject:
    def batch(first: int, last: int) -> dict[str, Any]:
        x, label = images.read(first, last)
        return {"fake": x} | ({"label": label} if images.has_labels else {})

    net = _suitable_net(images.shape, weights)
    metrics = [{"type": "frechet", "features": net}]
    if net == "fashion-cnn" and images.has_labels:
        metrics.append({"type": "class_accuracy"})
    return _Subject(
        "images", batch, images.count, [f"{images.name} sha {images.sha[:8]}"], None, metrics, notes=list(images.notes)
    )


def _suitable_net(shape: tuple[int, ...], weights: str | None) -> str:
    """The net that comes with the package where it can take the images, unless weights of the other one are named."""
    return "fashion-cnn" if weights is None and fashion_net.takes(shape) else "inception-2015"


def _judge_notes(data: dict[str, Any]) -> list[str]:
    """The feature net must not have learnt from the images a model is trained on; here it has."""
    if data["type"] != "fashion" or data.get("source") == "embedded":
        return []
    if "full" not in registry.build("data", data).info.source:
        return []
    return [
        "fashion-cnn-v1 was trained on the same 60,000 images as this run; set data.source=embedded for an independent judge"
    ]


def _checked(spec: dict[str, Any] | str, number: int, reference: str | None, weights: str | None) -> dict[str, Any]:
    """A metric's spec with the arguments of the call put in where the metric has such an option, and every default."""
    chosen = {"type": spec} if isinstance(spec, str) else dict(spec)
    named = registry.options(registry.find("metrics", str(chosen.get("type"))))
    if reference is not None and "reference" in named:
        chosen["reference"] = reference
    if weights is not None and "weights" in named and chosen.get("features") == "inception-2015":
        chosen["weights"] = weights
    return registry.check("metrics", chosen, f"metrics[{number}]")


def _how_many(subject: _Subject, count: int | None, specs: list[dict[str, Any]]) -> int:
    if subject.count is None:
        return count or max((spec["count"] for spec in specs if spec.get("count")), default=DEFAULT_COUNT)
    if count is not None and count > subject.count:
        raise UsageError(f"count={count}, but there are only {subject.count} images ({', '.join(subject.about)})")
    # A recipe's count is a limit: it is written before anybody knows how many images there are.
    limits = [s["count"] for s in specs if s.get("count")] if subject.kind == "tokenizer" else []
    return count or min([subject.count, *limits])


def _batches(read: Callable[[int, int], Any], rank: int, world: int, total: int, batch_size: int) -> Iterator[Any]:
    """This process's contiguous share of 0 .. total - 1, a batch at a time."""
    first, last = total * rank // world, total * (rank + 1) // world
    for start in range(first, last, batch_size):
        yield read(start, min(start + batch_size, last))


def _feed_references(
    measured: list[Any], data: dict[str, Any] | None, rank: int, world: int, batch_size: int, place: torch.device
) -> dict[str, str]:
    """Give every metric that has a reference its real images, each set read once. Returns word -> what it was, with count and hash."""
    compared: dict[str, str] = {}
    for word in dict.fromkeys(metric.reference for metric in measured if hasattr(metric, "reference")):
        fed = [metric for metric in measured if getattr(metric, "reference", None) == word]
        if word.endswith(".npz") and "mu" in sources.read_npz(word):
            for metric in fed:
                moments = metric.use(word)
            compared[word] = f"{moments.source}, n={moments.count or 'unknown'}, sha {file_sha256(word)[:8]}"
            continue
        images = sources.find(word, data)
        compared[word] = images.about
        for x, _ in _batches(images.read, rank, world, images.count, batch_size):
            batch = ImageBatch(x.to(place))
            for metric in fed:
                metric.update(real=batch)
    return compared


def _device(target: Any, device: str | torch.device | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    if not isinstance(target, str | Path):
        return torch.device(getattr(target, "device", "cpu"))
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _processes() -> tuple[int, int]:
    """This process's number and how many there are."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _sum_over_processes(state: dict[str, Tensor], world: int, place: torch.device) -> None:
    """Add up the states of all processes, in place."""
    if world == 1:
        return
    for value in state.values():
        summed = value.to(place) if torch.distributed.get_backend() == "nccl" else value
        torch.distributed.all_reduce(summed)
        value.copy_(summed)


@contextlib.contextmanager
def _evaluating(modules: list[torch.nn.Module]) -> Iterator[None]:
    """Modules in eval mode inside the block: no dropout, and no codebook that learns from what it encodes."""
    training = [module for module in modules if module.training]
    for module in training:
        module.eval()
    try:
        yield
    finally:
        for module in training:
            module.train()


def _modules(pipe: Any) -> list[torch.nn.Module]:
    parts = getattr(pipe, "components", {}).values()
    return [part for part in parts if isinstance(part, torch.nn.Module)]


def _weights_word(pipe: Any) -> str:
    return getattr(pipe, "weights_variant", "weights as given")


def _versions() -> dict[str, str]:
    from genkit import __version__

    return {
        "genkit": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
