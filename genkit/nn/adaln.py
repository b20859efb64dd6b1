"""Adaptive layer norm with gates that begin at zero (Peebles and Xie, "DiT", ICCV 2023, section 3.2, adaLN-Zero)."""

from __future__ import annotations

from torch import Tensor, addcmul, nn

from genkit.interfaces import Cache, Layout
from genkit.nn.cross_attention import CrossAttention
from genkit.nn.drop_path import DropPath
from genkit.nn.dropout import Dropout
from genkit.nn.gated_mlp import GatedMLP
from genkit.nn.norm import Norm, make_norm, modulate


class AdaLNBlock(nn.Module):
    """h [B, N, D] -> the same: mixer and perceptron, each in a residual branch with shift, scale and gate from the condition; with a context, attention to it
    between them, as PixArt-alpha (Chen et al., ICLR 2024), here behind a layer norm.

    Args:
        mixer, mlp: [B, N, D] -> [B, N, D].
        rank: the six vectors come from a product of two matrices of this rank without anything between them (FiTv2's adaLN-LoRA); None = one matrix.
        dropout, drop_path: on both branches.
        modulation: a part of its own that makes the six vectors, [B, D] -> [B, 6 D].
        norm, norm_eps: of both branches.
        cross: attention to a context; None = there is none.
        mlp_norm_eps: of the norm before the perceptron alone, where that is the layer norm; by default norm_eps.
    """

    def __init__(
        self,
        *,
        dim: int,
        mixer: nn.Module,
        mlp: nn.Module,
        rank: int | None = None,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        modulation: nn.Module | None = None,
        mlp_norm_eps: float | None = None,
        norm: Norm = "layer",
        norm_eps: float = 1e-6,
        cross: CrossAttention | None = None,
    ):
        super().__init__()
        self.mixer, self.mlp, self.norm_eps = mixer, mlp, norm_eps
        self.cross = cross
        self.cross_norm = None if cross is None else nn.LayerNorm(dim, eps=norm_eps)
        self.mlp_norm_eps = norm_eps if mlp_norm_eps is None else mlp_norm_eps
        self.norms = None if norm == "layer" else nn.ModuleList(make_norm(norm, dim, norm_eps) for _ in range(2))
        self.dropout = Dropout(dropout)
        self.drop_path = DropPath(drop_path)
        if modulation is None:
            wide = 6 * dim
            modulation = (
                nn.Linear(dim, wide) if rank is None else nn.Sequential(nn.Linear(dim, rank), nn.Linear(rank, wide))
            )
        self.modulation: nn.Module = modulation

    def forward(
        self,
        h: Tensor,
        c: Tensor,
        layout: Layout,
        cache: Cache | None = None,
        shared: Tensor | None = None,
        sample: Tensor | None = None,
        context: tuple[Tensor, Tensor | None] | None = None,
    ) -> Tensor:
        """
        Args:
            c: condition after its SiLU, [B, D].
            shared: [B, 6 D], added to the block's own six vectors.
            sample: [M] int64, of packed tokens h [M, D]: which sample of the batch each belongs to. The mixer is then given [M, D] too.
            context: vectors [B, k, E] that are attended to and which of them are real [B, k], see nn.told; None = nothing is said.
        """
        vectors = self.modulation(c) if shared is None else self.modulation(c) + shared
        mix_shift, mix_scale, mix_gate, shift, scale, gate = per_token(vectors, sample).chunk(6, dim=-1)
        mix_norm, mlp_norm = (None, None) if self.norms is None else self.norms
        mixed = self.mixer(modulate(h, mix_shift, mix_scale, self.norm_eps, mix_norm), layout, cache)
        h = addcmul(h, mix_gate, self.drop_path(self.dropout(mixed)))
        if self.cross is not None and self.cross_norm is not None and context is not None:
            h = h + self.drop_path(self.dropout(self.cross(self.cross_norm(h), *context)))
        widened = self.mlp(modulate(h, shift, scale, self.mlp_norm_eps, mlp_norm))
        return addcmul(h, gate, self.drop_path(self.dropout(widened)))

    def initialise(self) -> None:
        """The perceptron as in DiT; what the six vectors are made by 0, so that the block is the identity. The mixer stays as it is."""
        init_linears(self.mlp)
        if self.cross is not None:
            init_linears(self.cross)
            init_zero(self.cross.proj)
        if isinstance(self.modulation, nn.Sequential):
            init_linears(self.modulation[0])
            init_zero(self.modulation[1])
        elif isinstance(self.modulation, GatedMLP):
            init_linears(self.modulation)
            init_zero(self.modulation.down)
        else:
            init_zero(self.modulation)


class AdaLNHead(nn.Module):
    """The last layer: h [B, N, D], condition after its SiLU [B, D] -> [B, N, width], 0 at first.

    Args:
        norm, norm_eps: before it is modulated.
        modulation: a part of its own that makes shift and scale, [B, D] -> [B, 2 D].
    """

    def __init__(
        self,
        *,
        dim: int,
        width: int,
        norm: Norm = "layer",
        norm_eps: float = 1e-6,
        modulation: nn.Module | None = None,
    ):
        super().__init__()
        self.norm = None if norm == "layer" else make_norm(norm, dim, norm_eps)
        self.norm_eps = norm_eps
        self.modulation = nn.Linear(dim, 2 * dim) if modulation is None else modulation
        self.linear = nn.Linear(dim, width)
        init_zero(self.modulation.down if isinstance(self.modulation, GatedMLP) else self.modulation)
        init_zero(self.linear)

    def forward(self, h: Tensor, c: Tensor, sample: Tensor | None = None) -> Tensor:
        """Packed tokens as in AdaLNBlock."""
        shift, scale = per_token(self.modulation(c), sample).chunk(2, dim=-1)
        return self.linear(modulate(h, shift, scale, self.norm_eps, self.norm))


def per_token(vectors: Tensor, sample: Tensor | None) -> Tensor:
    """Vectors of samples [B, K] as [B, 1, K], which broadcasts over their tokens, or for packed tokens as [M, K]."""
    return vectors.unsqueeze(1) if sample is None else vectors.index_select(0, sample)


def init_linears(module: nn.Module) -> None:
    """Every linear layer as in DiT: Xavier-uniform weights, no biases."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def init_zero(module: nn.Module) -> None:
    """Every parameter 0."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
