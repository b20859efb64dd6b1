"""What images are compared with, as a file: statistics, features or images that this or another tool saved."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from genkit.errors import GenkitError, UsageError
from genkit.images import to_uint8
from genkit.metrics.arrays import Npz
from genkit.metrics.image_arrays import from_npz
from genkit.metrics.image_set import Images
from genkit.metrics.statistics import Moments
from genkit.weights import file_sha256

if TYPE_CHECKING:
    from genkit.metrics.features import FeatureNet

FORMATS = ("genkit", "adm", "fid", "edm")  # of files that are written here
ADM_IMAGES = 10_000  # images in an ADM reference, the number its precision and recall are measured with

# Layout -> layer -> keys of its mean and covariance.
_KEYS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
_OTHER_KEYS = {"pool": ("m2", "s2")}  # denoising-diffusion-pytorch
_ALIGNED = 64  # bytes; values that start at a multiple of this can be mapped whatever their type


@dataclass(frozen=True)
class Reference:
    """The content of a reference file.

    Attributes:
        name: of the file.
        sha: of the file, hex.
        layout: who writes such files: "genkit", "adm" (guided-diffusion), "fid" (pytorch-fid and most others: mu, sigma), "edm" (the same keys, so
            that only our own files say so), "lucidrains" (denoising-diffusion-pytorch: m2, s2), "images" (arr_0 alone).
        net_sha256: of the weights its statistics come from; empty = the file does not say.
        protocol: of the net, in words; empty = the file does not say.
        count: number of images; 0 = the file does not say.
        source: what the images were, one line.
        moments: by layer, "pool" and, where the file has them, "spatial".
        features: [N, D] float32 of the layer "pool", one row per image. Mapped: they are read from disk when they are used.
        images: the images themselves, or a part of them.
    """

    name: str
    sha: str
    layout: str
    net_sha256: str
    protocol: str
    count: int
    source: str
    moments: dict[str, Moments]
    features: Tensor | None
    images: Images | None

    def check_net(self, net: FeatureNet) -> None:
        """Raises GenkitError unless `net` made the statistics; a file that does not say is taken for Inception-2015.

        The weights alone do not tell: three nets share Inception's and differ in how images are resized for them.
        """
        told = f"{net.protocol} sha {net.sha256[:8]}"
        if self.net_sha256 and (self.net_sha256 != net.sha256 or self.protocol not in ("", net.protocol)):
            made_by = f"{self.protocol or 'another net'} (sha {self.net_sha256[:8]})"
            raise GenkitError(f"{self.name} holds statistics of {made_by}; they cannot be compared with {told}")
        if not self.net_sha256 and not net.name.startswith("inception-2015"):
            dims = len(self.moments["pool"].mu) if "pool" in self.moments else 0
            raise GenkitError(
                f"{self.name} does not say which net made its {dims}-dimensional statistics; they cannot be compared with {told}"
            )


def read(path: str | Path) -> Reference:
    """A reference file of any known layout, told by its keys.

    Raises: GenkitError, one line, for a file that is no npz, holds pickles (never unpickled) or other keys, which are named, and for
        statistics that are not finite, not symmetric or of shapes that do not fit.
    """
    path = Path(path)
    arrays = Npz(path)
    layout = _layout(arrays)
    about = {key: _text(arrays, key) for key in ("net_sha256", "protocol", "source")}
    about["source"] = about["source"] or path.name
    count = _count(arrays)
    keys = _OTHER_KEYS if layout == "lucidrains" else _KEYS
    moments = {
        layer: Moments(*_moments(arrays, *pair), count, about["net_sha256"], about["protocol"], about["source"])
        for layer, pair in keys.items()
        if pair[0] in arrays or pair[1] in arrays
    }
    features = _features(arrays, moments, count) if layout == "genkit" and "features" in arrays else None
    images = from_npz(path) if "arr_0" in arrays else None
    if layout == "images" and images is not None:
        count = images.count
    return Reference(
        path.name,
        file_sha256(path),
        layout,
        about["net_sha256"],
        about["protocol"],
        count,
        about["source"],
        moments,
        features,
        images,
    )


def write(
    path: str | Path,
    format: str,
    moments: dict[str, Moments],
    *,
    features: Tensor | None = None,
    images: Images | None = None,
) -> None:
    """Write a reference file, whole or not at all; the same content gives the same bytes.

    Every file names its net, protocol, count and source under keys that other readers ignore.

    Args:
        format: "adm": mu, sigma, mu_s, sigma_s and arr_0, up to ADM_IMAGES images spread evenly over those the moments are of, grey repeated to three
            channels. "fid", "edm": mu, sigma. "genkit": mu, sigma, mu_s and sigma_s where `moments` has them, and `features`.
        moments: by layer; "pool" must be there, for "adm" "spatial" too.
        features: [N, D], rows of the layer "pool".
        images: those the moments are of, or more that follow them.

    Raises: UsageError for another format, or one that needs what is not given.
    """
    if format not in FORMATS:
        raise UsageError(f"format={format} is not one of {', '.join(FORMATS)}")
    layers = {"adm": ("pool", "spatial"), "genkit": tuple(moments)}.get(format, ("pool",))
    if missing := [layer for layer in ("pool", *layers) if layer not in moments]:
        raise UsageError(f"format={format} needs {missing[0]} features, which this net does not have")
    if format == "adm" and images is None:
        raise UsageError("format=adm needs the images themselves")
    arrays: dict[str, np.ndarray] = {}
    for layer in layers:
        mu, sigma = _KEYS[layer]
        arrays |= {mu: moments[layer].mu.double().numpy(), sigma: moments[layer].sigma.double().numpy()}
    if format == "genkit" and features is not None:
        arrays["features"] = features.detach().cpu().float().numpy()
    pool = moments["pool"]
    arrays |= {"count": np.array(pool.count), "format": np.array(format)}
    arrays |= {key: np.array(getattr(pool, key)) for key in ("net_sha256", "protocol", "source")}
    with _replacing(Path(path)) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for key, value in arrays.items():
            _add(archive, key, value.shape, value.dtype, iter([value]))
        if format == "adm" and images is not None:
            seen = range(min(images.count, pool.count + len(images.missing)))
            readable = [i for i in seen if i not in images.missing]
            number = min(len(readable), ADM_IMAGES)
            chosen = [readable[i * len(readable) // number] for i in range(number)]
            shape = (number, *images.shape[1:], 3)
            _add(archive, "arr_0", shape, np.dtype(np.uint8), _pixels(images, chosen))


def _layout(arrays: Npz) -> str:
    """Who writes such files. Raises GenkitError where nobody does."""
    if "format" in arrays:
        named = _text(arrays, "format")
        if named not in FORMATS:
            raise GenkitError(
                f"{arrays.path} has format {named[:40]!r}; known: {', '.join(FORMATS)}; a newer genkit may read it"
            )
        return named
    if "mu" in arrays or "sigma" in arrays:
        if "net_sha256" in arrays:
            return "genkit"
        return "adm" if "mu_s" in arrays or "arr_0" in arrays else "fid"
    if "m2" in arrays or "s2" in arrays:
        return "lucidrains"
    if "arr_0" in arrays:
        return "images"
    raise GenkitError(
        f"{arrays.path} holds {arrays.found}; statistics need mu [D] and sigma [D, D], or m2 and s2; images need arr_0"
    )


def _moments(arrays: Npz, mu_key: str, sigma_key: str) -> tuple[Tensor, Tensor]:
    """Mean and covariance, checked."""
    path = arrays.path
    for key in (mu_key, sigma_key):
        if key not in arrays:
            raise GenkitError(f"{path} holds {arrays.found}; statistics need {mu_key} [D] and {sigma_key} [D, D]")
        if arrays.headers[key].dtype.kind not in "fiu":
            raise GenkitError(f"{path}: {key} is {arrays.headers[key].dtype}, not real numbers")
    mu_shape, sigma_shape = arrays.headers[mu_key].shape, arrays.headers[sigma_key].shape
    if len(mu_shape) != 1 or not mu_shape[0] or sigma_shape != mu_shape * 2:
        raise GenkitError(
            f"{path}: {mu_key} has shape {mu_shape} and {sigma_key} {sigma_shape}; expected [D] and [D, D]"
        )
    mu, sigma = (torch.from_numpy(arrays[key].astype(np.float64)) for key in (mu_key, sigma_key))
    if not (mu.isfinite().all() and sigma.isfinite().all()):
        raise GenkitError(f"{path}: {mu_key} or {sigma_key} is not finite")
    # Single precision sums leave differences of 1e-7 of the largest value.
    if bool(((sigma - sigma.T).abs() > 1e-5 * sigma.abs().max()).any()) or bool((sigma.diagonal() < 0).any()):
        raise GenkitError(
            f"{path}: {sigma_key} is not a covariance: it must be symmetric and not negative on its diagonal"
        )
    return mu, sigma / 2 + sigma.T / 2


def _features(arrays: Npz, moments: dict[str, Moments], count: int) -> Tensor:
    header = arrays.headers["features"]
    dim = len(moments["pool"].mu)
    if header.dtype != np.float32 or header.shape != (count, dim):
        raise GenkitError(
            f"{arrays.path}: features are {header.dtype} {list(header.shape)}; mu and count say float32 {[count, dim]}"
        )
    return torch.from_numpy(arrays.map("features", "c"))


def _text(arrays: Npz, key: str) -> str:
    """A line of text, empty where there is none."""
    if key not in arrays:
        return ""
    header = arrays.headers[key]
    if header.shape != () or header.dtype.kind != "U" or header.dtype.itemsize > 1 << 16:
        raise GenkitError(f"{arrays.path}: {key} is {header.dtype} {list(header.shape)}, not a short text")
    try:
        return " ".join(str(arrays[key]).split())
    except ValueError:  # numbers that are no characters
        raise GenkitError(f"{arrays.path}: {key} is not text") from None


def _count(arrays: Npz) -> int:
    if "count" not in arrays:
        return 0
    header = arrays.headers["count"]
    if header.shape != () or header.dtype.kind not in "iu" or (count := int(arrays["count"])) < 0:
        raise GenkitError(f"{arrays.path}: count is {header.dtype} {list(header.shape)}, not a number of images")
    return count


def _pixels(images: Images, chosen: list[int]) -> Iterator[np.ndarray]:
    """The chosen images as [B, Y, X, 3] uint8, a batch at a time: 10,000 of 256x256 are 2 GB."""
    for start in range(0, len(chosen), 64):
        x, _ = images.take(chosen[start : start + 64])
        yield to_uint8(x.expand(-1, 3, -1, -1)).numpy()


def _add(
    archive: zipfile.ZipFile, key: str, shape: tuple[int, ...], dtype: np.dtype, blocks: Iterator[np.ndarray]
) -> None:
    """An array as numpy.savez writes it, in blocks of its first axis."""
    # A date of its own would give the same content another hash each time.
    with archive.open(zipfile.ZipInfo(f"{key}.npy"), "w", force_zip64=True) as member:
        text = repr({"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape})
        assert archive.fp is not None
        before = archive.fp.tell() + 10  # magic, version and length of the text
        text += " " * (-(before + len(text) + 1) % _ALIGNED) + "\n"
        member.write(np.lib.format.magic(1, 0) + len(text).to_bytes(2, "little") + text.encode("latin1"))
        written = 0
        for block in blocks:
            member.write(np.ascontiguousarray(block).data)
            written += block.size
    if written != math.prod(shape):  # a dataset may leave images out that it cannot decode
        raise GenkitError(
            f"{key}: {written // math.prod(shape[1:])} of {shape[0]} images could be read; remove the others"
        )


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Any]:
    """A file that takes the place of `path` when it is whole. (Too large to be held in memory, as genkit.files wants it.)"""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
