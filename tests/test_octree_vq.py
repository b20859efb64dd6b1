"""The octree tokenizer: its graph, its function of space, what it decodes, and what a generator trains on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from genkit import config, registry
from genkit.backbones.octgpt import OctGPT
from genkit.data.packed import PackedShapes, find_or_build
from genkit.data.shapes import Shapes
from genkit.errors import GenkitError, UsageError
from genkit.evaluation.report import Report
from genkit.importers import octgpt, octgpt_vqvae
from genkit.importers.names import source_of
from genkit.importing import generator_of, import_weights
from genkit.meshes import pictures
from genkit.meshes.mesh import Mesh, inspect
from genkit.nn.dual_graph import Down, GraphConv, Up
from genkit.objectives.shape_reconstruction import ShapeReconstruction
from genkit.octree import build
from genkit.octree.graph import DIRECTIONS, EDGES, DualGraph, dual_graph
from genkit.octree.octree import Octree
from genkit.octree.partition import around, blend, blend_with_gradient
from genkit.octree.tokens import samples_of
from genkit.pipeline import open_run
from genkit.recipes import resolve
from genkit.requests import Request
from genkit.rng import Rng
from genkit.sampling import sample
from genkit.tokenizers.octree_vq import OctreeVQ

OFFSETS = ((0, 0, 1), (0, 0, -1), (0, 1, 0), (0, -1, 0), (1, 0, 0), (-1, 0, 0))
SIZES = {
    "depth": 5,
    "full_depth": 2,
    "bits": 8,
    "encoder_channels": [8, 8, 16],
    "encoder_blocks": [1, 1, 1],
    "inner_channels": [16, 16],
    "inner_blocks": [1, 1],
    "decoder_channels": [16, 16, 8, 8],
    "decoder_blocks": [1, 1, 1, 1],
}


def tiny(**options) -> OctreeVQ:
    torch.manual_seed(0)
    return OctreeVQ(**{**SIZES, **options})


def batch(count: int = 2, points: int = 400) -> dict[str, torch.Tensor]:
    return Shapes(num_shapes=12, num_points=points, num_distances=200).__getitems__(list(range(count)))


def octree(depth: int = 5) -> Octree:
    random = torch.Generator().manual_seed(0)
    points = torch.nn.functional.normalize(torch.randn(500, 3, generator=random)) * 0.6
    points[:60] *= 0.3  # a small one within, so that leaves of several sizes meet
    samples = (torch.arange(500) >= 400).long()
    return build.from_points(points, samples=samples, batch_size=2, depth=depth, full_depth=2)


def edges(graph: DualGraph) -> set[tuple[int, int, int]]:
    rows = graph.rows.view(len(graph), EDGES)
    assert torch.equal(rows[:, DIRECTIONS], torch.arange(len(graph)))
    node, face = (rows[:, :DIRECTIONS] < len(graph)).nonzero(as_tuple=True)
    single = zip(node.tolist(), face.tolist(), rows[node, face].tolist(), strict=True)
    many = ((slot // EDGES, slot % EDGES, j) for slot, j in zip(*graph.many.tolist(), strict=True))
    return {*single, *many}


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_vertices_share_a_face_exactly_where_there_is_an_edge(depth):
    tree = octree()
    graph = dual_graph(tree, depth)
    xyz = torch.cat([tree.xyz(d) for d in range(2, depth + 1)])[graph.is_vertex]
    side = 2 ** (5 - 2 - graph.depths)  # in units of the finest node
    low, high = xyz * side[:, None], (xyz + 1) * side[:, None]
    expected = set()
    for face, offset in enumerate(OFFSETS):
        axis, sign = next((a, o) for a, o in enumerate(offset) if o)
        others = [a for a in range(3) if a != axis]
        touch = (high[:, None, axis] == low[None, :, axis]) if sign > 0 else (low[:, None, axis] == high[None, :, axis])
        for a in others:
            touch &= torch.minimum(high[:, None, a], high[None, :, a]) > torch.maximum(low[:, None, a], low[None, :, a])
        touch &= graph.samples[:, None] == graph.samples[None]
        expected |= {(i, face, j) for i, j in touch.nonzero().tolist()}
    assert edges(graph) == expected


def test_graph_convolution_is_a_mean_over_faces_with_the_right_gradients():
    graph = dual_graph(octree(4), 4)
    conv = GraphConv(3, 2, 3).double()
    x = torch.randn(len(graph), 3, dtype=torch.float64, requires_grad=True)
    # Written out: the mean over the neighbours of each face, and itself.
    wide = torch.cat([x, torch.nn.functional.one_hot(graph.depths, 3).double()], 1)
    means = torch.zeros(len(graph), DIRECTIONS, len(graph), dtype=torch.float64)
    for i, face, j in edges(graph):
        means[i, face, j] = 1
    means = means / means.sum(2, keepdim=True).clamp_min(1)
    columns = torch.cat([torch.einsum("ifj,jc->ifc", means, wide), wide[:, None]], 1)
    expected, found = columns.flatten(1) @ conv.weight, conv(x, graph)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    weight = torch.randn_like(found)
    for parameter in (x, conv.weight):
        ours, theirs = (
            torch.autograd.grad((y * weight).sum(), parameter, retain_graph=True)[0] for y in (found, expected)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_leaves_pass_where_depths_change():
    tree = octree(4)
    above, below = dual_graph(tree, 3), dual_graph(tree, 4)
    x = torch.randn(len(below), 4)
    up = Down(4, 4)(x, tree, below, above)
    leaf = ~tree.is_occupied(3)
    at = above.num_leaves + leaf.nonzero().squeeze(1)
    assert torch.equal(up[: above.num_leaves], x[: above.num_leaves])
    assert torch.equal(up[at], x[above.num_leaves : below.num_leaves])
    again = Up(4, 4)(up, tree, above, below)
    assert torch.equal(again[: below.num_leaves], x[: below.num_leaves])


def test_a_plane_on_every_node_is_that_plane_in_space():
    tree = octree(5)
    g, o = torch.tensor([0.3, -0.5, 0.8]), 0.1
    centres = torch.cat([(tree.xyz(d) + 0.5) * 2.0 ** (1 - d) - 1 for d in range(2, 6)])
    values = torch.cat([g.expand(len(centres), 3), (centres @ g + o)[:, None]], 1)
    points = torch.rand(300, 3, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8
    near = around(tree, points, torch.zeros(300, dtype=torch.int64), range(5, 6))[5]
    value, rise = blend_with_gradient(values, near)
    torch.testing.assert_close(value, points @ g + o, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rise, g.expand(300, 3), rtol=1e-3, atol=1e-3)


def test_who_blends_is_the_same_by_the_table_of_places_and_by_search(monkeypatch):
    tree = octree(5)
    points = torch.rand(500, 3, generator=torch.Generator().manual_seed(0)) * 2.6 - 1.3  # some outside
    points[0], owner = torch.tensor([50.0, -50.0, 0.0]), torch.arange(500) % tree.batch_size
    by_table = around(tree, points, owner, range(3, 6))
    assert tree.raster(5, 2) is not None
    monkeypatch.setattr("genkit.octree.octree._MOST_PLACES", 0)
    by_search = around(tree, points, owner, range(3, 6))
    for d, near in by_table.items():
        for name, value in vars(near).items():
            torch.testing.assert_close(value, vars(by_search[d])[name], rtol=0, atol=0, msg=f"depth {d}, {name}")


def test_the_gradient_is_that_of_the_function():
    tree = octree(4)
    values = torch.randn(
        sum(tree.count(d) for d in range(2, 5)), 4, generator=torch.Generator().manual_seed(0)
    ).double()
    points = torch.rand(50, 3, generator=torch.Generator().manual_seed(1)).double() * 1.6 - 0.8
    owner = torch.arange(50) % 2

    def at(where):
        near = around(tree, where, owner, range(4, 5))[4]
        return blend(values, near), blend_with_gradient(values, near)

    value, (same, rise) = at(points)
    torch.testing.assert_close(value, same)
    for axis in range(3):
        step = torch.zeros(3, dtype=torch.float64)
        step[axis] = 1e-6
        numeric = (at(points + step)[0] - at(points - step)[0]) / 2e-6
        smooth = (numeric - rise[:, axis]).abs() < 1e-4
        assert smooth.float().mean() > 0.95, "but for the few points at which two linear pieces meet"


@pytest.mark.parametrize("options", [{}, {"encoder_nodes": "occupied", "unit": "node", "head_channels": 8}])
def test_every_parameter_learns_and_losses_are_per_shape(options):
    model, objective = tiny(**options), ShapeReconstruction(num_surface=50)
    losses = objective(model, batch(), {}, None, Rng.at(0, 0, 2))
    assert all(value.shape == (2,) for value in losses.values())
    sum(value.mean() for name, value in losses.items() if name[0] != "_").backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


def test_an_encoder_of_occupied_nodes_gives_all_empty_ones_one_code():
    data = batch(2)
    tokens = tiny(encoder_nodes="occupied").eval().encode(data["points"], data["normals"])
    true = tiny().octree(data["points"], data["normals"])
    empty = ~true.is_occupied(3)
    assert empty.any()
    assert len(tokens.codes[empty].unique(dim=0)) == 1
    assert len(tokens.codes[~empty].unique(dim=0)) > 10


def test_a_unit_of_nodes_makes_distances_as_many_times_smaller():
    data = batch(1)
    functions = []
    for unit in ("box", "node"):
        torch.manual_seed(0)
        model = tiny(unit=unit).eval()
        functions.append(model.field(model.encode(data["points"], data["normals"])).values[5])
    torch.testing.assert_close(functions[0] * torch.tensor([1, 1, 1, 2 / 2**5]), functions[1])


def test_a_shape_is_decoded_alike_alone_and_in_a_batch():
    model = tiny().eval()
    data = batch(3)
    tokens = model.encode(data["points"], data["normals"])
    together = model.field(tokens)
    points = torch.rand(100, 3, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8
    for i in range(3):
        one = model.encode(data["points"][i : i + 1], data["normals"][i : i + 1])
        assert torch.equal(one.codes, tokens.codes[tokens.octree.samples(3) == i])
        alone = model.field(one)
        torch.testing.assert_close(alone(points, 0, 5), together(points, i, 5), rtol=1e-4, atol=1e-5)


def test_decoded_meshes_are_watertight_whatever_the_weights():
    model = tiny().eval()
    data = batch(2)
    for mesh in model.meshes(model.encode(data["points"], data["normals"]), resolution=32):
        assert inspect(mesh).is_watertight
        assert mesh.bounds.abs().max() <= 0.9


def test_a_finer_grid_only_refines_near_the_surface_and_agrees_there():
    model = tiny().eval()
    data = batch(1)
    decoded = model.field(model.encode(data["points"], data["normals"]))
    axis = torch.arange(33)
    places = torch.cartesian_prod(axis, axis, axis)
    everywhere = decoded._evaluate(0, 5, 32, places).view(33, 33, 33)
    sparse = decoded.grid(0, 32, 5)
    inner = (slice(1, -1),) * 3
    assert ((sparse < 0.002) == (everywhere < 0.002))[inner].float().mean() > 0.999


def test_tokens_on_disk_are_those_of_the_tokenizer_and_building_goes_on(tmp_path):
    model, data = tiny().eval(), Shapes(num_shapes=40, num_points=300, num_distances=0)
    calls = []
    original = model.encode

    def encode(points, normals):
        calls.append(len(points))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(points, normals)

    model.encode = encode
    arguments = {"name": "a", "tokenizer_fingerprint": "t"}
    with pytest.raises(KeyboardInterrupt):
        find_or_build(model, data, tmp_path, **arguments)
    packed = find_or_build(model, data, tmp_path, **arguments)
    assert calls == [32, 8, 8], "the first block was kept"
    assert len(find_or_build(model, data, tmp_path, **arguments)) == 40
    assert len(calls) == 3
    indices = [33, 2, 7]
    found = packed.__getitems__(indices)
    sample = data.__getitems__(indices)
    expected = original(sample["points"], sample["normals"])
    assert torch.equal(found["ids"].splits, expected.splits)
    assert torch.equal(found["ids"].codes, expected.codes)
    assert torch.equal(samples_of(found["ids"].octree), samples_of(expected.octree))
    assert torch.equal(found["label"], sample["label"])
    assert found["caption"] == sample["caption"]
    assert packed[5]["ids"].batch_size == 1
    (packed.path / "codes.npy").unlink()
    with pytest.raises(UsageError, match="not a whole cache of shapes"):
        PackedShapes(path=str(packed.path))


def test_shapes_that_cannot_be_read_are_left_out_of_the_tokens(tmp_path):
    class Partly(Shapes):
        kept = staticmethod(lambda i: i % 3 != 1 and i < 30)

        def __getitems__(self, indices):
            chosen = [i for i in indices if self.kept(i)]
            return super().__getitems__(chosen) if chosen else {"label": torch.zeros(0, dtype=torch.int64)}

    model, data = tiny().eval(), Partly(num_shapes=36, num_points=100, num_distances=0)
    packed = find_or_build(model, data, tmp_path, name="a", tokenizer_fingerprint="t")
    assert len(packed) == packed.meta["count"] == 20
    Partly.kept = staticmethod(lambda i: False)
    with pytest.raises(GenkitError, match="none of the 36 shapes could be read"):
        find_or_build(model, data, tmp_path, name="b", tokenizer_fingerprint="t")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"encoder_blocks": [1]}, "lists of one length"),
        ({"decoder_channels": [16, 16, 8], "decoder_blocks": [1, 1, 1]}, "needs 4 decoder_channels, found 3"),
        ({"inner_channels": [16, 32]}, "skips are added"),
        ({"features": "NX"}, "known letters"),
        ({"full_depth": 3}, "not above full_depth"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        tiny(**options)


def test_tokens_of_another_tokenizer_and_data_without_distances_are_refused():
    model = tiny().eval()
    data = batch(1)
    tokens = model.encode(data["points"], data["normals"])
    tokens.codes = tokens.codes[:, :4]
    with pytest.raises(UsageError, match="with 4 bits; this tokenizer has depth 3 and 8 bits"):
        model.field(tokens)
    with pytest.raises(UsageError, match="num_distances must be above 0"):
        ShapeReconstruction()(model, {k: data[k] for k in ("points", "normals")}, {}, None, Rng.at(0, 0, 1))


# The tokenizer: counted from the official module; the transformers: with a row for "no class", which the released ones lack.
PUBLISHED = {"octree-vq-large": 33_802_418, "octgpt-shapenet": 170_291_778, "octgpt-objaverse": 440_362_050}


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_at_full_size_have_the_published_number_of_parameters(name):
    recipe = config.load(resolve(name))
    with torch.device("meta"):
        if "type" in recipe["tokenizer"]:
            model = registry.build("tokenizer", recipe["tokenizer"], image_channels=3)
        else:
            model = registry.build("backbone", recipe["backbone"], bits=32, full_depth=3, code_depth=6, num_classes=0)
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]


def released(model: OctreeVQ) -> dict[str, torch.Tensor]:
    """A tokenizer's weights as its authors store them."""
    found = {}
    for key, value in model.state_dict().items():
        (name,) = source_of(key, octgpt_vqvae.RULES)
        is_conv = name.startswith("encoder.") and name.endswith("conv.weights")
        found[name] = value[0] if is_conv else value[None] if ".gn." in name or ".norm.norm." in name else value
    return found | {"quantizer.basis": torch.arange(8)}


