"""A folder of meshes (OBJ, PLY, STL, OFF, GLB): points on their surfaces and signed distances around them; subfolders are classes."""

from __future__ import annotations

import hashlib
import io
import logging
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from genkit import files
from genkit.data.folder import choose_val
from genkit.data.shapes import SIZE, around, stacked
from genkit.errors import GenkitError, UsageError
from genkit.interfaces import DataInfo
from genkit.meshes import storage
from genkit.meshes.hierarchy import signed_distance
from genkit.meshes.mesh import Mesh, inspect, normalised
from genkit.meshes.repair import repaired
from genkit.meshes.sampling import sample_surface
from genkit.rng import Rng

VERSION = 1  # of what is kept; raise it when preparing changes
_STEPS = 65535  # that coordinates in [-1, 1] are kept in

log = logging.getLogger("genkit.data")


class Meshes:
    """Samples as those of `shapes`, from files.

    Every mesh is moved to the middle and scaled evenly until the longest side of its bounding box is 1.6 ([-0.8, 0.8]). A file is prepared once - 50,000
    points with normals, 50,000 places with signed distances - and kept in the cache folder; `genkit data prepare` does that for a whole folder at once.
    A file that cannot be used never stops a run: `fetch` puts the next good one in its place, `__getitems__` leaves it out, `skipped` tells each by name.

    Args:
        path: folder; files are found recursively, the first subfolder is the class.
        num_points: P, of the points of each mesh.
        num_distances: Q, places with signed distances. They need watertight meshes, others are skipped; 0 takes every mesh that has a surface.
        repair: meshes that are not watertight are replaced by the outside of a shell around them, one cell of `resolution` thick; see
            genkit.meshes.repair. Watertight ones stay as they are.
        resolution: of that grid, cells per axis.
        up: the axis of the files that points upwards.
        val_fraction: share of every class that forms the split "val", chosen by a hash of the file's name.
        cache: folder for what is prepared; None = $GENKIT_CACHE, by default ~/.cache/genkit.

    Raises: UsageError for a path that is missing, not a folder, or without meshes, and for a split that would be empty.
    """

    def __init__(
        self,
        *,
        path: str,
        num_points: int = 8192,
        num_distances: int = 8192,
        repair: bool = False,
        resolution: int = 96,
        up: Literal["y", "z"] = "y",
        split: Literal["train", "val", "all"] = "all",
        val_fraction: float = 0.0,
        cache: str | None = None,
    ) -> None:
        if not 1 <= num_points <= STORED or not 0 <= num_distances <= STORED:
            raise UsageError(
                f"data.num_points={num_points} must be 1 to {STORED:,}, data.num_distances={num_distances} 0 to {STORED:,}: that many are kept of a mesh"
            )
        if resolution < 16:
            raise UsageError(f"data.resolution={resolution} is too coarse to repair anything; use at least 16")
        if not 0 <= val_fraction < 1:
            raise UsageError(f"data.val_fraction={val_fraction} must be at least 0 and below 1")
        if split == "val" and val_fraction == 0:
            raise UsageError("data.split=val needs data.val_fraction above 0, for example 0.1")
        found = storage.scan(path)
        classes = sorted({key.partition("/")[0] for key in found if "/" in key})
        if split != "all":
            in_val = choose_val(found, val_fraction)
            found = [key for key in found if (key in in_val) == (split == "val")]
            if not found:
                raise UsageError(f"data.val_fraction={val_fraction} leaves no mesh of {path} in the split {split}")
        self.path, self.keys = Path(path), found
        number = {name: i for i, name in enumerate(classes)}
        self.labels = [number.get(key.partition("/")[0], -1) if "/" in key else -1 for key in found]
        self.num_points, self.num_distances = num_points, num_distances
        self.repair, self.resolution, self.up = repair, resolution, up
        root = Path(cache or os.environ.get("GENKIT_CACHE", "~/.cache/genkit")).expanduser()
        self.cache = root / "meshes"
        self.skipped: dict[str, str] = {}  # key -> reason, of every file met so far that cannot be used
        self._unsent: dict[str, str] = {}
        how = (VERSION, num_points, num_distances, *self._how(), classes)
        digest = hashlib.blake2b(repr(how).encode(), digest_size=16)
        for key in found:
            digest.update(f"{key}\0{(self.path / key).stat().st_size}\0".encode("utf-8", "surrogateescape"))
        labelled = f"{len(classes)} classes" if classes else "unlabelled"
        self.info = DataInfo(
            (3,), tuple(classes), digest.hexdigest(), f"{path}, {split}: {len(found):,} meshes, {labelled}"
        )
        self._kept = lru_cache(maxsize=256)(self._load)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample, as of `shapes`: "points", "normals", "sdf_points", "sdf", "label", "index", "key", "caption" (the name of the file).

        Raises: GenkitError naming the file and why it cannot be used.
        """
        return self._sample(index, None)

    def __getitems__(self, indices: Sequence[int] | np.ndarray) -> dict[str, Any]:
        """The samples that can be used, in order, stacked."""
        return self._batch([self._try(int(index), None) for index in indices])

    def fetch(self, indices: Sequence[int] | np.ndarray, rng: Rng) -> dict[str, Any]:
        """One sample per index, points chosen by streams of the caller; an unusable file is replaced by the next good one.

        Raises: GenkitError when no file can be used.
        """
        return self._batch([self._next_good(int(index), rng[i : i + 1]) for i, index in enumerate(indices)])

    def note(self, skipped: dict[str, str]) -> None:
        """Remember unusable files, and name each once. A loader calls it with what its workers met."""
        for key, reason in skipped.items():
            if key not in self.skipped:
                self.skipped[key] = reason
                if get_worker_info() is None:
                    log.warning("skipped %s (%s); %d so far", self.path / key, reason, len(self.skipped))

    def mesh(self, index: int) -> Mesh:
        """The mesh that points are drawn from: read, turned, repaired if asked and needed, normalised. Raises GenkitError naming the file."""
        path = self.path / self.keys[index]
        mesh = storage.load(path)
        if self.up == "z":
            mesh = Mesh(mesh.vertices[:, [0, 2, 1]] * torch.tensor([1.0, 1.0, -1.0]), mesh.faces)
        mesh = normalised(mesh, size=SIZE)
        findings = inspect(mesh)
        if findings.is_watertight:
            return Mesh(mesh.vertices, mesh.faces.flip(1)) if findings.volume < 0 and self.repair else mesh
        if self.repair:
            return normalised(repaired(mesh, self.resolution), size=SIZE)
        if self.num_distances:
            raise GenkitError(f"{path}: {findings}; set data.repair=true, or data.num_distances=0 for surfaces alone")
        return mesh

    def caption(self, index: int) -> str:
        """The name of the file, in words."""
        return Path(self.keys[index]).stem.replace("_", " ").replace("-", " ")

    def place(self, index: int) -> Path:
        """Where the prepared mesh is kept, or will be: a name of its own for every file, change of it, and way of preparing."""
        path = self.path / self.keys[index]
        try:
            stat = path.stat()
        except OSError as error:
            raise GenkitError(f"{path}: {error.strerror or error}") from None
        name = repr((VERSION, str(path.resolve()), stat.st_size, stat.st_mtime_ns, *self._how()))
        return (
            self.cache / f"{hashlib.blake2b(name.encode('utf-8', 'surrogateescape'), digest_size=12).hexdigest()}.npz"
        )

    def prepare(self, index: int) -> Path:
        """The file of a prepared mesh, made if it is not there. Raises GenkitError naming a mesh that cannot be used."""
        out = self.place(index)
        if out.exists():
            return out
        mesh = self.mesh(index)
        rng = Rng([0])
        points, normals, _ = sample_surface(mesh, STORED, rng)
        arrays = {"points": _packed(points), "normals": normals.half().numpy()}
        if self.num_distances:
            places = _unpacked(_packed(around(points, STORED, rng)))
            arrays |= {"sdf_points": _packed(places), "sdf": signed_distance(mesh, places).half().numpy()}
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        try:
            files.write_bytes(out, buffer.getvalue())
        except OSError as error:
            raise GenkitError(
                f"{out} cannot be written: {error.strerror or error}; set data.cache to another folder"
            ) from None
        return out

    def _how(self) -> tuple[Any, ...]:
        return self.num_distances > 0, self.repair, self.resolution if self.repair else 0, self.up

    def _load(self, index: int) -> dict[str, np.ndarray]:
        path = self.prepare(index)
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return dict(arrays)
        except (OSError, ValueError, EOFError, KeyError) as error:
            raise GenkitError(f"{path} is broken ({error}); delete it, it is made again") from None

    def _sample(self, index: int, rng: Rng | None) -> dict[str, Any]:
        kept = self._kept(index)
        key = self.keys[index]

        def order(word: str) -> np.ndarray:
            return np.arange(STORED) if rng is None else rng.fork(word).order(STORED)[0].numpy()

        rows = order("points")[: self.num_points]
        sample: dict[str, Any] = {
            "points": _unpacked(kept["points"][rows]),
            "normals": torch.nn.functional.normalize(torch.from_numpy(kept["normals"][rows]).float(), dim=1),
            "label": self.labels[index],
            "index": index,
            "key": key,
            "caption": self.caption(index),
        }
        if self.num_distances:
            # Places near the surface come first, those far from it last: every share of them is taken alike.
            rows = order("distances")
            half, most = STORED // 2, STORED * 3 // 4
            ends = [0, self.num_distances // 2, self.num_distances * 3 // 4, self.num_distances]
            groups = [rows[rows < half], rows[(rows >= half) & (rows < most)], rows[rows >= most]]
            rows = np.concatenate([group[: ends[i + 1] - ends[i]] for i, group in enumerate(groups)])
            sample |= {
                "sdf_points": _unpacked(kept["sdf_points"][rows]),
                "sdf": torch.from_numpy(kept["sdf"][rows]).float(),
            }
        return sample

    def _try(self, index: int, rng: Rng | None) -> dict[str, Any] | None:
        key = self.keys[index]
        if key in self.skipped:
            return None
        try:
            return self._sample(index, rng)
        except GenkitError as error:
            self._unsent[key] = str(error).removeprefix(f"{self.path / key}: ")
            self.note(self._unsent)
            return None

    def _next_good(self, index: int, rng: Rng) -> dict[str, Any]:
        for candidate in (*range(index, len(self)), *range(index)):
            sample = self._try(candidate, rng)
            if sample is not None:
                return sample
        first = next(iter(self.skipped.items()), ("", ""))
        raise GenkitError(f"none of the {len(self)} meshes of {self.path} can be used; {first[0]}: {first[1]}")

    def _batch(self, samples: list[dict[str, Any] | None]) -> dict[str, Any]:
        good = [sample for sample in samples if sample is not None]
        batch = (
            stacked(good)
            if good
            else {"label": torch.empty(0, dtype=torch.int64), "index": torch.empty(0, dtype=torch.int64), "key": []}
        )
        unsent, self._unsent = self._unsent, {}
        return batch | ({"skipped": unsent} if unsent else {})


STORED = 50_000  # points, and places, kept of every mesh


def _packed(points: Tensor) -> np.ndarray:
    """Coordinates in [-1, 1] as 16 bits each, in steps of 3e-5."""
    return ((points.clamp(-1, 1) + 1) * (_STEPS / 2)).round().numpy().astype(np.uint16)


def _unpacked(numbers: np.ndarray) -> Tensor:
    return torch.from_numpy(numbers.astype(np.float32)) * (2 / _STEPS) - 1
