"""`genkit import`."""

from __future__ import annotations

import argparse

from genkit.verbs.answer import Answer
from genkit.verbs.arguments import argument

ABOUT = "turn published weights into a tokenizer or a generator that every verb takes in place of a run"
ARGUMENTS = (
    argument(
        "file",
        metavar="FILE",
        help="a checkpoint (.safetensors, .pt, .pth, .ckpt), or a folder with one and config.json",
    ),
    argument(
        "--from",
        dest="source",
        required=True,
        metavar="NAME",
        help="whose weights: taming-vqgan, llamagen-vq, var-vqvae, titok, dqvae, maskgit-vqgan, diffusers-vq, diffusers-kl, vector-quantize-pytorch, dit, sit, fit, dimsum, ...",
    ),
    argument("-o", "--out", required=True, metavar="DIR"),
    argument(
        "--config",
        metavar="FILE",
        help="the original's options, YAML or JSON (default: config.json beside the weights)",
    ),
    argument(
        "--tokenizer",
        metavar="RUN",
        help="of a generator: the tokenizer whose latents it was trained on, a run or what was imported before",
    ),
    argument("--size", type=int, help="pixels per side that images are brought to (default: the config's, or 256)"),
    argument(
        "--data",
        default="data/images",
        metavar="DIR",
        help="images that `genkit eval` reconstructs (default: data/images)",
    ),
    argument("--check", action="store_true", help="encode and decode a drawn picture, or draw one"),
)


def run(args: argparse.Namespace) -> Answer:
    from genkit.importing import import_weights, render

    found = import_weights(
        args.file,
        args.source,
        args.out,
        config=args.config,
        check=args.check,
        data=args.data,
        size=args.size,
        tokenizer=args.tokenizer,
    )
    return Answer(found, render(found))
