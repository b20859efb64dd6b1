"""Sampling of masked generators against muse-maskgit-pytorch, and against itself without reused context."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from genkit.backbones.mar import MAR
from genkit.backbones.masked import Masked as Backbone
from genkit.bench import Case
from genkit.guidance import Guidance, guide
from genkit.nn.layout import dense_layout
from genkit.objectives.mar import MAR as MARObjective
from genkit.objectives.masked import Masked as Objective
from genkit.reuse.recap import Recap
from genkit.rng import Rng
from genkit.samplers.mar import MAR as MARSampler
from genkit.samplers.masked import Masked as Sampler

NUM_CLASSES, STRENGTH = 10, 3.0


def cases(quick: bool) -> Iterator[Case]:
    """The whole of sampling, guided, with random weights: the time does not depend on them."""
    size: dict[str, Any] = {"dim": 256, "depth": 4, "num_heads": 4, "codebook_size": 1024}
    for grid, batch in ((16, 2),) if quick else ((16, 8), (32, 2)):
        own = network(**size, grid=(grid, grid))
        name = f"MaskGIT, {size['depth']}x{size['dim']}, {batch}x{grid * grid} tokens, 18 steps, guided"
        ours = sampling(own, batch, (grid, grid), Sampler(num_steps=18))
        if importlib.util.find_spec("muse_maskgit_pytorch") is None:
            peer_name, peers = "muse-maskgit-pytorch", ["not installed", "not installed"]
        else:
            peer_name = f"muse-maskgit-pytorch {importlib.metadata.version('muse-maskgit-pytorch')}"
            peers = [muse(muse_network(**size, num_tokens=grid * grid), batch, grid), muse(Wrapped(own), batch, grid)]
        yield Case(name, peer_name, 1.3, ours, peers[0])
        yield Case(f"{name}, their loop around our network", peer_name, 1.0, ours, peers[1])
    yield from reuse_cases(quick)


def reuse_cases(quick: bool) -> Iterator[Case]:
    """Steps as many, every second and fourth of them full."""
    dim, depth, grid, batch, steps = (128, 2, 16, 2, 16) if quick else (384, 12, 16, 8, 64)
    model = network(dim=dim, depth=depth, num_heads=6 if dim == 384 else 4, codebook_size=1024, grid=(grid, grid))
    plain = sampling(model, batch, (grid, grid), Sampler(num_steps=steps))
    for light, goal in ((1, 1.5), (3, 2.4)):
        ours = sampling(model, batch, (grid, grid), Sampler(num_steps=steps, reuse=Recap(light=light)))
        name = f"MaskGIT with ReCAP, {depth}x{dim}, {batch}x{grid * grid} tokens, {steps} steps, 1 full + {light} light"
        yield Case(name, "all steps full", goal, ours, plain)


def network(*, dim: int, depth: int, num_heads: int, codebook_size: int, grid: tuple[int, ...]) -> Backbone:
    torch.manual_seed(0)
    model = Backbone(
        codebook_size=codebook_size,
        num_levels=1,
        num_classes=NUM_CLASSES,
        grid=grid,
        dim=dim,
        depth=depth,
        mixer={"type": "attention", "num_heads": num_heads},
    )
    return awake(model)


def awake(model: Any) -> Any:
    """Away from its initialisation: a network whose blocks are the identity and whose logits are all alike would be no fair case."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    return model.eval()


def sampling(model: Any, batch: int, grid: tuple[int, ...], sampler: Any) -> Callable[[], Tensor]:
    """Ids of a guided masked generator, all unknown at first."""
    label = torch.arange(batch) % NUM_CLASSES

    @torch.inference_mode()
    def sample() -> Tensor:
        predict = guide(Objective(), model, {"label": label}, dense_layout(grid), Guidance(STRENGTH))
        return sampler(predict, torch.full((batch, 1, *grid), -1), Rng.at(0, 0, batch))

    return sample


def mar(*, dim: int, depth: int, num_heads: int, grid: tuple[int, int]) -> Any:
    """A MAR with a small head."""
    torch.manual_seed(0)
    model = MAR(
        channels=16,
        num_classes=NUM_CLASSES,
        grid=grid,
        dim=dim,
        depth=depth // 2,
        num_heads=num_heads,
        buffer_size=64,
        head_width=256,
        head_depth=3,
    )
    return awake(model)


def mar_sampling(model: Any, batch: int, grid: tuple[int, int], sampler: MARSampler) -> Callable[[], Tensor]:
    """Latents of a guided MAR, all unknown at first."""
    label = torch.arange(batch) % NUM_CLASSES

    @torch.inference_mode()
    def sample() -> Tensor:
        predict: Any = guide(MARObjective(), model, {"label": label}, dense_layout(grid), Guidance(STRENGTH))
        return sampler(predict, torch.full((batch, 16, *grid), math.nan), Rng.at(0, 0, batch))

    return sample


# The peer


def muse_network(*, dim: int, depth: int, num_heads: int, codebook_size: int, num_tokens: int) -> Any:
    """The peer's transformer with attention written out, which is faster here than its own flash attention. It also attends to the text, a single token."""
    from types import SimpleNamespace

    from muse_maskgit_pytorch import t5
    from muse_maskgit_pytorch.muse_maskgit_pytorch import MaskGitTransformer

    t5.T5_CONFIGS["none"] = {"config": SimpleNamespace(d_model=dim)}  # no text encoder is loaded
    torch.manual_seed(0)
    model = MaskGitTransformer(
        num_tokens=codebook_size,
        seq_len=num_tokens,
        dim=dim,
        depth=depth,
        dim_head=dim // num_heads,
        heads=num_heads,
        flash=False,
        t5_name="none",
    ).eval()
    model.encode_text = lambda texts: torch.ones(len(texts), 1, dim)
    return model


class Wrapped(nn.Module):
    """Our network as the peer's loop calls its own: once with the condition, once without."""

    def __init__(self, model: Backbone):
        super().__init__()
        self.model, self.mask_id, self.self_cond = model, model.config["codebook_size"], False

    def encode_text(self, texts: list[str]) -> Tensor:
        return torch.arange(len(texts)) % NUM_CLASSES

    def forward_with_cond_scale(
        self, ids: Tensor, text_embeds: Tensor, cond_scale: float, **others: Any
    ) -> tuple[Tensor, Tensor]:
        grid = tuple(self.model.config["grid"])
        x = ids.view(len(ids), 1, *grid)
        logits, null = (
            self.model(x, None, {"label": label}, dense_layout(grid)).flatten(1, -2)
            for label in (text_embeds, torch.full_like(text_embeds, -1))
        )
        return null + (logits - null) * cond_scale, logits


def muse(transformer: Any, batch: int, side: int) -> Callable[[], Tensor]:
    """The peer's loop without a tokenizer."""
    from types import SimpleNamespace

    from muse_maskgit_pytorch import muse_maskgit_pytorch as peer

    peer.tqdm = lambda steps, **options: steps
    loop = peer.MaskGit.__new__(peer.MaskGit)
    nn.Module.__init__(loop)
    loop.transformer, loop.mask_id, loop.self_cond = transformer, transformer.mask_id, False
    loop.vae = SimpleNamespace(get_encoded_fmap_size=lambda size: side, decode_from_ids=lambda ids: ids)
    loop.image_size = loop.token_critic = None
    loop.noise_schedule, loop.resize_image_for_cond_image = peer.cosine_schedule, False
    return lambda: loop.generate(texts=["x"] * batch, fmap_size=side, timesteps=18, cond_scale=STRENGTH)
