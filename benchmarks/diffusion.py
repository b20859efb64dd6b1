"""Diffusion: DiT against diffusers and against a plainly written one, DiMSUM against its reference scan.

`genkit bench diffusion` times the pairs. `python scripts/results_diffusion_speed.py` puts them on a page, with what else is measured here: how close DiT comes to
the machine's limit, the memory of a training step, how far reuse is from the exact sample, seconds per image over the number of tokens, and padding of mixed sizes.
"""

from __future__ import annotations

import copy
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from genkit.backbones.dimsum import DiMSUM
from genkit.backbones.dit import DiT
from genkit.backbones.fit_interleaved import FITInterleaved
from genkit.bench import Case
from genkit.ema import Ema
from genkit.guidance import Guidance, guide
from genkit.importers import diffusers_dit
from genkit.nn.layout import dense_layout
from genkit.nn.packed import multiplied, packed
from genkit.nn.packing import Packing
from genkit.objectives.diffusion import Diffusion
from genkit.optim import adamw
from genkit.reuse.skip_blocks import SkipBlocks
from genkit.rng import Rng
from genkit.samplers.scheduler import Scheduler

# DiT-S/2 on 32x32 latents of 4 channels with learned variances: 256 tokens.
SIZE = {"dim": 384, "depth": 12, "num_heads": 6}
SMALL = {"dim": 64, "depth": 2, "num_heads": 2}
GRID, CHANNELS, CLASSES, STEPS, STRENGTH = (32, 32), 4, 1000, 20, 4.0
FORWARD_GOAL, REUSE_GOAL, TRAIN_GOAL, DIMSUM_GOAL = 1.15, 1.8, 1.1, 10
REUSE: dict[str, Any] = {"full_steps": 4, "period": 3, "order": 1}


def cases(quick: bool) -> Iterable[Case]:
    name = f"diffusers {diffusers.__version__}"
    for B in (1, 4):
        ours, peer = models(**SIZE)
        with packed(ours):
            yield Case(f"DiT-S/2 forward, batch {B}", name, FORWARD_GOAL, forward(ours, B), peer_forward(peer, B))
        if quick and B > 1:
            continue
        what, pipeline = f"DiT-S/2, {STEPS} guided steps, batch {B}", peer_sampling(peer, B)
        yield Case(what, f"{name} DiTPipeline", FORWARD_GOAL, sampling(ours, B), pipeline)
        if B == 1:
            reused = sampling(ours, B, SkipBlocks(**REUSE))
            yield Case(f"{what}, skipped blocks", f"{name} DiTPipeline", REUSE_GOAL, reused, pipeline)
    B = 4 if quick else 8
    yield Case(f"DiT-S/2 training step, batch {B}", "DiT written plainly", TRAIN_GOAL, our_step(B), plain_step(B))
    for dim, depth, side in ((192, 4, 32),) if quick else ((192, 4, 32), (384, 8, 32), (384, 8, 64)):
        network = dimsum(side, dim=dim, depth=depth)
        call = forward(network, 1, (side, side))
        what = f"DiMSUM {depth}x{dim} forward, {(side // 2) ** 2:,} tokens, batch 1"
        with packed(network):
            yield Case(what, "its reference scan in torch", DIMSUM_GOAL, call, with_kernel("reference", call))


def models(*, dim: int, depth: int, num_heads: int) -> tuple[DiT, Any]:
    """Ours with the weights of diffusers' model, away from the initialisation, where both return 0."""
    torch.manual_seed(0)
    peer: Any = DiTTransformer2DModel(
        num_attention_heads=num_heads,
        attention_head_dim=dim // num_heads,
        in_channels=CHANNELS,
        out_channels=2 * CHANNELS,
        num_layers=depth,
        sample_size=GRID[0],
        patch_size=2,
        num_embeds_ada_norm=CLASSES,
    )
    for parameter in peer.eval().parameters():
        nn.init.normal_(parameter, std=0.03)
    return diffusers_dit.convert(peer.state_dict(), dict(peer.config)), peer


def inputs(B: int, grid: tuple[int, int] = GRID) -> tuple[Tensor, Tensor, Tensor]:
    noise = torch.randn(B, CHANNELS, *grid, generator=torch.Generator().manual_seed(0))
    return noise, torch.full((B,), 500), torch.arange(B) % CLASSES


def forward(network: Any, B: int, grid: tuple[int, int] = GRID) -> Callable[[], Tensor]:
    """One call of a backbone, as sampling makes it where it is packed."""
    x, t, label = inputs(B, grid)
    layout = dense_layout(grid)

    @torch.no_grad()
    def run() -> Tensor:
        return network(x, t, {"label": label}, layout)

    return run


