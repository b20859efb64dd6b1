"""The dense models of docs/results/shapes.md: diffusion transformers over all cells of a grid of distances, trained and drawn from; scripts/results_shapes.py
calls it."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import results_shapes_parts as parts  # beside this file
import torch
from pages import Store
from safetensors.torch import load_file, save_file
from torch import Tensor

from genkit import files
from genkit.backbones.dit import DiT
from genkit.ema import Ema
from genkit.guidance import Guidance, guide
from genkit.images import write_png
from genkit.meshes import storage
from genkit.meshes.marching_cubes import marching_cubes
from genkit.meshes.mesh import Mesh, inspect
from genkit.meshes.pictures import contact_sheet
from genkit.nn.layout import dense_layout
from genkit.objectives.flow import Flow
from genkit.pipeline import open_run
from genkit.registry import build as make
from genkit.rng import Rng, sample_seeds
from genkit.samplers.heun import Heun
from genkit.tokenizers.octree_vq import BOX

DRAWING_STEPS = 18  # of Heun's
GUIDANCE = (1.0, 2.0)
SHOWN_GUIDANCE = 2.0
COUNT, POINTS = 24, 1024  # samples and as many held-out shapes, points of each
_EVERY = 50  # steps between lines


@dataclass(frozen=True)
class Dense:
    """One model and how it is trained.

    Args:
        side, patch: cells along a side of the grid, and of a token.
        dim: width, chosen so that all have about as many weights as OctGPT.
        cut: where distances are cut, cells.
        shift: how far times move towards noise, of the 32^3 grid: neighbouring cells tell the same, so that noise that hides one does not hide the shape.
        predicts: see genkit.objectives.flow.
        begins: the model whose weights training goes on with, at a rate that rises and falls anew; None = from nothing.
    """

    side: int
    patch: int
    dim: int
    num_steps: int
    batch_size: int = 8
    cut: float = 3.0
    shift: float = 4.0
    predicts: str = "x0"
    lr: float = 2e-3
    warmup: int = 50
    ema: float = 0.995
    begins: str | None = None

    def net(self, num_classes: int) -> DiT:
        mixer = {"type": "attention", "num_heads": 4, "qk_norm": True, "rope": False}
        return DiT(
            channels=1,
            num_classes=num_classes,
            grid=(self.side,) * 3,
            dim=self.dim,
            depth=4,
            patch_size=self.patch,
            mixer=mixer,
            gelu="none",
        )

    def objective(self) -> Flow:
        # A grid twice as fine says the same with eight times the cells: Esser et al., 2024, eq. 23, in three dimensions.
        shift = self.shift * (self.side / 32) ** 1.5
        return Flow(
            predicts=self.predicts,  # type: ignore[arg-type]
            time="logit_normal",
            time_mean=math.log(shift),
            cond_drop=0.1,
            shift=shift,
        )

    @property
    def reach(self) -> float:
        """Where distances are cut, in units of space."""
        return self.cut * 2 * BOX / (self.side - 1)


MODELS = {
    "dense-32": Dense(side=32, patch=4, dim=112, num_steps=540),
    "dense-32-long": Dense(side=32, patch=4, dim=112, num_steps=650, begins="dense-32"),
    "dense-64": Dense(side=64, patch=8, dim=108, num_steps=500, cut=5.0),
}


def distances_of(data: Any, side: int, runs: Path) -> Tensor:
    """[n, 1, side, side, side] float16, of all shapes, kept in the folder of runs."""
    place = runs / f"dense-distances-{side}.safetensors"
    if not place.exists():
        axis = torch.linspace(-BOX, BOX, side)
        places = torch.cartesian_prod(axis, axis, axis)
        grids = torch.stack([data.solid(i).distance(places).half() for i in range(len(data))])
        save_file({"distances": grids.view(-1, 1, side, side, side)}, place)
    return load_file(place)["distances"]


def train(model: Dense, config: dict[str, Any], runs: Path, name: str) -> None:
    """On as many shapes as the steps ask for; weights, statistics of the distances and CPU seconds are kept in runs / name."""
    if (runs / name / "dense.json").exists():
        return
    data = make("data", config | {"num_points": 16, "num_distances": 0})
    num_classes = len(data.info.class_names)
    grids = distances_of(data, model.side, runs).clamp(-model.reach, model.reach)
    mean, std = float(grids.float().mean()), float(grids.float().std())
    labels = torch.arange(len(data)) % num_classes
    torch.manual_seed(0)
    net, objective, layout = model.net(num_classes), model.objective(), dense_layout((model.side,) * 3)
    earlier, done = 0.0, 0
    if model.begins is not None:
        earlier, done = (Drawer(runs, model.begins).counters[key] for key in ("seconds", "steps"))
        net.load_state_dict(DiT.from_pretrained(runs / model.begins).state_dict())
    ema = Ema(net, model.ema)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(net.parameters(), lr=model.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    started, total = time.process_time(), 0.0
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    for step in range(model.num_steps):
        progress = max(0.0, (step - model.warmup) / max(1, model.num_steps - model.warmup))
        rate = min(1.0, (step + 1) / model.warmup) * 0.5 * (1 + math.cos(math.pi * progress))
        optimizer.param_groups[0]["lr"] = model.lr * rate
        first = (done + step) * model.batch_size
        rows = order[torch.arange(first, first + model.batch_size) % len(data)]
        rng = Noise.at(0, first, model.batch_size)
        z = (grids[rows].float() - mean) / std
        loss = objective(net, z, {"label": labels[rows]}, layout, rng)["velocity"].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(step + 1)
        total += float(loss.detach())
        if (step + 1) % _EVERY == 0:
            print(f"{name} {step + 1}: {total / _EVERY:.4f}, {time.process_time() - started:.0f} CPU s", flush=True)
            total = 0.0
    seconds = earlier + time.process_time() - started
    with ema.applied():
        net.eval().save_pretrained(runs / name)
    found = {"mean": mean, "std": std, "seconds": seconds, "steps": done + model.num_steps}
    found |= {"parameters": sum(p.numel() for p in net.parameters())}
    files.write_bytes(runs / name / "dense.json", json.dumps(asdict(model) | found, indent=1).encode())


class Noise(Rng):
    """Normal numbers by torch's own generator, much faster than those that are the same on every device; a grid of 64 needs two million for a batch."""

    def fork(self, word: str) -> Rng:
        return Noise(self.seeds, Rng(self.seeds, self.stream).fork(word).stream)

    def normal(self, *shape: int) -> Tensor:
        key = (int(self.seeds[0]) * 31 + self.stream) & 0x7FFFFFFFFFFFFFFF
        return torch.randn(len(self), *shape, generator=torch.Generator().manual_seed(key))


