"""Images <-> a file of token ids: what `genkit encode` and `genkit decode` do.

A codes file is an npz without pickles: `ids` [N, Q, *grid] uint16 or int32, `names` [N], `shape` (C, Y, X) of the
images, `codebook_size`, `fingerprint` of the tokenizer and `version`. Only the tokenizer that wrote the ids can read
them, so the file names it.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genkit import files, registry
from genkit.console import Progress
from genkit.data.folder import EXTENSIONS, Folder
from genkit.errors import GenkitError, UsageError

VERSION = 1


def tokenizer_fingerprint(tokenizer: torch.nn.Module) -> str:
    """sha256 over names, types, shapes and bytes of the weights, in hex."""
    found = hashlib.sha256()
    for name, value in sorted(tokenizer.state_dict().items()):
        data = value.detach().cpu().contiguous()
        found.update(f"{name} {data.dtype} {tuple(data.shape)}\n".encode())
        found.update(data.reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def encode(
    run: str, images: str, out: str = "codes.npz", *, device: str | None = None, batch_size: int = 64, ema: bool = True
) -> dict[str, Any]:
    """Encode a folder of images, or one image, with the tokenizer of a run.

    Args:
        out: the codes file; it appears whole or not at all.
        ema: averaged weights where the run has them; decode with the same choice.

    Returns: images; skipped, the corrupt files (name -> reason); tokens per image; codebook_size; bits_per_pixel of ids
        of fixed length; entropy_bits_per_pixel, the order-0 entropy of the ids of this file: what a coder that knows
        their frequencies needs; out.

    Raises: UsageError when the tokenizer is continuous; GenkitError when there is no image or the sizes do not fit.
    """
    from genkit.pipeline import open_run

    pipeline = open_run(run, ema=ema, device=device)
    tokenizer = pipeline.tokenizer
    if not tokenizer.num_levels:
        raise UsageError(f"the tokenizer of {run} makes continuous latents; encode needs one that makes ids (vq, ...)")
    shape = _image_shape(pipeline)
    parts, names = [], []
    with _as_folder(Path(images)) as folder:
        dataset = Folder(path=str(folder), size=shape[1:], channels=1 if shape[0] == 1 else 3)
        with Progress(len(dataset), "images", "encode") as progress:
            for x, keys in _batches(dataset, batch_size):
                with torch.inference_mode():
                    parts.append(tokenizer.encode(x.to(pipeline.device)).ids.cpu())
                names.extend(keys)
                progress.advance(len(keys))
    if not names:
        raise GenkitError(
            f"none of the {len(dataset)} images of {images} can be decoded; run: genkit data check {images}"
        )
    ids = torch.cat(parts)  # [N, Q, *grid]
    size = tokenizer.codebook_size
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        ids=ids.numpy().astype(np.uint16 if size <= 2**16 else np.int32),
        names=np.array(names, dtype=np.str_),
        shape=np.array(shape, dtype=np.int64),
        codebook_size=np.int64(size),
        fingerprint=np.str_(tokenizer_fingerprint(tokenizer)),
        version=np.int64(VERSION),
    )
    files.write_bytes(Path(out), buffer.getvalue())
    tokens = ids[0].numel()
    pixels = shape[1] * shape[2]
    return {
        "images": len(ids),
        "skipped": dataset.skipped,
        "tokens": tokens,
        "codebook_size": size,
        "bits_per_pixel": tokens * math.log2(size) / pixels,
        "entropy_bits_per_pixel": entropy(ids, size) * tokens / pixels,
        "out": out,
    }


def decode(
    run: str, codes: str, out: str = "decoded", *, device: str | None = None, batch_size: int = 64, ema: bool = True
) -> dict[str, Any]:
    """Decode a codes file into PNGs named like the images it was made of.

    Raises: GenkitError for a damaged file, another version, or another tokenizer than the one of the run.
    """
    from genkit.images import to_pil, write_png
    from genkit.pipeline import open_run

    stored = read(codes)
    pipeline = open_run(run, ema=ema, device=device)
    tokenizer = pipeline.tokenizer
    fingerprint = tokenizer_fingerprint(tokenizer)
    if stored["fingerprint"] != fingerprint:
        raise GenkitError(
            f"{codes} was written by tokenizer {stored['fingerprint'][:12]}, {run} holds {fingerprint[:12]}; "
            "decode with the run, the checkpoint and the weights (averaged or --raw) that encoded it"
        )
    ids = stored["ids"]
    if ids.max() >= tokenizer.codebook_size or ids.shape[1] != tokenizer.num_levels:
        raise GenkitError(f"{codes} holds ids that {run} does not know; the file is damaged, encode again")
    paths = [Path(out) / name for name in _file_names(stored["names"])]
    with Progress(len(ids), "images", "decode") as progress:
        for first in range(0, len(ids), batch_size):
            chosen = torch.from_numpy(ids[first : first + batch_size]).to(pipeline.device)
            with torch.inference_mode():
                x = tokenizer.decode(tokenizer.codes(chosen)).clamp(-1, 1)
            for path, image in zip(paths[first : first + batch_size], to_pil(x), strict=True):
                write_png(path, image)
            progress.advance(len(chosen))
    return {"images": len(ids), "out": out}


def read(path: str) -> dict[str, Any]:
    """A codes file: ids [N, Q, *grid] int64 array, names, shape, codebook_size, fingerprint.

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
        if ids.ndim < 3 or not len(ids) or len(found["names"]) != len(ids) or ids.min() < 0 or ids.max() >= size:
            raise ValueError("ids, names and codebook_size do not belong together")
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


