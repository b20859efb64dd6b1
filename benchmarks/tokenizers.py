"""Quantisers of genkit.nn against vector-quantize-pytorch at equal settings, and images per second of whole tokenizers.

`genkit bench tokenizers` times them. `python benchmarks/tokenizers.py [PART OF A NAME]` says by how much the memory of a fresh process grows at most in
two training steps, ours and the peer's.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from genkit.bench import Case
from genkit.nn.binary import BinaryQuantizer
from genkit.nn.quantize import Quantizer
from genkit.nn.scalar import ScalarQuantizer
from genkit.tokenizers.rvq import RVQ
from genkit.tokenizers.vq import VQ

DECAY = 0.99
PEER = "vector-quantize-pytorch"
LEVELS = {1024: (8, 5, 5, 5), 16384: (8, 8, 8, 6, 5)}  # of FSQ, for about as many codes
SHAPES = ((8, 256, 16, 16), (32, 64, 8, 8))

Sides = tuple[Callable[[], Any], Callable[[], Any] | str]


def cases(quick: bool) -> Iterable[Case]:
    """Training steps of the quantiser alone: look-up, statistics, gradient to the input, update of the table."""
    for shape in SHAPES:
        for size in (1024,) if quick else (1024, 16384):
            name = f"{'x'.join(map(str, shape))}, {size // 1024}k codes"
            yield _case(f"vq train step, {name}", 2.0, sides(_input(shape), size))
            if not quick and shape == SHAPES[0] and size == 1024:
                yield _case(f"vq train step, {name}, cosine", 2.0, sides(_input(shape), size, cosine=True))
                yield _case(f"vq train step, {name}, rotation", 2.0, sides(_input(shape), size, gradient="rotation"))
            if (
                size == 1024
            ):  # with 16k codes and 8 levels a step of the peer takes many seconds, all of it in products as above
                yield _case(f"rvq-8 train step, {name}", 2.0, rvq_sides(_input(shape), size, depth=8))
            yield _case(f"fsq train step, {name}", 1.0, fsq_sides(_input(shape), LEVELS[size]))
            yield _case(f"lfq train step, {name}", 1.0, lfq_sides(_input(shape), size))
    count = 10 if quick else 100
    for label, tokenizer in (("vq", VQ(image_channels=3)), ("rvq-4", RVQ(image_channels=3))):
        encode, decode = _whole(tokenizer, count)
        alone = f"nothing to compare with; {count} images"
        yield Case(f"{label} encode, {count} images of 64x64", "-", 1.0, encode, alone)
        yield Case(f"{label} decode, {count} images of 64x64", "-", 1.0, decode, alone)


def _case(name: str, goal: float, both: Sides) -> Case:
    return Case(name, _peer_name(), goal, *both)


def _input(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()


def sides(x: Tensor, codebook_size: int, *, cosine: bool = False, gradient: Any = "straight_through") -> Sides:
    """One training step on x, [B, N, D] or [B, D, Y, X], by us and by the peer, from the same codes.

    Each returns (codes, ids, table after the step).
    """
    is_image = x.ndim == 4
    dim = x.shape[1] if is_image else x.shape[2]
    quantizer = Quantizer(dim=dim, codebook_size=codebook_size, cosine=cosine, gradient=gradient, decay=DECAY).train()
    quantizer.codebook.set_codes(quantizer.codebook.embed.clone())

    def ours() -> tuple[Tensor, Tensor, Tensor]:
        found = quantizer(x.movedim(1, -1) if is_image else x)
        codes = found.codes.movedim(-1, 1) if is_image else found.codes
        _backward(x, codes, found.losses["commitment"].mean())
        quantizer.codebook.after_step()
        return codes, found.ids, quantizer.codebook.embed

    try:
        from vector_quantize_pytorch import VectorQuantize
    except ImportError:
        return ours, _not_installed()
    other = VectorQuantize(
        dim=dim,
        codebook_size=codebook_size,
        use_cosine_sim=cosine,
        accept_image_fmap=is_image,
        decay=DECAY,
        rotation_trick=gradient == "rotation",
    ).train()
    other._codebook.embed.copy_(quantizer.codebook.embed)
    other._codebook.embed_avg.copy_(quantizer.codebook.embed)

    def peer() -> tuple[Tensor, Tensor, Tensor]:
        codes, ids, loss = other(x)
        _backward(x, codes, loss)
        return codes, ids, other._codebook.embed

    return ours, peer


def rvq_sides(x: Tensor, codebook_size: int, *, depth: int) -> Sides:
    """As `sides`, with `depth` levels; x is [B, N, D] or [B, D, Y, X], which the peer cannot read: both get its rows.

    Each returns (codes, ids [B, N, depth], tables after the step [depth, S, D]).
    """
    dim = x.shape[1] if x.ndim == 4 else x.shape[2]

    def rows() -> Tensor:
        return x.flatten(2).mT if x.ndim == 4 else x

    quantizer = Quantizer(dim=dim, codebook_size=codebook_size, depth=depth, decay=DECAY).train()
    quantizer.codebook.set_codes(quantizer.codebook.embed.clone())

    def ours() -> tuple[Tensor, Tensor, Tensor]:
        found = quantizer(rows())
        _backward(x, found.codes, found.losses["commitment"].mean())
        quantizer.codebook.after_step()
        return found.codes, found.ids, quantizer.codebook.embed

    try:
        from vector_quantize_pytorch import ResidualVQ
    except ImportError:
        return ours, _not_installed()
    other = ResidualVQ(
        dim=dim, codebook_size=codebook_size, num_quantizers=depth, decay=DECAY, rotation_trick=False
    ).train()
    for layer, embed in zip(other.layers, quantizer.codebook.embed, strict=True):
        layer._codebook.embed.copy_(embed[None])
        layer._codebook.embed_avg.copy_(embed[None])

    def peer() -> tuple[Tensor, Tensor, Tensor]:
        codes, ids, loss = other(rows())
        _backward(x, codes, loss.mean())
        return codes, ids, other.codebooks

    return ours, peer


def fsq_sides(x: Tensor, levels: tuple[int, ...]) -> Sides:
    """One training step on x [B, D, Y, X] with linear layers to the levels and back. Each returns (codes [B, D, Y, X], ids)."""
    quantizer = ScalarQuantizer(dim=x.shape[1], levels=levels).train()

    def ours() -> tuple[Tensor, Tensor]:
        found = quantizer(x.movedim(1, -1))
        codes = found.codes.movedim(-1, 1)
        _backward(x, codes, None)
        quantizer.use.after_step()
        return codes, found.ids

    try:
        from vector_quantize_pytorch import FSQ
    except ImportError:
        return ours, _not_installed()
    other = FSQ(list(levels), dim=x.shape[1]).train()
    _copy_linear(quantizer, other)

    def peer() -> tuple[Tensor, Tensor]:
        codes, ids = other(x)
        _backward(x, codes, None)
        return codes, ids

    return ours, peer


def lfq_sides(x: Tensor, codebook_size: int) -> Sides:
    """One training step on x [B, D, Y, X] with linear layers to the bits and back, both losses.

    Each returns (codes [B, D, Y, X], ids, sum of the losses).
    """
    quantizer = BinaryQuantizer(dim=x.shape[1], codebook_size=codebook_size, entropy=0.1).train()

    def ours() -> tuple[Tensor, Tensor, Tensor]:
        found = quantizer(x.movedim(1, -1))
        codes = found.codes.movedim(-1, 1)
        loss = (0.25 * found.losses["commitment"] + found.losses["entropy"]).mean()
        _backward(x, codes, loss)
        quantizer.use.after_step()
        return codes, found.ids, loss.detach()

    try:
        from vector_quantize_pytorch import LFQ
    except ImportError:
        return ours, _not_installed()
    other = LFQ(
        dim=x.shape[1], codebook_size=codebook_size, entropy_loss_weight=0.1, commitment_loss_weight=0.25
    ).train()
    _copy_linear(quantizer, other)

    def peer() -> tuple[Tensor, Tensor, Tensor]:
        codes, ids, loss = other(x)
        _backward(x, codes, loss)
        return codes, ids, loss.detach()

    return ours, peer


def _whole(tokenizer: VQ | RVQ, count: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Encoding and decoding of `count` colour images of 64x64, 10 at a time."""
    tokenizer.eval()
    batches = torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(0)).mul_(2).sub_(1).split(10)
    with torch.no_grad():
        ids = [tokenizer.encode(x).ids for x in batches]

    @torch.no_grad()
    def encode() -> None:
        for x in batches:
            tokenizer.encode(x)

    @torch.no_grad()
    def decode() -> None:
        for own in ids:
            assert own is not None
            tokenizer.decode(tokenizer.codes(own))

    return encode, decode