class Drawer:
    """A trained dense model, and what it draws."""

    def __init__(self, runs: Path, name: str):
        told = json.loads((runs / name / "dense.json").read_text())
        self.model = Dense(**{key: told[key] for key in Dense.__dataclass_fields__})
        self.mean, self.std = told["mean"], told["std"]
        steps = told["steps"]
        self.counters = {"samples": steps * self.model.batch_size, "seconds": told["seconds"], "steps": steps}
        self.parameters = told["parameters"]
        self.net = DiT.from_pretrained(runs / name).eval()

    @torch.no_grad()
    def draw(self, labels: Tensor, guidance: float) -> list[Mesh]:
        side, meshes = self.model.side, []
        objective, layout = self.model.objective(), dense_layout((side,) * 3)
        for first in range(0, len(labels), 8):
            label = labels[first : first + 8]
            predict: Any = guide(objective, self.net, {"label": label}, layout, Guidance(guidance))
            rng = Rng(sample_seeds(1, first, len(label)))
            z = Heun(num_steps=DRAWING_STEPS)(predict, rng.fork("start").normal(1, side, side, side), rng)
            meshes += [surface(grid[0] * self.std + self.mean) for grid in z]
        return meshes


def surface(distances: Tensor) -> Mesh:
    """Where distances [X, Y, Z] over the box change sign; the outermost layer is outside."""
    closed = distances.clone()
    for axis in range(3):
        for end in (0, -1):
            closed.select(axis, end).clamp_(min=1e-4)
    return marching_cubes(closed, level=0.0, bounds=(-BOX, BOX))


def train_all(runs: Path) -> None:
    config = dict(open_run(runs / parts.GENERATOR).run_config["data"])
    for name, model in MODELS.items():
        train(model, config, runs, name)