def peer_forward(peer: Any, B: int) -> Callable[[], Tensor]:
    x, t, label = inputs(B)

    @torch.no_grad()
    def run() -> Tensor:
        return peer(x, t, label).sample

    return run


def sampling(network: Any, B: int, reuse: Any = None) -> Callable[[], Tensor]:
    """DDIM with guidance, from the same noise at the same times as the peer, without a decoder; images in [0, 1]."""
    noise, _, label = inputs(B)
    draw, layout, rng = Scheduler(name="DDIMScheduler", num_steps=STEPS), dense_layout(GRID), Rng.at(0, 0, B)

    @torch.no_grad()
    def run() -> Tensor:
        with packed(network):
            model = network if reuse is None else reuse.start(network)
            predict: Any = guide(Diffusion(), model, {"label": label}, layout, Guidance(STRENGTH))
            return (draw(predict, noise, rng) / 2 + 0.5).clamp(0, 1)

    return run


class NoDecoder(nn.Module):
    """Stands where DiTPipeline has its decoder."""

    config, device, dtype = SimpleNamespace(scaling_factor=1.0), torch.device("cpu"), torch.float32

    def decode(self, z: Tensor) -> Any:
        return SimpleNamespace(sample=z)


def peer_sampling(peer: Any, B: int) -> Callable[[], Tensor]:
    scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=False)
    pipeline: Any = DiTPipeline(peer, NoDecoder(), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    label = inputs(B)[2].tolist()

    def run() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipeline(label, STRENGTH, generator, STEPS, output_type="pt").images

    return run


# A training step: noise, forward, mean squared error, backward, AdamW, moving average.


class PlainBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def attend(self, x: Tensor) -> Tensor:
        B, N, D = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, D))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).unsqueeze(1).chunk(6, dim=2)
        x = x + gate1 * self.attend(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class PlainDiT(nn.Module):
    """x [B, C, Y, X], t, label -> [B, C, Y, X], as most people would write the paper's network."""

    def __init__(self, *, dim: int, depth: int, num_heads: int):
        super().__init__()
        self.embed = nn.Conv2d(CHANNELS, dim, 2, stride=2)
        self.position = nn.Parameter(torch.randn(1, GRID[0] * GRID[1] // 4, dim), requires_grad=False)
        self.time = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label = nn.Embedding(CLASSES + 1, dim)
        self.blocks = nn.ModuleList(PlainBlock(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))
        self.out = nn.Linear(dim, 4 * CHANNELS)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        B, C, Y, X = x.shape
        waves = t[:, None].float() * torch.exp(-math.log(10_000) * torch.arange(128) / 128)
        c = self.time(torch.cat([waves.cos(), waves.sin()], dim=-1)) + self.label(label)
        h = self.embed(x).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.modulation(c).unsqueeze(1).chunk(2, dim=2)
        out = self.out(self.norm(h) * (1 + scale) + shift).reshape(B, Y // 2, X // 2, 2, 2, C)
        return out.permute(0, 5, 1, 3, 2, 4).reshape(B, C, Y, X)


def our_step(B: int, size: dict[str, int] = SIZE) -> Callable[[], Tensor]:
    torch.manual_seed(0)
    mixer = {"type": "attention", "num_heads": size["num_heads"], "qk_norm": False, "rope": False}
    network = DiT(
        channels=CHANNELS, num_classes=CLASSES, grid=GRID, dim=size["dim"], depth=size["depth"], mixer=mixer
    ).train()
    objective, layout = Diffusion(), dense_layout(GRID)
    optimizer, ema = adamw(network, {"lr": 1e-4, "betas": (0.9, 0.999), "weight_decay": 0.0}), Ema(network, 0.9999)
    z, _, label = inputs(B)
    steps = 0

    def step() -> Tensor:
        nonlocal steps
        with multiplied(network):
            loss = objective(network, z, {"label": label}, layout, Rng.at(0, steps * B, B))["mse"].mean()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(steps)
        steps += 1
        return loss.detach()

    return step


def plain_step(B: int, size: dict[str, int] = SIZE) -> Callable[[], Tensor]:
    torch.manual_seed(0)
    network = PlainDiT(**size).train()
    averaged = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0)
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
    z, _, label = inputs(B)

    def step() -> Tensor:
        t, noise = torch.randint(1000, (B,)), torch.randn_like(z)
        alpha = alphas[t].view(-1, 1, 1, 1)
        dropped = torch.where(torch.rand(B) < 0.1, CLASSES, label)
        loss = (network(alpha.sqrt() * z + (1 - alpha).sqrt() * noise, t, dropped) - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for kept, parameter in zip(averaged.parameters(), network.parameters(), strict=True):
                kept.mul_(0.9999).add_(parameter, alpha=1 - 0.9999)
        return loss.detach()

    return step


# Cost over tokens.


def dimsum(side: int, *, dim: int, depth: int) -> DiMSUM:
    torch.manual_seed(0)
    return DiMSUM(channels=CHANNELS, num_classes=CLASSES, grid=(side, side), dim=dim, depth=depth).eval()


def with_kernel(path: str, run: Callable[[], Any]) -> Callable[[], Any]:
    """The same with another path of the scans."""

    def ordered() -> Any:
        before = os.environ.get("GENKIT_KERNEL")
        os.environ["GENKIT_KERNEL"] = f"selective_scan={path},causal_conv1d={path}"
        try:
            return run()
        finally:
            if before is None:
                del os.environ["GENKIT_KERNEL"]
            else:
                os.environ["GENKIT_KERNEL"] = before

    return ordered


def families(side: int) -> Iterator[tuple[str, Any]]:
    """Networks of about 33 million weights, one after the other, for side x side latents in patches of 2."""
    torch.manual_seed(0)
    given = {"channels": CHANNELS, "num_classes": CLASSES, "grid": (side, side)}
    yield "DiT", DiT(**given, dim=384, depth=12).eval()
    yield "DiMSUM", DiMSUM(**given, dim=384, depth=7).eval()
    yield "FIT, interleaved", FITInterleaved(**given, dim=256, latent_dim=512, layers="(2)4(2)4(2)").eval()


def cost() -> dict[str, dict[int, float]]:
    """Family -> {tokens: seconds per image of one call}."""
    found: dict[str, dict[int, float]] = {}
    for side in (32, 64, 128):
        for name, network in families(side):
            readings, run = [], forward(network, 1, (side, side))
            with packed(network):
                run()
                for _ in range(3):
                    started = time.perf_counter()
                    run()
                    readings.append(time.perf_counter() - started)
            found.setdefault(name, {})[(side // 2) ** 2] = statistics.median(readings)
    return found


def limit() -> dict[str, float]:
    """Billions of operations per second of the products in a forward, beside torch's product of 1024 x 1024 timed in turns."""
    D, L = SIZE["dim"], SIZE["depth"]
    N, square = GRID[0] * GRID[1] // 4, torch.randn(1024, 1024)
    ours, peer = models(**SIZE)
    work: dict[str, float] = {"matrix product": 2 * 1024**3}
    runs: dict[str, Callable[[], Any]] = {"matrix product": lambda: square @ square}
    for B in (1, 4):
        amount = B * L * (24 * N * D * D + 4 * N * N * D + 12 * D * D) + B * N * 2 * D * 12 * CHANNELS
        work |= {f"ours, batch {B}": amount, f"diffusers, batch {B}": amount}
        runs |= {f"ours, batch {B}": forward(ours, B), f"diffusers, batch {B}": peer_forward(peer, B)}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    with packed(ours):
        for _ in range(11):
            for name, run in runs.items():
                started = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - started)
    return {name: work[name] / statistics.median(seconds[name]) / 1e9 for name in runs}


def memory(side: str) -> int:
    """Peak resident MiB of a process that takes two training steps."""
    if sys.platform != "linux":
        return 0
    # VmHWM is of the program alone; what getrusage calls the peak of a child starts at the size of its parent.
    code = (
        f"import benchmarks.diffusion as b; run = b.{side}(8); run(); run(); "
        "print(next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM:')) // 1024)"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    return int(done.stdout)


def closeness() -> float:
    """PSNR in dB of a sample with skipped blocks to the exact one; images span [0, 1]."""
    ours, _ = models(**SIZE)
    exact, reused = sampling(ours, 1)(), sampling(ours, 1, SkipBlocks(**REUSE))()
    return float(-10 * torch.log10((reused - exact).square().mean()))


def padding() -> dict[str, float]:
    """Padded places by all places, in batches of 32 of random sizes between 1:2 and 2:1 of at most 256 tokens: what attention computes, and in one padded batch."""
    random = torch.Generator().manual_seed(0)
    real = packed_places = padded = 0
    for _ in range(100):
        ratio = 2 ** (2 * torch.rand(32, generator=random) - 1)
        most = 256 * torch.rand(32, generator=random).clamp_min(0.25)
        rows = (most * ratio).sqrt().int().clamp_min(1)
        counts = rows * (most / rows).int().clamp_min(1)
        packing = Packing.of(torch.arange(int(counts.max())) < counts[:, None])
        real, packed_places = real + int(counts.sum()), packed_places + packing.num_places
        padded += 32 * int(counts.max())
    return {"packed": 1 - real / packed_places, "padded": 1 - real / padded}
