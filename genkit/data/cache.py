"""Encode a dataset once, so that a generator trains on tokens and never pays for the tokenizer again.

A cache is a folder: ids.npy (or z.npy), labels.npy, keys.json, meta.json. It is written under a hidden temporary name
and renamed when it is whole: what has its final name is complete, whatever happened while it was made.
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
from genkit.interfaces import Dataset, Tokenizer
from genkit.nn.usage import usage

Progress = Callable[[int, int], None]  # (samples done, samples in all)


def check_size(shape: tuple[int, ...], stride: int) -> None:
    """Raises UsageError, with sizes that fit, when a side of samples [C, *sides] is no multiple of the stride."""
    sides = shape[1:]
    odd = [side for side in sides if side % stride]
    if odd:
        below = max(odd) // stride * stride
        fits = " or ".join(str(size) for size in (below, below + stride) if size)
        size = "x".join(map(str, sides))
        raise UsageError(f"size {size} is not divisible by the tokenizer's stride {stride}; try data.size={fits}")


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
    both = f"{dataset.info.fingerprint} {tokenizer_fingerprint}"
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
    """Encode every sample in order, corrupt ones left out, and replace whatever lies at `out` by the result.

    Args:
        tokenizer: on `device`; used in evaluation mode and given back as it was.

    Raises: UsageError when the image size does not fit the tokenizer's stride; GenkitError when nothing could be
        decoded or written.
    """
    check_size(dataset.info.shape, tokenizer.stride)
    out = Path(out)
    part = out.with_name(f".{out.name}.{socket.gethostname()}-{os.getpid()}.part")
    was_training = getattr(tokenizer, "training", False)
    try:
        _remove_abandoned(out)
        shutil.rmtree(part, ignore_errors=True)  # of a killed process that had our number
        part.mkdir(parents=True)
        if isinstance(tokenizer, torch.nn.Module):
            tokenizer.eval()
        with torch.inference_mode():
            meta = _encode(tokenizer, dataset, part, batch_size, device, progress)
        meta["tokenizer_fingerprint"] = tokenizer_fingerprint
        files.write_json(part / "meta.json", meta)
        _put_in_place(part, out)
    except OSError as error:
        raise GenkitError(f"the token cache {out} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(tokenizer, torch.nn.Module):
            tokenizer.train(was_training)
    return out


def _encode(
    tokenizer: Tokenizer, dataset: Dataset, folder: Path, batch_size: int, device: Any, progress: Progress | None
) -> dict[str, Any]:
    """Writes the arrays and the keys; returns what meta.json says of them."""
    codebook_size, num_levels = int(tokenizer.codebook_size), int(tokenizer.num_levels)
    counts = np.zeros((num_levels, codebook_size), np.int64)
    labels: list[np.ndarray] = []
    keys: list[str] = []
    total, squares, tokens = np.zeros(0), np.zeros(0), 0  # of the latents, per channel
    grid: list[int] = []
    values: _Rows | None = None
    try:
        for batch in read_all(dataset, batch_size, device=device):
            encoded = tokenizer.encode(batch["x"])
            z = encoded.z.double().transpose(0, 1).flatten(1)  # [C, B * tokens]
            if values is None:
                grid = list(encoded.z.shape[2:])
                total, squares = np.zeros(len(z)), np.zeros(len(z))
                # uint16 holds every id of the usual codebooks in a quarter of int64's space.
                dtype = "<f4" if encoded.ids is None else "<u2" if codebook_size <= 2**16 else "<i4"
                values = _Rows(folder / ("z.npy" if encoded.ids is None else "ids.npy"), np.dtype(dtype))
            total, squares, tokens = (
                total + z.sum(1).cpu().numpy(),
                squares + (z**2).sum(1).cpu().numpy(),
                tokens + z.shape[1],
            )
            if encoded.ids is None:
                values.append(encoded.z.float().cpu().numpy())
            else:
                ids = encoded.ids.cpu().numpy()
                if ids.min() < 0 or ids.max() >= codebook_size:
                    raise GenkitError(f"the tokenizer made the id {ids.max()}, outside its codebook of {codebook_size}")
                for level, row in enumerate(counts):
                    row += np.bincount(ids[:, level].ravel(), minlength=codebook_size)
                values.append(ids)
            labels.append(batch["label"].cpu().numpy())
            keys += batch["key"]
            if progress is not None:
                progress(len(keys), len(dataset))
    finally:
        if values is not None:
            values.close()
    if values is None:
        raise GenkitError(f"none of the {len(dataset)} samples could be decoded: {dataset.info.source}")
    with (folder / "labels.npy").open("wb") as file:
        np.save(file, np.concatenate(labels), allow_pickle=False)
        _sync(file)
    files.write_bytes(folder / "keys.json", json.dumps(keys).encode())
    mean = total / tokens
    use = usage(torch.from_numpy(counts)) if counts.size else None
    figures = {} if use is None else {"codebook_usage": use["usage"], "perplexity": use["perplexity"]}
    return {
        "count": len(keys),
        "shape": list(dataset.info.shape),
        "class_names": list(dataset.info.class_names),
        "grid": grid,
        "stride": int(tokenizer.stride),
        "channels": len(mean),
        "codebook_size": codebook_size,
        "num_levels": num_levels,
        "latent_mean": mean.tolist(),
        "latent_std": np.sqrt(np.maximum(squares / tokens - mean**2, 0)).tolist(),
        **figures,
        "source": dataset.info.source,
        "dataset_fingerprint": dataset.info.fingerprint,
    }


class _Rows:
    """A .npy file that grows: corrupt samples are left out, so that the number of rows is known only at the end."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self._file, self._dtype = path.open("wb"), dtype
        self._count, self._shape, self._begin = 0, (), 0

    def append(self, rows: np.ndarray) -> None:
        if not self._count:
            self._shape = rows.shape[1:]
            self._begin = self._header()
        self._file.write(np.ascontiguousarray(rows, self._dtype).data)
        self._count += len(rows)

    def close(self) -> None:
        try:
            if self._count:
                self._file.seek(0)
                # NumPy leaves room in the header for the first axis to grow; if it ever did not, the data would be
                # overwritten.
                assert self._header() == self._begin
            _sync(self._file)
        finally:
            self._file.close()

    def _header(self) -> int:
        shape = (self._count, *self._shape)
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)
        return self._file.tell()


def _matches(folder: Path, dataset: Dataset, tokenizer_fingerprint: str) -> bool:
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        return (meta["dataset_fingerprint"], meta["tokenizer_fingerprint"]) == (
            dataset.info.fingerprint,
            tokenizer_fingerprint,
        )
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


def _remove_abandoned(out: Path) -> None:
    """Temporary folders of builds on this machine that were killed: nobody else would ever remove them."""
    if os.name != "posix":
        return  # elsewhere signal 0 is not a harmless question
    host = socket.gethostname()
    for path in out.parent.glob(f".{out.name}.{host}-*"):
        pid = path.name.removeprefix(f".{out.name}.{host}-").partition(".")[0]
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            shutil.rmtree(path, ignore_errors=True)
        except (ValueError, OSError):
            continue  # not ours, or alive under another user


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
