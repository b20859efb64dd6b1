"""Golden runners of octrees and of the transformers on them; see golden.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from genkit.importers import octformer, octgpt
from genkit.kernels.octree_attention.windows import is_seen, to_windows
from genkit.nn.octformer import relative
from genkit.nn.octree_conv import OctreeConv
from genkit.nn.octree_places import Places, in_front
from genkit.octree import keys, values
from genkit.octree.build import from_points, merge
from genkit.octree.octree import Octree
from genkit.octree.tokens import grow, splits_of

if TYPE_CHECKING:
    from tests.golden import Case, Outputs


def clouds(case: Case) -> Octree:
    """The batch of octrees of a file's clouds."""
    octrees = [
        from_points(
            case.inputs[f"points_{name}"],
            normals=case.inputs.get(f"normals_{name}"),
            features=case.inputs.get(f"features_{name}"),
            depth=case.config["depth"],
            full_depth=case.config["full_depth"],
        )
        for name in case.config["clouds"]
    ]
    return merge(octrees)


def run_octree(case: Case) -> Outputs:
    config, octree = case.config, clouds(case)
    depths = range(octree.depth + 1)
    d, dv, ds = config["neigh_depth"], config["voxel_depth"], config["search_depth"]
    point, owner = values.to_points(octree)
    query = case.inputs["query_xyzb"]
    features = torch.arange(octree.count(d) * 4).float().sin().view(-1, 4)
    conv = OctreeConv(*case.weights["weights"].shape[1:], has_bias=True)
    conv.load_state_dict({"weight": case.weights["weights"][None], "bias": case.weights["bias"]})
    occupied = torch.arange(octree.count_occupied(d) * 4).float().sin().view(-1, 4)
    regrown = grow(splits_of(octree), full_depth=octree.full_depth, depth=octree.depth, batch_size=octree.batch_size)
    outputs: Outputs = {
        "nnum": torch.tensor([octree.count(i) for i in depths]),
        "nnum_nempty": torch.tensor([octree.count_occupied(i) for i in depths]),
        "to_points": point,
        "to_points_batch": owner[:, None],
        "voxel": values.to_voxels(torch.arange(1, octree.count(dv) + 1.0)[:, None], octree, dv),
        "search": octree.search(query[:, :3], query[:, 3].long(), ds),
        "max_pool": values.max_pool(features, octree, d),
        "avg_pool": values.average_pool(features, octree, d),
        "octree_pad": values.pad(occupied, octree, d),
        "conv333": conv(features, octree, d),
        "regrown_equal": torch.tensor(
            [int(torch.equal(regrown.keys[i], octree.keys[i])) for i in depths[octree.full_depth :]]
        ),
    }
    for i in depths:
        xyz, samples = octree.xyz(i), octree.samples(i)
        rows = torch.cat([xyz, samples[:, None]], 1)
        outputs |= {
            f"key_{i}": octree.keys[i],
            f"children_{i}": octree.children[i],
            f"xyzb_{i}": rows[:200] if i == octree.depth else rows,
            f"shuffled_key_{i}": keys.encode(xyz, samples),
            f"neigh_{i}": octree.neighbours(i),
            f"neigh_nempty_333_{i}": octree.neighbours_of(i, is_dense=False),
            f"neigh_nempty_stride2_{i}": octree.neighbours_of(i, "222", 2, is_dense=False),
        }
    for name in ("points", "normals", "features"):
        if (average := getattr(octree, name)) is not None:
            outputs[f"{name}_avg"] = average
    for name in case.outputs:
        if name.startswith("input_"):
            outputs[name] = values.input_features(octree, name.removeprefix("input_"), is_dense=False)
    return outputs


def run_octformer(case: Case) -> Outputs:
    config, octree, d = case.config, clouds(case), case.config["at_depth"]
    window, dilation, data = config["patch_size"], config["dilation"], case.inputs["data"]
    is_dense = not config.get("nempty", len(data) == octree.count_occupied(d))
    options = {"num_heads": config["num_heads"], "window": window, "dilation": dilation, "is_dense": is_dense}
    activation = config.get("activation", "GELU")
    stage = octformer.stage(case.weights, **options, qk_scale=config.get("qk_scale"), activation=activation)
    xyz, samples = octree.xyz(d), octree.samples(d)
    if not is_dense:
        xyz, samples = xyz[octree.occupied(d)], samples[octree.occupied(d)]
    padded = torch.nn.functional.pad(xyz, (0, 0, 0, -len(xyz) % (window * dilation)))  # their row of windows
    outputs = {
        "attention_block0": stage[0].attention(data, xyz, samples),
        "cpe_block0": stage[0].positions(data, octree, d),
        "block0": stage[0](data, octree, d),
        "stage": stage(data, octree, d),
        "rel_pos": relative(padded, window, 1)[:2],
        "dilate_pos": relative(padded, window, dilation)[:2],
        "patch_mask_blocked": _blocked(samples, window, octree.batch_size, dilation=1, multiple=window * dilation),
    }
    if len(stage) > 1:
        outputs["attention_block1_dilated"] = stage[1].attention(data, xyz, samples)
    return outputs


