"""Images <-> a file of coded token ids: what `genkit encode` and `genkit decode` do.

Only the tokenizer that wrote the ids can read them, so the file names it by a fingerprint: the hash of its weights. Its config is left out on purpose: it
gains keys as options are added, and files must stay readable. The format is genkit.codec.container; a name that ends
in .npz gives plain arrays instead (genkit.codec.npz).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from genkit import files, registry
from genkit.codec import adaptive, coder, container, lanes, lost, npz, pictures, rate
from genkit.codec.model import Model
from genkit.codec.npz import read as read  # a part of this module's interface
from genkit.codec.stream import MAX_SYMBOLS, Ints
from genkit.console import Progress
from genkit.data.folder import scan
from genkit.data.memory import to_float
from genkit.errors import GenkitError, UsageError, nearest
from genkit.weights import module_sha256

PRIORS = ("auto", "uniform", "static", "adaptive")  # words; anything else is the run of a generator


@dataclass
class _Encoded:
    """What became of a folder of images, in order."""

    names: list[str] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)  # before padding
    ids: list[Ints] = field(default_factory=list)  # [Q, *grid] each
    skipped: dict[str, str] = field(default_factory=dict)  # corrupt files, name -> reason


def encode(
    run: str,
    images: str,
    out: str = "codes.gtk",
    *,
    prior: str = "auto",
    codes: int | None = None,
    packets: str = "none",
    pad: bool = False,
    fit: bool = False,
    device: str | None = None,
    batch_size: int = 64,
    ema: bool = True,
) -> dict[str, Any]:
    """Encode a folder of images, or one image, with the tokenizer of a run.

    Args:
        out: the codes file; it appears whole or not at all.
        prior: how probable ids are taken to be. "uniform": all alike. "static": by their counts in this file. "adaptive": by their neighbours, as
            learned while coding. "auto": whichever of these makes the smallest file. Else the run of a masked generator of the same tokens; the
            same run decodes.
        codes: cluster the codebook into this many codes first: fewer bits, coarser images, no training.
        packets: "rows" or "interleaved" splits every image into packets with a checksum each, so that what is lost stays local; "none".
        pad: extend images by reflection to sides the tokenizer takes; decoding removes it.
        fit: crop and resize every image to the size the tokenizer was trained on. An npz always does.
        ema: averaged weights where the run has them; decode with the same choice.

    Returns: images; skipped, the corrupt files (name -> reason); tokens per image; codebook_size; out; and over all pixels bits_per_pixel of
        the whole file, payload_bits_per_pixel without its header, fixed_bits_per_pixel of ids of fixed length, entropy_bits_per_pixel by
        the order-0 entropy of the ids. Also prior, bytes, and tried: bytes of the file by each prior that was tried. Of an npz,
        bits_per_pixel are those of fixed length.

    Raises: UsageError when the tokenizer is continuous, an option does not fit it, or images have sides or channels it does not take;
        GenkitError when there is no image.
    """
    from genkit.pipeline import open_run

    if batch_size < 1:
        raise UsageError(f"batch_size={batch_size} must be at least 1")
    is_npz = out.endswith(".npz")
    if packets not in lanes.PACKETS:
        raise UsageError(f"--packets {packets}: {nearest(packets, lanes.PACKETS)}")
    if is_npz and (prior != "auto" or codes is not None or packets != "none" or pad):
        raise UsageError(
            f"{out}: an npz holds plain ids; --prior, --codes, --packets and --pad need a name that ends in .gtk"
        )
    if packets != "none" and prior not in ("auto", "uniform", "static"):
        raise UsageError(
            f"--packets {packets} with --prior {prior}: a packet must be readable without the others; use uniform or static"
        )
    pipeline = open_run(run, ema=ema, device=device)
    tokenizer = pipeline.tokenizer
    if not tokenizer.num_levels:
        raise UsageError(f"the tokenizer of {run} makes continuous latents; encode needs one that makes ids (vq, ...)")
    fingerprint = module_sha256(tokenizer)
    clusters = b""
    if codes is not None:
        tokenizer = rate.coarser(tokenizer, codes)
        clusters = rate.table_checksum(tokenizer)
    if tokenizer.codebook_size > MAX_SYMBOLS:
        raise UsageError(f"the tokenizer of {run} has {tokenizer.codebook_size} codes; at most {MAX_SYMBOLS} are coded")
    model = None if prior in PRIORS else _model(prior, fingerprint, codes, ema)
    found = _encode_images(pipeline, tokenizer, images, batch_size, pad=pad, fit=fit or is_npz)
    size = tokenizer.codebook_size
    pixels = sum(y * x for y, x in found.sizes)
    count = sum(ids.size for ids in found.ids)
    fixed = count * math.log2(size) / pixels
    report = {
        "images": len(found.ids),
        "skipped": found.skipped,
        "tokens": count // len(found.ids),
        "codebook_size": size,
        "bits_per_pixel": fixed,
        "fixed_bits_per_pixel": fixed,
        "entropy_bits_per_pixel": entropy(found.ids, size) * count / pixels,
        "out": out,
    }
    if is_npz:
        npz.write(out, np.stack(found.ids), found.names, _image_shape(pipeline), size, fingerprint)
        return report
    header = container.Header(
        bytes.fromhex(fingerprint)[:8],
        len(found.ids[0]),
        size,
        clusters,
        "uniform",
        b"",
        packets,
        tuple(found.names),
        tuple(found.sizes),
        tuple(ids.shape[1:] for ids in found.ids),
    )
    _check_limits(header)
    tried = {
        word: coder.encode(header, found.ids, word, lambda: _classes(tokenizer, len(header.grids[0])), model)
        for word in _priors_to_try(prior, packets)
    }
    chosen = min(tried, key=lambda word: len(tried[word]))
    files.write_bytes(Path(out), tried[chosen])
    payload = container.read(tried[chosen], out).payload_size
    return report | {
        "prior": chosen,
        "bytes": len(tried[chosen]),
        "bits_per_pixel": 8 * len(tried[chosen]) / pixels,
        "payload_bits_per_pixel": 8 * payload / pixels,
        "tried": {word: len(data) for word, data in tried.items()},
    }


def decode(
    run: str,
    codes: str,
    out: str = "decoded",
    *,
    prior: str | None = None,
    only: Sequence[str] | None = None,
    restore: str | None = None,
    lose: float = 0.0,
    seed: int = 0,
    device: str | None = None,
    batch_size: int = 64,
    ema: bool = True,
) -> dict[str, Any]:
    """Decode a codes file into PNGs named like the images it was made of.

    Args:
        prior: the run of the generator the file was coded with, if it was.
        only: names of images to decode; None = all.
        restore: what fills in ids that were lost: the run of a masked generator of the same tokens, or "nearest" to copy the nearest known id.
        lose: lose this fraction of the packets, or of the ids of a file without packets, to try `restore`.
        seed: decides which are lost.

    Returns: images, out, lost (ids that were missing) and ids (in all).

    Raises: GenkitError for a damaged file, another version, another tokenizer than the one of the run, or lost ids and no `restore`.
    """
    from genkit.pipeline import open_run

    if batch_size < 1:
        raise UsageError(f"batch_size={batch_size} must be at least 1")
    if not 0 <= lose <= 1:
        raise UsageError(f"--lose {lose} must be in [0, 1]")
    stored = read_codes(codes)
    pipeline = open_run(run, ema=ema, device=device)
    tokenizer, fingerprint = pipeline.tokenizer, module_sha256(pipeline.tokenizer)
    if isinstance(stored, container.File):
        wanted = _wanted(stored.header.names, only, codes)
        tokenizer = _check_tokenizer(stored, tokenizer, fingerprint, run)
        header = stored.header
        names, sizes = [header.names[i] for i in wanted], [header.sizes[i] for i in wanted]
        if header.prior == "model" and prior is None:
            raise UsageError(
                f"{codes} was coded with generator {header.table[:8].hex()}; name its run with --prior GENERATOR_RUN"
            )
        ids = coder.decode(
            stored,
            wanted,
            lambda: _classes(tokenizer, len(header.grids[0])),
            lambda groups: _model(str(prior), fingerprint, None, ema, num_groups=groups),
        )
        packets, is_clustered = header.packets, bool(header.clusters)
    else:
        if stored["fingerprint"] != fingerprint:
            raise GenkitError(_another(codes, stored["fingerprint"], run, fingerprint))
        if stored["ids"].max() >= tokenizer.codebook_size or stored["ids"].shape[1] != tokenizer.num_levels:
            raise GenkitError(f"{codes} holds ids that {run} does not know; the file is damaged, encode again")
        wanted = _wanted(stored["names"], only, codes)
        names, ids = [stored["names"][i] for i in wanted], [stored["ids"][i] for i in wanted]
        sizes, packets, is_clustered = [stored["shape"][1:]] * len(ids), "none", False
    if lose:
        ids = lost.lose(ids, lose, seed, packets)
    num_lost = sum(int((one < 0).sum()) for one in ids)
    total = sum(one.size for one in ids)
    if num_lost:
        if restore is None:
            raise GenkitError(
                f"{codes}: {num_lost} of {total} ids are lost; fill them in with --restore GENERATOR_RUN or --restore nearest"
            )
        ids = _filled(ids, restore, fingerprint, is_clustered, ema, device, batch_size)
    _decode_images(pipeline, tokenizer, ids, names, sizes, Path(out), batch_size)
    return {"images": len(ids), "out": out, "lost": num_lost, "ids": total}


def read_codes(path: str) -> container.File | dict[str, Any]:
    """A codes file of either kind. Raises GenkitError in one line for a file that is missing, damaged or of a newer version."""
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise GenkitError(f"no such codes file: {path}; `genkit encode` writes one") from None
    except OSError as error:
        raise GenkitError(f"{path} cannot be read: {error.strerror}") from None
    return npz.read(path) if data[:2] == b"PK" or path.endswith(".npz") else container.read(data, path)


def entropy(images: Iterable[Ints], codebook_size: int) -> float:
    """Bits per id if every level's ids [Q, *grid] are coded by their own frequencies over all images, averaged over levels."""
    counts: Any = sum(
        np.stack([np.bincount(level.ravel(), minlength=codebook_size) for level in ids]) for ids in images
    )
    p = torch.from_numpy(counts / counts.sum(1, keepdims=True))
    return float(-torch.special.xlogy(p, p).sum(1).mean() / math.log(2)) + 0.0  # + 0.0 turns -0.0 into 0.0


