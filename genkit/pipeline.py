"""Trained parts as diffusers pipelines: what a checkpoint holds and what people call.

Saved pipelines name our parts ["genkit", "VQ"], so they load without remote code and survive files that move. diffusers accepts a library
it does not know when it stands in its table of loadable classes; that table is private, so a test holds it for the installed release.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin
from diffusers.pipelines import pipeline_loading_utils
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput, logging
from safetensors import SafetensorError
from torch import Tensor

from genkit import config, registry
from genkit.checkpoint import find_run
from genkit.data.sizes import parse_size, show_size
from genkit.errors import GenkitError, UsageError
from genkit.fitting import check_reuse, check_sampler
from genkit.guidance import Guidance, guide
from genkit.interfaces import OnStep
from genkit.labels import class_number
from genkit.nn.extrapolation import extrapolating
from genkit.nn.grid_tokenizer import image_sides
from genkit.nn.layout import dense_layout
from genkit.nn.packed import packed
from genkit.rng import Rng
from genkit.weights import module_sha256

pipeline_loading_utils.LOADABLE_CLASSES.setdefault("genkit", {})


@dataclass
class ImagesOutput(BaseOutput):
    """`images`: a list of PIL images, or a tensor [B, C, Y, X] in [-1, 1] with output_type="pt", or an array [B, Y, X, C] in [0, 1]."""

    images: Any


class TokenizerPipeline(DiffusionPipeline):
    """A trained tokenizer. `run_config` is the resolved config of the run that made it."""

    tokenizer: Any

    def __init__(self, tokenizer: ModelMixin, run_config: dict[str, Any] | None = None):
        super().__init__()
        self.register_modules(tokenizer=tokenizer)
        self.register_to_config(run_config=run_config)
        self.run_config = run_config

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Reconstruct images [B, C, Y, X] in [-1, 1]."""
        return self.tokenizer(images.to(self.device))[0].clamp(-1, 1)


