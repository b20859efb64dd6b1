"""MAR of LTH14/mar (MAR-B/L/H on the latents of its KL tokenizer)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from genkit.backbones.mar import MAR
from genkit.errors import GenkitError, UsageError
from genkit.importers.dit import square_side
from genkit.importers.image_bert import num_heads
from genkit.importers.names import Rules, count, fill, flat, shape

WHAT = "a MAR"
HEADS = {768: 12, 1024: 16, 1280: 16}  # width -> attention heads of the published sizes


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> MAR:
    """State dict -> backbone in evaluation mode. Sizes are read from the weights; tokens form a square.

    Args:
        config: of the original's options, `encoder_num_heads`, `decoder_num_heads` (by default those of the published size of this width) and
            `patch_size` (default 1); `norm_eps` of the norm layers it was given (1e-6); `proj_dropout` (0.1) for fine-tuning.

    Raises: GenkitError for weights that do not fit, naming the keys; UsageError where the number of heads has to be told.
    """
    options = flat(config or {})
    dim, width = shape(state, "z_proj.weight", WHAT)
    out_dim = shape(state, "decoder_embed.weight", WHAT)[0]
    num_tokens = shape(state, "diffusion_pos_embed_learned", WHAT)[1]
    side = int(options.get("patch_size", 1))
    if width % side**2:
        raise GenkitError(
            f"these weights are not those of {WHAT} with patches of {side}: z_proj.weight is {[dim, width]}"
        )
    head_width = shape(state, "diffloss.net.input_proj.weight", WHAT)[0]
    network = MAR(
        channels=width // side**2,
        num_classes=shape(state, "class_emb.weight", WHAT)[0],
        grid=(side * square_side(num_tokens, WHAT),) * 2,
        dim=dim,
        depth=count(state, "encoder_blocks.{}."),
        num_heads=num_heads(dim, options, HEADS, "encoder_num_heads"),
        decoder_dim=out_dim,
        decoder_depth=count(state, "decoder_blocks.{}."),
        decoder_heads=num_heads(out_dim, options, HEADS, "decoder_num_heads"),
        mlp_ratio=shape(state, "encoder_blocks.0.mlp.fc1.weight", WHAT)[0] / dim,
        patch_size=side,
        buffer_size=shape(state, "encoder_pos_embed_learned", WHAT)[1] - num_tokens,
        head_width=head_width,
        head_depth=count(state, "diffloss.net.res_blocks.{}."),
        norm_eps=float(options.get("norm_eps", 1e-6)),
        dropout=float(options.get("proj_dropout", 0.1)),
    )
    own = {key: value for key, value in state.items() if key not in ("class_emb.weight", "fake_latent")}
    shape(state, "fake_latent", WHAT)
    own["classes"] = torch.cat([state["class_emb.weight"], state["fake_latent"]])  # no class behind the classes
    fill(network, own, RULES, {}, WHAT)
    return network.eval()


def sampling(network: Any, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """64 steps of tokens, 100 of each token, guidance growing with what is known: how the paper's fast setting draws.

    Args:
        config: of the original's options, `num_sampling_steps` of each token, and of training `diffusion_batch_mul`, `label_drop_prob`, `mask_ratio_min`.

    Raises: UsageError for steps that are no number: "ddim50" and lists space them otherwise than samplers here do.
    """
    options = flat(config or {})
    steps = str(options.get("num_sampling_steps", 100))
    if not steps.isdecimal():
        raise UsageError(
            f"num_sampling_steps={steps} of {WHAT} is not supported, only a number; steps are spaced evenly"
        )
    strength = {768: 2.9, 1024: 3.0, 1280: 3.2}.get(network.config["dim"], 3.0)
    return {
        "objective": {
            "type": "mar",
            "repeats": int(options.get("diffusion_batch_mul", 4)),
            "cond_drop": float(options.get("label_drop_prob", 0.1)),
            "min_masked": float(options.get("mask_ratio_min", 0.7)),
        },
        "sampler": {
            "type": "mar",
            "num_steps": min(64, network.num_tokens),
            "head_steps": int(steps),
            "guidance": strength,
            "guidance_schedule": "linear",
        },
    }


def _block(half: str, i: str, part: str, kind: str) -> str:
    names = {"mixer.qkv": "attn.qkv", "mixer.proj": "attn.proj", "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"}
    return f"{half}_blocks.{i}.{names.get(part, part)}.{kind}"


_NET = "diffloss.net"
RULES: Rules = [
    (r"label\.table\.weight", "classes"),
    (r"embed\.(\w+)", "z_proj.{0}"),
    (r"positions", "encoder_pos_embed_learned"),
    (r"embed_norm\.(\w+)", "z_proj_ln.{0}"),
    (r"(encoder|decoder)\.(\d+)\.(mixer\.qkv|mixer\.proj|mlp\.up|mlp\.down|norm1|norm2)\.(\w+)", _block),
    (r"(encoder|decoder)_norm\.(\w+)", "{0}_norm.{1}"),
    (r"project\.(\w+)", "decoder_embed.{0}"),
    (r"mask_token", "mask_token"),
    (r"decoder_positions", "decoder_pos_embed_learned"),
    (r"head_positions", "diffusion_pos_embed_learned"),
    (r"head\.embed\.(\w+)", f"{_NET}.input_proj.{{0}}"),
    (r"head\.condition\.(\w+)", f"{_NET}.cond_embed.{{0}}"),
    (r"head\.time\.(up|down)\.(\w+)", lambda part, kind: f"{_NET}.time_embed.mlp.{0 if part == 'up' else 2}.{kind}"),
    (r"head\.blocks\.(\d+)\.norm\.(\w+)", f"{_NET}.res_blocks.{{0}}.in_ln.{{1}}"),
    (
        r"head\.blocks\.(\d+)\.(up|down)\.(\w+)",
        lambda i, part, kind: f"{_NET}.res_blocks.{i}.mlp.{0 if part == 'up' else 2}.{kind}",
    ),
    (r"head\.blocks\.(\d+)\.modulation\.(\w+)", f"{_NET}.res_blocks.{{0}}.adaLN_modulation.1.{{1}}"),
    (r"head\.modulation\.(\w+)", f"{_NET}.final_layer.adaLN_modulation.1.{{0}}"),
    (r"head\.linear\.(\w+)", f"{_NET}.final_layer.linear.{{0}}"),
]
