"""Octrees: equal to ocnn where it can be compared, and true to their own rules where it cannot."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genkit.kernels.octree_cells.op import octree_cells
from genkit.kernels.octree_neighbours.op import octree_neighbours
from genkit.kernels.octree_parents.op import octree_parents
from genkit.kernels.scatter_sum.op import scatter_sum
from genkit.nn.octree_conv import OctreeConv, OctreeGroupNorm
from genkit.octree import build, keys, tokens, values
from genkit.octree.octree import KERNELS, Octree


def cloud(count: int, seed: int, radius: float = 0.7) -> torch.Tensor:
    """Points of a sphere, with a seam at which they are dense."""
    random = torch.Generator().manual_seed(seed)
    points = torch.nn.functional.normalize(torch.randn(count, 3, generator=random)) * radius
    points[: count // 3, 0] *= 0.1
    return points


def batch(depth: int = 5, full_depth: int = 2, count: int = 300) -> Octree:
    clouds = [cloud(count, seed) for seed in (0, 1, 2)]
    samples = torch.arange(3).repeat_interleave(count)
    points = torch.cat(clouds)
    return build.from_points(points, normals=points, samples=samples, batch_size=3, depth=depth, full_depth=full_depth)


def theirs(depth: int, full_depth: int, count: int = 300):
    """The same batch by ocnn."""
    ocnn = pytest.importorskip("ocnn", reason="ocnn is the peer (test extra)")
    octrees = []
    for seed in (0, 1, 2):
        points = cloud(count, seed)
        octree = ocnn.octree.Octree(depth, full_depth)
        octree.build_octree(ocnn.octree.Points(points, points))
        octrees.append(octree)
    merged = ocnn.octree.merge_octrees(octrees)
    merged.construct_all_neigh()
    return ocnn, merged


# --- keys


@given(st.lists(st.tuples(*[st.integers(0, 2**16 - 1)] * 3), min_size=1, max_size=20), st.integers(0, 2**15 - 1))
@settings(max_examples=50, deadline=None)
def test_keys_hold_coordinates_and_sample(xyz, sample):
    xyz = torch.tensor(xyz)
    key = keys.encode(xyz, sample)
    back, owner = keys.decode(key)
    assert torch.equal(back, xyz)
    assert (owner == sample).all()
    up, _ = keys.decode(keys.parent(key))
    assert torch.equal(up, xyz >> 1)
    child = (xyz & 1) @ torch.tensor([4, 2, 1])
    assert torch.equal(keys.first_child(keys.parent(key) & (2**45 - 1)) + child, keys.place(key))


# --- structure, against ocnn


@pytest.mark.parametrize(("depth", "full_depth"), [(2, 2), (3, 0), (5, 2), (7, 3), (10, 2)])
def test_structure_equals_ocnn(depth, full_depth):
    _, peer = theirs(depth, full_depth)
    both = [batch(depth, full_depth)]
    single = [
        build.from_points(cloud(300, s), normals=cloud(300, s), depth=depth, full_depth=full_depth) for s in range(3)
    ]
    both.append(build.merge(single))
    for octree in both:
        for d in range(depth + 1):
            assert torch.equal(octree.keys[d], peer.keys[d])
            assert torch.equal(octree.children[d], peer.children[d].long())
            assert octree.count_occupied(d) == peer.nnum_nempty[d]
            if d:
                assert torch.equal(octree.neighbours(d), peer.neighs[d])
        torch.testing.assert_close(octree.points, peer.points[depth])
        torch.testing.assert_close(octree.normals, peer.normals[depth])


@pytest.mark.parametrize("kernel", sorted(KERNELS))
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("is_dense", [True, False])
def test_parts_of_the_neighbourhood_equal_ocnn(kernel, stride, is_dense):
    _, peer = theirs(4, 2)
    expected = peer.get_neigh(4, kernel, stride, nempty=not is_dense)
    assert torch.equal(batch(4).neighbours_of(4, kernel, stride, is_dense), expected)


@pytest.mark.parametrize("is_dense", [True, False])
@pytest.mark.parametrize(("kernel", "stride"), [("333", 1), ("333", 2), ("222", 2), ("311", 1)])
def test_convolution_and_its_gradients_equal_ocnn(kernel, stride, is_dense):
    ocnn, peer = theirs(4, 2)
    octree = batch(4)
    rows = octree.count(4) if is_dense else octree.count_occupied(4)
    x = torch.randn(rows, 6, generator=torch.Generator().manual_seed(0))
    conv = OctreeConv(6, 5, kernel=kernel, stride=stride, is_dense=is_dense, has_bias=True)
    other = ocnn.nn.OctreeConv(6, 5, [int(k) for k in kernel], stride, not is_dense, use_bias=True, method="block_gemm")
    with torch.no_grad():
        other.weights.copy_(conv.weight[0])
        other.bias.copy_(conv.bias.normal_())
    ours, them = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = conv(ours, octree, 4), other(them, peer, 4)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(y)
    (y * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(ours.grad, them.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(conv.weight.grad[0], other.weights.grad, rtol=1e-4, atol=1e-4)


def test_groups_are_slices_of_the_channels():
    octree = batch(4)
    x = torch.randn(octree.count(4), 8, requires_grad=True)
    conv = OctreeConv(8, 4, groups=2)
    halves = []
    for g in range(2):
        half = OctreeConv(4, 2)
        half.load_state_dict({"weight": conv.weight[g : g + 1]})
        halves.append(half(x[:, 4 * g : 4 * g + 4], octree, 4))
    torch.testing.assert_close(conv(x, octree, 4), torch.cat(halves, 1))
    found = torch.autograd.grad(conv(x, octree, 4).square().sum(), x)[0]
    expected = torch.autograd.grad(sum((h.square().sum() for h in halves), torch.zeros(())), x)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_pooling_padding_and_norm_equal_ocnn():
    ocnn, peer = theirs(5, 2)
    octree = batch(5)
    x = torch.randn(octree.count(5), 8, generator=torch.Generator().manual_seed(0))
    few = x[: octree.count_occupied(5)]
    assert torch.equal(values.pad(few, octree, 5, 2.0), ocnn.nn.octree_pad(few, peer, 5, 2.0))
    assert torch.equal(values.max_pool(x, octree, 5), ocnn.nn.octree_max_pool(x, peer, 5))
    assert torch.equal(values.max_pool(few, octree, 5, False), ocnn.nn.octree_max_pool(few, peer, 5, nempty=True))
    for kernel, stride, rows in (("222", 2, x), ("333", 1, x)):
        expected = ocnn.nn.octree_avg_pool(rows, peer, 5, kernel, stride)
        torch.testing.assert_close(values.average_pool(rows, octree, 5, kernel, stride), expected)
    torch.testing.assert_close(values.global_pool(x, octree, 5), ocnn.nn.octree_global_pool(x, peer, 5))
    torch.testing.assert_close(values.to_voxels(x, octree, 5), ocnn.nn.octree2voxel(x, peer, 5))
    assert torch.equal(values.from_voxels(values.to_voxels(x, octree, 5), octree, 5), x)
    norm = OctreeGroupNorm(8, 32)
    expected = ocnn.nn.OctreeGroupNorm(8, 32)(x, peer, 5)
    torch.testing.assert_close(norm(x, octree.samples(5), 3), expected, rtol=1e-4, atol=1e-5)


def test_gradients_of_the_norm():
    norm, samples = OctreeGroupNorm(8, 2).double(), torch.tensor([0, 2, 0, 0, 2, 0])
    x = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    torch.nn.init.normal_(norm.weight)

    def call(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x, samples, 3))

    assert torch.autograd.gradcheck(call, (x, norm.weight, norm.bias))


def test_search_finds_every_node_and_nothing_else():
    octree = batch(5)
    for d in (2, 5):
        number = octree.search(octree.xyz(d), octree.samples(d), d)
        assert torch.equal(number, torch.arange(octree.count(d)))
    occupied = octree.occupied(5)
    number = octree.search(octree.xyz(5)[occupied], octree.samples(5)[occupied], 5, is_dense=False)
    assert torch.equal(number, torch.arange(len(occupied)))
    outside = torch.tensor([[-1, 0, 0], [32, 0, 0], [0, 0, 0]])
    assert octree.search(outside, torch.tensor([0, 0, 3]), 5).tolist() == [-1, -1, -1]
    assert octree.search(outside, torch.tensor([0, 0, 3]), 2).tolist() == [-1, -1, -1]


# --- their own rules


def test_split_bits_are_the_octree():
    octree = batch(6, 2)
    again = tokens.grow(tokens.splits_of(octree), full_depth=2, depth=6, batch_size=3)
    assert all(torch.equal(a, b) for a, b in zip(again.keys, octree.keys, strict=True))
    with pytest.raises(ValueError, match="split bits"):
        tokens.grow(tokens.splits_of(octree)[:-8], full_depth=2, depth=6, batch_size=3)


def test_growing_where_nothing_is_split_splits_the_first_node():
    octree = build.complete(2)
    deeper = build.split(octree, torch.zeros(64, dtype=torch.bool))
    assert deeper.count(3) == 8
    assert deeper.is_occupied(2).nonzero().flatten().tolist() == [0]
    assert octree.count_occupied(2) == 64, "the octree that was given is as it was"


def test_a_sample_without_points_and_a_single_point():
    octree = build.from_points(torch.zeros(1, 3), samples=torch.tensor([1]), batch_size=3, depth=4, full_depth=1)
    assert octree.counts_of_samples(1).tolist() == [8, 8, 8]
    assert octree.counts_of_samples(4).tolist() == [0, 8, 0]
    empty = build.from_points(torch.zeros(0, 3), depth=3, full_depth=1)
    assert [empty.count(d) for d in range(4)] == [1, 8, 0, 0]
    assert empty.neighbours(3).shape == (0, 27)


def test_points_of_a_node_are_averaged():
    points = torch.tensor([[0.1, 0.1, 0.1], [0.2, 0.1, 0.1], [-0.5, 0.0, 0.9]])
    octree = build.from_points(points, features=torch.tensor([[1.0], [3.0], [5.0]]), depth=2)
    back, owner = values.to_points(octree)
    torch.testing.assert_close(back, torch.tensor([[-0.5, 0.0, 0.9], [0.15, 0.1, 0.1]]))
    assert octree.features.flatten().tolist() == [5.0, 2.0]
    assert owner.tolist() == [0, 0]
    grown = tokens.grow(tokens.splits_of(octree), full_depth=2, depth=2, batch_size=1)
    assert (values.to_points(grown)[0].abs() == torch.tensor([0.25, 0.75])[:, None, None]).any(0).all()


def test_cutting_and_moving_keep_what_is_known():
    octree = batch(5)
    shallow = build.until(octree, 3)
    assert shallow.depth == 3
    assert torch.equal(shallow.children[3], octree.children[3])
    assert torch.equal(octree.to("cpu").neighbours(4), octree.neighbours(4))


@pytest.mark.parametrize(
    ("points", "words"),
    [
        (torch.tensor([[0.0, float("nan"), 0.0]]), "not finite"),
        (torch.tensor([[0.0, 1.0, 0.0]]), "reach outside"),
        (torch.tensor([[0.0, -1e9, 0.0]]), "reach outside"),
        (torch.zeros(3), r"\[P, 3\]"),
    ],
)
def test_points_that_do_not_fit_are_refused(points, words):
    with pytest.raises(ValueError, match=words):
        build.from_points(points, depth=4)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="full_depth 5 and depth 4"):
        build.from_points(torch.zeros(1, 3), depth=4, full_depth=5)
    with pytest.raises(ValueError, match="batch_size"):
        build.complete(1, batch_size=0)
    with pytest.raises(ValueError, match="different depth"):
        build.merge([build.complete(1), build.complete(2)])
    with pytest.raises(ValueError, match="no octree"):
        build.merge([])
    with pytest.raises(ValueError, match="a mark each"):
        build.split(build.complete(1), torch.ones(3))
    with pytest.raises(ValueError, match="kernel 555"):
        build.complete(1).neighbours_of(1, "555")
    with pytest.raises(ValueError, match="2 normals for 1 points"):
        build.from_points(torch.zeros(1, 3), normals=torch.zeros(2, 3), depth=2)
    with pytest.raises(ValueError, match="unknown or not in this octree"):
        values.input_features(build.from_points(torch.zeros(1, 3), depth=2), "ND")


# --- kernels


@pytest.mark.parametrize("path", ["cpu", "reference"])
@pytest.mark.parametrize(("depth", "count"), [(0, 5), (3, 0), (3, 200), (8, 500), (16, 300)])
def test_cells_of_points(path, depth, count):
    random = torch.Generator().manual_seed(depth)
    points = torch.rand(count, 3, generator=random) * 2 - 1
    points[:3] = torch.tensor([[-1.0, 0.0, 0.9999999], [0.0, 0.0, 0.0], [0.0, -1.0, 0.5]])[: len(points[:3])]
    samples = torch.randint(0, 3000, (count,), generator=random)
    for owner in (None, samples):
        key, number = octree_cells(points, owner, depth, path=path)
        expected = keys.encode(((points + 1) * 2.0 ** (depth - 1)).long().clamp_max((1 << depth) - 1), owner)
        assert torch.equal(key[number], expected)
        assert (key.diff() > 0).all()
        assert len(number) == 0 or number.max() == len(key) - 1


@pytest.mark.parametrize("path", ["cpu", "torch"])
def test_one_depth_of_neighbours_and_of_parents_equals_the_reference(path):
    tree = batch(5)
    for d in (3, 4):
        parents = tree.neighbours(d)[tree.occupied(d)]
        found = octree_neighbours(parents, tree.children[d], path=path)
        assert torch.equal(found, octree_neighbours(parents, tree.children[d], path="reference"))
        own = tree.keys[d + 1][tree.occupied(d + 1)]
        if path == "cpu":
            for ours, theirs in zip(octree_parents(own, path=path), octree_parents(own, path="reference"), strict=True):
                assert torch.equal(ours, theirs)
    assert octree_neighbours(
        torch.zeros(0, 27, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), path=path
    ).shape == (0, 27)
    assert [len(x) for x in octree_parents(torch.zeros(0, dtype=torch.int64))] == [0, 0, 0]


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_rows_are_added_up_where_they_belong(channels):
    x = torch.randn(50, channels, requires_grad=True)
    rows = torch.randint(0, 9, (50,), generator=torch.Generator().manual_seed(0)).clamp_min(1)
    weight = torch.randn(9, channels)
    found = [scatter_sum(x, rows, 9, path=path) for path in ("cpu", "reference")]
    torch.testing.assert_close(*found)
    assert not found[0][0].any()
    torch.testing.assert_close(*(torch.autograd.grad((y * weight).sum(), x)[0] for y in found))
    torch.library.opcheck(torch.ops.genkit.scatter_sum_cpu, (x, rows, 9))


def test_kernels_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="rows reach from 0 to 3, count is 3"):
        scatter_sum(torch.zeros(4, 1), torch.arange(4), 3)
    with pytest.raises(ValueError, match="points must be"):
        octree_cells(torch.zeros(4, 2), None, 3)
    with pytest.raises(ValueError, match="depth 17"):
        octree_cells(torch.zeros(4, 3), None, 17)
    with pytest.raises(ValueError, match="parents must be"):
        octree_neighbours(torch.zeros(4, 26, dtype=torch.int64), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="keys must be"):
        octree_parents(torch.zeros(4))
