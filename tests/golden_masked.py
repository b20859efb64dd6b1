"""Runners of the golden files of masked generators: official weights through the importers, official outputs by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genkit.interfaces import Cache
from genkit.nn.context import Context, rows_of
from genkit.nn.layout import dense_layout

Outputs = dict[str, Tensor]


def logits(network: Any, ids: Tensor, label: Tensor, cache: Cache | None = None) -> Tensor:
    """ids [B, n] -> [B, n, S]."""
    grid = network.config["grid"]
    shape = ids.shape[1:] if cache is not None and cache["context"].is_light else grid
    out = network(ids.view(len(ids), 1, *shape), None, {"label": label}, dense_layout(tuple(grid)), cache)
    return out.flatten(1, -2)


def run_maskgit_imagebert(case: Any) -> Outputs:
    from genkit.importers.image_bert import convert

    return both(convert(case.weights, case.config), case)


def run_maskgit_uvitbert(case: Any) -> Outputs:
    from genkit.importers.uvit_bert import convert

    return both(convert(case.weights, case.config), case)


def both(network: Any, case: Any) -> Outputs:
    """With the labels and without."""
    ids, label = case.inputs["input_ids"], case.inputs["condition"].flatten()
    return {"logits": logits(network, ids, label), "logits_uncond": logits(network, ids, torch.full_like(label, -1))}


def run_recap(case: Any) -> Outputs:
    from genkit.importers.autonat import convert

    network = convert(case.weights, case.config)
    label, strength = case.inputs["labels"].flatten(), case.inputs["cfg_scale"]
    chosen, others = case.inputs["unmask_idx"], case.inputs["cached_idx"]
    outputs: Outputs = {}
    for name, classes in (("cond", label), ("uncond", torch.full_like(label, -1))):
        cache: Cache = {"context": Context()}
        outputs[f"full_{name}"] = logits(network, case.inputs["x"], classes, cache)
        if name == "cond":
            last = len(network.blocks) - 1
            keys, values = cache["context"].kept(0)[0], cache["context"].kept(last)[1]  # [B, H, 1 + N, K]
            outputs["cached_k_layer0"] = rows_of(keys[:, :, 1:].transpose(1, 2), others)
            outputs["cached_v_last"] = rows_of(values[:, :, 1:].transpose(1, 2), others)
        cache["context"].chosen = chosen
        for n in (1, 2):
            outputs[f"light{n}_{name}"] = logits(network, case.inputs[f"local_x{n}"], classes, cache)
    for name in ("full", "light1"):
        cond, null = outputs[f"{name}_cond"], outputs[f"{name}_uncond"]
        outputs[f"{name}_cfg"] = cond + strength * (cond - null)
    return outputs


def run_mar(case: Any) -> Outputs:
    from genkit.importers.mar import convert
    from genkit.nn.patch import patchify, unpatchify
    from genkit.objectives.diffusion import Diffusion, interpolated, posterior
    from genkit.samplers.ancestral import Ancestral

    network = convert(case.weights, case.config)
    given = case.inputs
    label, null = given["labels"], torch.full_like(given["labels"], -1)
    tokens, known = patchify(given["imgs"], network.sides), given["mask"] == 0
    encoded, slots = network.encode(tokens, known, {"label": label})
    unlabelled = network.decode(*network.encode(tokens, known, {"label": null}), tokens.shape[1])

    def head(x: Tensor, t: Tensor) -> Tensor:
        return network.head(x, t, given["mlp_c"])

    x, t = given["mlp_x"], given["mlp_t"]
    half = torch.cat([x[: len(x) // 2]] * 2)
    width = x.shape[1]
    eps, rest = head(half, t).split(width, dim=1)
    guided = torch.lerp(*eps.chunk(2)[::-1], given["cfg_scale"])

    diffusion = Diffusion(schedule="cosine")
    path, k = diffusion.path, given["loss_t"]
    at = (k + 1).double() / path.num_times
    alpha, sigma = path.alpha(at).float()[:, None], path.sigma(at).float()[:, None]
    x_t = alpha * x + sigma * given["loss_noise"]
    losses = diffusion.errors(head(x_t, k), x, x_t, given["loss_noise"], k, dense_layout(network.token_grid))

    num_steps, noise = int(case.config["num_sampling_steps"]), given["sample_noise"]
    times = path.times(num_steps)
    index = len(times) - 2 - torch.arange(num_steps)  # respaced steps count from the data
    step = case.outputs["step_t"]
    t, s = times[index[step]], times[index[step] + 1]
    out, variance = head(noise, path.index(t).float()).split(width, dim=1)
    x0, _ = diffusion.split(out, noise, t)
    # Of the smallest variance, the released code takes that of the second step for the last.
    t_v, s_v = (torch.where(step == 0, times[-3 + i], value) for i, value in enumerate((t, s)))

    least = interpolated(path, -torch.ones_like(variance), t_v, s_v)
    most = interpolated(path, torch.ones_like(variance), t, s)

    def predict(x_t: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        out, v = head(x_t, path.index(t).float()).split(width, dim=1)
        return diffusion.split(out, x_t, t)[0].clamp(-1, 1), out, (v + 1) / 2

    predict.path = path  # type: ignore[attr-defined]
    return {
        "patchify": tokens,
        "unpatchify": unpatchify(tokens, network.token_grid, network.sides),
        "encoder": encoded,
        "decoder": network.decode(encoded, slots, tokens.shape[1]),
        "decoder_uncond": unlabelled,
        "mlp": head(x, given["mlp_t"]),
        "mlp_cfg": torch.cat([torch.cat([guided, guided]), rest], dim=1),
        "train_mse": losses["mse"],
        "train_vb": losses["vb"],
        "train_loss": losses["mse"] + losses["vb"],
        "gen_timestep_map": path.index(times[index]).round().long(),
        "step_t": step,
        "step_pred_xstart": x0,
        "step_mean": posterior(path, x0, noise, t, s)[0],
        "step_log_variance": torch.lerp(least, most, (variance + 1) / 2),
        "sample_temp0_clip": Ancestral(num_steps=num_steps, variance="learned")(predict, noise, Silent()),  # type: ignore[arg-type]
    }


class Silent:
    """Streams of zeros: sampling without noise."""

    def fork(self, word: str) -> Silent:
        return self

    def normal(self, *shape: int) -> Tensor:
        return torch.zeros(1, *shape)


def run_recap_mar(case: Any) -> Outputs:
    from genkit.importers.mar import convert

    network = convert(case.weights, case.config)
    given, cond = case.inputs, {"label": case.inputs["labels"]}
    chosen = given["mask_to_pred"].nonzero()[:, 1].view(len(given["labels"]), -1)
    outputs: Outputs = {"ids_to_pred": chosen}
    for name, keeps_condition in (("cachebuf", True), ("freshbuf", False)):
        context = Context(keeps_condition=keeps_condition)
        encoded, slots = network.encode(given["tokens"], given["mask"] == 0, cond, context)
        full = network.decode(encoded, slots, network.num_tokens, context)
        outputs |= {"full_encoder": encoded, "full_z": full}
        context.chosen = chosen
        encoded, slots = network.encode(given["local_tokens"], given["local_mask"] == 0, cond, context)
        outputs[f"light_encoder_{name}"] = encoded
        outputs[f"light_z_{name}"] = network.decode(encoded, slots, chosen.shape[1], context)
    return outputs