class GeneratorPipeline(DiffusionPipeline):
    """Tokenizer, backbone, objective and sampler as one thing that makes images.

    Args:
        tokenizer, backbone: trained modules.
        objective, sampler: checked specs of the parts that turn the backbone into a predictor and call it.
        grid: tokens along each axis of a generated sample.
        class_names: one per class; empty for an unconditional model.
        run_config: resolved config of the run, for the record.
        condition: checked spec of what the backbone is told; None = the class.
        told: the part that it makes, where the caller has it already.
    """

    tokenizer: Any
    backbone: Any

    def __init__(
        self,
        tokenizer: ModelMixin,
        backbone: ModelMixin,
        # diffusers takes arguments without a default for modules, so what is plain data has one.
        objective: dict | None = None,
        sampler: dict | None = None,
        grid: list = [],  # noqa: B006
        class_names: list = [],  # noqa: B006
        run_config: dict | None = None,
        condition: dict | None = None,
        told: Any = None,
    ):
        super().__init__()
        if objective is None or sampler is None or not grid:
            raise UsageError("a generator pipeline needs objective, sampler and grid beside its modules")
        self.register_modules(tokenizer=tokenizer, backbone=backbone)
        self.register_to_config(
            objective=objective,
            sampler=sampler,
            grid=list(grid),
            class_names=list(class_names),
            run_config=run_config,
            condition=condition,
        )
        self.objective: dict[str, Any] = objective
        self.sampler: dict[str, Any] = sampler
        self.grid = tuple(grid)
        self.class_names = tuple(class_names)
        self.condition: dict[str, Any] = condition or {"type": "label"}
        self.run_config = run_config
        self._told = told
        self._weak: dict[str, Any] = {}  # path -> a worse model, opened when first guided by

    @property
    def num_classes(self) -> int:
        """Classes that labels count: those of the database where it is told neighbours."""
        return len(self.told.names())

    def each_class(self, first: int, last: int) -> Tensor:
        """[last - first] int64: sample i is of the i-th class that it can be of, over and over; -1 where there are none."""
        classes = torch.tensor(self.told.classes() or [-1])
        return classes[torch.arange(first, last) % len(classes)]

    @property
    def told(self) -> Any:
        """What makes the condition of a request (genkit.interfaces.Condition)."""
        if self._told is None:
            # A checkpoint lies in a run, which may keep what the condition needs.
            folder = getattr(self, "folder", None)
            self._told = registry.build(
                "condition",
                self.condition,
                tokenizer=self.tokenizer,
                grid=self.grid,
                class_names=self.class_names,
                data=(self.run_config or {}).get("data"),
                folder=None if folder is None else folder.parents[2],
            )
        return self._told

    @torch.no_grad()
    def generate(
        self,
        labels: Tensor,
        seeds: Sequence[int],
        *,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: Mapping[str, Any] | Sequence[str] = (),
        size: str | Sequence[int] | None = None,
        rope: Mapping[str, Any] | None = None,
        start: Tensor | None = None,
        resolution: int | None = None,
        texts: Sequence[str] | None = None,
        database: Any = None,
        images: Sequence[Any] | None = None,
        on_step: OnStep | None = None,
    ) -> Any:
        """Samples by label and seed: the same pair gives the same image in any batch.

        Args:
            labels: [B] int64, -1 = no class; of generators that are told neighbours, the class of what is looked for in the database.
            seeds: one per sample.
            steps, guidance: instead of the sampler's own; guidance 1 = off.
            sampler: changes of the recipe's section `sampler`: {"reuse": {"type": "skip_blocks"}}, or texts as on the command line, "type=euler".
            size: pixels of the images, (Y, X) or "48x64", rows x columns; None = as trained.
            rope: how rotary positions of the backbone `fit` meet another size: {"method": "ntk", "gain": "paper", "per_axis": True}, see
                nn.extrapolation; None = as the recipe says.
            start: of masked generators, what is known: ids [B, Q, *grid] with -1, or latents [B, C, *grid] with NaN, where they are to be found
                (genkit/editing.py makes it of an image).
            texts: of generators that are told captions, one for each sample; None = the names of the classes.
            database: of generators that are told neighbours, another database (genkit/conditions/embeddings.py) than that of training, by an object or
                by a word: a folder, fashion:val, a file of `genkit database`.
            images: of generators that are told pictures, one for each sample: paths, PIL images or [C, Y, X] in [-1, 1]; None = pictures of held-out shapes.
            resolution: of shapes, cells along a side in which their surface is looked for; None = the tokenizer's.

        Returns: [B, C, Y, X] in [-1, 1]; of shapes a list of B meshes.
        Raises: UsageError for what does not fit the model.
        """
        chosen = self.chosen_sampler(sampler)
        spec = {k: v for k, v in chosen.items() if k not in config.Sampler.model_fields}
        if steps is not None:
            if steps < 1:
                raise UsageError(f"steps={steps}: a sampler takes at least one step")
            if "num_steps" not in registry.options(registry.find("sampler", spec["type"])):
                raise UsageError(f"steps={steps}: sampler {spec['type']} takes as many steps as its generator draws in")
            spec["num_steps"] = steps
        reuse: Any = registry.build("reuse", chosen["reuse"]) if chosen.get("reuse") else None
        wraps = hasattr(reuse, "start")
        draw = registry.build("sampler", spec, **({} if reuse is None or wraps else {"reuse": reuse}))
        objective = registry.build("objective", self.objective)
        if hasattr(objective, "bind"):
            objective.bind(self.tokenizer)
        if isinstance(database, str | Path) and hasattr(self.told, "open"):
            database = self.told.open(str(database))
        labels = self.check_labels(labels, self.told.names(database))
        grid = self.grid if size is None else self.grid_of(size)
        if grid != self.grid and hasattr(objective, "bind"):
            raise UsageError(
                f"size={size}: this model draws in the scales of its tokenizer, which belong to {self.trained_size}; leave it out"
            )
        rng = Rng(list(seeds), device=self.device)
        how = self.guidance(guidance, chosen)
        weak = self.weak_backbone(chosen) if how.strength != 1 else None
        predict: Any = guide(
            objective,
            reuse.start(self.backbone) if wraps else self.backbone,
            self.told.of_request(labels.to(self.device), rng, texts=texts, database=database, images=images),
            dense_layout(grid, device=self.device),
            how,
            reuse.start(weak) if wraps and weak is not None else weak,
        )
        with packed(self.backbone, weak), contextlib.ExitStack() as stack:
            for network in [self.backbone] if weak is None else [self.backbone, weak]:
                stack.enter_context(extrapolating(network, rope or {}))
            start = self._start(objective, predict, len(labels), grid, rng, start)
            drawn = draw(predict, start, rng, on_step)
        if hasattr(self.tokenizer, "meshes"):
            return self.tokenizer.meshes(drawn, resolution)
        z = self.tokenizer.codes(drawn) if objective.target == "ids" else drawn
        return self.tokenizer.decode(z).clamp(-1, 1)

    def _start(self, objective: Any, predict: Any, count: int, grid: tuple[int, ...], rng: Rng, given: Any) -> Any:
        """What a sampler begins with: nothing of shapes; holes, or what is given, where ids or tokens are filled in; else noise."""
        if hasattr(self.tokenizer, "meshes"):
            return predict.start(count)
        if objective.target == "ids":
            shape = (count, *getattr(predict, "shape", (self.tokenizer.num_levels, *grid)))
            ids = torch.full(shape, -1, device=self.device) if given is None else given
            check_start(ids, shape, self.tokenizer.codebook_size)
            return ids
        shape = (self.tokenizer.channels, *grid)
        if getattr(objective, "draws", "") == "tokens":
            return torch.full((count, *shape), math.nan, device=self.device) if given is None else given
        return rng.fork("start").normal(*shape)

    @property
    def trained_size(self) -> str:
        """Pixels of the images it was trained on, "32x32"."""
        return show_size(image_sides(self.tokenizer, self.grid))

    def grid_of(self, size: str | Sequence[int]) -> tuple[int, ...]:
        """Cells of images of a size in pixels, (Y, X) or "48x64". Raises UsageError for one that cells or patches do not fill."""
        sides = parse_size(size)
        if len(self.grid) != len(sides):
            raise UsageError(
                f"size={show_size(sides)}: this model's tokens are no grid of rows and columns; it draws {self.trained_size}"
            )
        stride = self.tokenizer.stride
        patches = getattr(self.backbone, "sides", (1, 1))
        units = [stride * patch for patch in patches]
        if any(side % unit for side, unit in zip(sides, units, strict=True)):
            below = [side // unit * unit for side, unit in zip(sides, units, strict=True)]
            above = [-(-side // unit) * unit for side, unit in zip(sides, units, strict=True)]
            fits = " or ".join(show_size(pair) for pair in (below, above) if min(pair))
            what = show_size(units) if units[0] != units[1] else units[0]
            raise UsageError(
                f"size {show_size(sides)} (rows x columns) is not divisible by {what}, the tokenizer's stride {stride} times the backbone's patches of "
                f"{show_size(patches) if patches[0] != patches[1] else patches[0]}; nearest sizes that are: {fits}"
            )
        return tuple(side // stride for side in sides)

    def chosen_sampler(self, changes: Mapping[str, Any] | Sequence[str] = ()) -> dict[str, Any]:
        """The recipe's section `sampler` with changes. Raises UsageError for what does not fit it, or the objective."""
        if not changes:
            return self.sampler
        found = config.with_sampler(self.sampler, changes)
        check_sampler(found, self.objective)
        check_reuse(found, self.objective)
        return found

    def guidance(self, strength: float | None = None, sampler: Mapping[str, Any] | None = None) -> Guidance:
        """The recipe's guidance, or this strength of it. Raises UsageError for guidance of a model without classes, unless there is a worse one."""
        sampler = self.sampler if sampler is None else sampler
        # Pipelines saved before an option existed do not hold it.
        own = {k.removeprefix("guidance_"): v for k, v in sampler.items() if k.startswith("guidance_")}
        has_weak = own.pop("weak", None) is not None
        strength = sampler["guidance"] if strength is None else strength
        if not 0 <= strength < math.inf:
            raise UsageError(f"guidance {strength:g} must be at least 0, and finite; 1 = off")
        is_told = self.num_classes or self.condition["type"] != "label"
        if strength != 1 and not is_told and not has_weak:
            raise UsageError(
                f"guidance {strength:g} of a model that was trained without classes: there is nothing to guide towards; use 1, "
                "or guide it away from a worse model with sampler.guidance_weak=RUN"
            )
        return Guidance(strength, **own | {"interval": tuple(own.get("interval", (0.0, 1.0)))})

    def weak_backbone(self, sampler: Mapping[str, Any]) -> Any:
        """The worse model of `guidance_weak`, or None. Raises UsageError for one of other latents, classes or noise."""
        path = sampler.get("guidance_weak")
        if path is None:
            return None
        if path not in self._weak:
            weak = open_run(path, device=self.device)
            if not isinstance(weak, GeneratorPipeline):
                raise UsageError(f"sampler.guidance_weak={path} is a tokenizer; give the run of a worse generator")
            for what, its, ours in (
                ("number of classes", weak.num_classes, self.num_classes),
                ("objective", _asked(weak.objective), _asked(self.objective)),
                ("tokenizer", module_sha256(weak.tokenizer)[:8], module_sha256(self.tokenizer)[:8]),
            ):
                if its != ours:
                    raise UsageError(
                        f"sampler.guidance_weak={path} has another {what}, {its}, than this model, {ours}; give a worse model of the same kind"
                    )
            self._weak[path] = weak.backbone
        return self._weak[path]

    def check_labels(self, labels: Tensor, names: Sequence[str]) -> Tensor:
        """Raises UsageError for a label that is none of so many classes."""
        wrong = labels[(labels < -1) | (labels >= len(names))]
        if len(wrong):
            classes = f"0-{len(names) - 1}" if names else "none (the model is unconditional)"
            raise UsageError(f"label {int(wrong[0])} is out of range; classes: {classes}")
        return labels

    def __call__(
        self,
        class_labels: Sequence[int | str] | Tensor | None = None,
        num_images: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        sampler: Mapping[str, Any] | Sequence[str] = (),
        size: str | Sequence[int] | None = None,
        rope: Mapping[str, Any] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Any = None,
    ) -> ImagesOutput | tuple[Any]:
        """Generate images, in the way of diffusers pipelines.

        Args:
            class_labels: class numbers or names, one per image; None = every class in turn, or no class.
            num_images: how many; by default one per label.
            guidance_scale: 1 = off; None = the recipe's.
            sampler, size, rope: as in generate.
            generator: one generator, or one per image; None draws seeds at random.
            output_type: "pil", "np" or "pt".
            callback_on_step_end: called as f(pipeline, step, num_steps, {"state": tensor}).
        """
        if output_type not in ("pil", "np", "pt"):
            raise UsageError(f"output_type={output_type!r}; known: pil, np, pt")
        labels = self._labels(class_labels, num_images)
        seeds = draw_seeds(generator, len(labels))

        def on_step(step: int, total: int, state: Tensor) -> None:
            if callback_on_step_end is not None:
                callback_on_step_end(self, step, total, {"state": state})

        x = self.generate(
            labels,
            seeds,
            steps=num_inference_steps,
            guidance=guidance_scale,
            sampler=sampler,
            size=size,
            rope=rope,
            on_step=on_step,
        )
        from genkit.images import to_pil

        images = (
            to_pil(x)
            if output_type == "pil"
            else x
            if output_type == "pt"
            else ((x + 1) / 2).permute(0, 2, 3, 1).cpu().numpy()
        )
        return ImagesOutput(images=images) if return_dict else (images,)

    def _labels(self, labels: Sequence[int | str] | Tensor | None, count: int | None) -> Tensor:
        if labels is None:
            count = 1 if count is None else count
            return self.each_class(0, count)
        chosen = [
            class_number(label, self.class_names)
            for label in (labels.tolist() if isinstance(labels, Tensor) else labels)
        ]
        if not chosen:
            raise UsageError("class_labels is empty; give at least one class number or name")
        return torch.tensor([chosen[i % len(chosen)] for i in range(count or len(chosen))], dtype=torch.int64)


def _asked(objective: Mapping[str, Any]) -> dict[str, Any]:
    """What of an objective says how a network is asked; how it was trained may differ."""
    keys = ("type", "path", "towards", "prediction", "schedule", "num_times", "sigma_data")
    return {key: objective[key] for key in keys if key in objective}


def check_start(start: Tensor, shape: Sequence[int], codebook_size: int) -> None:
    """Raises UsageError for ids to go on from that do not fit: of another shape, or none of the codebook and not -1."""
    if tuple(start.shape) != tuple(shape):
        raise UsageError(
            f"start has the shape {list(start.shape)}, expected {list(shape)}: ids, and -1 where one is to be found"
        )
    wrong = start[(start < -1) | (start >= codebook_size)]
    if len(wrong):
        raise UsageError(
            f"start holds the id {int(wrong[0])} of a codebook of {codebook_size} (0-{codebook_size - 1}); where an id is to be found, put -1"
        )


def draw_seeds(generator: torch.Generator | list[torch.Generator] | None, count: int) -> list[int]:
    """One seed per image, from one generator or from one each."""
    if isinstance(generator, list):
        if len(generator) != count:
            raise UsageError(f"{len(generator)} generators for {count} images; give one, or one per image")
        return [int(torch.randint(2**62, (), generator=g, device=g.device)) for g in generator]
    device = generator.device if generator is not None else "cpu"
    return torch.randint(2**62, (count,), generator=generator, device=device).tolist()


def pipeline_folder(path: str | Path) -> Path:
    """The pipeline inside a run, a checkpoint, or the folder itself."""
    folder = Path(path)
    if (folder / "model_index.json").is_file():
        return folder
    if (folder / "pipeline" / "model_index.json").is_file():
        return folder / "pipeline"
    last = find_run(folder).last
    if last is None:
        raise GenkitError(f"run {folder} has no checkpoint yet; run `genkit train` until it saves one")
    return last / "pipeline"


def open_run(path: str | Path, ema: bool = True, device: str | torch.device | None = None) -> Any:
    """The pipeline of a run (its last checkpoint), of a checkpoint or of a pipeline folder, in eval mode.

    Args:
        ema: averaged weights where there are some.
    """
    folder = pipeline_folder(path)
    try:
        index = json.loads((folder / "model_index.json").read_text())
    except (OSError, ValueError) as error:
        raise _damaged(folder, error) from None
    cls = {c.__name__: c for c in (TokenizerPipeline, GeneratorPipeline)}.get(index.get("_class_name", ""))
    if cls is None:
        raise GenkitError(
            f"{folder} holds a {index.get('_class_name')}, which genkit does not know; load it with diffusers"
        )
    variant = "ema" if ema and any(folder.glob("*/*.ema.safetensors")) else None
    logging.disable_progress_bar()  # two parts are loaded at once
    try:
        # Parts make small tables of their own at construction, which the meta-device shortcut would lose.
        pipeline = cls.from_pretrained(folder, variant=variant, low_cpu_mem_usage=False)
    except (OSError, SafetensorError) as error:
        raise _damaged(folder, error) from None
    finally:
        logging.enable_progress_bar()
    for component in pipeline.components.values():
        component.eval().requires_grad_(False)
    pipeline.weights_variant = variant or "raw"
    pipeline.folder = folder.resolve()
    return pipeline.to(device) if device is not None else pipeline


def _damaged(folder: Path, error: Exception) -> GenkitError:
    """What to do about a checkpoint that cannot be read."""
    checkpoint = folder.resolve().parent
    others = sorted(p.name for p in checkpoint.parent.glob("[0-9]*") if p != checkpoint)
    way = f"take an older one, {checkpoint.parent / others[-1]}" if others else "restore it, or train it again"
    return GenkitError(f"{folder} is damaged ({' '.join(str(error).split())}); {way}")


class AutoPipeline:
    """`AutoPipeline.from_pretrained("runs/NAME")`: the right pipeline for a run, a checkpoint or a pipeline folder."""

    @staticmethod
    def from_pretrained(path: str | Path, *, ema: bool = True, device: str | torch.device | None = None) -> Any:
        return open_run(path, ema=ema, device=device)


class AutoTokenizer:
    """`AutoTokenizer.from_pretrained("runs/NAME")`: the tokenizer module of a tokenizer's or a generator's run."""

    @staticmethod
    def from_pretrained(path: str | Path, *, ema: bool = True, device: str | torch.device | None = None) -> Any:
        return open_run(path, ema=ema, device=device).tokenizer


# DiffusionPipeline.from_pretrained looks a saved pipeline's class up in diffusers alone.
for _cls in (TokenizerPipeline, GeneratorPipeline):
    setattr(diffusers, _cls.__name__, _cls)
