"""The ids of many images to the bytes of a file and back, by whichever prior."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from genkit.codec import adaptive, container, lanes, memoryless
from genkit.codec.damaged import DamagedError
from genkit.codec.model import Model
from genkit.codec.stream import Ints
from genkit.console import Progress
from genkit.errors import GenkitError

_ChunkDecoder = Callable[[range, list[int], list[bytes | None]], list[Ints]]


def encode(
    header: container.Header, ids: Sequence[Ints], prior: str, classes: Callable[[], Ints], model: Model | None
) -> bytes:
    """The bytes of a file.

    Args:
        header: of the images; its prior and table are filled in here.
        ids: [Q, *grid] int64 of each image.
        prior: one of container.PRIORS.
        classes: gives [Q, S], the class of every code (see adaptive.classes_of); called for the prior "adaptive".
        model: for the prior "model".
    """
    chunks = [[ids[i] for i in chunk] for chunk in header.chunks()]
    if prior == "adaptive":
        learner = adaptive.Adaptive(classes())
        return container.write(
            replace(header, prior=prior, table=learner.table), [[learner.encode(chunk)] for chunk in chunks]
        )
    if prior == "model":
        assert model is not None
        with Progress(len(ids), "images", "code by the generator") as progress:
            coded = [model.encode(chunk, progress.advance) for chunk in chunks]
        return container.write(replace(header, prior=prior, table=model.table), coded)
    S = header.codebook_size
    coder = memoryless.uniform(S) if prior == "uniform" else memoryless.static(ids, S)
    coded = [coder.encode(chunk, header.packets) for chunk in chunks]
    return container.write(replace(header, prior=prior, table=coder.table), coded)


def decode(
    file: container.File,
    wanted: Sequence[int],
    classes: Callable[[], Ints],
    model: Callable[[int], Model],
) -> list[Ints]:
    """ids [Q, *grid] of the wanted images, -1 where a packet was lost. Other chunks are neither decoded nor checked.

    Args:
        wanted: numbers of images, in rising order.
        classes: as in `encode`.
        model: gives the Model for a number of groups; called for the prior "model".

    Raises: GenkitError naming the file for bytes that are damaged, or that were coded by another model or on a machine that computes otherwise.
    """
    asked = set(wanted)
    found: dict[int, Ints] = {}
    try:
        decode_chunk = _chunk_decoder(file.header, classes, model)
        for number, chunk in enumerate(file.chunks):
            own = [i for i in chunk if i in asked]
            if own:
                found |= zip(own, decode_chunk(chunk, own, file.lanes(number)), strict=True)
    except DamagedError as error:
        raise GenkitError(f"{file.name} {error}") from None
    return [found[i] for i in wanted]


def _chunk_decoder(
    header: container.Header, classes: Callable[[], Ints], model: Callable[[int], Model]
) -> _ChunkDecoder:
    """What turns (a chunk, the wanted images of it, its lanes) into their ids."""
    Q, S, table = header.num_levels, header.codebook_size, header.table

    if header.prior == "adaptive":
        learner = adaptive.Adaptive(classes())
        if learner.table != table:
            raise DamagedError(
                "cannot be decoded here: this machine groups the tokenizer's codes otherwise; encode with --prior static"
            )

        def by_neighbours(chunk: range, own: list[int], coded: list[bytes | None]) -> list[Ints]:
            (stream,) = _whole(coded)
            ids = learner.decode(stream, [header.grids[i] for i in chunk], own[-1] - chunk[0] + 1)
            return [ids[i - chunk[0]] for i in own]

        return by_neighbours

    if header.prior == "model":
        if len(table) != 9 or not table[8]:
            raise DamagedError("does not say how its generator was used; the file is damaged")
        generator = model(table[8])
        if generator.table != table:
            raise DamagedError(
                f"was coded with generator {table[:8].hex()}, the one given is {generator.table[:8].hex()}; "
                "give --prior the run, the checkpoint and the weights (averaged or --raw) that encoded it"
            )

        def by_generator(chunk: range, own: list[int], coded: list[bytes | None]) -> list[Ints]:
            runs = [chunk[i : i + lanes.STREAM_IMAGES] for i in range(0, len(chunk), lanes.STREAM_IMAGES)]
            needed = [
                (run, lane) for run, lane in zip(runs, _whole(coded), strict=True) if not set(own).isdisjoint(run)
            ]
            ids: dict[int, Ints] = {}
            with Progress(sum(len(run) for run, _ in needed), "images", "decode by the generator") as progress:
                for run, lane in needed:
                    found = generator.decode(lane, [header.grids[i] for i in run], Q, progress.advance)
                    ids |= zip(run, found, strict=True)
            return [ids[i] for i in own]

        return by_generator

    coder = memoryless.uniform(S) if header.prior == "uniform" else memoryless.read_static(table, Q, S)

    def by_counts(chunk: range, own: list[int], coded: list[bytes | None]) -> list[Ints]:
        ids = coder.decode(coded, [header.grids[i] for i in chunk], header.packets, Q)
        return [ids[i - chunk[0]] for i in own]

    return by_counts


def _whole(coded: list[bytes | None]) -> list[bytes]:
    """Lanes of a file without packets: those are there, or the chunk was refused."""
    found = [lane for lane in coded if lane is not None]
    assert len(found) == len(coded)
    return found
