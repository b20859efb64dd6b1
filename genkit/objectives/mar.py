"""Masked generation of continuous tokens, each drawn by a small diffusion of its own (Li et al., "MAR", NeurIPS 2024, sections 3.2 and 3.4)."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from genkit.errors import UsageError
from genkit.interfaces import Cache, Cond, Layout, Predict, PredictTokens
from genkit.nn.context import context_of, rows_of
from genkit.nn.patch import patchify, unpatchify
from genkit.nn.paths import Predictor
from genkit.nn.token_head import TokenPredictor
from genkit.nn.wrapped import unwrapped
from genkit.objectives.diffusion import Diffusion
from genkit.objectives.dropping import drop
from genkit.objectives.masking import truncated_normal
from genkit.rng import Rng


class MAR:
    """The loss of a chain of DDPM with learned variances (genkit/objectives/diffusion.py) on every masked token, given what the network says of it.

    Per sample a fraction N(mean, std^2) within [min_masked, 1] of the tokens is masked. Difference from the paper, which draws one fraction for a batch:
    a sample's loss does not depend on what else is in the batch.

    Args:
        prediction: what the perceptron predicts, see Diffusion: "noise" as published. At the noisy end of the cosine chain an error of the noise is an error of
            the token thousands of times as large, until the perceptron is trained very well; with "v" it stays as it is.
        schedule, num_times: of the chain, see nn.paths.Discrete.
        mean, std, min_masked: of the masked fraction.
        repeats: noisy versions of every masked token, each with a time of its own; costs little, as the transformer runs once.
        cond_drop: probability in [0, 1] that a label is dropped.
    """

    target = "z"
    asks = "continuous tokens"
    fills_holes = True  # sampling may start from what is known of an image
    draws = "tokens"

    def __init__(
        self,
        *,
        prediction: Literal["noise", "v", "x0"] = "noise",
        schedule: Literal["linear", "scaled_linear", "cosine"] = "cosine",
        num_times: int = 1000,
        mean: float = 1.0,
        std: float = 0.25,
        min_masked: float = 0.7,
        repeats: int = 4,
        cond_drop: float = 0.1,
    ):
        for name, value in (("cond_drop", cond_drop), ("min_masked", min_masked)):
            if not 0 <= value <= 1:
                raise UsageError(f"objective.{name}={value} must be in [0, 1]")
        if std <= 0:
            raise UsageError(f"objective.std={std} must be positive")
        if repeats < 1:
            raise UsageError(f"objective.repeats={repeats} must be at least 1")
        self.diffusion = Diffusion(prediction=prediction, schedule=schedule, num_times=num_times)
        self.mean, self.std, self.min_masked = mean, std, min_masked
        self.repeats, self.cond_drop = repeats, cond_drop

    def __call__(self, model: Any, target: Tensor, cond: Cond, layout: Layout, rng: Rng) -> dict[str, Tensor]:
        """{"mse": [B], "vb": [B] bits per number} for latents target [B, C, *grid]; means over a sample's masked tokens."""
        B, R, path = len(target), self.repeats, self.diffusion.path
        tokens = patchify(target, unwrapped(model).sides)  # [B, N, W]
        N, W = tokens.shape[1:]
        fraction = truncated_normal(rng.fork("ratio").uniform(), self.mean, self.std, self.min_masked)
        count = (fraction * N).ceil().clamp_min(1)
        masked = rng.fork("mask").order(N) < count[:, None]  # [B, N]
        k = rng.fork("time").integers(path.num_times, R, N).transpose(0, 1)[:, masked]  # [R, P]
        noise = rng.fork("noise").normal(R, N, W).transpose(0, 1)[:, masked].to(tokens)  # [R, P, W]
        clean = tokens[masked].expand(R, -1, -1)
        t = (k + 1).double() / path.num_times
        noisy = path.alpha(t).to(clean)[..., None] * clean + path.sigma(t).to(clean)[..., None] * noise
        positions = masked.flatten().nonzero().squeeze(1)
        out = model(
            tokens,
            k,
            drop(cond, self.cond_drop, rng),
            layout,
            None,
            known=~masked,
            positions=positions,
            noisy=noisy,
        ).float()
        rows = out.flatten(0, 1), clean.flatten(0, 1), noisy.flatten(0, 1), noise.flatten(0, 1)
        losses = self.diffusion.errors(*rows, k=k.flatten(), layout=Layout(layout.coords, layout.grid))
        sample = (positions // N).repeat(R)

        def mean(values: Tensor) -> Tensor:
            return values.new_zeros(B).index_add(0, sample, values) / (R * masked.sum(1))

        return {name: mean(values.float()) for name, values in losses.items()}

    def predictor(self, model: Any, cond: Cond, layout: Layout) -> PredictTokens:
        """See genkit.interfaces.PredictTokens. Each Predict gives, beside x0 and noise, f in about [0, 1] for the variances."""
        assert layout.grid is not None
        network, sides = unwrapped(model), unwrapped(model).sides
        grid = tuple(length // side for length, side in zip(layout.grid, sides, strict=True))

        def predict(tokens: Tensor, known: Tensor, cache: Cache | None = None) -> Any:
            context = context_of(cache)
            found = model(
                tokens, None, cond, layout, None if context is None else {"context": context}, known=known
            )  # [B, N, D]

            def at(slots: Tensor, fraction: Tensor) -> Predict:
                told = rows_of(found, slots)

                def denoise(x_t: Tensor, t: Tensor) -> tuple[Tensor, ...]:
                    k = self.diffusion.path.index(t).float().to(x_t.device)
                    out = network.head(x_t, k, told).float()
                    found, variance = out.chunk(2, dim=-1)
                    return (*self.diffusion.split(found, x_t, t), (variance + 1) / 2)

                return Predictor(self.diffusion.path, denoise)

            return at

        return TokenPredictor(predict, lambda z: patchify(z, sides), lambda tokens: unpatchify(tokens, grid, sides))
