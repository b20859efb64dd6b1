"""Image files of a folder or a zip as numbered images, with the labels that lie beside them."""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genkit.data.memory import to_float
from genkit.errors import GenkitError, UsageError
from genkit.metrics.arrays import check_packing, reason, shown
from genkit.metrics.image_set import Images, some

MAX_MEMBER = 256 << 20  # bytes of one file in a zip, unpacked: far above any image, far below what fills a memory
_THREADS = min(8, os.cpu_count() or 1)
_RECORDS = ("samples.json", "dataset.json")  # files that say which label an image has


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
            self._left_out.append(f"files that are no images, left out: {some(others)}")
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


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
