"""What the blocks of a transformer attend to besides each other: vectors of a condition, or the letters of a text."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from genkit.errors import UsageError
from genkit.interfaces import Cond
from genkit.nn.cross_attention import CrossAttention
from genkit.nn.text import TextEncoder
from genkit.nn.wrapped import unwrapped


class Told(nn.Module):
    """cond -> (states [B, k, width], which of them are real [B, k] bool), or None where nothing is said.

    Args:
        dim: of the transformer.
        context_dim: width of the vectors in cond["context"]; None = none.
        text_length: letters of the texts in cond["text"], read by an encoder that is trained here; None = none.

    Raises: UsageError for both, and when called, for vectors of another width.
    """

    def __init__(self, *, dim: int, context_dim: int | None, text_length: int | None):
        super().__init__()
        if context_dim is not None and text_length is not None:
            raise UsageError("backbone.context_dim and backbone.text_length: the context is one or the other")
        self.dim, self.context_dim = dim, context_dim
        self.text = (
            None if text_length is None else TextEncoder(dim=dim, num_heads=num_heads_of(dim), length=text_length)
        )

    @property
    def width(self) -> int | None:
        """Of the states; None = nothing is ever said."""
        return self.dim if self.text is not None else self.context_dim

    def attention(self) -> CrossAttention | None:
        """Of one block, to what is said."""
        if self.width is None:
            return None
        return CrossAttention(dim=self.dim, context_dim=self.width, num_heads=num_heads_of(self.dim))

    def forward(self, cond: Cond) -> tuple[Tensor, Tensor] | None:
        if self.text is not None and "text" in cond:
            return self.text(cond["text"])
        if self.width is None or "context" not in cond:
            return None
        given = cond["context"]
        if given.ndim != 3 or given.shape[2] != self.width:
            raise UsageError(
                f"the context is {list(given.shape)}, expected [B, k, {self.width}] as in training (backbone.context_dim)"
            )
        return given, (given != 0).any(-1)  # all zero = nothing

    def once(self, cond: Cond) -> Cond:
        """The condition with its texts read, for a model that is asked many times."""
        if self.text is None or "text" not in cond:
            return cond
        states, valid = self.text(cond["text"])
        rest = {name: value for name, value in cond.items() if name != "text"}
        return {**rest, "context": states * valid.unsqueeze(-1)}


def once(model: Any, cond: Cond) -> Cond:
    """The condition for a model that is asked many times: with its texts read, where the model reads texts."""
    told = getattr(unwrapped(model), "told", None)
    return cond if told is None else told.once(cond)


def num_heads_of(dim: int) -> int:
    """Heads of 64 channels, or one that has them all."""
    return dim // 64 if dim % 64 == 0 else 1
