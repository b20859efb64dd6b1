"""Arrays in an npz: what they are at once, what they hold when asked for. Also what every reader of archives here refuses, and how it says so."""

from __future__ import annotations

import math
import os
import struct
import zipfile
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from genkit.errors import GenkitError

# Bytes of one compressed array; one that is not compressed is mapped and may have any size.
MAX_UNPACKED = 8 << 30


class Header(NamedTuple):
    """What an npz says of an array."""

    shape: tuple[int, ...]
    dtype: np.dtype
    is_fortran: bool
    length: int  # bytes in front of the values


class Npz:
    """The arrays of an npz: their shapes and types at once, their values when asked for. Nothing is ever unpickled.

    Raises: GenkitError for a file that is none, is damaged, or holds pickled objects.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._members: dict[str, zipfile.ZipInfo] = {}
        self.headers: dict[str, Header] = {}
        try:
            with zipfile.ZipFile(self.path) as archive:
                for info in archive.infolist():
                    if info.filename.endswith(".npy"):
                        self._members[info.filename[:-4]] = info
                        self.headers[info.filename[:-4]] = _header(archive, info)
        except FileNotFoundError:
            raise GenkitError(f"no such file: {self.path}") from None
        except Exception as error:  # zipfile and numpy raise many unrelated types on broken bytes
            raise self._unreadable(error) from None

    @property
    def found(self) -> str:
        """Keys, types and shapes, for messages."""
        listed = [f"{shown(key)} {header.dtype} {list(header.shape)}" for key, header in self.headers.items()]
        return ", ".join(listed) or "nothing"

    def __contains__(self, key: str) -> bool:
        return key in self.headers

    def __getitem__(self, key: str) -> np.ndarray:
        """Read an array."""
        info = self._members[key]
        try:
            if info.compress_type != zipfile.ZIP_STORED and info.file_size > MAX_UNPACKED:
                raise ValueError(
                    f"{key} would unpack to {info.file_size:,} bytes, more than {MAX_UNPACKED:,}; save it uncompressed"
                )
            with zipfile.ZipFile(self.path) as archive, archive.open(info) as member:
                return np.lib.format.read_array(member, allow_pickle=False)
        except Exception as error:
            raise self._unreadable(error) from None

    def map(self, key: str, mode: Literal["r", "c"] = "r") -> np.ndarray:
        """An array whose values stay on disk until they are touched; one that is compressed is read.

        Args:
            mode: "r" = it cannot be written to, "c" = what is written stays in memory.
        """
        info, header = self._members[key], self.headers[key]
        try:
            with open(self.path, "rb") as file:
                file.seek(info.header_offset + 26)  # the lengths of two fields of the local header, which has 30 bytes
                start = info.header_offset + 30 + sum(struct.unpack("<2H", file.read(4))) + header.length
                end = file.seek(0, os.SEEK_END)
        except (OSError, struct.error) as error:
            raise self._unreadable(error) from None
        size = math.prod(header.shape) * header.dtype.itemsize
        if info.compress_type != zipfile.ZIP_STORED or not size or start % header.dtype.itemsize or start + size > end:
            return self[key]
        return np.memmap(self.path, header.dtype, mode, start, header.shape, "F" if header.is_fortran else "C")

    def _unreadable(self, error: Exception) -> GenkitError:
        why = "it holds pickled objects, which are never loaded" if "pickle" in str(error) else reason(error)
        return GenkitError(f"{self.path} cannot be read as npz: {why}; save plain arrays with numpy.savez")


def _header(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Header:
    check_packing(info)
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        if read is None:
            raise ValueError(f"{info.filename} has format {version}, which holds no plain numbers")
        shape, is_fortran, dtype = read(member)
        length = member.tell()
    if dtype.hasobject:
        raise ValueError("it holds pickled objects")
    size = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or length + size != info.file_size:
        raise ValueError(f"{info.filename} has {info.file_size - length:,} bytes of values where {size:,} should be")
    return Header(shape, dtype, is_fortran, length)


def check_packing(info: zipfile.ZipInfo) -> None:
    # The other methods cannot be unpacked piece by piece, so that their size is only known when the memory is full.
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError("it is packed with a method other than stored or deflated")


def shown(name: str) -> str:
    """A file's name on one line."""
    return name if name.isprintable() else ascii(name)


def reason(error: Exception, data: bytes = b"?") -> str:
    """Why something could not be read, on one line."""
    if not data:
        return "empty file"
    text = " ".join(str(error).split())
    if "cannot identify image file" in text:
        return "its format is not known"
    return text or type(error).__name__
