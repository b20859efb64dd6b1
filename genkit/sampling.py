"""From a trained run to images on disk."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genkit import files, images
from genkit.console import Progress
from genkit.data.sizes import named_size, parse_size
from genkit.errors import UsageError
from genkit.rng import Rng, sample_seeds


def parse_labels(text: str | Sequence[int | str] | None, class_names: Sequence[str]) -> list[int]:
    """Class numbers from "0-9", "3,7", "Sneaker,Bag" or a list; None = every class, or [-1] for an unconditional model.

    Raises: UsageError for a number out of range or an unknown name.
    """
    from genkit.pipeline import class_number

    if text is None:
        return list(range(len(class_names))) or [-1]
    chosen: list[int] = []
    for word in text.split(",") if isinstance(text, str) else text:
        if isinstance(word, str) and (span := re.fullmatch(r"\s*(\d+)\s*-\s*(\d+)\s*", word)):
            chosen += range(int(span[1]), int(span[2]) + 1)
        elif isinstance(word, str) and re.fullmatch(r"\s*-?\d+\s*", word):
            chosen.append(int(word))
        else:
            chosen.append(class_number(word.strip() if isinstance(word, str) else word, class_names))
    wrong = [label for label in chosen if not -1 <= label < len(class_names)]
    if wrong or not chosen:
        classes = f"0-{len(class_names) - 1}" if class_names else "none: the model is unconditional"
        raise UsageError(
            f"labels {text!r}: {wrong[0] if wrong else 'nothing'} is not a class of this model (classes {classes})"
        )
    return chosen


def sample(
    run: str | Path,
    *,
    count: int | None = None,
    labels: str | Sequence[int | str] | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    sampler: Sequence[str] = (),
    size: str | Sequence[int] | None = None,
    rope: Mapping[str, Any] | None = None,
    known: str | Path | None = None,
    keep: str | None = None,
    captions: Sequence[str] = (),
    pictures: Sequence[str | Path] = (),
    database: str | Path | None = None,
    classes: str | None = None,
    format: str = "ply",
    resolution: int | None = None,
    turntable: bool = False,
    ema: bool = True,
    batch_size: int = 64,
    device: str | None = None,
) -> dict[str, Any]:
    """Write `count` PNGs, a grid with one row per class, and samples.json with every label and seed.

    Image i has label labels[i mod len(labels)] and seed `seed * 2^32 + i`; it is the same for any batch size and number of processes.
    An interrupted call continues when it is repeated. Under `accelerate launch` the images are shared out over the processes.

    Args:
        count: how many; by default one per label, caption or picture.
        labels: see `parse_labels`; of a generator that is told neighbours, classes of the database.
        sampler: changes of the recipe's section `sampler`: "type=euler", "reuse.type=skip_blocks".
        size: pixels, "48x64" or (Y, X), rows x columns; by default as trained.
        rope: how rotary positions meet another size, see GeneratorPipeline.generate.
        known, keep: of masked generators, an image and which of its pixels stay, see genkit.editing.mask_of; the others are drawn.
        captions: of a generator that is told captions, what to draw, in turn; by default the names of the classes.
        pictures: of a generator that is told pictures, files of what to draw, in turn; by default held-out shapes of the classes.
        database, classes: of a generator that is told neighbours, another database than that of training (genkit/conditions/neighbours.py), and
            which classes of it.
        format, resolution, turntable: of shapes, see genkit.shapes.write_samples.
        out: folder; by default RUN/samples/seed-SEED, with the size in its name if there is one.

    Returns: images (of shapes: shapes, and the files of those without a surface as empty), out, grid, json (paths) and seconds.
    """
    from accelerate import PartialState

    from genkit.pipeline import open_run

    state = PartialState(cpu=device == "cpu")
    pipeline = open_run(run, ema=ema, device=device or state.device)
    if not hasattr(pipeline, "generate"):
        raise UsageError(
            f"run {run} is a tokenizer; sampling needs a generator's run (`genkit encode` and `decode` use tokenizers)"
        )
    neighbours = None
    if database is not None or classes is not None:
        neighbours = open_database(pipeline, database, classes)
    class_names = pipeline.told.names(neighbours)
    said = [word for word, given in (("--caption", captions), ("--image", pictures), ("--labels", labels)) if given]
    if len(said) > 1:
        raise UsageError(f"{' and '.join(said)} both say what to draw; give one of them")
    if captions or pictures or labels is None:
        chosen = [-1] if captions or pictures else pipeline.told.classes(neighbours) or [-1]
    else:
        chosen = parse_labels(labels, class_names)
    count = len(captions or pictures or chosen) if count is None else count
    if count < 1:
        raise UsageError(f"-n {count}: at least one sample is needed")
    all_labels = [chosen[i % len(chosen)] for i in range(count)]
    seeds = sample_seeds(seed, 0, count)
    texts = [captions[i % len(captions)] for i in range(count)] if captions else None
    looks = [str(pictures[i % len(pictures)]) for i in range(count)] if pictures else None
    if pictures:  # what cannot be read, or is not listened to, is said before anything is written
        different = list(dict.fromkeys(looks or ()))
        pipeline.told.of_request(torch.full((len(different),), -1), Rng(seeds[:1] * len(different)), images=different)
    edit = "" if known is None else f"-{Path(known).stem}"
    edit += "-captions" if captions else ""
    edit += f"-{Path(pictures[0]).stem}" if pictures else ""
    edit += "" if neighbours is None else f"-{named_database(database, classes)}"
    folder = Path(out) if out is not None else Path(run) / "samples" / f"seed-{seed}{named_size(size, rope)}{edit}"
    settings = {
        "run": str(run),
        "checkpoint": pipeline.folder.parent.name,
        "weights": pipeline.weights_variant,
        "sampler": pipeline.chosen_sampler(sampler)
        | ({} if steps is None else {"num_steps": steps})
        | ({} if guidance is None else {"guidance": guidance}),
        **({} if size is None else {"size": list(parse_size(size))}),
        **({"rope": dict(rope)} if rope else {}),
        **({} if neighbours is None else {"database": database and str(database), "classes": classes}),
    }
    if hasattr(pipeline.tokenizer, "meshes"):
        if size is not None or known is not None or rope:
            raise UsageError("--size, --rope and --known are for images; this model draws shapes")
        from genkit import shapes

        drawing: dict[str, Any] = {"steps": steps, "guidance": guidance, "sampler": sampler}
        how: dict[str, Any] = {
            "format": format,
            "batch_size": batch_size,
            "resolution": resolution,
            "turntable": turntable,
            "texts": texts,
            "looks": looks,
        }
        return shapes.write_samples(pipeline, state, folder, settings, all_labels, seeds, **how, **drawing)
    if looks is not None:
        raise UsageError("--image is for generators of shapes that are told pictures; --known IMAGE completes an image")
    grid = None if size is None else pipeline.grid_of(size)
    edited = None
    if known is not None or keep is not None:
        from genkit import editing

        if known is None or keep is None:
            raise UsageError("--known IMAGE and --keep MASK go together: an image, and which of its pixels stay")
        edited = editing.read(pipeline, known, keep, grid)
        settings["known"] = edited.record
    names = [f"{i:06d}.png" for i in range(count)]
    rows = [
        {"file": name, "label": label, "class": class_names[label] if label >= 0 else None, "seed": seed}
        for name, label, seed in zip(names, all_labels, seeds, strict=True)
    ]
    if texts is not None:
        rows = [row | {"caption": text} for row, text in zip(rows, texts, strict=True)]
    if state.is_main_process:
        claim(folder, {**settings, "samples": rows})
    state.wait_for_everyone()

    started = time.perf_counter()
    todo = [i for i in range(count) if not (folder / names[i]).exists()][state.process_index :: state.num_processes]
    with Progress(total=len(todo), unit="images", title=f"sample {Path(run).name}") as progress:
        for first in range(0, len(todo), batch_size):
            part = todo[first : first + batch_size]
            x = pipeline.generate(
                torch.tensor([all_labels[i] for i in part]),
                [seeds[i] for i in part],
                steps=steps,
                guidance=guidance,
                sampler=sampler,
                size=size,
                rope=rope,
                texts=None if texts is None else [texts[i] for i in part],
                database=neighbours,
                start=None if edited is None else edited.start.expand(len(part), -1, -1, -1),
                on_step=lambda step, total, state: progress.advance(0, step=step + 1),
            )
            x = x if edited is None else edited.paste(x)
            for i, picture in zip(part, images.to_pil(x), strict=True):
                images.write_png(folder / names[i], picture)
            progress.advance(len(part))
    state.wait_for_everyone()
    seconds = time.perf_counter() - started
    if state.is_main_process:
        shown = range(min(count, 200))
        tensors = _read([folder / names[i] for i in shown])
        images.write_png(folder / "grid.png", class_grid(tensors, [all_labels[i] for i in shown], class_names))
    return {
        "images": count,
        "out": str(folder),
        "grid": str(folder / "grid.png"),
        "json": str(folder / "samples.json"),
        "seconds": seconds,
    }


def open_database(pipeline: Any, database: str | Path | None, classes: str | None) -> Any:
    """The database by a word, None = that of training; of some of its classes alone, named as labels are.

    Raises: UsageError for a generator that is told something else, and for what cannot be a database.
    """
    if not hasattr(pipeline.told, "open"):
        raise UsageError(
            f"--database is for generators that are told neighbours; this one was trained with condition: {{type: {pipeline.condition['type']}}}"
        )
    found = pipeline.told.database if database is None else pipeline.told.open(str(database))
    return found if classes is None else found.of_classes(parse_labels(classes, found.class_names))


def write_database(
    run: str | Path, images: str, out: str | Path, *, classes: str | None = None, device: str | None = None
) -> dict[str, Any]:
    """Embed images as neighbours for a generator, into a file that `sample` takes in their place. Returns: out, entries, width, classes."""
    from genkit.pipeline import open_run

    if Path(out).suffix != ".safetensors":
        raise UsageError(f"-o {out}: a database is a file of safetensors; give it a name in .safetensors")
    pipeline = open_run(run, device=device)
    if not hasattr(pipeline, "generate"):
        raise UsageError(f"run {run} is a tokenizer; a database belongs to a generator that is told neighbours")
    found = open_database(pipeline, images, classes)
    found.save(Path(out))
    return {
        "out": str(out),
        "entries": len(found),
        "width": found.vectors.shape[1],
        "classes": list(found.class_names),
    }


def named_database(database: str | Path | None, classes: str | None) -> str:
    """For the name of a folder: "val", "cats-3,7"."""
    parts = ["" if database is None else Path(database).stem, classes or ""]
    return re.sub(r"[^A-Za-z0-9_.,]+", "-", "-".join(filter(None, parts)))


def claim(folder: Path, record: dict[str, Any]) -> None:
    """Make the folder this call's own: continue the same samples, refuse to mix with others."""
    path = folder / "samples.json"
    if path.exists():
        if json.loads(path.read_text()) != json.loads(json.dumps(record)):
            raise UsageError(f"{folder} holds other samples (see {path.name} in it); choose another -o or remove it")
        return
    if folder.exists() and any(folder.glob("*.png")):
        raise UsageError(f"{folder} holds images that were not sampled by this command; choose another -o")
    files.write_json(path, record)


def _read(paths: list[Path]) -> Tensor:
    import numpy as np
    from PIL import Image

    pixels = np.stack([np.atleast_3d(np.asarray(Image.open(path))) for path in paths])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def class_grid(x: Tensor, labels: list[int], class_names: Sequence[str], columns: int = 16) -> Any:
    """Samples with one named row per class; a plain square for unconditional samples.

    Args:
        x: [B, C, Y, X] in [-1, 1].
        columns: at most this many of each class.
    """
    distinct = list(dict.fromkeys(labels))
    if distinct == [-1]:
        return images.grid(x, columns=max(1, round(len(x) ** 0.5)))
    by_class = [[i for i, label in enumerate(labels) if label == row][:columns] for row in distinct]
    width = max(map(len, by_class))
    blank = torch.ones_like(x[:1])
    tiles = torch.cat([torch.cat([x[own], *[blank] * (width - len(own))]) for own in by_class])
    return images.grid(
        tiles, columns=width, row_names=[class_names[label] if label >= 0 else "any" for label in distinct]
    )