# Images to ids and back


def _encode_images(pipeline: Any, tokenizer: Any, images: str, batch_size: int, *, pad: bool, fit: bool) -> _Encoded:
    found = _Encoded()
    channels = tokenizer.config["image_channels"]
    if channels not in (1, 3):
        raise UsageError(
            f"this tokenizer takes grids of vectors of {channels} numbers, no images; use its encode and decode from Python (genkit.AutoTokenizer)"
        )
    with pictures.as_folder(Path(images)) as folder:
        keys = scan(str(folder))
        readable = pictures.read(
            folder,
            keys,
            channels=channels,
            multiple=getattr(tokenizer, "region", tokenizer.stride),
            size=_image_shape(pipeline)[1:] if fit else None,
            pad=pad,
            skipped=found.skipped,
        )
        with Progress(len(keys), "images", "encode") as progress:
            for batch in _alike(((picture, picture.pixels) for picture in readable), batch_size):
                x = to_float(torch.from_numpy(np.stack([pixels for _, pixels in batch])))
                try:
                    with torch.inference_mode():
                        ids = tokenizer.encode(x.to(pipeline.device)).ids.cpu().numpy()
                except UsageError as error:
                    # Only the tokenizer knows what it takes; it does not know which image this is, or what helps.
                    raise UsageError(
                        f"{batch[0][0].name}: {error}; --fit resizes images to the size of its training"
                    ) from None
                for (picture, _), own in zip(batch, ids, strict=True):
                    found.names.append(picture.name)
                    found.sizes.append(picture.size)
                    found.ids.append(own)
                progress.advance(len(batch))
    if not found.names:
        raise GenkitError(f"none of the {len(keys)} images of {images} can be decoded; run: genkit data check {images}")
    return found


