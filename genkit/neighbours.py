"""The nearest neighbours of an image in a database, as what a generator is conditioned on.

Blattmann et al., "Semi-Parametric Neural Image Synthesis" (RDM, RARM), NeurIPS 2022. The search compares directions, the generator is given the
embeddings as they are. The embedding is whatever function one has; the database may be another at sampling than it was in training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from genkit.errors import UsageError
from genkit.optional import is_installed, require
from genkit.rng import Rng


class Database:
    """Embeddings [M, E], searched exactly: by faiss where it is installed and `index` is "faiss", else by a matrix product in pieces.

    Args:
        vectors: float, one row per entry.
        labels: [M] int64, what entries are, for databases of some classes.

    Raises: UsageError for an empty database, and for an index that is not installed.
    """

    def __init__(self, vectors: Tensor, labels: Tensor | None = None, index: str = "torch"):
        if vectors.ndim != 2 or not len(vectors):
            raise UsageError(
                f"the database of neighbours is empty (shape {list(vectors.shape)}); give it at least one embedding: images, and a function that embeds them"
            )
        if index not in ("torch", "faiss"):
            raise UsageError(f"index={index!r}; known: torch, faiss")
        if index == "faiss" and not is_installed("faiss"):
            raise UsageError(
                "index=faiss needs the package faiss-cpu: pip install faiss-cpu; index=torch finds the same"
            )
        self.vectors, self.labels = vectors.float(), labels
        self.unit = normalize(self.vectors, dim=1)
        self._faiss: Any = None
        if index == "faiss":
            self._faiss = require("faiss").IndexFlatIP(self.unit.shape[1])
            self._faiss.add(self.unit.cpu().numpy())

    @classmethod
    def of(cls, images: Iterable[Tensor], embed: Callable[[Tensor], Tensor], labels: Tensor | None = None) -> Database:
        """Of batches of images [B, C, Y, X] by a function that embeds them, [B, E]."""
        with torch.no_grad():
            found = [embed(x).flatten(1).float().cpu() for x in images]
        return cls(torch.cat(found) if found else torch.zeros(0, 0), labels)

    def __len__(self) -> int:
        return len(self.vectors)

    def of_classes(self, classes: Iterable[int]) -> Database:
        """The entries of some classes alone. Raises UsageError without labels, or when nothing is left."""
        if self.labels is None:
            raise UsageError("this database has no labels to choose by")
        kept = torch.isin(self.labels, torch.tensor(list(classes)))
        return Database(self.vectors[kept], self.labels[kept])

    def search(self, queries: Tensor, k: int, omit: Tensor | None = None, piece: int = 1024) -> Tensor:
        """Numbers [B, k] of the entries of largest cosine similarity, the nearest first. Equal ones: the lower number.

        Args:
            queries: [B, E].
            omit: [B] int64, an entry that is left out for each query: the query itself, while training.

        Raises: UsageError when there are not so many entries.
        """
        most = len(self) - (omit is not None)
        if not 1 <= k <= most:
            raise UsageError(f"{k} neighbours of a database of {len(self)} entries; there must be between 1 and {most}")
        if queries.shape[1] != self.vectors.shape[1]:
            raise UsageError(
                f"queries have {queries.shape[1]} channels, the database {self.vectors.shape[1]}; both must come from one embedding"
            )
        unit = normalize(queries.float(), dim=1)
        wanted = k + (omit is not None)
        if self._faiss is not None:
            found = torch.from_numpy(self._faiss.search(unit.cpu().numpy(), wanted)[1])
        else:
            found = torch.cat(
                [
                    (part @ self.unit.T).sort(dim=1, descending=True, stable=True).indices[:, :wanted]
                    for part in unit.split(piece)
                ]
            )
        if omit is None:
            return found
        is_other = found != omit.unsqueeze(1).to(found.device)
        return found.gather(1, is_other.int().argsort(dim=1, descending=True, stable=True)[:, :k])

    def context(self, queries: Tensor, k: int, omit: Tensor | None = None) -> Tensor:
        """What a generator is conditioned on: the embeddings [B, k, E] of the nearest entries, as they are."""
        return self.vectors[self.search(queries, k, omit)]

    def draw(self, rng: Rng, often: Tensor | None = None, share: float = 1.0) -> Tensor:
        """Numbers [B] of entries that stand in for queries, one per stream.

        Args:
            often: [M], how often each entry is a neighbour of training images; the most frequent `share` of entries is drawn from (the paper's
                top-m), None = all.
        """
        if not 0 < share <= 1:
            raise UsageError(f"share={share} must be above 0 and at most 1")
        count = max(1, round(share * len(self)))
        order = torch.arange(len(self)) if often is None else often.argsort(descending=True, stable=True)
        return order[rng.fork("neighbour").integers(count, 1)[:, 0].cpu()]
