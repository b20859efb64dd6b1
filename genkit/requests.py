"""What is asked of a generator: a label and a seed for each sample, and a caption, a picture or a database where those are what it is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from genkit.databases import named_database, open_database
from genkit.errors import UsageError
from genkit.labels import parse_labels
from genkit.rng import Rng, sample_seeds


@dataclass(frozen=True)
class Request:
    """Samples to be drawn, each by its number.

    Args:
        labels, seeds: one per sample; label -1 = no class.
        class_names: what labels count.
        texts, pictures: captions or files of pictures, one per sample; None = by label.
        database: of generators that are told neighbours, in place of that of training.
        name: of what is told instead of a label, for the name of a folder.
    """

    labels: list[int]
    seeds: list[int]
    class_names: Sequence[str]
    texts: list[str] | None = None
    pictures: list[str] | None = None
    database: Any = None
    name: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    def told(self, numbers: Sequence[int]) -> dict[str, Any]:
        """What GeneratorPipeline.generate takes of these samples."""
        return {
            "labels": torch.tensor([self.labels[i] for i in numbers]),
            "seeds": [self.seeds[i] for i in numbers],
            "texts": None if self.texts is None else [self.texts[i] for i in numbers],
            "images": None if self.pictures is None else [self.pictures[i] for i in numbers],
            "database": self.database,
        }

    def rows(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """What samples.json says of each file."""
        return [
            {
                "file": name,
                "label": label,
                "class": self.class_names[label] if label >= 0 else None,
                "seed": seed,
                **({} if self.texts is None else {"caption": self.texts[i]}),
                **({} if self.pictures is None else {"picture": self.pictures[i]}),
            }
            for i, (name, label, seed) in enumerate(zip(names, self.labels, self.seeds, strict=True))
        ]


def read_request(
    pipeline: Any,
    *,
    count: int | None = None,
    labels: str | Sequence[int | str] | None = None,
    seed: int = 0,
    captions: Sequence[str] = (),
    pictures: Sequence[str | Path] = (),
    database: str | Path | None = None,
    classes: str | None = None,
) -> Request:
    """From words of the command line to a request; the arguments are those of genkit.sampling.sample.

    Raises: UsageError for words that exclude each other, and for what this generator is not told or cannot read.
    """
    found = None
    if database is not None or classes is not None:
        found = open_database(pipeline, database, classes)
    class_names = pipeline.told.names(found)
    said = [word for word, given in (("--caption", captions), ("--image", pictures), ("--labels", labels)) if given]
    if len(said) > 1:
        raise UsageError(f"{' and '.join(said)} both say what to draw; give one of them")
    if captions or pictures:
        chosen = [-1]
    elif labels is None:
        chosen = pipeline.told.classes(found) or [-1]
    else:
        chosen = parse_labels(labels, class_names)
    count = len(captions or pictures or chosen) if count is None else count
    if count < 1:
        raise UsageError(f"-n {count}: at least one sample is needed")
    seeds = sample_seeds(seed, 0, count)
    if pictures:  # what cannot be read, or is not listened to, is said before anything is written
        different = list(dict.fromkeys(map(str, pictures)))
        pipeline.told.of_request(torch.full((len(different),), -1), Rng(seeds[:1] * len(different)), images=different)
        if not hasattr(pipeline.tokenizer, "meshes"):
            raise UsageError(
                "--image is for generators of shapes that are told pictures; --known IMAGE completes an image"
            )
    name = "-captions" if captions else f"-{Path(pictures[0]).stem}" if pictures else ""
    return Request(
        labels=_in_turn(chosen, count),
        seeds=seeds,
        class_names=class_names,
        texts=_in_turn(captions, count) if captions else None,
        pictures=_in_turn([str(path) for path in pictures], count) if pictures else None,
        database=found,
        name=name + ("" if found is None else f"-{named_database(database, classes)}"),
    )


def _in_turn(values: Sequence[Any], count: int) -> list[Any]:
    return [values[i % len(values)] for i in range(count)]