def _backward(x: Tensor, codes: Tensor, loss: Tensor | None) -> None:
    """The gradient of x for a gradient of the codes, here the codes themselves, and a loss of the quantiser."""
    x.grad = None
    ends = (codes,) if loss is None else (codes, loss.sum())
    torch.autograd.backward(ends, (codes.detach(), None)[: len(ends)])


def _copy_linear(ours: nn.Module, theirs: nn.Module) -> None:
    own = {name: value for name, value in ours.state_dict().items() if name.startswith("project_")}
    theirs.load_state_dict(own, strict=False)


def _not_installed() -> str:
    return "not installed; pip install 'genkit-torch[bench]'"


def _peer_name() -> str:
    try:
        return f"{PEER} {version(PEER)}"
    except PackageNotFoundError:
        return PEER


def _memory(part: str) -> None:
    """A line for each case whose name has this part: MiB that the process grows by, ours and theirs."""
    for number, case in enumerate(cases(quick=False)):
        if part in case.name and "train step" in case.name:
            grown = [
                subprocess.run(
                    [sys.executable, __file__, str(number), side], stdout=subprocess.PIPE, text=True, check=True
                )
                for side in ("ours", "peer")
            ]
            ours, peer = (float(done.stdout.split()[-1]) for done in grown)
            print(f"{case.name}: {ours:.0f} MiB, {case.peer_name} {peer:.0f} MiB", flush=True)


def _grow(number: int, side: str) -> None:
    case = next(case for i, case in enumerate(cases(quick=False)) if i == number)
    step = getattr(case, side)
    small = torch.ones(64, 64, requires_grad=True)
    (small @ small).sum().backward()  # what the libraries set up once is nobody's
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is held now
    before = _status("VmRSS")
    step()
    step()
    print(_status("VmHWM") - before)


def _status(word: str) -> float:
    """A line of /proc/self/status in MiB; Linux alone has it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{word}:"))


if __name__ == "__main__":
    if len(sys.argv) == 3:
        _grow(int(sys.argv[1]), sys.argv[2])
    else:
        _memory(sys.argv[1] if len(sys.argv) > 1 else "")
