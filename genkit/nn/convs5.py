"""ConvS5 layers: a convolutional state space over time with S5's parameters (Smith et al. 2023, "Convolutional State Space Models for Long-Range
Spatiotemporal Modeling", section 3 and appendix)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genkit.kernels.convscan.op import convscan
from genkit.kernels.s5.op import discretise

Activation = Callable[[Tensor], Tensor]

_EPS = 1e-6  # of the norms, as in the published weights

ACTIVATIONS: dict[str, Activation] = {
    "gelu": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "swish": F.silu,
    "elu": F.elu,
}


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


class SqueezeExcite(nn.Module):
    """sigmoid(W2 relu(W1 mean over a frame)) times the frame: channels weighed by what the whole image holds (Hu et al. 2018). x [B, D, Y, X]."""

    def __init__(self, dim: int):
        super().__init__()
        self.reduce = nn.Linear(dim, max(dim // 16, 4))
        self.expand = nn.Linear(max(dim // 16, 4), dim)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.expand(F.relu(self.reduce(x.mean((2, 3))))).sigmoid()
        return x * weight[..., None, None]


class SkipHead(nn.Module):
    """act(norm(y + D * u)), with squeeze and excitation behind; y, u [B, D, Y, X], one frame each."""

    def __init__(self, dim: int, kernel_size: int, num_groups: int, activation: Activation, excite: bool):
        super().__init__()
        self.skip = _same_conv(dim, kernel_size)
        self.norm = nn.GroupNorm(num_groups, dim, eps=_EPS)
        self.excite = SqueezeExcite(dim) if excite else nn.Identity()
        self.activation = activation

    def forward(self, y: Tensor, u: Tensor) -> Tensor:
        return self.excite(self.activation(self.norm(y + self.skip(u))))


class ResnetHead(nn.Module):
    """act(y + conv(act(norm(conv(act(norm(y))))))), with squeeze and excitation before the sum; u reaches it through the state alone."""

    def __init__(self, dim: int, kernel_size: int, num_groups: int, activation: Activation, excite: bool):
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(num_groups, dim, eps=_EPS) for _ in range(2))
        self.convs = nn.ModuleList(_same_conv(dim, kernel_size) for _ in range(2))
        self.excite = SqueezeExcite(dim) if excite else nn.Identity()
        self.activation = activation

    def forward(self, y: Tensor, u: Tensor) -> Tensor:
        h = y
        for norm, conv in zip(self.norms, self.convs, strict=True):
            h = conv(self.activation(norm(h)))
        return self.activation(y + self.excite(h))


class HalfGLUHead(nn.Module):
    """z sigmoid(W z) with z = gelu(LayerNorm(y)) at every pixel; u reaches it through the state alone."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=_EPS)
        self.gate = nn.Linear(dim, dim)

    def forward(self, y: Tensor, u: Tensor) -> Tensor:
        z = ACTIVATIONS["gelu"](self.norm(y.movedim(1, -1)))
        return (z * self.gate(z).sigmoid()).movedim(-1, 1)


class BareHead(nn.Module):
    """y itself."""

    def forward(self, y: Tensor, u: Tensor) -> Tensor:
        return y


