"""S5 (2023): a linear time-invariant state space over the sequence of tokens, one way or both, then a gated projection."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, glu

from genkit.errors import UsageError
from genkit.interfaces import Cache, Layout
from genkit.kernels.s5.op import discretise, s5


class S5(nn.Module):
    """Smith et al., "Simplified State Space Layers for Sequence Modeling", ICLR 2023.

    x' = Lambda x + B u with P conjugate pairs of states for all D channels, held over a learned step per state (zero-order hold);
    y = 2 Re(C x) + skip u; GLU(W gelu(y)), gelu by tanh as in its code. Lambda starts at the eigenvalues of HiPPO-N. Nothing depends on the content of tokens, so the
    mixer suits regular axes, as time. Tokens are taken in their order; what is at padding reads as 0, but counts as time.

    Args:
        state_size: P.
        is_bidirectional: tokens are also read from the last to the first, with a C of its own.
    """

    needs_grid = False
    is_resolution_free = True

    undecayed = ("eigenvalues", "B")  # as published

    def __init__(self, *, dim: int, layer: int, state_size: int = 32, is_bidirectional: bool = False):
        super().__init__()
        if state_size < 1:
            raise UsageError(f"mixer.state_size={state_size} must be at least 1")
        self.layer, self.is_bidirectional, self.is_causal = layer, is_bidirectional, not is_bidirectional
        eigenvalues, vectors = hippo(2 * state_size)
        directions = 1 + is_bidirectional
        B = vectors.mH @ torch.randn(2 * state_size, dim, dtype=torch.complex64) / math.sqrt(dim)
        C = torch.randn(dim, 2 * state_size, dtype=torch.complex64) / math.sqrt(2 * state_size * directions) @ vectors
        C = torch.cat([C[:, :state_size]] * directions, dim=-1)
        # Complex numbers are pairs of reals: optimisers and casts then treat them as any weight.
        self.eigenvalues = nn.Parameter(torch.view_as_real(eigenvalues[:state_size]).contiguous())
        self.B = nn.Parameter(torch.view_as_real(B[:state_size]).contiguous())
        self.C = nn.Parameter(torch.view_as_real(C.resolve_conj()).contiguous())
        self.log_step = nn.Parameter(torch.empty(state_size).uniform_(math.log(1e-3), math.log(0.1)))
        self.skip = nn.Parameter(torch.randn(dim))
        self.proj = nn.Linear(dim, 2 * dim)

    def forward(self, x: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor:
        if layout.valid is not None:
            x = x.masked_fill(~layout.valid.unsqueeze(-1), 0)
        real, imaginary = self.eigenvalues.unbind(-1)
        eigenvalues = torch.complex(real.clamp(max=-1e-4), imaginary)  # states that fade, as published
        decay, B = discretise(eigenvalues, torch.view_as_complex(self.B), self.log_step.exp())
        C = torch.view_as_complex(self.C)
        before = None if cache is None or self.is_bidirectional else cache.get(self.layer)
        both = self.is_bidirectional
        y = s5(x, decay, B, C, self.skip, is_bidirectional=both, state=before, return_state=not both)
        if not isinstance(y, Tensor):
            y, state = y
            if cache is not None:
                cache[self.layer] = state.detach()
        return glu(self.proj(gelu(y, approximate="tanh")), dim=-1)


def hippo(size: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues [size] and eigenvectors [size, size] of HiPPO-N, complex64; those with positive imaginary part first.

    The normal part of HiPPO-LegS (Gu et al., 2022, S4D, section 4): -1/2 on the diagonal, skew-symmetric beside it.
    """
    n = torch.arange(size, dtype=torch.float64)
    root = (2 * n + 1).sqrt()
    skew = root[:, None] * root / 2
    skew = skew.triu(1) - skew.tril(-1)
    rates, vectors = torch.linalg.eigh(-1j * skew.to(torch.complex128))  # ascending, in pairs of +- the same
    order = rates.argsort(descending=True)
    return torch.complex(torch.full_like(n, -0.5), rates[order]).to(torch.complex64), vectors[:, order].to(
        torch.complex64
    )
