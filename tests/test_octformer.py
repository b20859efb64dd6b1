"""Stages of OctFormer and their importer."""

from __future__ import annotations

import pytest
import torch

from genkit.errors import GenkitError, UsageError
from genkit.importers import octformer as importer
from genkit.nn.octformer import OctFormerStage, PositionConv
from genkit.octree import build
from genkit.octree.octree import Octree
from genkit.octree.values import gather

DIM, DEPTH = 16, 3


def octree() -> Octree:
    points = torch.rand(60, 3, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8
    samples = torch.arange(2).repeat_interleave(30)
    return build.from_points(points, samples=samples, batch_size=2, depth=DEPTH, full_depth=1)


def exported(stage: OctFormerStage) -> dict[str, torch.Tensor]:
    """Under the published names, in the published shapes."""
    state = {}
    for key, value in stage.state_dict().items():
        number, _, name = key.partition(".")
        if name == "positions.conv.weight":
            if value.shape[0] == DIM:
                state[f"blocks.{number}.cpe.conv.weights"] = value[..., 0].movedim(0, 2)  # [27, 1, C]
            else:
                state |= {f"blocks.{number}.cpe.conv.convs.{g}.weights": part for g, part in enumerate(value)}
            continue
        for ours, theirs in (
            ("positions.norm", "cpe.bn"),
            ("attention.table", "attention.rpe.rpe_table"),
            ("mlp.0", "mlp.fc1"),
            ("mlp.2", "mlp.fc2"),
        ):
            name = name.replace(ours, theirs)
        state[f"blocks.{number}.{name}"] = value
    return state


@pytest.mark.parametrize("is_dense", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"is_depthwise": True}, {"has_bias": False}, {"has_positions": False, "is_depthwise": True}]
)
def test_the_importer_reads_every_form_of_a_stage(options, is_dense):
    torch.manual_seed(0)
    tree = octree()
    stage = OctFormerStage(DIM, 2, 2, window=8, dilation=2, mlp_ratio=1.5, is_dense=is_dense, **options).eval()
    state = exported(stage)
    again = importer.stage(state, num_heads=2, window=8, dilation=2, is_dense=is_dense)
    x = torch.randn(tree.count(DEPTH) if is_dense else tree.count_occupied(DEPTH), DIM)
    assert torch.equal(stage(x, tree, DEPTH), again(x, tree, DEPTH))
    state["blocks.1.extra"] = torch.zeros(1)
    with pytest.raises(GenkitError, match=r"unknown: blocks\.1\.extra"):
        importer.stage(state, num_heads=2, window=8, dilation=2, is_dense=is_dense)


def test_another_scale_of_the_scores_goes_into_the_queries():
    torch.manual_seed(0)
    tree = octree()
    x = torch.randn(tree.count_occupied(DEPTH), DIM)
    state = exported(OctFormerStage(DIM, 2, 2, window=8, dilation=2))
    options = {"num_heads": 2, "window": 8, "dilation": 2}
    usual = importer.stage(state, **options)
    told = importer.stage(state, **options, qk_scale=(DIM / 2) ** -0.5)
    torch.testing.assert_close(told(x, tree, DEPTH), usual(x, tree, DEPTH))
    assert torch.equal(importer.stage(state, **options, qk_scale=0.0)(x, tree, DEPTH), usual(x, tree, DEPTH))
    sharp = importer.stage(state, **options, qk_scale=2 * (DIM / 2) ** -0.5)
    torch.testing.assert_close(sharp[0].attention.qkv.weight[:DIM], 2 * usual[0].attention.qkv.weight[:DIM])
    assert torch.equal(sharp[0].attention.qkv.weight[DIM:], usual[0].attention.qkv.weight[DIM:])


@pytest.mark.parametrize("word", ["ReLU", "torch.nn.SiLU", "<class 'torch.nn.modules.activation.Tanh'>"])
def test_the_activation_of_the_original_is_told(word):
    torch.manual_seed(0)
    tree = octree()
    x = torch.randn(tree.count_occupied(DEPTH), DIM)
    state = exported(OctFormerStage(DIM, 2, 1, window=8, dilation=2))
    options = {"num_heads": 2, "window": 8, "dilation": 2}
    usual, told = (importer.stage(state, **options, **activation) for activation in ({}, {"activation": word}))
    f = {"R": torch.relu, "S": lambda h: h * torch.sigmoid(h), "T": torch.tanh}[word.rpartition(".")[2][0]]
    fc1, _, fc2 = usual[0].mlp
    torch.testing.assert_close(told[0].mlp(x), fc2(f(fc1(x))))
    assert (told(x, tree, DEPTH) - usual(x, tree, DEPTH)).abs().max() > 1e-3
    with pytest.raises(
        UsageError, match=r"activation=PReLU of a stage of an OctFormer is not supported, only GELU, ReLU"
    ):
        importer.stage(state, **options, activation="PReLU")


def test_the_depthwise_positions_weigh_every_channel_by_itself():
    torch.manual_seed(0)
    tree = octree()
    positions = PositionConv(DIM, is_depthwise=True).eval()
    x = torch.randn(tree.count_occupied(DEPTH), DIM)
    around = gather(x, tree.neighbours_of(DEPTH, is_dense=False))  # [M, 27, C]
    weight = positions.conv.weight[:, :, 0, 0].T
    torch.testing.assert_close(positions(x, tree, DEPTH), positions.norm((around * weight).sum(1)))