def _decode_images(
    pipeline: Any,
    tokenizer: Any,
    ids: list[Ints],
    names: list[str],
    sizes: Sequence[tuple[int, int]],
    out: Path,
    batch_size: int,
) -> None:
    from genkit.images import to_pil, write_png

    targets = zip([out / name for name in pictures.file_names(names)], sizes, strict=True)
    with Progress(len(ids), "images", "decode") as progress:
        for batch in _alike(zip(targets, ids, strict=True), batch_size):
            chosen = torch.from_numpy(np.stack([own for _, own in batch])).to(pipeline.device)
            try:
                with torch.inference_mode():
                    x = tokenizer.decode(tokenizer.codes(chosen)).clamp(-1, 1).cpu()
            except UsageError as error:
                raise GenkitError(f"the codes do not fit the tokenizer: {error}; the file is damaged") from None
            for ((path, (height, width)), _), image in zip(batch, x, strict=True):
                if image.shape[1] < height or image.shape[2] < width:
                    raise GenkitError(f"the codes of {path.name} make fewer pixels than it has; the file is damaged")
                write_png(path, to_pil(image[None, :, :height, :width])[0])
            progress.advance(len(batch))


def _alike(items: Iterable[tuple[Any, NDArray[Any]]], batch_size: int) -> Iterator[list[tuple[Any, NDArray[Any]]]]:
    """Runs of (anything, array) with arrays of one shape, at most batch_size long."""
    batch: list[tuple[Any, NDArray[Any]]] = []
    for item in items:
        if batch and (len(batch) == batch_size or item[1].shape != batch[0][1].shape):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


