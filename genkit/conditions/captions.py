"""What an image is called, read by a generator letter by letter or through a text encoder of transformers."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genkit import registry
from genkit.conditions.encoders import open_encoder
from genkit.conditions.held_out import held_out, of_class
from genkit.conditions.refusing import refuse
from genkit.errors import UsageError
from genkit.interfaces import Cond
from genkit.nn.text import bytes_of
from genkit.rng import Rng

_CODE_POINT = re.compile(r"[0-9A-F]{4,6} ")  # in front of the names of emoji


class Captions:
    """cond["text"] [B, T] int64, bytes that the generator reads itself; or cond["context"] [B, T, E], the states of an encoder, with
    cond["said"] [B, T]. An empty caption is nothing. See genkit.interfaces.Condition.

    The caption of an emoji is its name ("grinning face"), of a shape what it is made of, of other images that of their class.

    Args:
        encoder: "letters", trained together with the generator; else what transformers opens as a model of texts, a folder or a name. It stays as it is,
            and its last hidden states are attended to.
        length: letters, or tokens of the encoder, that are read; what is longer is cut off.
        files: of data.type=folder, the caption of a/b.jpg is what the file a/b.txt beside it says.

    Raises: UsageError for an encoder that cannot be opened, and for files of data that are no folder.
    """

    def __init__(
        self,
        *,
        encoder: str = "letters",
        length: int = 64,
        files: bool = False,
        class_names: Sequence[str] = (),
        data: Mapping[str, Any] | None = None,
    ):
        if length < 1:
            raise UsageError(f"condition.length={length} must be at least 1")
        self.class_names, self.length, self.data = tuple(class_names), length, data
        self.folder = None
        if files:
            if data is None or data.get("type") != "folder":
                raise UsageError("condition.files=true reads a.txt beside a.jpg, which data.type=folder has alone")
            self.folder = Path(data["path"])
        self.encoder = None if encoder == "letters" else Encoder(encoder, length)
        self.takes: dict[str, int] = {"num_classes": 0}
        self.takes |= {"text_length": length} if self.encoder is None else {"context_dim": self.encoder.dim}

    def of_batch(self, batch: Mapping[str, Any]) -> Cond:
        if "caption" in batch:  # the data know
            return self._cond(batch["caption"], batch["label"].device)
        rows = zip(batch["key"], batch["label"].tolist(), strict=True)
        return self._cond([self.caption(key, label) for key, label in rows], batch["label"].device)

    def caption(self, key: str, label: int) -> str:
        """Of a training image by its name and class; empty where there is none."""
        if self.folder is not None:
            return _read(self.folder / Path(key).with_suffix(".txt"))
        named = _CODE_POINT.match(key)
        return key[named.end() :] if named else self._of_class(label)

    def of_request(
        self,
        labels: Tensor,
        rng: Rng,
        *,
        texts: Sequence[str] | None = None,
        database: Any = None,
        images: Sequence[Any] | None = None,
    ) -> Cond:
        """Without texts the captions are the names of the classes, or, where the data know captions, those of held-out samples of the classes."""
        refuse("captions", images=(images, "say what to draw by --caption"), database=(database, "leave it out"))
        if texts is None:
            texts = self._chosen(labels, rng)
        if len(texts) != len(labels):
            raise UsageError(f"{len(texts)} captions for {len(labels)} samples; give one for each")
        return self._cond(texts, labels.device)

    def names(self, database: Any = None) -> tuple[str, ...]:
        return self.class_names

    def classes(self, database: Any = None) -> list[int]:
        return list(range(len(self.class_names)))

    def _chosen(self, labels: Tensor, rng: Rng) -> list[str]:
        known = self.data is not None and hasattr(registry.find("data", self.data["type"]), "caption")
        if not known:
            return [self._of_class(label) for label in labels.tolist()]
        shapes, found = held_out(self.data or {}), []
        at = rng.fork("caption").uniform().cpu().double().tolist()
        for label, u in zip(labels.tolist(), at, strict=True):
            own = [] if label < 0 else of_class(shapes, label, self.class_names)
            found.append(shapes.caption(own[int(u * len(own))]) if own else "")
        return found

    def _of_class(self, label: int) -> str:
        return self.class_names[label] if label >= 0 else ""

    def _cond(self, texts: Sequence[str], device: torch.device) -> Cond:
        if self.encoder is None:
            return {"text": bytes_of(texts, self.length).to(device)}
        states = self.encoder(texts).to(device)
        return {"context": states, "said": (states != 0).any(-1)}


@functools.lru_cache(maxsize=100_000)
def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read ({error.strerror}); condition.files=true needs a text file beside every image"
        ) from None


class Encoder:
    """Texts -> states [B, length, E] of a frozen text encoder of transformers, 0 behind the end of each.

    Args:
        name: a folder with a model and its tokenizer, or the name of one in transformers' cache.
    """

    def __init__(self, name: str, length: int):
        self.tokenizer, model = open_encoder(name, "text")
        # Models of pairs (CLIP) and of translation (BART) have a part that reads.
        model = getattr(model, "text_model", None) or (
            model.get_encoder() if model.config.is_encoder_decoder and hasattr(model, "decoder") else model
        )
        self.model = model.eval().requires_grad_(False)
        self.dim, self.length = int(self.model.config.hidden_size), length
        self._kept: dict[str, Tensor] = {}  # data have few captions, and ask for them in every epoch

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        new = [text for text in dict.fromkeys(texts) if text and text not in self._kept]
        if new:
            given = self.tokenizer(
                new, padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
            )
            states = self.model(**given).last_hidden_state.float()
            states = states * given["attention_mask"].unsqueeze(-1)
            if len(self._kept) > 100_000:
                self._kept.clear()
                return self(texts)
            self._kept |= dict(zip(new, states, strict=True))
        none = torch.zeros(self.length, self.dim)
        return torch.stack([self._kept[text] if text else none for text in texts])
