"""What a generator is told as tokens in front of its own (Sun et al., LlamaGen, 2024, section 2.2: text-conditional generation)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from genkit.errors import UsageError
from genkit.interfaces import Cond


class ContextPrefix(nn.Module):
    """cond["context"] [B, k <= length, context_dim] -> (tokens [B, length, dim], which of them are real [B, length] bool; None = all).

    Real ones stand last, right before the first id, in their order; what stands before them is padding. Where all of a sample is 0 nothing is said: fixed
    vectors, drawn once, stand there instead, as many of them as are real by cond["said"], by default all.

    Args:
        length: tokens in front.

    Raises: when called, UsageError for a context of another width, or a longer one.
    """

    nothing: Tensor

    def __init__(self, *, dim: int, context_dim: int, length: int):
        super().__init__()
        self.length, self.context_dim = length, context_dim
        self.up = nn.Linear(context_dim, dim, bias=False)
        self.down = nn.Linear(dim, dim, bias=False)
        self.register_buffer("nothing", torch.randn(length, context_dim) / context_dim**0.5)

    def forward(self, cond: Cond, batch_size: int) -> tuple[Tensor, Tensor | None]:
        context, real = self._padded(cond, batch_size)
        is_told = (context != 0).flatten(1).any(1)  # [B]
        order = real.int().argsort(dim=1, stable=True)
        context = context.gather(1, order.unsqueeze(-1).expand_as(context))
        context = torch.where(is_told[:, None, None], context, self.nothing.to(context))
        valid = real.gather(1, order) | ~real.any(1, keepdim=True)
        tokens = self.down(functional.gelu(self.up(context), approximate="tanh"))
        return tokens, None if bool(valid.all()) else valid

    def _padded(self, cond: Cond, batch_size: int) -> tuple[Tensor, Tensor]:
        """(context [B, length, context_dim], which of it is real [B, length])."""
        context = cond.get("context")
        if context is None:
            context = self.up.weight.new_zeros(batch_size, self.length, self.context_dim)
        if context.ndim != 3 or context.shape[1] > self.length or context.shape[2] != self.context_dim:
            raise UsageError(
                f"the context is {list(context.shape)}, expected [B, k, {self.context_dim}] as in training (backbone.context_dim), "
                f"k at most {self.length} (backbone.context_length)"
            )
        real = cond["said"] if "said" in cond else (context != 0).any(-1)
        more = self.length - context.shape[1]
        return functional.pad(context, (0, 0, 0, more)), functional.pad(real, (0, more))
