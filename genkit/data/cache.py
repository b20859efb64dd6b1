"""Encode a dataset once, so that a generator trains on tokens and never pays for the tokenizer again.

A cache is a folder: ids.npy (or z.npy), labels.npy, keys.json, meta.json; with the same of mirrored images in ids_mirrored.npy where a dataset flips,
and sizes.npy where samples have sizes of their own: their numbers then lie one sample after the other, in one row.

It is written under a hidden temporary name and renamed when it is whole: what has its final name is complete, whatever happened while it was made. A
journal says what is safely on disk after every batch, so that an interrupted build goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genkit import files
from genkit.data.loader import read_all
from genkit.errors import GenkitError, UsageError
from genkit.interfaces import DataInfo, Dataset, Tokenizer
from genkit.nn.layout import rows_of_one_size
from genkit.nn.usage import usage

Progress = Callable[[int, int], None]  # (samples done, samples in all)
_PLAN, _JOURNAL = "plan.json", "journal.jsonl"  # of a folder that is not whole yet


def check_size(shape: tuple[int, ...], stride: int) -> None:
    """Raises UsageError, with sizes that fit, when a side of samples [C, *sides] is no multiple of the stride."""
    sides = shape[1:]
    odd = [side for side in sides if side % stride]
    if odd:
        below = max(odd) // stride * stride
        fits = " or ".join(str(size) for size in (below, below + stride) if size)
        size = "x".join(map(str, sides))
        raise UsageError(f"size {size} is not divisible by the tokenizer's stride {stride}; try data.size={fits}")


def check_unit(info: DataInfo, stride: int) -> None:
    """Raises UsageError for samples in sizes of their own whose sides are no multiples of the stride."""
    if info.unit % stride:
        raise UsageError(
            f"sides of these images are multiples of {info.unit} pixels, which the tokenizer's stride {stride} does not divide; set data.unit, or the "
            "sides in data.sizes, to multiples of it"
        )


def find_or_build(
    tokenizer: Tokenizer,
    dataset: Dataset,
    root: Path,
    *,
    name: str,
    tokenizer_fingerprint: str,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Path:
    """The cache folder root/name-HASH of exactly this data and this tokenizer: an existing one, else a new one."""
    both = f"{dataset.info.fingerprint} {tokenizer_fingerprint}{' mirrored' if getattr(dataset, 'flip', False) else ''}"
    out = Path(root) / f"{name}-{hashlib.blake2b(both.encode(), digest_size=6).hexdigest()}"
    if _matches(out, dataset, tokenizer_fingerprint):
        return out
    return build(
        tokenizer,
        dataset,
        out,
        tokenizer_fingerprint=tokenizer_fingerprint,
        batch_size=batch_size,
        device=device,
        progress=progress,
    )


def build(
    tokenizer: Tokenizer,
    dataset: Dataset,
    out: Path,
    *,
    tokenizer_fingerprint: str,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Path:
    """Encode every sample in order, corrupt ones left out, and replace whatever lies at `out` by the result. A build of the same that was interrupted
    on this machine is continued.

    Args:
        tokenizer: on `device`; used in evaluation mode and given back as it was.
        dataset: where its `flip` is true, every image is encoded mirrored too: latents of a mirrored image are not mirrored latents.

    Raises: UsageError when the image size does not fit the tokenizer's stride; GenkitError when nothing could be
        decoded or written.
    """
    check_size(dataset.info.shape, tokenizer.stride)
    check_unit(dataset.info, tokenizer.stride)
    out = Path(out)
    part = out.with_name(f".{out.name}.{socket.gethostname()}-{os.getpid()}.part")
    was_training = getattr(tokenizer, "training", False)
    plan = {
        "dataset_fingerprint": dataset.info.fingerprint,
        "tokenizer_fingerprint": tokenizer_fingerprint,
        "mirrored": bool(getattr(dataset, "flip", False)),
    }
    try:
        _begin(out, part, plan)
        if isinstance(tokenizer, torch.nn.Module):
            tokenizer.eval()
        with torch.inference_mode():
            meta = _encode(tokenizer, dataset, part, bool(plan["mirrored"]), batch_size, device, progress)
        files.write_json(part / "meta.json", meta | plan)
        for name in (_PLAN, _JOURNAL):
            (part / name).unlink()
        _put_in_place(part, out)
    except OSError as error:
        kept = "; what is done so far is kept for the next call" if _journal(part) else ""
        raise GenkitError(f"the token cache {out} cannot be written: {error.strerror or error}{kept}") from error
    except GenkitError:
        shutil.rmtree(part, ignore_errors=True)
        raise
    finally:
        if not _journal(part):
            shutil.rmtree(part, ignore_errors=True)
        if isinstance(tokenizer, torch.nn.Module):
            tokenizer.train(was_training)
    return out


def _encode(
    tokenizer: Tokenizer,
    dataset: Dataset,
    folder: Path,
    mirrored: bool,
    batch_size: int,
    device: Any,
    progress: Progress | None,
) -> dict[str, Any]:
    """Writes the arrays and the keys; returns what meta.json says of them."""
    codebook_size, num_levels = int(tokenizer.codebook_size), int(tokenizer.num_levels)
    word = "ids" if num_levels else "z"
    # uint16 holds every id of the usual codebooks in a quarter of int64's space.
    dtype = np.dtype("<f4" if word == "z" else "<u2" if codebook_size <= 2**16 else "<i4")
    done = _journal(folder)
    names = [word, f"{word}_mirrored"] if mirrored else [word]
    values: list[_Rows] = []
    try:
        values += [_Rows(folder / f"{name}.npy", dtype, done[-1] if done else None) for name in names]
        first = done[-1]["next"] if done else 0
        with (folder / _JOURNAL).open("ab") as journal:
            for batch in read_all(dataset, batch_size, device=device, first=first):
                made = [_made(tokenizer, batch, word, turned) for turned in ((False, True) if mirrored else (False,))]
                for rows, (arrays, _, _) in zip(values, made, strict=True):
                    rows.append(
                        np.concatenate([array.ravel() for array in arrays]) if dataset.info.unit else np.stack(arrays)
                    )
                    rows.sync()
                arrays, total, squares = made[0]
                before = done[-1] if done else {"total": 0, "squares": 0, "tokens": 0}
                line = {
                    "next": int(batch["index"][-1]) + 1,
                    "rows": values[0].count,
                    "row_shape": list(values[0].shape),
                    "labels": batch["label"].tolist(),
                    "keys": batch["key"],
                    "sizes": [list(array.shape[1:]) for array in arrays] if dataset.info.unit else [],
                    "grid": list(arrays[0].shape[1:]),
                    "total": (np.asarray(before["total"]) + total).tolist(),
                    "squares": (np.asarray(before["squares"]) + squares).tolist(),
                    "tokens": before["tokens"] + sum(int(np.prod(array.shape[1:])) for array in arrays),
                }
                done.append(line)
                journal.write(json.dumps(line).encode() + b"\n")
                _sync(journal)
                if progress is not None:
                    progress(line["next"], len(dataset))
    finally:
        for rows in values:
            rows.close()
    if not done:
        raise GenkitError(f"none of the {len(dataset)} samples could be decoded: {dataset.info.source}")
    sizes = np.array([size for line in done for size in line["sizes"]], np.int64).reshape(-1, 2)
    arrays_by_name = {"labels": np.array([label for line in done for label in line["labels"]], np.int64)}
    for name, array in (arrays_by_name | ({"sizes": sizes} if dataset.info.unit else {})).items():
        with (folder / f"{name}.npy").open("wb") as file:
            np.save(file, array, allow_pickle=False)
            _sync(file)
    keys = [key for line in done for key in line["keys"]]
    files.write_bytes(folder / "keys.json", json.dumps(keys).encode())
    tokens = done[-1]["tokens"]
    mean = np.asarray(done[-1]["total"]) / tokens
    squares = np.asarray(done[-1]["squares"]) / tokens
    use = usage(_counts(folder / "ids.npy", sizes, num_levels, codebook_size)) if num_levels else None
    figures = {} if use is None else {"codebook_usage": use["usage"], "perplexity": use["perplexity"]}
    stride = int(tokenizer.stride)
    return {
        "count": len(keys),
        "shape": list(dataset.info.shape),
        "class_names": list(dataset.info.class_names),
        "grid": [side // stride for side in dataset.info.shape[1:]] if dataset.info.unit else done[0]["grid"],
        "unit": dataset.info.unit,
        "stride": stride,
        "channels": len(mean),
        "codebook_size": codebook_size,
        "num_levels": num_levels,
        "latent_mean": mean.tolist(),
        "latent_std": np.sqrt(np.maximum(squares - mean**2, 0)).tolist(),
        **figures,
        "source": dataset.info.source,
    }


def _made(
    tokenizer: Tokenizer, batch: dict[str, Any], word: str, turned: bool
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """What a tokenizer makes of a batch, or of its mirror image: every sample's ids [Q, *grid] or z [C, *grid], and sums of z and of its squares, [C]
    each. Padding is cut off before: a tokenizer would carry it into the picture."""
    x, found = batch["x"], [np.zeros(0)] * len(batch["x"])
    total: Any = 0
    squares: Any = 0
    whole = [(tuple(x.shape[2:]), torch.arange(len(x)))]
    for size, rows in rows_of_one_size(batch["size"].cpu()) if "size" in batch else whole:
        own = x[rows.to(x.device)][(..., *(slice(side) for side in size))]
        encoded = tokenizer.encode(own.flip(-1) if turned else own)
        z = encoded.z.double().transpose(0, 1).flatten(1)  # [C, samples * tokens]
        total, squares = total + z.sum(1).cpu().numpy(), squares + (z**2).sum(1).cpu().numpy()
        made = (encoded.z.float() if encoded.ids is None else encoded.ids).cpu().numpy()
        if word == "ids" and (made.min() < 0 or made.max() >= tokenizer.codebook_size):
            raise GenkitError(
                f"the tokenizer made the id {made.max()}, outside its codebook of {int(tokenizer.codebook_size)}"
            )
        for row, array in zip(rows.tolist(), made, strict=True):
            found[row] = array
    return found, total, squares


def _counts(path: Path, sizes: np.ndarray, num_levels: int, codebook_size: int) -> torch.Tensor:
    """How often every code is used, [Q, S]. Read from the file at the end: a build that was continued never saw the first part."""
    ids = np.load(path, mmap_mode="r", allow_pickle=False)
    counts = np.zeros((num_levels, codebook_size), np.int64)
    if len(sizes):
        ends = num_levels * sizes.prod(1).cumsum()
        parts = (
            ids[end - num_levels * n : end].reshape(1, num_levels, n)
            for end, n in zip(ends, sizes.prod(1), strict=True)
        )
    else:
        parts = (ids[first : first + 4096] for first in range(0, len(ids), 4096))
    for part in parts:
        for level, row in enumerate(counts):
            row += np.bincount(part[:, level].ravel(), minlength=codebook_size)
    return torch.from_numpy(counts)


def _begin(out: Path, part: Path, plan: dict[str, Any]) -> None:
    """Make the folder a build writes to: the longest unfinished one of the same plan that nobody works on, else a new one. Others like it are removed."""
    found = {path: len(_journal(path)) for path in _abandoned(out, part) if _plan(path) == plan}
    kept = max(found, key=lambda path: found[path], default=None)
    if kept is not None and found[kept] and kept != part:
        shutil.rmtree(part, ignore_errors=True)
        kept.rename(part)
    for path in _abandoned(out, part):
        if path != part or kept is None or not found[kept]:
            shutil.rmtree(path, ignore_errors=True)
    if not part.exists():
        part.mkdir(parents=True)
        files.write_json(part / _PLAN, plan)


def _plan(folder: Path) -> Any:
    try:
        return json.loads((folder / _PLAN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _journal(folder: Path) -> list[dict[str, Any]]:
    """The batches that are on disk. A last line that is not whole belongs to one that is not, and is cut off."""
    path = folder / _JOURNAL
    try:
        text = path.read_bytes()
    except OSError:
        return []
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return [json.loads(line) for line in whole.splitlines()]


class _Rows:
    """A .npy file that grows: corrupt samples are left out, so that the number of rows is known only at the end.

    Args:
        done: a line of the journal, of a file to go on with; what was written after it is cut off.
    """

    def __init__(self, path: Path, dtype: np.dtype, done: dict[str, Any] | None = None) -> None:
        self._file, self._dtype = path.open("wb" if done is None else "r+b"), dtype
        self.count, self.shape, self._begin = 0, (), 0
        if done is not None:
            self.count, self.shape = done["rows"], tuple(done["row_shape"])
            self._begin = self._header()
            self._file.seek(self._begin + self.count * int(np.prod(self.shape, dtype=np.int64)) * dtype.itemsize)
            self._file.truncate()

    def append(self, rows: np.ndarray) -> None:
        if not self.count:
            self.shape = rows.shape[1:]
            self._begin = self._header()
        self._file.write(np.ascontiguousarray(rows, self._dtype).data)
        self.count += len(rows)

    def sync(self) -> None:
        _sync(self._file)

    def close(self) -> None:
        try:
            if self.count:
                self._file.seek(0)
                # NumPy leaves room in the header for the first axis to grow; if it ever did not, the data would be
                # overwritten.
                assert self._header() == self._begin
            _sync(self._file)
        finally:
            self._file.close()

    def _header(self) -> int:
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self.count, *self.shape)}
        np.lib.format.write_array_header_1_0(self._file, header)
        return self._file.tell()


def _matches(folder: Path, dataset: Dataset, tokenizer_fingerprint: str) -> bool:
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        wanted = (dataset.info.fingerprint, tokenizer_fingerprint, bool(getattr(dataset, "flip", False)))
        return (meta["dataset_fingerprint"], meta["tokenizer_fingerprint"], meta.get("mirrored", False)) == wanted
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _put_in_place(part: Path, out: Path) -> None:
    """Rename, moving aside what was there: a folder that is not empty cannot be renamed over."""
    if out.exists():
        old = part.with_suffix(".old")
        out.rename(old)
        part.rename(out)
        shutil.rmtree(old)
    else:
        part.rename(out)
    if os.name != "posix":
        return  # elsewhere a folder cannot be synced
    handle = os.open(out.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _abandoned(out: Path, part: Path) -> list[Path]:
    """Temporary folders of this machine that no living process works on, this one's own among them: of builds that were killed or interrupted."""
    if os.name != "posix":
        return [part] if part.exists() else []  # elsewhere signal 0 is not a harmless question
    host = socket.gethostname()
    found = []
    for path in out.parent.glob(f".{out.name}.{host}-*"):
        pid = path.name.removeprefix(f".{out.name}.{host}-").partition(".")[0]
        try:
            if int(pid) != os.getpid():
                os.kill(int(pid), 0)
                continue  # alive
        except ProcessLookupError:
            pass
        except (ValueError, OSError):
            continue  # not ours, or alive under another user
        found.append(path)
    return sorted(found)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
