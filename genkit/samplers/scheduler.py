"""Any scheduler of diffusers over our predictors."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch
from torch import Tensor

from genkit.errors import UsageError, nearest
from genkit.interfaces import OnStep, Predict
from genkit.rng import Rng
from genkit.samplers.steps import start_at


class Scheduler:
    """Runs a scheduler's own loop: set_timesteps, scale_model_input, step.

    Schedulers of the discrete chain are given its betas and what they ask for, noise, x0 or v; FlowMatch schedulers velocities, on a straight path. Noise
    that a scheduler draws comes from one generator per sample.

    Args:
        name: class name in diffusers: "DDIMScheduler", "UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler", ...
        num_steps: >= 1.
        options: further arguments of its constructor.
    """

    def __init__(self, *, name: str = "DDIMScheduler", num_steps: int = 50, options: dict[str, Any] | None = None):
        if num_steps < 1:
            raise UsageError(f"sampler.num_steps={num_steps} must be at least 1")
        cls = getattr(importlib.import_module("diffusers"), name, None)
        if cls is None or not hasattr(cls, "set_timesteps"):
            known = [word for word in dir(importlib.import_module("diffusers")) if word.endswith("Scheduler")]
            raise UsageError(f"sampler.name={name} is no scheduler of the installed diffusers; {nearest(name, known)}")
        self.num_steps, self.options = num_steps, dict(options or {})
        self._cls, self._is_flow = cls, name.startswith("FlowMatch")

    def __call__(self, predict: Predict, start: Tensor, rng: Rng, on_step: OnStep | None = None) -> Tensor:
        """As Euler's. Raises UsageError where path and scheduler do not go together."""
        scheduler = self._make(predict.path)
        scheduler.set_timesteps(self.num_steps, device=start.device)
        generators = [torch.Generator(start.device).manual_seed(int(seed) & 2**63 - 1) for seed in rng.seeds]
        noise_kwargs = {"generator": generators} if _takes(scheduler.step, "generator") else {}
        x = start_at(predict.path, start) * float(getattr(scheduler, "init_noise_sigma", 1.0))
        kind = "flow" if self._is_flow else scheduler.config.get("prediction_type", "epsilon")
        for step, k in enumerate(scheduler.timesteps):
            scaled = scheduler.scale_model_input(x, k) if hasattr(scheduler, "scale_model_input") else x
            t = (k.double() if self._is_flow else k.double() + 1) / scheduler.config.num_train_timesteps
            x0, noise = predict(scaled, t.cpu())[:2]
            x = scheduler.step(_wanted(kind, x0, noise, predict.path, t.cpu()), k, x, **noise_kwargs).prev_sample
            if on_step is not None:
                on_step(step, len(scheduler.timesteps), x0)
        return x

    def _make(self, path: Any) -> Any:
        is_chain, is_straight = hasattr(path, "num_times"), type(path).__name__ == "Straight"
        if self._is_flow:
            if not is_straight:
                raise UsageError(
                    f"{self._cls.__name__} needs a straight path (objective.type=flow); this is {type(path).__name__}"
                )
            return self._cls(**self.options)
        if not is_chain:
            raise UsageError(
                f"{self._cls.__name__} needs the discrete chain (objective.type=diffusion); this is a {type(path).__name__} path"
            )
        unclipped = {"clip_sample": False} if _takes(self._cls, "clip_sample") else {}
        return self._cls(
            num_train_timesteps=path.num_times, trained_betas=path.betas().tolist(), **unclipped | self.options
        )


def _wanted(kind: str, x0: Tensor, noise: Tensor, path: Any, t: Tensor) -> Tensor:
    """The network's output that a scheduler expects."""
    if kind == "flow":
        return noise - x0
    if kind == "v_prediction":
        return float(path.alpha(t)) * noise - float(path.sigma(t)) * x0
    return x0 if kind == "sample" else noise


def _takes(function: Any, name: str) -> bool:
    return name in inspect.signature(function).parameters
