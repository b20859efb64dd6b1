"""Runners of tokenizers whose ids have a structure, for golden.py: VAR's scales, TiTok's tokens, DQ-VAE's grains.

A case has `config`, `weights` and `inputs` as in golden.py; each function returns outputs by name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Outputs = dict[str, Tensor]


def run_var_vqvae(case: Any) -> Outputs:
    from genkit.importers.var_vqvae import convert

    tokenizer = convert(case.weights, case.config)
    quantizer = tokenizer.quantizer
    features = tokenizer.features(case.inputs["image"])
    encoded_ids = tokenizer.encode(case.inputs["image"]).ids
    assert encoded_ids is not None
    ids = encoded_ids[:, 0]
    sums = quantizer.sums(ids)
    given = torch.cat([case.inputs[f"idx_{k}"] for k in range(len(tokenizer.patch_sizes))], dim=1)
    two_scales = sum(p * p for p in tokenizer.patch_sizes[:2])
    next_sum, next_input = quantizer.add_scale(torch.zeros_like(features), case.inputs["idx_1"], 1)

    def decode(ids: Tensor) -> Tensor:
        return tokenizer.decode(tokenizer.codes(ids[:, None])).clamp(-1, 1)

    return {
        "features": features,
        **{f"indices_{k}": part.flatten(1) for k, part in enumerate(quantizer.split(ids))},
        **{f"fhat_{k}": total for k, total in enumerate(sums)},
        "fhat_last": sums[-1],
        "recon": decode(ids),
        "decode_given": decode(given),
        "decode_given_scale1": decode(given[:, :two_scales]),
        "var_input_given": tokenizer.next_inputs(given[:, None]),
        "next_fhat": next_sum,
        "next_input": next_input,
    }


def run_titok(case: Any) -> Outputs:
    from genkit.importers.titok import convert

    tokenizer = convert(case.weights, case.config)
    x = 2 * case.inputs["image"] - 1  # theirs are in [0, 1]
    encoded = tokenizer.encode(x)
    assert encoded.ids is not None

    def decode(z: Tensor) -> Tensor:
        if case.config.get("finetune_decoder") or not case.config.get("is_legacy", True):
            return (tokenizer.decode(z) + 1) / 2
        return tokenizer.proxy_logits(z)

    return {
        "latents": tokenizer.latents(x)[:, :, None],
        "quant": encoded.z[:, :, None],
        "indices": encoded.ids,
        "decoded": decode(encoded.z),
        "decode_tokens": decode(tokenizer.codes(case.inputs["tokens"])),
    }


def run_dqvae(case: Any) -> Outputs:
    from genkit.importers.dqvae import convert
    from genkit.nn.grain import entropy, mask_weights

    tokenizer = convert(case.weights, case.config)
    x = case.inputs["image"]
    features, gate = tokenizer.look(x)
    grains = tokenizer.grain(x)
    merged = tokenizer.merge(features, gate)
    encoded = tokenizer.encode(x)
    assert encoded.ids is not None
    commitment = encoded.losses["commitment"].mean()
    return {
        "entropy": entropy(x, case.config.get("entropy_patch_size", tokenizer.region)),
        "gate": gate,
        "grain_indices": grains,
        "codebook_mask": mask_weights(grains, tokenizer.num_grains)[:, None],
        "h_dual": merged,
        "h_triple": merged,  # as three grains are called
        "pre_quant": tokenizer.enter(merged),
        "quant": encoded.z,
        "indices": encoded.ids[:, 0],
        "codebook_loss": 1.25 * commitment,  # the codebook's own term has the same value and no gradient
        "recon": tokenizer.decode(encoded.z),
        "decode_codes": tokenizer.decode(tokenizer.codes(case.inputs["codes"][:, None])),
    }
