"""What `genkit eval` of shapes looks at: meshes in a folder, those of a dataset, or those a run makes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genkit import registry
from genkit.console import Progress
from genkit.errors import UsageError
from genkit.meshes import storage
from genkit.meshes.mesh import Mesh
from genkit.meshes.sampling import sample_surface
from genkit.rng import Rng, sample_seeds

RESOLUTION = 64  # cells per axis of meshes made from procedural solids
DATA = ("shapes", "meshes")  # words of datasets of shapes


@dataclass
class ShapeSet:
    """Numbered shapes.

    Attributes:
        count: how many there are.
        mesh: number -> mesh, perhaps without faces. May raise GenkitError naming a file that cannot be used.
        label: number -> name of its class, "" = none.
        about: where they come from, for the report.
        solid: number -> exact points and normals, (number, count, rng) -> two [count, 3]; None = points are drawn from meshes.
        inside: (number, places [N, 3]) -> [N] bool; None = asked of the mesh.
        missing: what should be there and is not, one line each.
    """

    count: int
    mesh: Callable[[int], Mesh]
    label: Callable[[int], str]
    about: str
    solid: Callable[[int, int, Rng], tuple[Tensor, Tensor]] | None = None
    inside: Callable[[int, Tensor], Tensor] | None = None
    missing: list[str] = field(default_factory=list)

    def points(self, number: int, mesh: Mesh, count: int) -> tuple[Tensor, Tensor]:
        """Points and normals of shape `number`, whose mesh is known: two [count, 3]."""
        rng = Rng.at(0, number, 1).fork("points")
        if self.solid is not None:
            return self.solid(number, count, rng)
        return sample_surface(mesh, count, rng)[:2]


def is_of_shapes(target: Any) -> bool:
    """Whether a target of `genkit eval` is about shapes: a folder of meshes and no images, a mesh, or a run or pipeline of shapes."""
    if not isinstance(target, str | Path):
        return ((getattr(target, "run_config", None) or {}).get("data") or {}).get("type") in DATA
    path = Path(target)
    if path.suffix.lower() in storage.SUFFIXES:
        return True
    if not path.is_dir():
        return False
    for name in ("config.resolved.yaml", "../config.resolved.yaml", "../../config.resolved.yaml"):
        if (path / name).is_file():
            import yaml

            data = (yaml.safe_load((path / name).read_text(encoding="utf-8")) or {}).get("data") or {}
            return data.get("type") in DATA
    if (path / "model_index.json").exists():
        try:
            index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
            return index["run_config"]["data"]["type"] in DATA
        except (ValueError, KeyError, TypeError):  # whoever opens it says what is wrong
            return False
    from genkit.data.check_meshes import has_only_meshes

    return has_only_meshes(str(path)) or (
        (path / "samples.json").exists() and any(p.suffix.lower() in storage.SUFFIXES for p in path.iterdir())
    )


def is_run(path: Path) -> bool:
    return any(
        (path / name).exists() for name in ("config.resolved.yaml", "model_index.json", "pipeline/model_index.json")
    )


def opened(target: Any, ema: bool, device: Any) -> tuple[Any, Path | None]:
    """A run, or the pipeline itself, and where its report belongs: RUN/eval/STEP.json, nowhere for a pipeline without a run."""
    if not isinstance(target, str | Path):
        return target, None
    from genkit.pipeline import open_run

    pipe = open_run(Path(target), ema=ema, device=torch.device(device or "cpu"))
    checkpoint = Path(getattr(pipe, "folder", ".")).parent
    place = checkpoint.parent.parent / "eval" / f"{checkpoint.name}{'' if ema else '-raw'}.json"
    return pipe, place if (checkpoint.parent.parent / "config.resolved.yaml").is_file() else None


def beside(target: Any) -> Path | None:
    """NAME.eval.json beside a folder or a mesh."""
    if not isinstance(target, str | Path):
        return None
    path = Path(target)
    named = path if path.name not in ("", "..") else path.resolve()
    return named.with_name(f"{named.name if named.is_dir() else named.stem}.eval.json")


def generated(pipe: Any, count: int, seed: int, batch_size: int, drawing: dict[str, Any]) -> ShapeSet:
    """Sample i has the class i mod (number of classes)."""
    classes = len(pipe.class_names)
    labels = torch.arange(count) % classes if classes else torch.full((count,), -1)
    meshes: list[Mesh] = []
    with Progress(total=count, unit="shapes", title="sample") as progress:
        for first in range(0, count, batch_size):
            part = labels[first : first + batch_size]
            meshes += pipe.generate(part, sample_seeds(seed, first, len(part)), **drawing)
            progress.advance(len(part))
    how = ", ".join(f"{name}={value}" for name, value in drawing.items())
    about = f"{getattr(pipe, 'weights_variant', 'given')} weights, seed {seed}, {how}"
    return ShapeSet(
        count, meshes.__getitem__, lambda number: pipe.class_names[number % classes] if classes else "", about
    )


def from_path(path: Path) -> ShapeSet:
    """A folder of meshes, or one mesh. Raises UsageError where there is neither."""
    if not path.exists():
        raise UsageError(f"no such folder of meshes, and no such mesh: {path}")
    if not path.is_dir():
        storage.check_format(path)
        return ShapeSet(1, lambda number: storage.load(path), lambda number: "", path.name)
    keys = storage.scan(path)
    labels = {key: key.partition("/")[0] if "/" in key else "" for key in keys}
    missing: list[str] = []
    try:
        for sample in json.loads((path / "samples.json").read_text(encoding="utf-8"))["samples"]:
            if sample["file"] in labels:
                labels[sample["file"]] = sample.get("class") or ""
            else:
                missing.append(f"{path / sample['file']}: not written, it had no surface")
    except (OSError, ValueError, KeyError, TypeError):
        missing = []
    digest = hashlib.sha256(repr([(key, (path / key).stat().st_size) for key in keys]).encode()).hexdigest()
    return ShapeSet(
        len(keys),
        lambda number: storage.load(path / keys[number]),
        lambda number: labels[keys[number]],
        f"{path.name or path} sha {digest[:8]}",
        missing=missing,
    )


def of_dataset(data: Any, about: str) -> ShapeSet:
    """Shapes of a dataset `shapes` or `meshes`."""
    names = data.info.class_names
    if hasattr(data, "solid"):
        return ShapeSet(
            len(data),
            lambda number: data.mesh(number, RESOLUTION),
            lambda number: names[number % len(names)],
            about,
            lambda number, count, rng: data.solid(number).sample_surface(count, rng),
            lambda number, places: data.solid(number).distance(places) < 0,
        )
    return ShapeSet(
        len(data), data.mesh, lambda number: names[data.labels[number]] if data.labels[number] >= 0 else "", about
    )


def reference_of(word: str, data: dict[str, Any] | None) -> ShapeSet:
    if word in ("train", "val"):
        if data is None:
            raise UsageError(
                f"--ref {word} is a split of a run's data, and a folder has none; name shapes:test or a folder of meshes"
            )
        return of_dataset(registry.build("data", {**data, "split": word}), f"{word} of {data['type']}")
    name, _, split = word.partition(":")
    if name == "shapes" and not Path(word).exists():
        if split not in ("", "train", "val", "test"):
            raise UsageError(f"--ref {word}: shapes has the splits train, val and test")
        spec = registry.check("data", {"type": "shapes", "split": split or "train", "num_distances": 0}, "data")
        return of_dataset(registry.build("data", spec), f"shapes:{split or 'train'}")
    if not Path(word).exists():
        raise UsageError(
            f"--ref {word} is neither train nor val of a run, nor shapes, shapes:val or shapes:test, nor a folder of meshes or a mesh"
        )
    return from_path(Path(word))


def default_reference(data: dict[str, Any] | None) -> str:
    if data and data["type"] == "meshes" and not data.get("val_fraction"):
        return "train"
    return "val"