# What is used beside the tokenizer


def _priors_to_try(word: str, packets: str) -> tuple[str, ...]:
    if word != "auto":
        return (word if word in PRIORS else "model",)
    return ("uniform", "static") if packets != "none" else ("uniform", "static", "adaptive")


def _classes(tokenizer: Any, axes: int) -> Ints:
    """[Q, S]: the classes of every level's codes."""
    return np.stack([adaptive.classes_of(vectors) for vectors in rate.code_vectors(tokenizer, axes)])


def _generator(run: str, fingerprint: str, option: str, ema: bool, device: str | None) -> Any:
    """The pipeline of a generator of the same tokens. Raises UsageError for another."""
    from genkit.pipeline import open_run

    pipeline = open_run(run, ema=ema, device=device)
    if not hasattr(pipeline, "backbone"):
        words = f"; words: {', '.join(PRIORS)}" if option == "--prior" else ""
        raise UsageError(f"{option} {run}: that is a tokenizer's run, a masked generator's is needed{words}")
    own = module_sha256(pipeline.tokenizer)
    if own != fingerprint:
        raise UsageError(
            f"{option} {run}: that generator makes tokens of tokenizer {own[:16]}, the codes are of {fingerprint[:16]}"
        )
    return pipeline


def _model(run: str, fingerprint: str, codes: int | None, ema: bool, **options: int) -> Model:
    if codes is not None:
        raise UsageError(
            f"--codes {codes} with --prior {run}: the generator knows the codebook as it was; use --prior auto"
        )
    if not Path(run).exists():
        raise UsageError(f"--prior {run}: no such run, and no word for a prior; {nearest(run, PRIORS)}")
    pipeline = _generator(run, fingerprint, "--prior", ema, "cpu")
    return Model(pipeline, bytes.fromhex(module_sha256(pipeline.backbone))[:8], **options)