@torch.no_grad()
def measure(runs: Path) -> dict[str, Any]:
    """Both generators of octrees and all dense models by the same measures, with the CPU seconds that each was trained for."""
    pipeline = open_run(runs / parts.GENERATOR)
    names, data = list(pipeline.class_names), parts.held_out(pipeline)
    real = data.__getitems__(list(range(COUNT)))["points"][:, :POINTS]
    labels = torch.arange(COUNT) % len(names)
    store = Store(runs / "results-shapes-dense.json")  # each row by itself: together they take a quarter of an hour
    each = store.get("seconds of a sample", lambda: seconds_of_a_sample(runs))
    rows: dict[str, dict[str, Any]] = {}
    shown: list[str] = []

    def judged(name: str, draw: Callable[[], list[Mesh]], counters: dict[str, Any]) -> None:
        def row() -> dict[str, Any]:
            started = time.process_time()
            meshes = draw()
            seconds = (time.process_time() - started) / COUNT
            for i, mesh in enumerate(meshes[: 2 * len(names)]):
                if len(mesh.faces):
                    storage.save(mesh, runs / "dense-samples" / name / f"{i:02d}.ply")
            found = [inspect(mesh) for mesh in meshes]
            return {
                "cpu_seconds": seconds,
                "accuracy": parts.class_accuracy(meshes, labels, names),
                "pieces": parts.mean([float(f.num_components) for f in found]),
                "one piece": parts.mean([float(f.num_components == 1) for f in found]),
                "watertight": parts.mean([float(f.is_watertight) for f in found]),
                **parts.distances(real, meshes, POINTS),
            }

        rows[name] = store.get(name, row) | counters

    for name in (parts.GENERATOR, parts.LONGER):
        pipeline = open_run(runs / name)
        samples = parts.counters(pipeline)["samples"]
        counters = {"samples": samples, "seconds": each * samples}
        judged(name, lambda of=pipeline: parts.draw(of, COUNT, seed=1)[0], counters)  # type: ignore[misc]
        shown.append(name)
    for name in MODELS:
        drawer = Drawer(runs, name)
        for guidance in GUIDANCE:
            own = f"{name}, guidance {guidance:g}"
            judged(own, lambda of=drawer, g=guidance: of.draw(labels, g), drawer.counters)  # type: ignore[misc]
        shown.append(f"{name}, guidance {SHOWN_GUIDANCE:g}")
    for side in sorted({model.side for model in MODELS.values()}):
        axis = torch.linspace(-BOX, BOX, side)
        places = torch.cartesian_prod(axis, axis, axis)
        judged(
            f"held-out shapes on a grid of {side}",
            lambda at=places, n=side: [surface(data.solid(i).distance(at).view(n, n, n)) for i in range(COUNT)],  # type: ignore[misc]
            {},
        )
    tiles = [
        kept(runs / "dense-samples" / name / f"{i + k * len(names):02d}.ply")
        for i in range(len(names))
        for name in shown
        for k in range(2)
    ]
    write_png(runs / "shapes-dense.png", contact_sheet(tiles, columns=2 * len(shown), size=120, row_names=names))
    return {
        "rows": rows,
        "fine": store.get("fine", lambda: fine(len(names))),
        "parameters": {name: Drawer(runs, name).parameters for name in MODELS},
    }


def kept(path: Path) -> Mesh:
    """A sample; nothing where it had no surface."""
    return storage.load(path) if path.exists() else Mesh(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int64))


def seconds_of_a_sample(runs: Path) -> float:
    """CPU seconds that OctGPT is trained on one shape: the difference between a short run and a shorter one."""
    from genkit.training import train as run

    spent = []
    for count in (1, 5, 45):  # the first also fills the cache of tokens
        name = f"octgpt-shapes-timed-{count}"
        changes = [f"tokenizer.from={runs / parts.TOKENIZER}", f"train.num_samples={16 * count}", "log.num_images=1"]
        started = time.process_time()
        with torch.enable_grad():
            run(f"toy/{parts.GENERATOR}", changes, name=name, out=runs)
        spent.append(time.process_time() - started)
        shutil.rmtree(runs / name)
    return (spent[2] - spent[1]) / (16 * 40)


def fine(num_classes: int) -> dict[str, float]:
    """CPU seconds of a grid of 64 in patches of 4, eight times the tokens: one step of training on two shapes, and drawing one. Weights do not matter."""
    model = Dense(side=64, patch=4, dim=112, num_steps=1)
    net, objective, layout = model.net(num_classes), model.objective(), dense_layout((64,) * 3)
    label, z = torch.zeros(2, dtype=torch.int64), torch.randn(2, 1, 64, 64, 64)
    with torch.enable_grad():
        started = time.process_time()
        objective(net, z, {"label": label}, layout, Noise([0, 1]))["velocity"].mean().backward()
    step = (time.process_time() - started) / 2
    started = time.process_time()
    predict: Any = objective.predictor(net.eval(), {"label": label[:1]}, layout)
    Heun(num_steps=DRAWING_STEPS)(predict, Noise([0]).normal(1, 64, 64, 64), Rng([0]))
    return {"training": step, "drawing": time.process_time() - started}