def test_released_weights_become_a_tokenizer_and_a_generator_on_it(tmp_path):
    model = tiny(inner_blocks=[1, 2], num_depths=4).eval()
    save_file({k: v.contiguous() for k, v in released(model).items()}, tmp_path / "vq.safetensors")
    options = {"depth": 5, "full_depth": 2}
    found = import_weights(tmp_path / "vq.safetensors", "octgpt-vqvae", tmp_path / "vq", config=options)
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    again = open_run(tmp_path / "vq").tokenizer
    data = batch(1)
    tokens = model.encode(data["points"], data["normals"])
    assert torch.equal(again.encode(data["points"], data["normals"]).codes, tokens.codes)
    torch.testing.assert_close(again.field(tokens).values[5], model.field(tokens).values[5])

    torch.manual_seed(0)
    network = OctGPT(
        bits=8, full_depth=2, code_depth=3, max_depth=6, dim=24, depth=4, num_heads=2, window=16, dilation=2, buffer=4
    )
    state = {source_of(key, octgpt.RULES)[0]: value for key, value in network.state_dict().items()}
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "gpt.safetensors")
    options = {"patch_size": 16, "dilation": 2, "num_heads": 2, "buffer_size": 4, "depth_low": 2, "depth_high": 3}
    arguments = {"config": options, "tokenizer": tmp_path / "vq"}
    import_weights(tmp_path / "gpt.safetensors", "octgpt", tmp_path / "gpt", **arguments)
    found = sample(
        tmp_path / "gpt", count=2, out=tmp_path / "out", sampler=["num_steps=2"], resolution=16, format="obj"
    )
    assert found["shapes"] + len(found["empty"]) == 2
    assert (tmp_path / "out" / "grid.png").is_file()
    written = sorted(path.name for path in (tmp_path / "out").glob("*.obj"))
    assert written == [name for name in ("000000.obj", "000001.obj") if name not in found["empty"]]
    other = OctGPT(**{**dict(network.config), "bits": 6})
    with pytest.raises(UsageError, match="bits of a code: 8, this network needs 6"):
        generator_of(other, octgpt.sampling(other), "octgpt", tmp_path / "vq", "x", "", None)
    with pytest.raises(UsageError, match="--size, --rope, --known and --keep are for images"):
        sample(tmp_path / "gpt", count=1, size="32x32", out=tmp_path / "other")
    with pytest.raises(UsageError, match="--format xyz"):
        sample(tmp_path / "gpt", count=1, format="xyz", out=tmp_path / "other")


