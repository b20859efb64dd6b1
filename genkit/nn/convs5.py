"""ConvS5 layers: a convolutional state space over time with S5's parameters (Smith et al. 2023, "Convolutional State Space Models for Long-Range
Spatiotemporal Modeling", section 3 and appendix)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genkit.kernels.convscan.op import convscan
from genkit.kernels.s5.op import discretise

_EPS = 1e-6  # of the norms, as in the published weights


def hippo_eigenvalues(size: int) -> tuple[Tensor, Tensor]:
    """The half of the eigenvalues of the normal part of HiPPO-LegS with negative imaginary part [size / 2], and their eigenvectors [size, size / 2].

    All real parts are -1/2: A + p p^T is -1/2 plus a skew-symmetric matrix, A_nk = -sqrt(2n+1) sqrt(2k+1) below the diagonal and -(n+1) on it,
    p_n = sqrt(n + 1/2) (Gu et al. 2022, "How to Train Your HiPPO", and Smith et al. 2023, "Simplified State Space Layers", section 4.3).
    """
    if size < 2 or size % 2:
        raise ValueError(f"the state of a HiPPO block must be even and at least 2, got {size}")
    n = torch.arange(size, dtype=torch.float64)
    root = (2 * n + 1).sqrt()
    A = -torch.tril(root[:, None] * root, -1) - torch.diag(n + 1)
    p = (n + 0.5).sqrt()
    normal = A + p[:, None] * p
    imaginary, vectors = torch.linalg.eigh(-1j * (normal - normal.diagonal().mean() * torch.eye(size)))  # ascending
    half = size // 2
    return torch.complex(normal.diagonal().mean().expand(half), imaginary[:half]), vectors[:, :half]


class ConvS5(nn.Module):
    """y = gelu(norm(2 Re(C * x) + D * u)) with x_t = A x_{t-1} + B * u_t; u [B, D, F, Y, X] -> y alike.

    Args:
        dim: channels of u and y.
        state_size: real size of the state per pixel, twice the number of complex channels.
        num_blocks: HiPPO blocks the state is made of.
        kernel_size: of B, C and D; odd.
        num_groups: of the group norm, over one frame.
        step_range: the steps of time are drawn log-uniformly from it.
    """

    def __init__(
        self,
        *,
        dim: int,
        state_size: int,
        num_blocks: int = 1,
        kernel_size: int = 3,
        num_groups: int = 32,
        step_range: tuple[float, float] = (1e-3, 1e-1),
    ):
        super().__init__()
        if state_size % num_blocks:
            raise ValueError(f"state_size={state_size} must be a multiple of num_blocks={num_blocks}")
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} must be odd")
        P, area = state_size // 2, kernel_size**2
        eigenvalues, vectors = hippo_eigenvalues(state_size // num_blocks)
        eigenvalues, vectors = eigenvalues.repeat(num_blocks), torch.block_diag(*[vectors] * num_blocks)  # [P], [2P, P]
        self.eigenvalues = nn.Parameter(torch.view_as_real(eigenvalues).float())  # [P, 2]
        low, high = (math.log(step) for step in step_range)
        self.log_step = nn.Parameter(torch.empty(P).uniform_(low, high))
        # Drawn as real matrices of the whole state, then turned into the basis of eigenvectors.
        B = _he(state_size, dim * area, fan_in=dim * area)
        C = _he(dim * area, state_size, fan_in=state_size * area)
        grid = (kernel_size, kernel_size)
        B = (vectors.mH @ B).view(P, dim, *grid)
        C = (C @ vectors).view(dim, *grid, P).movedim(-1, 1)
        self.B = nn.Parameter(torch.view_as_real(B.contiguous()).float())  # [P, D, k, k, 2]
        self.C = nn.Parameter(torch.view_as_real(C.contiguous()).float())  # [D, P, k, k, 2]
        self.skip = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2)
        self.norm = nn.GroupNorm(num_groups, dim, eps=_EPS)

    def system(self) -> tuple[Tensor, Tensor, Tensor]:
        """The discrete decay [P], B [P, D, k, k] and C [D, P, k, k], complex. Real parts of the eigenvalues stay below -1e-4: the state fades."""
        real, imaginary = self.eigenvalues.unbind(-1)
        eigenvalues = torch.complex(real.clamp_max(-1e-4), imaginary)
        decay, B = discretise(eigenvalues, torch.view_as_complex(self.B), self.log_step.exp())
        return decay, B, torch.view_as_complex(self.C)

    def forward(self, u: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """y and the state behind the last frame, [B, P, Y, X] complex; pass it on to continue with later frames."""
        y, state = convscan(u, *self.system(), state=state, return_state=True)  # y [B, D, F, Y, X]
        frames = u.transpose(1, 2).flatten(0, 1)  # [B F, D, Y, X]
        z = y.transpose(1, 2).flatten(0, 1) + self.skip(frames)
        z = F.gelu(self.norm(z), approximate="tanh")
        return z.unflatten(0, (u.shape[0], -1)).transpose(1, 2), state


class ConvS5Layer(nn.Module):
    """norm(u + ConvS5(u)), a LayerNorm over the channels of each pixel. Arguments as ConvS5."""

    def __init__(
        self,
        *,
        dim: int,
        state_size: int,
        num_blocks: int = 1,
        kernel_size: int = 3,
        num_groups: int = 32,
        step_range: tuple[float, float] = (1e-3, 1e-1),
    ):
        super().__init__()
        self.ssm = ConvS5(
            dim=dim,
            state_size=state_size,
            num_blocks=num_blocks,
            kernel_size=kernel_size,
            num_groups=num_groups,
            step_range=step_range,
        )
        self.norm = nn.LayerNorm(dim, eps=_EPS)

    def forward(self, u: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """u [B, D, F, Y, X] -> the same shape, and the state as ConvS5.forward."""
        y, state = self.ssm(u, state)
        return self.norm((u + y).movedim(1, -1)).movedim(-1, 1), state


def _he(rows: int, columns: int, fan_in: int) -> Tensor:
    """A complex-typed real matrix, normal with variance 2 / fan_in, cut at two standard deviations."""
    std = math.sqrt(2 / fan_in)
    matrix = torch.empty(rows, columns, dtype=torch.float64)
    return nn.init.trunc_normal_(matrix, std=std, a=-2 * std, b=2 * std).to(torch.complex128)
