"""Index backpropagation: the choice among all codes is differentiated through a softmax, so that every code learns from every vector.

Shi et al., "Taming Scalable Visual Tokenizer for Autoregressive Image Generation" (IBQ), 2024, section 3.2. The losses are those of its code
(TencentARC/SEED-Voken src/IBQ), where beta stands on the other term than in the paper. Differences: the first batch is clustered and dead codes restart
(genkit.nn.codebook), all with one length, and the softmax over the codebook exists for a block of vectors at a time: where there are several, it is
computed again for the gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from genkit.kernels.nearest_code.chunked import nearest_code
from genkit.nn.codebook import Codebook, normalise
from genkit.nn.entropy import entropy, over_processes
from genkit.nn.quantize import Quantized

_CHUNK = 2**22  # scores held at once, 16 MiB each of a few tensors of float32


class DotCodebook(Codebook):
    """The code with the largest dot product is chosen; neither side is normalised."""

    def search(self, rows: Tensor, table: Tensor) -> Tensor:
        return nearest_code(rows, table, cosine=True)

    def start(self, rows: Tensor, codes: Tensor) -> Tensor:
        """With the mean length of the codes: a longer one would be chosen for every row on its side, and nearly all others would die."""
        return normalise(rows) * codes.norm(dim=-1).mean(-1)[..., None, None]


class IndexBackpropQuantizer(nn.Module):
    """Projection, softmax over the codebook, projection back.

    Args:
        dim: D, width of the vectors that come and go.
        codebook_size: S.
        codebook_dim: d, width of a code; None = D. Where d differs from D, a linear layer goes in and one comes out.
        beta: weight of the pull of hard codes towards their vectors.
        entropy: weight of the entropy loss: mean entropy of a vector's assignment minus entropy of the mean one; 0 = off.
        temperature: of the assignment that the entropies are taken of.
        restart: see Codebook.
    """

    num_levels = 1

    def __init__(
        self,
        *,
        dim: int,
        codebook_size: int,
        codebook_dim: int | None = None,
        beta: float = 0.25,
        entropy: float = 0.05,
        temperature: float = 0.01,
        restart: float = 0.0,
    ):
        super().__init__()
        self.codebook_size, self.beta, self.entropy, self.temperature = codebook_size, beta, entropy, temperature
        code_dim = dim if codebook_dim is None else codebook_dim
        self.codebook = DotCodebook(codebook_size=codebook_size, dim=code_dim, update="gradient", restart=restart)
        self.project_in: nn.Module = nn.Identity()
        self.project_out: nn.Module = nn.Identity()
        if code_dim != dim:
            self.project_in, self.project_out = nn.Linear(dim, code_dim), nn.Linear(code_dim, dim)

    def forward(self, z: Tensor) -> Quantized:
        """z [B, *grid, D] -> Quantized. In training mode the codebook remembers the batch until `codebook.after_step()`.

        Losses: "commitment", mean squared distance of the vectors to their codes; "codebook", the same of soft codes, with a gradient for both, plus
        beta times that of hard codes with a gradient for them; in training "entropy", weighted, the part over the batch the same for every image.
        """
        B, *grid, _ = z.shape
        z = self.project_in(z)
        with torch.autocast(z.device.type, enabled=False):
            rows = z.float().flatten(0, -2)  # [N, d]
            hard, ids = self.codebook(rows[None])
            hard, ids = hard[0].float(), ids[0]  # [N, d], [N]
            codes, of_samples, mean = self._soft(rows, ids) if torch.is_grad_enabled() else (hard, None, None)
            losses = {
                "commitment": _mean_square(hard.detach() - rows, B),
                "codebook": _mean_square(codes - rows, B) + self.beta * _mean_square(hard - rows.detach(), B),
            }
            if self.training and self.entropy and of_samples is not None and mean is not None:
                of_samples = of_samples.reshape(B, -1).mean(1)
                losses["entropy"] = self.entropy * (of_samples - entropy(over_processes(mean)))
        codes = self.project_out(codes.to(z.dtype))
        return Quantized(codes.reshape(B, *grid, -1), ids.reshape(B, *grid, 1), losses)

    def codes(self, ids: Tensor) -> Tensor:
        """ids [B, *grid, 1] in [0, S) -> codes [B, *grid, D]."""
        B, *grid, _ = ids.shape
        return self.project_out(self.codebook.codes(ids.reshape(1, -1))[0]).reshape(B, *grid, -1)

    def _soft(self, rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes of rows [N, d] with a gradient through the softmax [N, d]; entropy of each row's assignment [N]; mean assignment [S]."""
        table = self.codebook.table()[0].float()
        size = max(1, _CHUNK // len(table))
        parts = list(zip(rows.split(size), ids.split(size), strict=True))
        if len(parts) == 1:
            blocks = [self._soft_block(rows, ids, table)]
        else:
            blocks = [checkpoint(self._soft_block, *part, table, use_reentrant=False) for part in parts]
        codes, entropies, sums = zip(*blocks, strict=True)
        return torch.cat(codes), torch.cat(entropies), torch.stack(sums).sum(0) / len(rows)

    def _soft_block(self, rows: Tensor, ids: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = rows @ table.T  # [n, S]
        # In value the hard code, bit for bit; its gradient goes to the code, and through the softmax to the vector and to all codes.
        soft = logits.softmax(-1) @ table.detach()
        codes = F.embedding(ids, table) + (soft - soft.detach())
        log_p = (logits / self.temperature).log_softmax(-1)
        p = log_p.exp()
        return codes, -(p * log_p).sum(-1), p.sum(0)


def _mean_square(error: Tensor, batch: int) -> Tensor:
    """[N, d] -> [B], the mean over places and width."""
    return error.square().reshape(batch, -1).mean(1)