def entropy(ids: Tensor, codebook_size: int) -> float:
    """Bits per token if every level's ids [N, Q, *grid] are coded by their own frequencies, averaged over levels."""
    bits = 0.0
    for level in ids.unbind(1):
        p = torch.bincount(level.flatten(), minlength=codebook_size).double() / level.numel()
        bits -= float((p[p > 0] * p[p > 0].log2()).sum())
    return bits / ids.shape[1] + 0.0  # + 0.0 turns -0.0 into 0.0


def _image_shape(pipeline: Any) -> tuple[int, int, int]:
    """(C, Y, X) of the images the run was trained on; a data section without a size is asked for its own."""
    data = pipeline.run_config["data"]
    size = data.get("size") or registry.build("data", data).info.shape[1:]
    height, width = (size, size) if isinstance(size, int) else size
    return pipeline.tokenizer.config["image_channels"], height, width


@contextmanager
def _as_folder(path: Path) -> Iterator[Path]:
    """The folder itself, or for the length of the block a folder that holds one file."""
    if not path.is_file():
        yield path
        return
    if path.suffix.lower() not in EXTENSIONS:
        raise UsageError(f"{path} is no image; known: {', '.join(EXTENSIONS)}")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / path.name).symlink_to(path.resolve())
        yield Path(folder)


def _batches(dataset: Folder, batch_size: int) -> Iterator[tuple[Tensor, list[str]]]:
    """Images [B, C, Y, X] that can be decoded and their names, in order."""
    for first in range(0, len(dataset), batch_size):
        batch = dataset.__getitems__(range(first, min(first + batch_size, len(dataset))))
        if batch["key"]:
            yield batch["x"], batch["key"]


def _file_names(names: list[str]) -> list[str]:
    """PNG names, one for each image; a codes file from elsewhere cannot name a path outside the output folder."""
    taken: set[str] = set()
    chosen = []
    for name in names:
        parts = [part for part in PurePosixPath(name).with_suffix("").parts if part not in ("..", "/")]
        stem = "/".join(re.sub(r"[^\w.\- ]", "_", part) for part in parts) or "image"
        number, unique = 1, stem
        while unique in taken:
            number += 1
            unique = f"{stem}-{number}"
        taken.add(unique)
        chosen.append(f"{unique}.png")
    return chosen
