"""Octrees depth by depth, each depth by revealing tokens in a random order (Wei et al., "OctGPT", 2025; `octree-nn/octgpt OctGPT.generate`).

Differences from the official loop: finished depths are not computed again; steps, temperatures and the share that is drawn anew are counted for every shape
by itself, from a stream of its own, so that a shape does not depend on its batch; a token that is not yet there is never counted as one to draw anew.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from genkit.errors import UsageError
from genkit.interfaces import OnStep, PredictTree
from genkit.rng import Rng

_CODES_REMASKED = 0.5  # of the share of split bits: a code is 32 bits, and half of it is right by chance


class OctreeMasked:
    """Tokens of a batch of shapes in sum(num_steps) calls of the model.

    In step i of T of a depth, the tokens still unknown after it are floor(n cos(pi / 2 (i + 1) / T)) of its n, at least one until the last step; which ones is
    a random order, not the model's confidence. Late steps also draw known tokens anew where the model would now choose another value.

    With reuse the steps of each depth come in groups (genkit/reuse/recap.py): light steps compute the tokens that their group reveals and no others, and draw
    nothing anew.

    Args:
        num_steps: calls per depth, at most the tokens there can be; one number for all depths, or one for each.
        temperature: of the draw, at the start of a depth; it falls linearly to 0. One number, or one per depth.
        remask: share of the tokens the model disagrees with that are drawn anew in a late step; codes half of it. 0 = off.
        remask_from: a step is late from this fraction of the steps on.
        reuse: kinds that group steps: recap.
    """

    def __init__(
        self,
        *,
        num_steps: int | list[int] = 16,
        temperature: float | list[float] = 1.0,
        remask: float = 0.2,
        remask_from: float = 0.7,
        reuse: Any = None,
    ):
        for steps in num_steps if isinstance(num_steps, list) else [num_steps]:
            if steps < 1:
                raise UsageError(f"sampler.num_steps={num_steps} must be at least 1")
        for value in temperature if isinstance(temperature, list) else [temperature]:
            if not value > 0:
                raise UsageError(f"sampler.temperature={temperature} must be positive")
        if not 0 <= remask <= 1 or not 0 <= remask_from <= 1:
            raise UsageError(f"sampler.remask={remask} and remask_from={remask_from} must be in [0, 1]")
        if reuse is not None:
            reuse.check_needs_no_choice("octree_masked")
        self.num_steps, self.temperature, self.remask, self.remask_from = num_steps, temperature, remask, remask_from
        self.reuse = reuse

    def __call__(self, predict: PredictTree, start: Any, rng: Rng, on_step: OnStep | None = None) -> Any:
        """The finished tokens, what predict.result() returns.

        Args:
            predict: where the octrees grow: `depths`, how many there are; `samples` [n], of the nodes of the present depth; `bits`, 0 where a token is a
                split bit, else those of a code; logits(values [n] or [n, bits], known [n]) -> [..., 2]; finish(values), which turns to the next depth; with
                reuse light(values, known, chosen [m] int64, keeps_condition) -> logits [m, ..., 2].
            start: octrees with the nodes of the first depth.
            rng: one stream per shape.
            on_step: is shown the values of the depth with -1 where they are unknown.
        """
        predict.begin(start)
        steps = _each("num_steps", self.num_steps, predict.depths)
        temperatures = _each("temperature", self.temperature, predict.depths)
        self._check(steps, predict)
        done = 0
        for depth, (count, temperature) in enumerate(zip(steps, temperatures, strict=True)):
            values = self._reveal(predict, count, temperature, rng.fork(f"depth {depth}"), done, sum(steps), on_step)
            predict.finish(values)
            done += count
        return predict.result()

    def _check(self, steps: list[int], predict: Any) -> None:
        """Raises UsageError for more steps than there can be tokens: so many in the first depth, and eight below each. One number for all depths may be
        as large as the last one can use."""
        most = [int(torch.bincount(predict.samples).max()) * 8**depth for depth in range(len(steps))]
        if not isinstance(self.num_steps, list):
            most = [most[-1]] * len(steps)
        for depth, (count, tokens) in enumerate(zip(steps, most, strict=True), 1):
            if count > tokens:
                where = f"depth {depth} of {len(steps)}" if isinstance(self.num_steps, list) else "the last depth"
                raise UsageError(
                    f"sampler.num_steps={self.num_steps}, but {where} has at most {tokens} tokens and every step reveals at least one; "
                    f"use {tokens} or fewer there"
                )

    def _reveal(
        self, predict: Any, num_steps: int, temperature: float, rng: Rng, done: int, total: int, on_step: OnStep | None
    ) -> Tensor:
        samples: Tensor = predict.samples
        B, bits = len(rng), predict.bits
        count = torch.bincount(samples, minlength=B)  # [B]
        column = torch.arange(len(samples), device=samples.device) - (count.cumsum(0) - count)[samples]
        widest = int(count.max())
        noise = rng.fork("order").uniform(widest).to(samples.device)[samples, column]
        # Place of a node in the order of its own shape.
        rank = _rank(noise, samples) - (count.cumsum(0) - count)[samples]
        draws = rng.fork("draw")
        values = torch.full((len(samples), bits) if bits else (len(samples),), -1, device=samples.device)
        known = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
        remaining = _remaining(count, num_steps)
        sizes, step = [1] * num_steps if self.reuse is None else self.reuse.groups(num_steps), 0
        for size in sizes:
            group = ~known & (rank >= remaining[step + size - 1][samples])  # what its steps reveal
            for number in range(size):
                u = draws.uniform(widest * max(1, bits)).to(samples.device)  # drawn in every step, needed or not
                own = u.unflatten(1, (widest, bits))[samples, column] if bits else u[samples, column]
                heat = temperature * (num_steps - step) / num_steps
                chosen = ~known & (rank >= remaining[step][samples])
                is_late = bool(self.remask) and step > num_steps * self.remask_from
                step += 1
                if number == 0 and (is_late or group.any()):
                    logits = predict.logits(values, known)
                    if is_late:
                        anew = self._doubted(logits, values, known, samples, B, bits)
                        chosen, group = chosen | anew, group | anew  # what changes is computed in light steps, too
                    drawn = _drawn(logits, own, heat)
                elif number and chosen.any():
                    asked = group.nonzero().squeeze(1)
                    logits = predict.light(values, known, asked, self.reuse.keeps_condition)
                    drawn = values.index_copy(0, asked, _drawn(logits, own[asked], heat))
                else:
                    continue  # fewer tokens than steps
                values = torch.where(chosen[:, None] if bits else chosen, drawn, values)
                known = known | chosen
                if on_step is not None:
                    on_step(done + step - 1, total, values)
        return values

    def _doubted(self, logits: Tensor, values: Tensor, known: Tensor, samples: Tensor, B: int, bits: int) -> Tensor:
        """[n] bool: of the known tokens that the model would choose otherwise, the worst share of each shape."""
        wrong = values != (logits[..., 1] > logits[..., 0]).long()
        if bits:
            score, is_wrong = wrong.sum(1).float(), wrong.any(1)
        else:
            score, is_wrong = -logits.gather(1, values.clamp_min(0)[:, None])[:, 0].float(), wrong
        is_wrong = is_wrong & known
        share = self.remask * (_CODES_REMASKED if bits else 1)
        budget = (torch.bincount(samples[is_wrong], minlength=B) * share).floor().long()
        # Worst first among the doubted of a shape; the others come behind them.
        place = _rank(torch.where(is_wrong, -score, math.inf), samples)
        count = torch.bincount(samples, minlength=B)
        return is_wrong & (place - (count.cumsum(0) - count)[samples] < budget[samples])


def _remaining(count: Tensor, num_steps: int) -> list[Tensor]:
    """How many of the tokens [B] of each shape are unknown after each step."""
    left, found = count, []
    for step in range(num_steps):
        wanted = (count * math.cos(math.pi / 2 * (step + 1) / num_steps)).floor().long()
        after = torch.minimum(torch.minimum(wanted, left - 1).clamp_min(1), left)
        left = torch.zeros_like(left) if step + 1 == num_steps else after
        found.append(left)
    return found


def _drawn(logits: Tensor, u: Tensor, temperature: float) -> Tensor:
    """[...] int64 of logits [..., 2]: 1 where u is at or above the probability of 0."""
    return (u >= torch.sigmoid((logits[..., 0] - logits[..., 1]).float() / temperature)).long()


def _rank(values: Tensor, samples: Tensor) -> Tensor:
    """Place of every entry when all are sorted by (sample, value)."""
    order = values.argsort(stable=True)
    order = order[samples[order].argsort(stable=True)]
    return torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))


def _each(name: str, given: Any, depths: int) -> list[Any]:
    if not isinstance(given, list):
        return [given] * depths
    if len(given) != depths:
        raise UsageError(
            f"sampler.{name}={given} has {len(given)} entries for {depths} depths; give one each, or one number"
        )
    return given