class ConvS5(nn.Module):
    """y = head(2 Re(C * x), u) with x_t = A x_{t-1} + B * u_t; u [B, D, F, Y, X] -> y alike.

    Args:
        dim: channels of u and y.
        state_size: real size of the state per pixel, twice the number of complex channels.
        num_blocks: HiPPO blocks the state is made of.
        kernel_size: of B, C and the head's convolutions; odd. One number, or one for each of the three.
        head: "skip" adds a convolution D of u (the paper's form), "resnet" is a residual block, "half_glu" a gate at every pixel, "none" nothing.
        activation: of the heads "skip" and "resnet", a word of ACTIVATIONS.
        excite: those heads weigh channels by squeeze and excitation.
        num_groups: of the head's group norms, over one frame.
        clip: real parts of the eigenvalues stay below -1e-4, so that the state fades.
        step_range: the steps of time are drawn log-uniformly from it.

    Raises: ValueError for an option outside of these.
    """

    def __init__(
        self,
        *,
        dim: int,
        state_size: int,
        num_blocks: int = 1,
        kernel_size: int | Sequence[int] = 3,
        head: str = "skip",
        activation: str = "gelu",
        excite: bool = False,
        num_groups: int = 32,
        clip: bool = True,
        step_range: tuple[float, float] = (1e-3, 1e-1),
    ):
        super().__init__()
        if state_size % num_blocks:
            raise ValueError(f"state_size={state_size} must be a multiple of num_blocks={num_blocks}")
        sizes = (kernel_size,) * 3 if isinstance(kernel_size, int) else tuple(kernel_size)
        if len(sizes) != 3 or any(size < 1 or size % 2 == 0 for size in sizes):
            raise ValueError(f"kernel_size={kernel_size} must be odd: one number, or those of B, C and the head")
        if head not in HEADS:
            raise ValueError(f"head={head!r} must be one of {', '.join(HEADS)}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation={activation!r} must be one of {', '.join(ACTIVATIONS)}")
        self.clip = clip
        k_in, k_out, k_head = sizes
        P = state_size // 2
        eigenvalues, vectors = hippo_eigenvalues(state_size // num_blocks)
        eigenvalues, vectors = eigenvalues.repeat(num_blocks), torch.block_diag(*[vectors] * num_blocks)  # [P], [2P, P]
        self.eigenvalues = nn.Parameter(torch.view_as_real(eigenvalues).float())  # [P, 2]
        low, high = (math.log(step) for step in step_range)
        self.log_step = nn.Parameter(torch.empty(P).uniform_(low, high))
        # Drawn as real matrices of the whole state, then turned into the basis of eigenvectors.
        B = _he(state_size, dim * k_in**2, fan_in=dim * k_in**2)
        C = _he(dim * k_out**2, state_size, fan_in=state_size * k_out**2)
        B = (vectors.mH @ B).view(P, dim, k_in, k_in)
        C = (C @ vectors).view(dim, k_out, k_out, P).movedim(-1, 1)
        self.B = nn.Parameter(torch.view_as_real(B.contiguous()).float())  # [P, D, k, k, 2]
        self.C = nn.Parameter(torch.view_as_real(C.contiguous()).float())  # [D, P, k, k, 2]
        self.head = HEADS[head](dim, k_head, num_groups, ACTIVATIONS[activation], excite)

    def system(self) -> tuple[Tensor, Tensor, Tensor]:
        """The discrete decay [P], B [P, D, k, k] and C [D, P, k, k], complex."""
        real, imaginary = self.eigenvalues.unbind(-1)
        eigenvalues = torch.complex(real.clamp_max(-1e-4) if self.clip else real, imaginary)
        decay, B = discretise(eigenvalues, torch.view_as_complex(self.B), self.log_step.exp())
        return decay, B, torch.view_as_complex(self.C)

    def forward(self, u: Tensor, state: Tensor | None = None, *, path: str | None = None) -> tuple[Tensor, Tensor]:
        """y and the state behind the last frame, [B, P, Y, X] complex; pass it on to continue with later frames. `path`: as of convscan."""
        y, state = convscan(u, *self.system(), state=state, return_state=True, path=path)  # y [B, D, F, Y, X]
        frames, read = (x.transpose(1, 2).flatten(0, 1) for x in (u, y))  # [B F, D, Y, X]
        return self.head(read, frames).unflatten(0, (u.shape[0], -1)).transpose(1, 2), state


class ConvS5Layer(nn.Module):
    """norm(u + ConvS5(u)), a LayerNorm over the channels of each pixel.

    Args:
        norm: "after" the sum, "before" the state space (u + ConvS5(norm(u))), or "none".
        has_skip: u is added; without, the layer is ConvS5 and the norm alone.
        options: of ConvS5.
    """

    def __init__(self, *, dim: int, norm: str = "after", has_skip: bool = True, **options: Any):
        super().__init__()
        if norm not in ("after", "before", "none"):
            raise ValueError(f"norm={norm!r} must be after, before or none")
        self.ssm = ConvS5(dim=dim, **options)
        self.norm = nn.Identity() if norm == "none" else nn.LayerNorm(dim, eps=_EPS)
        self.is_before, self.has_skip = norm == "before", has_skip

    def forward(self, u: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """u [B, D, F, Y, X] -> the same shape, and the state as ConvS5.forward."""
        y, state = self.ssm(self._normed(u) if self.is_before else u, state)
        y = u + y if self.has_skip else y
        return y if self.is_before else self._normed(y), state

    def _normed(self, x: Tensor) -> Tensor:
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


def _same_conv(dim: int, kernel_size: int) -> nn.Conv2d:
    return nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2)


HEADS: dict[str, Callable[[int, int, int, Activation, bool], nn.Module]] = {
    "skip": SkipHead,
    "resnet": ResnetHead,
    "half_glu": lambda dim, *_: HalfGLUHead(dim),
    "none": lambda *_: BareHead(),
}


def _he(rows: int, columns: int, fan_in: int) -> Tensor:
    """A complex-typed real matrix, normal with variance 2 / fan_in, cut at two standard deviations."""
    std = math.sqrt(2 / fan_in)
    matrix = torch.empty(rows, columns, dtype=torch.float64)
    return nn.init.trunc_normal_(matrix, std=std, a=-2 * std, b=2 * std).to(torch.complex128)
