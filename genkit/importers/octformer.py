"""Stages of octree-nn/octformer, with the group convolution as position encoding. Part of a network: there is no word for it after --from."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from genkit.importers.names import Rules, count, fill, shape
from genkit.nn.octformer import OctFormerStage

WHAT = "a stage of an OctFormer"
IGNORED: dict[str, str] = {}
_GROUPS = 8
RULES: Rules = (
    (r"(\d+)\.positions\.conv\.weight", tuple(f"blocks.{{0}}.cpe.conv.convs.{g}.weights" for g in range(_GROUPS))),
    (r"(\d+)\.positions\.norm\.(.+)", "blocks.{0}.cpe.bn.{1}"),
    (r"(\d+)\.attention\.table", "blocks.{0}.attention.rpe.rpe_table"),
    (r"(\d+)\.mlp\.0\.(.+)", "blocks.{0}.mlp.fc1.{1}"),
    (r"(\d+)\.mlp\.2\.(.+)", "blocks.{0}.mlp.fc2.{1}"),
    (r"(\d+)\.(.+)", "blocks.{0}.{1}"),
)


def stage(
    state: Mapping[str, Tensor], *, num_heads: int, window: int, dilation: int, is_dense: bool = False
) -> OctFormerStage:
    """State dict of an OctFormerStage -> our stage in evaluation mode. Widths, depth and the table are read from the weights."""
    dim = shape(state, "blocks.0.norm1.weight", WHAT)[0]
    network = OctFormerStage(
        dim,
        num_heads,
        count(state, "blocks.{}."),
        window=window,
        dilation=dilation,
        mlp_ratio=shape(state, "blocks.0.mlp.fc1.weight", WHAT)[0] / dim,
        has_positions="blocks.0.attention.rpe.rpe_table" in state,
        is_dense=is_dense,
    )
    # Theirs are one weight [27, C / 8, C / 8] per group; ours begin with the groups.
    laid_out = {key: value[None] if ".convs." in key else value for key, value in state.items()}
    laid_out |= {key: value.clone() for key, value in laid_out.items() if torch.is_tensor(value) and value.ndim == 0}
    fill(network, laid_out, RULES, IGNORED, WHAT)
    return network.eval()
