"""SiT of willisma/SiT (SiT-XL/2): the network of DiT, trained on velocities."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from genkit.backbones.dit import DiT
from genkit.importers import dit

IGNORED = dit.IGNORED


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> DiT:
    """As importers.dit. The released weights have outputs for variances, which were never trained; a flow does not read them."""
    return dit.convert(state, config)


def sampling(network: Any, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The velocity towards data, by 249 calls of the model (the paper's ODE solver is given 250 points), three channels guided."""
    return {
        "objective": {"type": "flow", "towards": "data"},
        "sampler": {"type": "heun", "num_steps": 125, "guidance": 1.5, "guidance_channels": 3},
    }
