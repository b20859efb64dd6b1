"""Runners of the golden files of VQGANs: official weights through the importers, official outputs by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Outputs = dict[str, Tensor]


def run_taming_vqgan(case: Any) -> Outputs:
    from genkit.importers.taming_vqgan import convert

    tokenizer = convert(case.weights, case.config)
    x, codes = case.inputs["image"], case.inputs["codes"]
    encoded = tokenizer.encode(x)
    assert encoded.ids is not None
    ids = encoded.ids.squeeze(1)  # [B, Y, X]
    return {
        "pre_quant": tokenizer.encoder(x),
        "quant": encoded.z,
        # The original weighs the codebook's term with beta = 0.25 and the encoder's with 1; both have the same value.
        "codebook_loss": (1 + 0.25) * encoded.losses["commitment"].mean(),
        "indices": ids if case.config.get("sane_index_shape") else ids.flatten(),
        "recon": tokenizer.decode(encoded.z),
        "decode_codes": tokenizer.decode(tokenizer.codes(codes.unsqueeze(1))),
    }


def run_llamagen_vq(case: Any) -> Outputs:
    from genkit.importers.llamagen_vq import convert

    tokenizer = convert(case.weights, case.config)
    x, codes = case.inputs["image"], case.inputs["codes"]
    encoded = tokenizer.encode(x)
    assert encoded.ids is not None
    return {
        "pre_quant": tokenizer.encoder(x),
        "quant": encoded.z,
        "indices": encoded.ids.squeeze(1),
        "recon": tokenizer.decode(tokenizer.codes(encoded.ids)),
        "decode_codes": tokenizer.decode(tokenizer.codes(codes.unsqueeze(1))),
    }


def run_maskgit_vqgan(case: Any) -> Outputs:
    from genkit.importers.maskgit_vqgan import convert

    tokenizer = convert(case.weights, case.config)
    x = case.inputs["image"] * 2 - 1  # theirs are in [0, 1]
    hidden = tokenizer.encoder(x)
    encoded = tokenizer.encode(x)
    assert encoded.ids is not None
    given = case.inputs["codes"].reshape(encoded.ids.shape)
    pixels = (tokenizer.decode(tokenizer.codes(given)) + 1) / 2
    # Softmax over minus the squared distances at temperature 0.7; double precision, for they are differences of large numbers.
    rows = hidden.permute(0, 2, 3, 1).flatten(1, 2).double()
    distances = torch.cdist(rows, tokenizer.quantizer.codebook.embed.double().expand(len(rows), -1, -1)).square()
    return {
        "hidden": hidden,
        "quant": encoded.z,
        "indices": encoded.ids.flatten(1),
        "soft_code": torch.log_softmax(-distances / 0.7, dim=-1).clamp_min(torch.tensor(1e-12).log().item()).float(),
        "recon": (tokenizer.decode(encoded.z) + 1) / 2,
        "decode_codes": pixels,
        "decode_codes_clamped": pixels.clamp(0, 1),
    }
