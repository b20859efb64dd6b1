"""The nearest neighbours of an image in a database, which may be another while sampling than it was in training (RDM and RARM)."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genkit import registry
from genkit.conditions.embeddings import Database, Index, embedding
from genkit.conditions.refusing import refuse
from genkit.errors import UsageError
from genkit.interfaces import Cond
from genkit.metrics import sources
from genkit.nn.grid_tokenizer import image_sides, latent_grid
from genkit.rng import Rng

FILE = "database.safetensors"  # in the folder of a run


class Neighbours:
    """cond["context"] [B, k, E]: the embeddings of the k nearest entries of a database. See genkit.interfaces.Condition.

    Blattmann et al., "Semi-Parametric Neural Image Synthesis" (RDM, RARM), NeurIPS 2022. The search compares directions, the generator is given the
    embeddings as they are, and no class. While training the neighbours are those of the training image, without itself; while sampling those of
    an entry that is drawn for each sample, without that entry. Differences from the paper: exact search; an embedding is any feature net or the
    tokenizer's own latents.

    Args:
        k: neighbours.
        embedding: "tokenizer", its latents averaged over parts of the image; or a feature net: clip-vit-b-32 (the paper's), dinov2-vit-b-14, ...
        cells: of embedding=tokenizer, parts along each axis.
        database: "train", the images of the recipe; or other images, by a word (fashion:val), a folder, a zip, an npz, or a file of `genkit database`.
        share: while sampling, entries are drawn from this share of the database, those that are most often neighbours of others (the paper's top-m).
        index: "torch", a matrix product; "faiss" where it is installed.

    Raises: UsageError for values out of range.
    """

    def __init__(
        self,
        *,
        k: int = 4,
        embedding: str = "tokenizer",
        cells: int = 2,
        database: str = "train",
        share: float = 1.0,
        index: Index = "torch",
        tokenizer: Any = None,
        grid: Sequence[int] = (),
        data: Mapping[str, Any] | None = None,
        folder: Path | None = None,
    ):
        if k < 1 or cells < 1:
            raise UsageError(f"condition.k={k} and condition.cells={cells} must be at least 1")
        if not 0 < share <= 1:
            raise UsageError(f"condition.share={share} must be above 0 and at most 1")
        self.k, self.share, self.index, self.word = k, share, index, database
        self.data, self.folder = data, folder
        self._embedding = (embedding, {"tokenizer": tokenizer, "grid": latent_grid(tokenizer, grid), "cells": cells})
        self._of_training: Tensor | None = None

    @functools.cached_property
    def embed(self) -> Any:
        word, given = self._embedding
        return embedding(word, **given)

    @property
    def takes(self) -> dict[str, int]:
        return {"num_classes": 0, "context_dim": self.embed.dim}

    @functools.cached_property
    def database(self) -> Database:
        """The recipe's own: what the run keeps of it, else made anew."""
        kept = None if self.folder is None else self.folder / FILE
        if kept is not None and kept.exists():
            found = Database.load(kept, self.index)
            if found.made_by == self.embed.name:
                return found
        return self.open(self.word)

    def open(self, word: str) -> Database:
        """A database by a word, see the class. Images of a folder are brought to the size of those that the generator draws.

        Raises: UsageError for one that is empty, or made by another embedding.
        """
        path = Path(word)
        if path.suffix == ".safetensors":
            found = Database.load(path, self.index)
            if found.vectors.shape[1] != self.embed.dim:
                raise UsageError(
                    f"{word} holds embeddings of {found.vectors.shape[1]} numbers, this generator is conditioned on {self.embed.dim} ({self.embed.name}); "
                    "make one of the same images with `genkit database`"
                )
            if found.made_by != self.embed.name:
                raise UsageError(
                    f"{word} was made by another embedding ({found.made_by or 'unknown'}) than this generator is conditioned on ({self.embed.name}); "
                    "make one of the same images with `genkit database`"
                )
            return found
        if path.is_dir():
            images = sources.from_dataset(registry.build("data", self._folder(word)), path.name)
        else:
            images = sources.find(word, dict(self.data) if self.data else None, "database")
        return Database.of(images, self.embed, index=self.index)

    def _folder(self, path: str) -> dict[str, Any]:
        """The section `data` of images in a folder, as the generator draws them."""
        tokenizer, grid = self._embedding[1]["tokenizer"], self._embedding[1]["grid"]
        sides = image_sides(tokenizer, grid)
        size = sides[0] if len(set(sides)) == 1 else sides
        channels = tokenizer.config["image_channels"]
        return registry.check("data", {"type": "folder", "path": path, "size": size, "channels": channels}, "database")

    def prepare(self, count: int) -> None:
        """Before training on so many images: keep the database with the run, and find the neighbours of each."""
        if self.folder is not None and not (self.folder / FILE).exists():
            self.database.save(self.folder / FILE)
        is_own = self.word == "train"
        own = self.database if is_own else self.open("train")
        if len(own) != count:
            raise UsageError(
                f"{count} images are trained on and {len(own)} of them can be embedded; `genkit data check` names those that cannot be decoded: remove them"
            )
        self._of_training = self.database.search(own.vectors, self.k, torch.arange(len(own)) if is_own else None)

    def of_batch(self, batch: Mapping[str, Any]) -> Cond:
        assert self._of_training is not None, "prepare comes first"
        rows = self._of_training[batch["index"].cpu()]
        return {"context": self.database.vectors[rows].to(batch["label"].device)}

    def of_request(
        self,
        labels: Tensor,
        rng: Rng,
        *,
        texts: Sequence[str] | None = None,
        database: Database | None = None,
        images: Sequence[Any] | None = None,
    ) -> Cond:
        """Labels are those of the database."""
        refuse(
            "neighbours of images",
            images=(images, "give them as a database (--database FOLDER)"),
            texts=(texts, "leave them out"),
        )
        chosen = self.database if database is None else database
        rows = chosen.draw(rng, labels, self.share, self.k)
        found = chosen.search(chosen.vectors[rows], self.k, rows)
        return {"context": chosen.vectors[found].to(labels.device)}

    def names(self, database: Database | None = None) -> tuple[str, ...]:
        return (self.database if database is None else database).class_names

    def classes(self, database: Database | None = None) -> list[int]:
        return (self.database if database is None else database).classes()
