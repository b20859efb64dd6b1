"""What was computed of a reference set, kept, so that a second evaluation does not pass the same images through the same net again.

Entries are safetensors files in $GENKIT_CACHE/references, else ~/.cache/genkit/references. An entry is found by everything it depends on and by
nothing else: another image, weight, layer, count or version of what computes is another entry. The folder may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
from pathlib import Path

import PIL
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from genkit import __version__, files

VERSION = 1  # to be raised when anything between an image file and its features changes
MAX_ENTRY = 512 << 20  # bytes; 50,000 Inception vectors are 410 MB, larger sets are not kept
MAX_TOTAL = 4 << 30  # bytes of all entries; those that were not used for longest go first

log = logging.getLogger("genkit.metrics")


def load(
    images_sha: str, net_sha: str, net_name: str, layer: str, kind: str, count: int, device: str = "cpu"
) -> dict[str, Tensor] | None:
    """A state that was saved under the same words; None = compute it."""
    path, key = _place(images_sha, net_sha, net_name, layer, kind, count, device)
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("key") != key:
                return None
            state = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError):  # there is none, or its end is missing
        return None
    with contextlib.suppress(OSError):
        os.utime(path)
    return state


def save(
    state: dict[str, Tensor],
    images_sha: str,
    net_sha: str,
    net_name: str,
    layer: str,
    kind: str,
    count: int,
    device: str = "cpu",
) -> None:
    """Keep the state of a FeatureSums or FeatureRows that has seen every image; one of more than MAX_ENTRY bytes is not kept.

    Only for images whose hash covers every pixel (Images.is_exact). A folder that cannot be written to is logged, and nothing else.

    Args:
        images_sha: Images.sha.
        net_sha, net_name: of the FeatureNet.
        kind: of collection, the name of its class.
        count: number of images.
        device: on what kind of device the net ran: rounding differs.
    """
    if sum(value.nbytes for value in state.values()) > MAX_ENTRY:
        return
    path, key = _place(images_sha, net_sha, net_name, layer, kind, count, device)
    try:
        files.write_bytes(path, to_bytes({name: value.contiguous() for name, value in state.items()}, {"key": key}))
        _shrink(path.parent)
    except OSError as error:
        _tell(str(error))


def folder() -> Path:
    return Path(os.environ.get("GENKIT_CACHE") or Path.home() / ".cache" / "genkit") / "references"


def _place(*words: str | int) -> tuple[Path, str]:
    """The file of an entry, and its full key, which is kept inside."""
    versions = [VERSION, __version__, torch.__version__, PIL.__version__]
    key = json.dumps([*versions, *words])
    return folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}.safetensors", key


@functools.cache
def _tell(reason: str) -> None:
    """Once: every metric would say the same."""
    log.warning("features of the reference are not kept for the next time: %s", reason)


def _shrink(folder: Path) -> None:
    """Remove entries, the least recently used first, until they take MAX_TOTAL bytes."""
    entries = []
    for path in folder.glob("*.safetensors"):
        with contextlib.suppress(OSError):  # another process has removed it
            entries.append((path.stat().st_mtime, path.stat().st_size, path))
    total = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if total <= MAX_TOTAL:
            break
        path.unlink(missing_ok=True)
        total -= size