def _filled(
    ids: list[Ints], how: str, fingerprint: str, is_clustered: bool, ema: bool, device: str | None, batch_size: int
) -> list[Ints]:
    """The ids without holes."""
    if how == "nearest":
        return [lost.by_nearest(one) for one in ids]
    if is_clustered:
        raise UsageError(
            f"--restore {how}: the generator does not know clustered codes (--codes); use --restore nearest"
        )
    pipeline = _generator(how, fingerprint, "--restore", ema, device)
    filled: list[Ints] = []
    with Progress(len(ids), "images", "restore") as progress:
        for batch in _alike(((None, own) for own in ids), batch_size):
            holes = torch.from_numpy(np.stack([own for _, own in batch]))
            filled.extend(lost.by_generator(pipeline, holes).numpy())
            progress.advance(len(batch))
    return filled


# Checks


def _check_tokenizer(stored: container.File, tokenizer: Any, fingerprint: str, run: str) -> Any:
    """The tokenizer that reads the file: the run's, or that with its codes clustered. Raises GenkitError when it is another."""
    header = stored.header
    if header.fingerprint.hex() != fingerprint[:16]:
        raise GenkitError(_another(stored.name, header.fingerprint.hex(), run, fingerprint))
    if header.clusters:
        tokenizer = rate.coarser(tokenizer, header.codebook_size)
        if rate.table_checksum(tokenizer) != header.clusters:
            raise GenkitError(
                f"{stored.name}: clustering the codebook gives other codes here than where it was encoded; encode it again here"
            )
    if (header.num_levels, header.codebook_size) != (tokenizer.num_levels, tokenizer.codebook_size):
        raise GenkitError(f"{stored.name} holds ids that {run} does not know; the file is damaged, encode again")
    return tokenizer


def _another(codes: str, theirs: str, run: str, ours: str) -> str:
    return (
        f"{codes} was written by tokenizer {theirs[:16]}, {run} holds {ours[:16]}; "
        "decode with the run, the checkpoint and the weights (averaged or --raw) that encoded it"
    )


def _check_limits(header: container.Header) -> None:
    """What `container.read` would refuse is not written."""
    largest = max(range(len(header.grids)), key=lambda i: math.prod(header.grids[i]))
    ids = header.num_levels * math.prod(header.grids[largest])
    if ids > container.MAX_IDS:
        raise UsageError(
            f"{header.names[largest]} makes {ids} ids; an image of a codes file has at most {container.MAX_IDS}"
        )
    if len(header.names) > container.MAX_IMAGES:
        raise UsageError(f"{len(header.names)} images; a codes file holds at most {container.MAX_IMAGES}, use several")


def _wanted(names: Sequence[str], only: Sequence[str] | None, codes: str) -> list[int]:
    """Numbers of the images to decode, in the order of the file."""
    if only is None:
        return list(range(len(names)))
    missing = [name for name in only if name not in set(names)]
    if missing:
        raise UsageError(f"{codes} holds no image {missing[0]}; {nearest(missing[0], list(names)[:1000])}")
    return [i for i, name in enumerate(names) if name in set(only)]


def _image_shape(pipeline: Any) -> tuple[int, int, int]:
    """(C, Y, X) of the images the run was trained on; a data section without a size is asked for its own."""
    data = pipeline.run_config["data"]
    size = data.get("size") or registry.build("data", data).info.shape[1:]
    height, width = (size, size) if isinstance(size, int) else size
    return pipeline.tokenizer.config["image_channels"], height, width