def run_octgpt(case: Case) -> Outputs:
    config, octree = case.config, clouds(case)
    window, dilation, low, high = (config[k] for k in ("patch_size", "dilation", "depth_low", "depth_high"))
    model = octgpt.convert(case.weights, {**config, "is_aligned": False})
    cond = {}
    for name, kind in (("class_id", "label"), ("context", "context"), ("condition", "context"), ("cond", "context")):
        if name in case.inputs:
            cond[kind] = case.inputs[name]
    # From their first depth on, which may be another than the one down to which octrees are complete.
    splits = torch.cat([octree.is_occupied(d) for d in range(low, high)]).long()
    known = case.inputs["mask"] == 0
    outputs: Outputs = {"split_seq": splits, **_binary(case.inputs["vq_features"])}
    code = outputs["vq_indices"]
    places = model.places(octree, range(low, high + 1))
    # Their order within a sample is what torch's unstable sort makes of equal numbers on a CPU of the kind the file was made on.
    places.is_stable = False
    x = torch.cat([model.embed_splits(splits), model.embed_codes(code)])
    y = model.decode_all(x, places, known, cond)
    ahead = in_front(model.buffer, places).followed_by(places)
    order = torch.empty_like(ahead.slots).index_copy_(0, ahead.slots, torch.arange(len(ahead)))
    row = ahead.select(order)
    block = model.decoder.blocks[0]
    first = Places(row.samples[:64], row.depths[:64], row.xyz[:64], row.batch_size, False)
    qkv = (torch.arange(len(row) * 3 * config["num_embed"]).float() * 0.7).sin().view(len(row), -1)[:64]
    q, k, v = qkv.unflatten(1, (3, config["num_heads"], -1)).unbind(1)
    q, k = block.rotary(q, k, first.xyz)
    numbers = torch.arange(len(row))
    outputs |= {
        "split_logits": model.split_logits(y[: len(splits)]),
        "vq_logits": model.code_logits(y[len(splits) :]).flatten(1),
        "vq_extract_code": (code * 2.0 - 1) * code.shape[1] ** -0.5,
        "depth2batch_indices": order,
        "batch_idx": row.samples,
        "depth_idx": row.depths,
        "xyz": row.xyz,
        "mask_windows": case.outputs["mask_windows"],  # which windows the masks are stored of
        "patch_partition": _filled(numbers, 0, -7, window * dilation),
        "patch_partition_swin": _filled(numbers, window // 2, -7, window * dilation),
        "rope_qkv_first64": torch.stack([q, k, v], 1).flatten(1),
        "pos_emb_first64": block.positions(first),
    }
    shown = case.outputs["mask_windows"]
    for name, shift in (("", 0), ("swin_", window // 2)):
        for kind, step in (("patch", 1), ("dilate", dilation)):
            place = {"dilation": step, "multiple": window * dilation, "shift": shift}
            blocked = _blocked(row.samples, window, row.batch_size, **place)
            outputs[f"{name}{kind}_mask_blocked"] = blocked[shown]
            outputs[f"{name}{kind}_mask_blocked_count"] = blocked.flatten(1).sum(1)
            blocked = _blocked(row.depths, window, int(row.depths.max()) + 1, is_order=True, **place)
            outputs[f"{name}{kind}_tf_mask_blocked"] = blocked[shown]
            outputs[f"{name}{kind}_tf_mask_blocked_count"] = blocked.flatten(1).sum(1)
    return {name: value for name, value in outputs.items() if name in case.outputs}


def _binary(z: Tensor) -> Outputs:
    from genkit.nn.sphere import BinarySphere

    quantizer = BinarySphere(z.shape[1])
    zq, bits, entropy = quantizer(z)
    return {"vq_zq": zq, "vq_indices": bits, "vq_entropy_penalty": entropy}


def _filled(x: Tensor, front: int, fill: int, multiple: int) -> Tensor:
    """Their row of windows: -1 in front, the tokens, a fill up to whole groups."""
    behind = -(len(x) + front) % multiple
    return torch.cat([x.new_full((front,), -1), x, x.new_full((behind,), fill)])


def _blocked(
    x: Tensor, window: int, fill: int, *, dilation: int, multiple: int, shift: int = 0, is_order: bool = False
) -> Tensor:
    """Where they add -1000, [W, window, window]. Among tokens this is where ours see nothing; their fillers at the end see each other."""
    row = to_windows(_filled(x, shift, fill, multiple), window, dilation=dilation)
    query, key = row[:, :, None], row[:, None]
    blocked = ((query < key) if is_order else (query != key)) | (query < 0) | (key < 0)
    if not is_order:  # the rule our kernel computes by, on the tokens
        ours = is_seen(x, None, window, dilation, shift)
        is_token = (row >= 0) & (row != fill)
        both = (is_token[:, :, None] & is_token[:, None])[: len(ours)]
        assert torch.equal(ours[both], ~blocked[: len(ours)][both])
    return blocked
