"""Sets of images on disk or in a dataset, read at their own size: what is evaluated, and what it is compared with."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import typing
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genkit import registry
from genkit.data.memory import to_float
from genkit.data.sizes import Size, parse_size, show_size
from genkit.errors import GenkitError, UsageError, nearest
from genkit.interfaces import Dataset
from genkit.metrics.arrays import Npz, check_packing, reason, shown

MAX_MEMBER = 256 << 20  # bytes of one file in a zip, unpacked: far above any image, far below what fills a memory
_THREADS = min(8, os.cpu_count() or 1)
_NAMED = 3  # files a note names

# Fashion-MNIST is found in different sizes on different machines; a reference must be the same everywhere.
_PINNED = {"fashion": {"source": "embedded"}}


class Images:
    """Numbered images of one shape.

    Attributes:
        name: for people: "fashion train".
        shape: (C, Y, X).
        count: how many.
        has_labels: whether all of them have one.
        is_exact: whether `sha` changes with every pixel. Where it does not, nothing may be kept under it for another time.
        converted: number -> what was done to an image that was not 8-bit grey or RGB, of those read so far.
        missing: number -> name of the images a dataset could not decode, of those asked for so far.
    """

    is_exact = True

    def __init__(self, name: str, shape: tuple[int, ...], count: int, has_labels: bool = False):
        self.name = name
        self.shape = shape
        self.count = count
        self.has_labels = has_labels
        self.converted: dict[int, tuple[str, ...]] = {}
        self.missing: dict[int, str] = {}

    def take(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images [B, C, Y, X] float32 in [-1, 1] and labels [B] int64 (-1 = none) with these numbers, in this order.

        Images a dataset cannot decode are left out.
        """
        raise NotImplementedError

    def read(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """What `take` gives for first .. last - 1. Reading one batch after the other is the fast way."""
        return self.take(range(first, last))

    @functools.cached_property
    def sha(self) -> str:
        """Hash of what is in the set, hex. Taken when it is first asked for: files that were read before are not read again."""
        return self._hash()

    @property
    def about(self) -> str:
        """One line for a report; takes the hash."""
        return f"{self.name}, n={self.count}, sha {self.sha[:8]}"

    @property
    def notes(self) -> tuple[str, ...]:
        """What was left out, and how many images had to be converted to 8-bit grey or RGB.

        Images are looked at when they are read: complete once this process has read all of them, or all processes have and did `gather`.
        """
        found = []
        if self.missing:
            names = [name for _, name in sorted(self.missing.items())]
            found.append(f"images of {self.name} that cannot be decoded, left out: {_some(names)}")
        counts = Counter(kind for kinds in list(self.converted.values()) for kind in kinds)
        return (
            *found,
            *(f"{n} of {self.count} images {'is' if n == 1 else 'are'} {kind}" for kind, n in sorted(counts.items())),
        )

    def gather(self) -> None:
        """Under torch.distributed: learn what the other processes saw in the images they read. All must call it."""
        parts: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, (self.converted, self.missing))
        for converted, missing in parts:
            self.converted |= converted
            self.missing |= missing

    def _hash(self) -> str:
        raise NotImplementedError


# Datasets


def from_spec(spec: dict[str, Any], split: str | None = None) -> Images:
    """A dataset by its config section, in another split if one is named. Raises UsageError when it has no such split."""
    if split is not None and spec.get("split") != split:
        if "split" in registry.options(registry.find("data", spec["type"])):
            spec = registry.check("data", {**spec, "split": split}, "data")
        elif split != "train":
            raise UsageError(f"data.type={spec['type']} has no split '{split}'; name another reference")
    if spec["type"] == "tokens":
        raise UsageError(
            f"data.path={spec['path']} holds latents and no images; name what to compare with: --ref FOLDER, or --ref with a dataset's word"
        )
    if "flip" in spec:
        spec = {**spec, "flip": False}
    if spec.get("sizes") or spec.get("aspect", "crop") != "crop":
        sides = spec["size"]
        spec = at_size(spec, parse_size(sides))
    return from_dataset(registry.build("data", spec), " ".join([spec["type"], spec.get("split") or ""]).strip())


