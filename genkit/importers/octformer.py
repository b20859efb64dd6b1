"""Stages of octree-nn/octformer, with the group convolution or the depthwise one as position encoding. Part of a network: there is no word for it after --from."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from genkit.errors import UsageError
from genkit.importers.names import Rules, count, fill, shape
from genkit.nn.octformer import OctFormerStage

WHAT = "a stage of an OctFormer"
IGNORED: dict[str, str] = {}
# By the names of torch.nn, made without arguments as theirs are.
_ACTIVATIONS: dict[str, type[nn.Module]] = {
    kind.__name__.lower(): kind
    for kind in (nn.GELU, nn.ReLU, nn.SiLU, nn.LeakyReLU, nn.ELU, nn.Mish, nn.Hardswish, nn.Tanh)
}
_GROUPS = 8
_GROUPED = tuple(f"blocks.{{0}}.cpe.conv.convs.{g}.weights" for g in range(_GROUPS))
_DEPTHWISE = ("blocks.{0}.cpe.conv.weights",)
RULES: Rules = (
    (r"(\d+)\.positions\.norm\.(.+)", "blocks.{0}.cpe.bn.{1}"),
    (r"(\d+)\.attention\.table", "blocks.{0}.attention.rpe.rpe_table"),
    (r"(\d+)\.mlp\.0\.(.+)", "blocks.{0}.mlp.fc1.{1}"),
    (r"(\d+)\.mlp\.2\.(.+)", "blocks.{0}.mlp.fc2.{1}"),
    (r"(\d+)\.(.+)", "blocks.{0}.{1}"),
)


def stage(
    state: Mapping[str, Tensor],
    *,
    num_heads: int,
    window: int,
    dilation: int,
    is_dense: bool = False,
    qk_scale: float | None = None,
    activation: str = "GELU",
) -> OctFormerStage:
    """State dict of an OctFormerStage -> our stage in evaluation mode. Widths, depth and the table are read from the weights.

    Args:
        qk_scale: of the scores where it is neither None nor 0, which are K^-1/2; it goes into the weights of the queries.
        activation: between the layers of the MLPs, a class of torch.nn: GELU, "torch.nn.ReLU". Weights do not tell it.

    Raises: GenkitError for weights that do not fit, naming the keys; UsageError for an activation that is not known.
    """
    kind = _ACTIVATIONS.get(activation.strip("<>'").rpartition(".")[2].lower())
    if kind is None:
        known = ", ".join(kind.__name__ for kind in _ACTIVATIONS.values())
        raise UsageError(f"activation={activation} of {WHAT} is not supported, only {known}")
    dim = shape(state, "blocks.0.norm1.weight", WHAT)[0]
    is_depthwise = _DEPTHWISE[0].format(0) in state
    network = OctFormerStage(
        dim,
        num_heads,
        count(state, "blocks.{}."),
        window=window,
        dilation=dilation,
        mlp_ratio=shape(state, "blocks.0.mlp.fc1.weight", WHAT)[0] / dim,
        has_positions="blocks.0.attention.rpe.rpe_table" in state,
        has_bias="blocks.0.attention.qkv.bias" in state,
        is_depthwise=is_depthwise,
        is_dense=is_dense,
        activation=kind,
    )
    # Theirs are one weight [27, C / 8, C / 8] per group, or [27, 1, C]; ours begin with the groups.
    laid_out = {key: value[None] if ".convs." in key else value for key, value in state.items()}
    if is_depthwise:
        laid_out |= {
            key: value.movedim(2, 0)[..., None] for key, value in state.items() if key.endswith(".cpe.conv.weights")
        }
    if qk_scale:
        factor = torch.ones(3 * dim)
        factor[:dim] = qk_scale * math.sqrt(dim / num_heads)
        laid_out |= {
            key: value * factor.view(-1, *[1] * (value.ndim - 1))
            for key, value in state.items()
            if key.rpartition(".")[0].endswith("attention.qkv")
        }
    laid_out |= {key: value.clone() for key, value in laid_out.items() if torch.is_tensor(value) and value.ndim == 0}
    conv = (r"(\d+)\.positions\.conv\.weight", _DEPTHWISE if is_depthwise else _GROUPED)
    fill(network, laid_out, (conv, *RULES), IGNORED, WHAT)
    return network.eval()
