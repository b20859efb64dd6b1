"""From a trained run to images on disk."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genkit import files, images
from genkit.console import Progress
from genkit.data.sizes import named_size, parse_size
from genkit.errors import UsageError
from genkit.requests import read_request

RECORD = "samples.json"  # which samples a folder holds


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
    format: str | None = None,
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
        labels: see genkit.labels.parse_labels; of a generator that is told neighbours, classes of the database.
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

    if batch_size < 1:
        raise UsageError(f"batch_size={batch_size} must be at least 1")
    state = PartialState(cpu=device == "cpu")
    pipeline = open_run(run, ema=ema, device=device or state.device)
    if not hasattr(pipeline, "generate"):
        raise UsageError(
            f"run {run} is a tokenizer; sampling needs a generator's run (`genkit encode` and `decode` use tokenizers)"
        )
    asked = read_request(
        pipeline,
        count=count,
        labels=labels,
        seed=seed,
        captions=captions,
        pictures=pictures,
        database=database,
        classes=classes,
    )
    about = named_size(size, rope) + ("" if known is None else f"-{Path(known).stem}") + asked.name
    folder = Path(out) if out is not None else Path(run) / "samples" / f"seed-{seed}{about}"
    settings = {
        "run": str(run),
        "checkpoint": pipeline.folder.parent.name,
        "weights": pipeline.weights_variant,
        "sampler": pipeline.chosen_sampler(sampler)
        | ({} if steps is None else {"num_steps": steps})
        | ({} if guidance is None else {"guidance": guidance}),
        **({} if size is None else {"size": list(parse_size(size))}),
        **({"rope": dict(rope)} if rope else {}),
        **({} if asked.database is None else {"database": database and str(database), "classes": classes}),
    }
    if hasattr(pipeline.tokenizer, "meshes"):
        if size is not None or known is not None or keep is not None or rope:
            raise UsageError("--size, --rope, --known and --keep are for images; this model draws shapes")
        from genkit import shapes

        return shapes.write_samples(
            pipeline,
            state,
            folder,
            settings,
            asked,
            format=format or "ply",
            batch_size=batch_size,
            resolution=resolution,
            turntable=turntable,
            steps=steps,
            guidance=guidance,
            sampler=sampler,
        )
    if format is not None or resolution is not None or turntable:
        raise UsageError("--format, --resolution and --turntable are for shapes; this model draws images")
    grid = None if size is None else pipeline.grid_of(size)
    edited = None
    if known is not None or keep is not None:
        from genkit import editing

        if known is None or keep is None:
            raise UsageError("--known IMAGE and --keep MASK go together: an image, and which of its pixels stay")
        edited = editing.read(pipeline, known, keep, grid)
        settings["known"] = edited.record
    names = [f"{i:06d}.png" for i in range(len(asked))]
    claimed = claim(folder, {**settings, "samples": asked.rows(names)}) if state.is_main_process else False
    state.wait_for_everyone()

    started = time.perf_counter()
    todo = [i for i in range(len(asked)) if not (folder / names[i]).exists()][
        state.process_index :: state.num_processes
    ]
    with (
        unclaimed_if_nothing_comes(folder, names if claimed else None),
        Progress(total=len(todo), unit="images", title=f"sample {Path(run).name}") as progress,
    ):
        for first in range(0, len(todo), batch_size):
            part = todo[first : first + batch_size]
            x = pipeline.generate(
                **asked.told(part),
                steps=steps,
                guidance=guidance,
                sampler=sampler,
                size=size,
                rope=rope,
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
        shown = range(min(len(asked), 200))
        tensors = _read([folder / names[i] for i in shown])
        images.write_png(folder / "grid.png", class_grid(tensors, asked.labels[: len(shown)], asked.class_names))
    return {
        "images": len(asked),
        "out": str(folder),
        "grid": str(folder / "grid.png"),
        "json": str(folder / "samples.json"),
        "seconds": seconds,
    }


def claim(folder: Path, record: dict[str, Any]) -> bool:
    """Make the folder this call's own: continue the same samples, refuse to mix with others. Returns: whether it was nobody's before."""
    path = folder / RECORD
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; give -o a folder")
    if path.exists():
        if _record(path) != json.loads(json.dumps(record)):
            raise UsageError(f"{folder} holds other samples (see {path.name} in it); choose another -o or remove it")
        return False
    if folder.exists() and (
        any(folder.glob("*.png")) or any((folder / row["file"]).exists() for row in record["samples"])
    ):
        raise UsageError(f"{folder} holds samples that were not drawn by this command; choose another -o")
    files.write_json(path, record)
    return True


def _record(path: Path) -> Any:
    """None for what is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None


@contextlib.contextmanager
def unclaimed_if_nothing_comes(folder: Path, names: Sequence[str] | None) -> Iterator[None]:
    """Where what is inside fails before any of the files is there, the folder is nobody's again: another call may have it.

    Args:
        names: of the files; None = the folder was claimed by an earlier call, and stays so.
    """
    try:
        yield
    except BaseException:
        if names is not None and not any((folder / name).exists() for name in names):
            (folder / RECORD).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # it holds what others have put there
                folder.rmdir()
        raise


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
