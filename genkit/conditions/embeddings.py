"""Images as vectors that neighbours are looked for among, and databases of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import normalize

from genkit import files
from genkit.errors import GenkitError, UsageError, nearest
from genkit.metrics import features
from genkit.metrics.image_set import Images
from genkit.optional import is_installed, require
from genkit.rng import Rng
from genkit.weights import module_sha256

Index = Literal["torch", "faiss"]


@dataclass(frozen=True)
class Embedding:
    """images [B, C, Y, X] in [-1, 1] -> vectors [B, dim]; `name` tells embeddings apart, weights and all."""

    name: str
    dim: int
    call: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        return self.call(x).float().cpu()


def embedding(word: str, *, tokenizer: Any, grid: Sequence[int], cells: int) -> Embedding:
    """By a word of a recipe.

    Args:
        word: "tokenizer": its latents, averaged over cells x cells parts of the grid; or a feature net of genkit.metrics.features.
        grid: of the latents of images that the generator was trained on.

    Raises: UsageError for another word, and when called, for images that the tokenizer makes other latents of.
    """
    if word != "tokenizer":
        if word not in features.NAMES:
            raise UsageError(f"condition.embedding={word}: {nearest(word, ['tokenizer', *features.NAMES])}")
        net = features.load(word)
        return Embedding(f"{net.protocol} {net.sha256[:16]}", net.dim, net)
    sides = [min(cells, side) for side in grid]
    pool: Any = {
        1: functional.adaptive_avg_pool1d,
        2: functional.adaptive_avg_pool2d,
        3: functional.adaptive_avg_pool3d,
    }

    def latents(x: Tensor) -> Tensor:
        found = list(x.shape[1:])
        channels = tokenizer.config.get("image_channels", x.shape[1])
        z = None if x.shape[1] != channels else tokenizer.encode(x.to(next(tokenizer.parameters()).device)).z
        if z is None or tuple(z.shape[2:]) != tuple(grid):
            raise UsageError(
                f"images of the database are {found} (C, Y, X), which this tokenizer does not turn into the {list(grid)} latents of the images that "
                "the generator was trained on; bring them to the same size and channels"
            )
        return pool[len(grid)](z, sides).flatten(1)

    name = f"tokenizer {module_sha256(tokenizer)[:16]} {'x'.join(map(str, sides))}"
    return Embedding(name, tokenizer.channels * torch.Size(sides).numel(), latents)


class Database:
    """Embeddings [M, E], searched exactly: by faiss where it is installed and `index` is "faiss", else by a matrix product in pieces.

    Args:
        vectors: float, one row per entry.
        labels: [M] int64, what entries are, -1 = nothing; None = no entry has one.
        class_names: what the labels mean.
        made_by: the name of the embedding; empty = unknown.

    Raises: UsageError for an empty database, and for an index that is not installed.
    """

    def __init__(
        self,
        vectors: Tensor,
        labels: Tensor | None = None,
        class_names: Sequence[str] = (),
        made_by: str = "",
        index: Index = "torch",
    ):
        if vectors.ndim != 2 or not len(vectors):
            raise UsageError(
                f"the database of neighbours is empty (shape {list(vectors.shape)}); it needs at least one image"
            )
        if index not in ("torch", "faiss"):
            raise UsageError(f"condition.index={index}; known: torch, faiss")
        if index == "faiss" and not is_installed("faiss"):
            raise UsageError(
                "condition.index=faiss needs the package faiss-cpu: pip install faiss-cpu; index=torch finds the same"
            )
        self.vectors, self.labels = vectors.float(), labels
        self.class_names, self.made_by, self.index = tuple(class_names), made_by, index
        self.unit = normalize(self.vectors, dim=1)
        self._faiss: Any = None
        if index == "faiss":
            self._faiss = require("faiss").IndexFlatIP(self.unit.shape[1])
            self._faiss.add(self.unit.numpy())

    @classmethod
    def of(cls, images: Images, embed: Embedding, *, batch_size: int = 256, index: Index = "torch") -> Database:
        """Of a set of images."""
        vectors, labels = [], []
        for first in range(0, images.count, batch_size):
            x, label = images.read(first, min(first + batch_size, images.count))
            vectors.append(embed(x))
            labels.append(label)
        has_labels = images.has_labels and bool(labels)
        return cls(
            torch.cat(vectors) if vectors else torch.zeros(0, embed.dim),
            torch.cat(labels) if has_labels else None,
            images.dataset.info.class_names if has_labels and hasattr(images, "dataset") else (),
            embed.name,
            index,
        )

    def save(self, path: Path) -> None:
        """As safetensors: "vectors", "labels" and what they are by."""
        tensors = {"vectors": self.vectors.contiguous()}
        tensors |= {} if self.labels is None else {"labels": self.labels.contiguous()}
        about = {"made_by": self.made_by, "class_names": json.dumps(self.class_names)}
        files.write_bytes(path, save(tensors, about))

    @classmethod
    def load(cls, path: Path, index: Index = "torch") -> Database:
        """What `save` wrote. Raises GenkitError for another file."""
        try:
            with safe_open(path, "pt") as file:
                about, keys = file.metadata() or {}, set(file.keys())
                vectors = file.get_tensor("vectors")
                labels = file.get_tensor("labels") if "labels" in keys else None
            names = json.loads(about.get("class_names", "[]"))
        except (OSError, SafetensorError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise GenkitError(f"{path} is no database of neighbours ({reason}); `genkit database` makes one") from None
        return cls(vectors, labels, names, about.get("made_by", ""), index)

    def __len__(self) -> int:
        return len(self.vectors)

    def classes(self) -> list[int]:
        """Labels of which there is an entry, rising; those without a name do not count."""
        found = [] if self.labels is None else self.labels.unique().tolist()
        return [label for label in found if 0 <= label < len(self.class_names)]

    def of_classes(self, classes: Iterable[int]) -> Database:
        """The entries of some classes alone. Raises UsageError without labels, or when nothing is left."""
        if self.labels is None:
            raise UsageError("this database has no classes to choose by: its images have none")
        kept = torch.isin(self.labels, torch.tensor(list(classes)))
        return Database(self.vectors[kept], self.labels[kept], self.class_names, self.made_by, self.index)

    def search(self, queries: Tensor, k: int, omit: Tensor | None = None) -> Tensor:
        """Numbers [B, k] of the entries of largest cosine similarity, the nearest first.

        Args:
            queries: [B, E].
            omit: [B] int64, an entry that is left out for each query: the query itself.

        Raises: UsageError when there are not so many entries, or vectors of another length.
        """
        most = len(self) - (omit is not None)
        if not 1 <= k <= most:
            raise UsageError(
                f"{k} neighbours of a database of {len(self)} entries; there must be between 1 and {most}: give it more images, or ask for fewer"
            )
        if queries.shape[1] != self.vectors.shape[1]:
            raise UsageError(
                f"queries have {queries.shape[1]} channels, the database {self.vectors.shape[1]}; both must come from one embedding"
            )
        unit = normalize(queries.float(), dim=1)
        wanted = k + (omit is not None)
        if self._faiss is not None:
            found = torch.from_numpy(self._faiss.search(unit.numpy(), wanted)[1])
        else:
            rows = max(1, (1 << 26) // len(self))  # scores of 256 MB at once
            found = torch.cat([(part @ self.unit.T).topk(wanted).indices for part in unit.split(rows)])
        if omit is None:
            return found
        is_other = found != omit.unsqueeze(1)
        return found.gather(1, is_other.int().argsort(dim=1, descending=True, stable=True)[:, :k])

    def draw(self, rng: Rng, labels: Tensor, share: float = 1.0, k: int = 1) -> Tensor:
        """Numbers [B] of entries that stand in for queries, one per stream.

        Args:
            labels: [B] int64, of which class an entry is to be; -1 = of any.
            share: only so many of the entries are drawn from, those that are most often among the k neighbours of others (the paper's top-m).

        Raises: UsageError for a class of which there is no entry.
        """
        order = torch.arange(len(self))
        if share < 1:
            often = self.search(self.vectors, k, order).flatten().bincount(minlength=len(self))
            order = often.argsort(descending=True, stable=True)
        at = rng.fork("neighbour").uniform().cpu().double()  # [B]
        found = torch.empty_like(labels, device="cpu")
        for label in labels.unique().tolist():
            own = order
            if label >= 0:
                if self.labels is None:
                    raise UsageError("this database has no classes to choose by: its images have none; use no labels")
                own = order[self.labels[order] == label]
                if not len(own):
                    raise UsageError(
                        f"the database of neighbours has no entry of class {self._name(label)}; it has "
                        f"{', '.join(map(self._name, self.labels.unique().tolist()))}"
                    )
            own = own[: max(1, round(share * len(own)))]
            rows = (labels == label).cpu()
            found[rows] = own[(at[rows] * len(own)).long()]
        return found

    def _name(self, label: int) -> str:
        return self.class_names[label] if 0 <= label < len(self.class_names) else str(label)
