"""Rotary positions on grids larger than those a network was trained on, without training (Lu et al., "FiT", ICML 2024, section 3.3; FiTv2, 2024).

All rules change the J frequencies f_j = base^(-j / J) of an axis by s, how much longer it is than the trained length, at least 1.
"""

from __future__ import annotations

import contextlib
import math
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from genkit.errors import UsageError

Method = Literal["none", "plain", "interpolate", "ntk", "ntk_by_parts", "yarn"]
Gain = Literal["none", "paper", "release", "release_longest"]


@dataclass(frozen=True)
class Extrapolation:
    """
    Args:
        method: "none", no positions; "plain" as trained; "interpolate" f / s (Chen et al., 2023); "ntk" a longer base, base s^(J / (J - 1)); "ntk_by_parts" and "yarn" (Peng et
            al., 2023) leave fast waves, and interpolate slow ones.
        per_axis: every axis by its own length ("vision" NTK and YaRN); else all by the longest.
        gain: of the attention logits by the number of tokens. "paper": ln(n) / ln(n of training), at least 1. "release": the published code has 2 n in
            place of n, which acts at the trained size too; "release_longest": likewise, of the longest axis alone. YaRN has another gain of its own, and
            takes none.
        trained: tokens along an axis while training.
        lengths: tokens along every axis that all samples are treated as having; None = each its own.
    """

    method: Method = "plain"
    per_axis: bool = True
    gain: Gain = "none"
    trained: int = 16
    base: float = 10_000.0
    lengths: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.trained < 1:
            raise UsageError(f"rope_trained={self.trained} must be at least 1")
        if self.gain != "none" and (self.method == "yarn" or self.trained < 2):
            raise UsageError(f"rope_gain={self.gain} goes neither with rope=yarn nor with rope_trained below 2")

    def frequencies(self, sizes: Tensor, num_pairs: int) -> Tensor:
        """sizes [B, A], tokens along every axis of a sample -> [B, A, J = num_pairs] float32, radians per token."""
        J, sizes = num_pairs, self._treated(sizes)
        if self.method == "none":
            return torch.zeros(*sizes.shape, J, device=sizes.device)
        plain = self.base ** -(torch.arange(J, dtype=torch.float32, device=sizes.device) / J)
        if self.method == "plain":
            return plain.expand(*sizes.shape, J)
        longest = sizes if self.per_axis else sizes.amax(1, keepdim=True).expand_as(sizes)
        s = (longest.float() / self.trained).clamp_min(1).unsqueeze(-1)  # [B, A, 1]
        slow = plain / s
        if self.method == "interpolate":
            return slow
        if self.method == "yarn":
            return slow.lerp(plain, 1 - self._ramp(32, 1, J, s))
        if J < 2:
            raise UsageError(f"rope={self.method} needs heads with at least two pairs of channels per axis")
        base = self.base * s ** (J / (J - 1))
        ntk = base ** -(torch.arange(J, dtype=torch.float32, device=sizes.device) / J)
        if self.method == "ntk":
            return ntk
        blended = slow.lerp(ntk, 1 - self._ramp(1.25, 0.75, J, s))
        return blended.lerp(plain, 1 - self._ramp(16, 2, J, s))

    def amplitude(self, sizes: Tensor) -> Tensor:
        """sizes [B, A] -> [B] float32 that turned queries and keys are both multiplied by."""
        sizes = self._treated(sizes)
        s = (sizes.amax(1).float() / self.trained).clamp_min(1)
        if self.method == "yarn":
            return 1 + 0.1 * s.log()
        if self.gain == "none" or self.method == "none":
            return torch.ones_like(s)
        if self.gain == "release_longest":
            return ((2 * sizes.amax(1).float()).log() / math.log(self.trained)).clamp_min(1).sqrt()
        tokens, trained = sizes.prod(1).float(), self.trained ** sizes.shape[1]
        if self.gain == "release":
            tokens = 2 * tokens
        return (tokens.log() / math.log(trained)).clamp_min(1).sqrt()

    def _treated(self, sizes: Tensor) -> Tensor:
        return sizes if self.lengths is None else torch.tensor(self.lengths, device=sizes.device).expand_as(sizes)

    def _ramp(self, most: float, least: float, J: int, like: Tensor) -> Tensor:
        """[J], from 0 where a wave turns more than `most` times within the trained length to 1 where it turns less than `least` times."""
        low = max(math.floor(self._channel(most, J)), 0)
        high = min(math.ceil(self._channel(least, J)), 2 * J - 1)
        steps = torch.arange(J, dtype=torch.float32, device=like.device)
        return ((steps - low) / (high - low if high != low else 0.001)).clamp(0, 1)

    def _channel(self, turns: float, J: int) -> float:
        """The j, a real number, whose wave turns so many times within the trained length."""
        return J * math.log(self.trained / (2 * math.pi * turns)) / math.log(self.base)


def turning_table(coords: Tensor, sizes: Tensor, head_dim: int, rule: Extrapolation) -> tuple[Tensor, Tensor]:
    """cos and sin, each [B, N, 1, head_dim / 2] float32, for nn.rope.rotate.

    Args:
        coords: [B or 1, N, A], in tokens.
        sizes: [B, A], see Extrapolation.frequencies.

    Raises: UsageError when head_dim has no pair for every axis.
    """
    axes, pairs = coords.shape[-1], head_dim // 2
    if head_dim % 2 or pairs < axes:
        raise UsageError(f"rotary positions need an even head width >= {2 * axes} for {axes} axes, found {head_dim}")
    frequencies = rule.frequencies(sizes, pairs // axes)  # [B, A, J]
    angles = (coords.float().unsqueeze(-1) * frequencies.unsqueeze(1)).flatten(-2)  # [B, N, A J]
    angles = torch.nn.functional.pad(angles, (0, pairs - angles.shape[-1])).unsqueeze(-2)
    amplitude = rule.amplitude(sizes)[:, None, None, None]
    return angles.cos() * amplitude, angles.sin() * amplitude


@contextlib.contextmanager
def extrapolating(network: Any, changes: Mapping[str, Any]) -> Iterator[None]:
    """A network whose rotary positions follow another rule, inside the block.

    Args:
        network: with `rule`, an Extrapolation.
        changes: of it: method, per_axis, gain, trained. Every sample is then treated by its own lengths.

    Raises: UsageError for a network whose positions have no such rule, and for words no rule has.
    """
    if not changes:
        yield
        return
    kept = getattr(network, "rule", None)
    if kept is None or getattr(network, "has_mixer", False):
        raise UsageError(
            f"this model's {type(network).__name__} has no rotary positions that could be extrapolated by another rule; the backbone fit has, "
            "with its own attention. Leave --rope and its like out: other positions are stretched to the size, or refuse it"
        )
    for name, words in (("method", Method), ("gain", Gain)):
        if name in changes and changes[name] not in typing.get_args(words):
            raise UsageError(f"rope {name} {changes[name]} is none of {', '.join(typing.get_args(words))}")
    network.rule = replace(kept, lengths=None, **changes)
    try:
        yield
    finally:
        network.rule = kept