def test_a_function_without_a_surface_is_reported_and_not_written(tmp_path, monkeypatch, capsys):
    from genkit import shapes

    nothing = Mesh(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int64))
    corners = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    faces = torch.tensor([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]])

    class Pipeline:
        class_names = ()

        def generate(self, labels, seeds, **how):
            return [nothing if seed == 1 else Mesh(corners, faces) for seed in seeds]

    class State:
        is_main_process, process_index, num_processes = True, 0, 1

        def wait_for_everyone(self):
            pass

    monkeypatch.setattr(pictures, "write_turntable", lambda path, mesh: path.write_bytes(b"turning"))
    how = {"format": "ply", "batch_size": 2, "resolution": None, "turntable": True}
    found = shapes.write_samples(Pipeline(), State(), tmp_path / "out", {}, Request([-1] * 3, [0, 1, 2], ()), **how)
    assert found["empty"] == ["000001.ply"]
    assert "000001.ply is not written: the decoded function has no surface (seed 1)" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("000000.gif", "000000.ply", "000002.gif", "000002.ply", "grid.png", "samples.json")
    ]


def test_the_whole_line_of_shapes(tmp_path, monkeypatch):
    """Tokenizer, tokens, generator, samples, figures, at a size at which only whether it runs can be seen; twice gives the same."""
    from genkit import quickstart

    changes: dict[str, dict[str, Any]] = {
        "octree-shapes": {"train": {"num_samples": 4}, "data": {"num_kept": 1024}},
        "octgpt-shapes": {
            "train": {"num_samples": 16},
            "data": {},
            "sampler": {"num_steps": [2, 2]},
            "backbone": {"dim": 24, "num_heads": 2},
        },
    }
    for name, sections in changes.items():
        recipe = yaml.safe_load((quickstart.RECIPES / f"{name}.yaml").read_text())
        sections["data"] |= {"num_shapes": 12, "num_points": 300}
        sections["log"] = {"num_images": 2}
        for section, options in sections.items():
            assert recipe[section].keys() >= options.keys()
            recipe[section] |= options
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr(quickstart, "RECIPES", tmp_path)
    monkeypatch.setattr(quickstart, "SHAPES", 2)
    measured = []

    def measure(run, **how):  # what is measured has tests of its own: tests/test_shape_metrics.py
        measured.append((run.name, how["count"]))
        return Report([{"metric": "IoU", "value": 0.5, "better": "higher", "comparable": "", "protocol": run.name}])

    monkeypatch.setattr("genkit.evaluation.evaluate.evaluate", measure)
    monkeypatch.setattr(pictures, "picture", lambda mesh, size: torch.zeros(3, size, size))  # shading takes long
    monkeypatch.setattr(OctreeVQ.meshes, "__defaults__", (16, 0.002))
    found = quickstart.quickstart(what="shapes", out=tmp_path / "runs")
    assert measured == [("octree-shapes", quickstart.SHAPES_EVALUATED), ("octgpt-shapes", quickstart.SHAPES_EVALUATED)]
    assert (tmp_path / "runs/quickstart-shapes-samples/grid.png").is_file()
    assert "train generator" in quickstart.render(found)
    assert quickstart.quickstart(what="shapes", out=tmp_path / "runs") == found