def at_size(spec: dict[str, Any], size: Size) -> dict[str, Any]:
    """The config section of the same images, all at one size. Raises UsageError for data that come in their own size alone."""
    options = registry.options(registry.find("data", spec["type"]))
    kinds = typing.get_args(options["size"].annotation) if "size" in options else ()
    if not any(typing.get_origin(kind) is tuple for kind in kinds) and size[0] != size[1]:
        raise UsageError(
            f"data.type={spec['type']} has no images of {show_size(size)} to compare with; name others, --ref FOLDER, or a square size"
        )
    changed: dict[str, Any] = {"size": list(size) if size[0] != size[1] else size[0]}
    changed |= {name: value for name, value in {"aspect": "crop", "sizes": None}.items() if name in options}
    return registry.check("data", {**spec, **changed}, "data")


def from_dataset(dataset: Dataset, name: str) -> Images:
    return _Dataset(dataset, name)


class _Dataset(Images):
    def __init__(self, dataset: Dataset, name: str):
        from genkit.data.folder import Folder

        info = dataset.info
        super().__init__(name, tuple(info.shape), len(dataset), bool(info.class_names))
        self.dataset = dataset
        self.is_exact = not isinstance(dataset, Folder)  # whose fingerprint is that of names and file sizes

    def take(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        from genkit.data.loader import take

        batch = take(self.dataset, np.asarray(numbers, np.int64))
        if len(batch["x"]) < len(numbers):
            keys = getattr(self.dataset, "keys", None)
            for number in set(numbers) - set(batch["index"].tolist()):
                self.missing[number] = str(number if keys is None else keys[number])
        return batch["x"], batch["label"]

    def _hash(self) -> str:
        return self.dataset.info.fingerprint


# Folders and zips of image files


def from_folder(path: Path, class_names: tuple[str, ...] = ()) -> Images:
    """All images of a folder and below, at their own size; all must have the same.

    Images become 8-bit grey or RGB as genkit.data.folder.Folder does it; `notes` counts those that were something else. The set is grey when
    all of up to 64 files spread over it are.

    Labels come from samples.json, which `genkit sample` writes beside its images, or from dataset.json of the StyleGAN and EDM tools
    ({"labels": [["a/b.png", 3], ...]}, or null for none); else they are the names of first-level subfolders, numbers or words of
    `class_names`. Pictures called grid* are overviews, not samples, and are left out.

    Raises: UsageError without images; GenkitError for an unreadable file or one of another size, which is named, when it is read.
    """
    from genkit.data.folder import EXTENSIONS, scan

    every = scan(str(path))
    others = []
    for folder, below, names in os.walk(path):
        below[:] = [name for name in below if not name.startswith(".")]
        found = [name for name in names if not name.startswith(".") and not name.lower().endswith(EXTENSIONS)]
        others += [(Path(folder) / name).relative_to(path).as_posix() for name in found]

    def fetch(file: str) -> bytes:
        return (path / file).read_bytes()

    return _Files(f"folder {path.name}", path, every, sorted(others), fetch, class_names)


def from_zip(path: Path, class_names: tuple[str, ...] = ()) -> Images:
    """The images in a zip, as `from_folder` takes those of a folder; nothing is unpacked to disk.

    Raises: UsageError without images; GenkitError for a damaged zip, for files that are encrypted or packed in another way than "deflated",
        and for a zip bomb: an image or list of labels of more than MAX_MEMBER bytes.
    """
    from genkit.data.folder import EXTENSIONS

    try:
        archive = zipfile.ZipFile(path)
    except FileNotFoundError:
        raise GenkitError(f"no such file: {path}") from None
    except Exception as error:  # zipfile raises many unrelated types on broken bytes
        raise GenkitError(f"{path} cannot be read as zip: {reason(error)}") from None
    members = {
        info.filename: info
        for info in archive.infolist()
        if not info.is_dir()
        and not any(part.startswith(".") or part == "__MACOSX" for part in info.filename.split("/"))
    }
    every = sorted(name for name in members if name.lower().endswith(EXTENSIONS))
    if not every:
        raise UsageError(f"{path} has no images; looked for {', '.join(EXTENSIONS)} in it")

    def fetch(file: str) -> bytes:
        if file not in members:
            raise FileNotFoundError(file)
        return _unpack(archive, members[file])

    for name in [*every, *(name for name in _RECORDS if name in members)]:
        if members[name].file_size > MAX_MEMBER:
            raise GenkitError(
                f"{path}: {shown(name)} would unpack to {members[name].file_size:,} bytes, more than the {MAX_MEMBER:,} "
                "a file in a zip may have; nothing was unpacked"
            )
    return _Files(f"zip {path.name}", path, every, sorted(members.keys() - set(every)), fetch, class_names)


_RECORDS = ("samples.json", "dataset.json")  # files that say which label an image has


class _Files(Images):
    """Image files by name, wherever their bytes are.

    Files are decoded by a few threads, and the batch that would come next is decoded while the caller works on this one. There is never more
    than one batch ahead, and the threads end with it.

    Args:
        where: the folder or zip, for messages.
        every: names of all images; "/" separates folders.
        others: names of the files that are no images.
        fetch: name -> bytes; raises FileNotFoundError where there is no such file.
    """

    def __init__(
        self,
        name: str,
        where: Path,
        every: list[str],
        others: list[str],
        fetch: Callable[[str], bytes],
        class_names: tuple[str, ...],
    ):
        self.where = where
        self.files = [file for file in every if not file.rpartition("/")[2].startswith("grid")]
        if not self.files:
            raise UsageError(f"{where} has no images besides {shown(every[0])}")
        others = [file for file in others if file not in _RECORDS]
        self._left_out = []
        if len(self.files) < len(every):
            self._left_out.append(f"pictures called grid*, left out: {len(every) - len(self.files)}")
        if others:
            self._left_out.append(f"files that are no images, left out: {_some(others)}")
        self._fetch = fetch
        self._labels = torch.tensor(_labels(where, self.files, fetch, class_names), dtype=torch.int64)
        self._digests = np.zeros((len(self.files), 32), np.uint8)  # sha256 of each file that was read
        self._hashed = np.zeros(len(self.files), bool)
        self._ahead: tuple[range, list[Future[np.ndarray]]] | None = None
        self._channels = self._probe()
        super().__init__(name, (), len(self.files), bool((self._labels >= 0).all()))
        self.shape = self._decode(0).shape

    def take(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        return self._gather(numbers, self._start(numbers))

    def read(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        numbers = range(first, min(last, self.count))
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] != numbers:
            _cancel(ahead[1])
            ahead = None
        batch = self._gather(numbers, self._start(numbers) if ahead is None else ahead[1])
        following = range(last, min(2 * last - first, self.count))
        self._ahead = (following, self._start(following))
        return batch

    @property
    def notes(self) -> tuple[str, ...]:
        return (*self._left_out, *super().notes)

    def _start(self, numbers: Sequence[int]) -> list[Future[np.ndarray]]:
        """Begin to decode. The threads end when all is done, whether or not anybody waits for it."""
        if not numbers:
            return []
        pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="decode")
        waiting = [pool.submit(self._load, number) for number in numbers]
        pool.shutdown(wait=False)
        return waiting

    def _gather(self, numbers: Sequence[int], waiting: list[Future[np.ndarray]]) -> tuple[Tensor, Tensor]:
        try:
            arrays = [future.result() for future in waiting]
        except BaseException:
            _cancel(waiting)
            raise
        pixels = np.stack(arrays) if arrays else np.empty((0, *self.shape), np.uint8)
        return to_float(torch.from_numpy(pixels)), self._labels[torch.as_tensor(numbers, dtype=torch.int64)]

    def _load(self, number: int) -> np.ndarray:
        """[C, Y, X] uint8."""
        pixels = self._decode(number)
        if pixels.shape != self.shape:
            raise GenkitError(
                f"{self.where} mixes sizes: {shown(self.files[0])} is {_by(self.shape)}, {shown(self.files[number])} is {_by(pixels.shape)} "
                "(CxYxX); all must have the same: resize them first (`genkit data check FOLDER` lists the sizes)"
            )
        return pixels

    def _decode(self, number: int) -> np.ndarray:
        from PIL import Image

        from genkit.data.folder import prepare

        data = b"?"
        try:
            data = self._bytes(number)
            with Image.open(io.BytesIO(data)) as image:
                kinds = _conversions(image, self._channels)
                pixels = prepare(image, None, self._channels)
        except Exception as error:  # decoders raise many unrelated types on broken bytes
            file = shown(str(self.where / self.files[number]))
            raise GenkitError(f"{file} cannot be decoded: {reason(error, data)}; repair or remove it") from None
        if kinds:
            self.converted[number] = tuple(kinds)
        return pixels

    def _bytes(self, number: int) -> bytes:
        """The file; its hash is kept, so that a set that was read whole is not read again for its hash."""
        data = self._fetch(self.files[number])
        if not self._hashed[number]:
            self._digests[number] = np.frombuffer(hashlib.sha256(data).digest(), np.uint8)
            self._hashed[number] = True
        return data

    def _probe(self) -> int:
        """1 when the headers of all probed files are grey; unreadable files have no say."""
        from PIL import Image

        from genkit.data.folder import GREY_MODES, PROBED

        modes = set()
        for number in range(0, len(self.files), max(1, len(self.files) // PROBED)):
            try:
                with Image.open(io.BytesIO(self._bytes(number))) as image:
                    modes.add(image.mode)
            except Exception:
                continue
        return 1 if modes and modes <= set(GREY_MODES) else 3

    def _hash(self) -> str:
        """Over names and contents, in the order of the names."""

        def visit(number: int) -> None:
            try:
                self._bytes(number)
            except Exception as error:
                file = shown(str(self.where / self.files[number]))
                raise GenkitError(f"{file} cannot be read: {reason(error)}") from None

        with ThreadPoolExecutor(_THREADS) as pool:
            for _ in pool.map(visit, np.flatnonzero(~self._hashed).tolist()):
                pass
        whole = hashlib.sha256()
        for file, digest in zip(self.files, self._digests, strict=True):
            whole.update(file.encode("utf-8", "surrogateescape") + b"\0" + digest.tobytes())
        return whole.hexdigest()


def _cancel(waiting: list[Future[np.ndarray]]) -> None:
    for future in waiting:
        future.cancel()


def _conversions(image: Any, channels: int) -> list[str]:
    """What `prepare` will do to an opened image that is not 8-bit grey or RGB already; to be asked before its pixels are loaded."""
    from PIL.ExifTags import Base

    from genkit.data.folder import GREY_MODES

    mode, tiles, found = image.mode, str(image.tile), []
    if getattr(image, "is_animated", False):
        found.append("animated: the first frame was taken")
    if mode == "I":
        found.append("32-bit grey: clipped to 16 bits, divided by 257")
    elif mode.startswith("I;16"):
        found.append("16-bit grey: divided by 257")
    elif ";16" in tiles:
        found.append("16-bit colour: only the high byte was kept")
    if image.has_transparency_data:
        found.append(f"{mode if mode[-1] in 'Aa' else f'{mode} with transparency'}: alpha was laid over white")
    elif mode == "P":
        found.append("palette: colours were looked up")
    elif mode == "1":
        found.append("1-bit: made 8-bit")
    elif mode not in GREY_MODES and mode != "RGB":
        found.append(f"{mode}: converted to RGB")
    if mode in GREY_MODES and channels == 3:
        found.append("grey among colour: repeated three times")
    elif mode not in GREY_MODES and channels == 1:
        found.append("colour among grey: reduced to luma")
    if image.getexif().get(Base.Orientation, 1) != 1:  # last: of a PNG this reads the pixels
        found.append("stored turned: set upright by their EXIF orientation")
    return found


def _labels(
    where: Path, files: list[str], fetch: Callable[[str], bytes], class_names: tuple[str, ...]
) -> Iterable[int]:
    """One label per file, -1 where there is none."""
    for record, rows, form in (
        ("samples.json", _sample_rows, "is not the list of samples `genkit sample` writes"),
        ("dataset.json", _dataset_rows, 'is not {"labels": [["a/b.png", 3], ...]} or {"labels": null}'),
    ):
        try:
            by_file = {file: _number(label) for file, label in rows(json.loads(fetch(record)))}
        except FileNotFoundError:
            continue
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise GenkitError(f"{where / record} {form} ({reason(error)}); repair or remove it") from None
        except Exception as error:  # of the zip it lies in
            raise GenkitError(f"{where / record} cannot be read: {reason(error)}; repair or remove it") from None
        return [by_file.get(file, -1) for file in files]
    by_name = {name.lower(): i for i, name in enumerate(class_names)}
    tops = [file.partition("/")[0] if "/" in file else "" for file in files]
    return [int(top) if top.isdecimal() and len(top) < 10 else by_name.get(top.lower(), -1) for top in tops]


def _sample_rows(content: Any) -> list[tuple[str, Any]]:
    return [(row["file"], row["label"]) for row in content["samples"]]


def _dataset_rows(content: Any) -> list[tuple[str, Any]]:
    return [(file, label) for file, label in content["labels"] or []]


def _number(label: Any) -> int:
    if isinstance(label, bool) or not isinstance(label, int) or not -1 <= label < 1 << 31:
        raise ValueError(f"{str(label)[:40]!r} is not the number of a class")
    return label


def _unpack(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """The bytes of a member. Of what a forged header hides, no more than the declared size is ever unpacked."""
    check_packing(info)
    with archive.open(info) as member:
        return member.read(info.file_size)


# Arrays in an npz


def from_npz(path: Path) -> Images:
    """`arr_0` uint8 [N, Y, X, C] or [N, C, Y, X] or [N, Y, X], and, where it is there, `arr_1` or `label` [N] of integers.

    An array that is not compressed is mapped, not loaded: it may be larger than the memory.

    Raises: GenkitError for another content, naming the keys that were found.
    """
    return _Pixels(Npz(path))


class _Pixels(Images):
    def __init__(self, arrays: Npz):
        path, found = arrays.path, arrays.found
        if "arr_0" not in arrays:
            raise GenkitError(f"{path} has no arr_0 (images, uint8 [N, Y, X, C] or [N, C, Y, X]); found {found}")
        shape, dtype = arrays.headers["arr_0"].shape, arrays.headers["arr_0"].dtype
        full = (*shape, 1) if len(shape) == 3 else shape
        if dtype != np.uint8 or len(full) != 4 or not {full[-1], full[1]} & {1, 3} or 0 in full:
            raise GenkitError(
                f"{path}: arr_0 must be uint8 [N, Y, X, C] or [N, C, Y, X] with 1 or 3 channels; found {found}"
            )
        self._arrays = arrays
        self._full = full
        self._channels_last = full[-1] in (1, 3)
        key = next((key for key in ("arr_1", "label") if key in arrays), None)
        self._labels = torch.full((full[0],), -1)
        if key is not None:
            header = arrays.headers[key]
            if header.shape != (full[0],) or header.dtype.kind not in "iu":
                raise GenkitError(
                    f"{path}: {full[0]} images need as many integers as labels, but {key} is {header.dtype} {list(header.shape)}"
                )
            self._labels = torch.from_numpy(arrays[key].astype(np.int64))
        chw = (full[3], full[1], full[2]) if self._channels_last else full[1:]
        super().__init__(path.name, chw, full[0], key is not None)

    def take(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        chosen = np.asarray(numbers, np.int64)
        return to_float(torch.from_numpy(self._chosen(chosen))), self._labels[torch.from_numpy(chosen)]

    def read(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        return self.take(range(first, min(last, self.count)))

    @functools.cached_property
    def _pixels(self) -> np.ndarray:
        return self._arrays.map("arr_0").reshape(self._full)

    def _chosen(self, numbers: np.ndarray) -> np.ndarray:
        """[B, C, Y, X] uint8, a copy."""
        pixels = self._pixels[numbers]
        return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2) if self._channels_last else pixels)

    def _hash(self) -> str:
        digest = hashlib.sha256(repr((self.count, *self.shape)).encode())
        for start in range(0, self.count, 256):
            digest.update(self._chosen(np.arange(start, min(start + 256, self.count))).data)
        return digest.hexdigest()


# What people name


def find(word: str, data: dict[str, Any] | None = None, option: str = "reference") -> Images:
    """Images by what a person names them: "train" or "val" of the data section `data`, a folder, a zip, an npz of images, or a dataset word
    ("fashion", "fashion:val"). A file of statistics is read by genkit.metrics.references.

    Args:
        option: what was named, for messages.

    Raises: UsageError when it is none of them.
    """
    if word in ("train", "val"):
        if data is None:
            raise UsageError(
                f"{option}={word} means a split of a run's own data, and there is no run here; name a dataset, a folder, a zip or an npz"
            )
        return from_spec(data, word)
    path = Path(word)
    if path.suffix.lower() == ".npz":
        return from_npz(path)
    if path.suffix.lower() == ".zip":
        return from_zip(path)
    if path.is_dir():
        return from_folder(path)
    name, _, split = word.partition(":")
    known = list(registry.words("data"))
    if name not in known:
        raise UsageError(
            f"{option}={word} is neither a folder, a zip or npz of images, nor a dataset (fashion, fashion:val), nor train or val of a run; "
            f"{nearest(name, known)}"
        )
    spec = registry.check("data", {"type": name, **_PINNED.get(name, {})}, option)
    return from_spec(spec, split or "train")


# Words and numbers


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _some(files: list[str]) -> str:
    """ "5 (a.txt, b.txt, c.txt, ...)" """
    named = ", ".join(shown(file) for file in files[:_NAMED])
    return f"{len(files)} ({named}{', ...' if len(files) > _NAMED else ''})"
