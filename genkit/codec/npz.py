"""Ids of equally large images as a plain npz, for people who want to read them with NumPy.

Without pickles: `ids` [N, Q, *grid] uint16 or int32, `names` [N], `shape` (C, Y, X) of the images, `codebook_size`, `fingerprint` of the
tokenizer and `version`.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from genkit import files
from genkit.errors import GenkitError

VERSION = 1


def write(
    path: str,
    ids: NDArray[np.integer],
    names: list[str],
    shape: tuple[int, int, int],
    codebook_size: int,
    fingerprint: str,
) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        ids=ids.astype(np.uint16 if codebook_size <= 2**16 else np.int32),
        names=np.array(names, dtype=np.str_),
        shape=np.array(shape, dtype=np.int64),
        codebook_size=np.int64(codebook_size),
        fingerprint=np.str_(fingerprint),
        version=np.int64(VERSION),
    )
    files.write_bytes(Path(path), buffer.getvalue())


def read(path: str) -> dict[str, Any]:
    """An npz of ids: ids [N, Q, *grid] int64 array, names, shape, codebook_size, fingerprint.

    Raises: GenkitError in one line when the file is missing, damaged or of another version.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            found = {name: stored[name] for name in stored.files}
        version = int(found["version"])
        if version != VERSION:
            raise GenkitError(
                f"{path} has format version {version}, this genkit reads {VERSION}; encode the images again"
            )
        ids = found["ids"].astype(np.int64, casting="safe")
        size = int(found["codebook_size"])
        if ids.ndim < 3 or not len(ids) or len(found["names"]) != len(ids):
            raise ValueError(f"ids are {list(ids.shape)}, names {len(found['names'])}")
        if ids.min() < 0 or ids.max() >= size:
            raise ValueError(f"ids lie in {ids.min()}..{ids.max()}, but the codebook has {size} codes, from 0 on")
        return {
            "ids": ids,
            "names": [str(name) for name in found["names"]],
            "shape": tuple(int(n) for n in found["shape"]),
            "codebook_size": size,
            "fingerprint": str(found["fingerprint"]),
        }
    except FileNotFoundError:
        raise GenkitError(f"no such codes file: {path}; `genkit encode` writes one") from None
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise GenkitError(f"{path} is not a complete codes file ({reason}); encode the images again") from None
