"""Fewer codes without training: a tokenizer's codebook clustered, everything else as it is.

Mao et al., "Extreme Image Compression using Fine-tuned VQGANs", DCC 2024 (arXiv 2307.08265), without their fine-tuning. Difference: clusters are
weighted by how often training used a code, since codes that died would draw centres to where no image is.
"""

from __future__ import annotations

import copy
import zlib
from typing import Any

import numpy as np
import torch

from genkit.codec.cluster import kmeans, whole_numbers
from genkit.codec.stream import Ints
from genkit.errors import UsageError
from genkit.nn.codebook import Codebook, normalise

_HEAVIEST = 4095


def one_codebook(tokenizer: Any) -> Codebook | None:
    """The table of a tokenizer that has exactly one, for one id per place; None for any other."""
    codebook = getattr(getattr(tokenizer, "quantizer", None), "codebook", None)
    is_one = isinstance(codebook, Codebook) and len(codebook.embed) == 1 and tokenizer.num_levels == 1
    return codebook if is_one else None


def coarser(tokenizer: Any, count: int) -> Any:
    """A copy of the tokenizer with `count` codes, the weighted k-means centres of its own.

    The encoder's vectors are compared with the centres themselves, so ids are the nearest of those, not the clusters of former ids. The result
    depends on nothing but the tokenizer and `count` and is the same on every machine.

    Raises: UsageError for a tokenizer without exactly one codebook, or a count that is not below its size.
    """
    codebook = one_codebook(tokenizer)
    if codebook is None:
        raise UsageError(
            f"--codes clusters one codebook of one id per place; {type(tokenizer).__name__} has {tokenizer.num_levels} levels or no table"
        )
    if not 2 <= count < tokenizer.codebook_size:
        raise UsageError(
            f"--codes {count} must be at least 2 and below the tokenizer's {tokenizer.codebook_size} codes"
        )
    vectors, scale = whole_numbers(codebook.embed[0].double().cpu().numpy())
    used = codebook.recent[0].double().cpu().numpy()
    weights = np.rint(used * (_HEAVIEST / max(float(used.max()), 1e-30))).astype(np.int64)
    if np.count_nonzero(weights) < count:
        weights = weights + 1  # an imported table without a history: all codes count
    centres = torch.from_numpy(kmeans(vectors, weights, count)[0] / scale)
    embed = (normalise(centres) if codebook.cosine else centres).float()
    reduced = Codebook(codebook_size=count, dim=embed.shape[1], cosine=codebook.cosine)
    reduced.set_codes(embed[None])
    coarse = copy.deepcopy(tokenizer)
    coarse.quantizer.codebook = reduced.to(codebook.embed.device).eval().requires_grad_(False)
    coarse.codebook_size = count
    return coarse


def table_checksum(tokenizer: Any) -> bytes:
    """4 bytes that differ where the table of a tokenizer with one codebook does."""
    codebook = one_codebook(tokenizer)
    assert codebook is not None
    return zlib.crc32(codebook.embed.float().cpu().numpy().astype("<f4").tobytes()).to_bytes(4, "little")


def code_vectors(tokenizer: Any, axes: int) -> list[Ints]:
    """Whole-number vectors [S, d] of every code, one array per level, for what needs to know which codes are alike.

    Args:
        axes: of the grid of its ids.
    """
    codebook = one_codebook(tokenizer)
    if codebook is not None:
        return [whole_numbers(codebook.embed[0].cpu().numpy())[0]]
    S, Q = tokenizer.codebook_size, tokenizer.num_levels
    found = []
    for q in range(Q):
        ids = torch.zeros(S, Q, *[1] * axes, dtype=torch.int64)
        ids[:, q] = torch.arange(S).view(-1, *[1] * axes)
        with torch.inference_mode():
            z = tokenizer.codes(ids.to(tokenizer.device)).flatten(1).double().cpu().numpy()  # [S, C]
        found.append(whole_numbers(z - z.mean(0))[0])
    return found
