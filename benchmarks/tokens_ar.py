"""Ids drawn one after the other: ours against the same network, with the same weights, in transformers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from genkit.backbones.gpt import GPT
from genkit.bench import Case
from genkit.interfaces import Layout
from genkit.objectives.next_token import NextToken
from genkit.rng import Rng
from genkit.samplers.autoregressive import Autoregressive

DIM, DEPTH, HEADS, CODES = 384, 8, 6, 1024
BASE = 10000.0


def cases(quick: bool) -> Iterable[Case]:
    """Sampling from all of the distribution, no guidance, keys and values kept on both sides.

    The peer's "static" cache is set aside ahead, as ours is; its default, "dynamic", is copied at every step. We meet the faster of the two: a full case
    takes minutes.
    """
    length = 64 if quick else 1024
    network = gpt()
    try:
        peer_name, peer = f"transformers {_version()} LlamaForCausalLM.generate", llama_of(network)
    except ImportError:
        peer_name, peer = "transformers LlamaForCausalLM.generate", None
    for batch, goal in ((1, 2.0), (16, 1.3)):
        name = f"{length} ids, batch {batch}, {DEPTH}x{DIM}, {CODES} codes"
        theirs: Callable[[], Any] | str = "not installed"
        kind = "dynamic or static"
        if peer is not None:
            kind = faster(peer, batch, min(length, 256))
            theirs = generate(peer, batch, length, do_sample=True, static=kind == "static")
        yield Case(name, f"{peer_name}, {kind} cache", goal, sample(network, batch, length), theirs)


def faster(peer: Any, batch: int, length: int) -> str:
    """The kind of cache with which the peer draws so many ids in less time, of two tries each."""
    seconds: dict[str, float] = {}
    for kind in ("dynamic", "static", "static", "dynamic"):
        started = time.perf_counter()
        generate(peer, batch, length, do_sample=True, static=kind == "static")()
        seconds[kind] = min(seconds.get(kind, math.inf), time.perf_counter() - started)
    return min(seconds, key=lambda kind: seconds[kind])


def _version() -> str:
    import transformers

    return transformers.__version__


def gpt(dim: int = DIM, depth: int = DEPTH, heads: int = HEADS, codes: int = CODES) -> GPT:
    """Random weights that give every id a say."""
    torch.manual_seed(0)
    mixer = {
        "type": "attention",
        "num_heads": heads,
        "qk_norm": False,
        "bias": False,
        "rope_base": BASE,
        "is_causal": True,
    }
    network = GPT(
        codebook_size=codes,
        num_levels=1,
        num_classes=1,
        grid=(1,),
        dim=dim,
        depth=depth,
        mixer=mixer,
        multiple_of=32,
        class_rope="identity",
    )
    torch.nn.init.normal_(network.head.weight, std=0.05)
    return network.eval()


def row(length: int) -> Layout:
    """A row of tokens whose first stands one behind the class, as in a text: with it the network is Llama's to the last weight."""
    return Layout(coords=torch.arange(1.0, length + 1).view(1, -1, 1), grid=(length,))


def sample(network: GPT, batch: int, length: int, **options: Any) -> Callable[[], Tensor]:
    layout, label = row(length), torch.zeros(batch, dtype=torch.int64)
    sampler, start = Autoregressive(**options), torch.full((batch, 1, length), -1)

    def run() -> Tensor:
        with torch.inference_mode():
            predict = NextToken().predictor(network, {"label": label}, layout)
            return sampler(predict, start, Rng.at(0, 0, batch))[:, 0]

    return run


def llama_of(network: GPT) -> Any:
    """The peer's model with our weights. The class is one more word of its vocabulary, which comes first."""
    from transformers import LlamaConfig, LlamaForCausalLM

    options = network.config
    codes, dim = options["codebook_size"], options["dim"]
    config = LlamaConfig(
        vocab_size=codes + 1,
        hidden_size=dim,
        intermediate_size=network.blocks[0].mlp.down.weight.shape[1],  # type: ignore[union-attr]
        num_hidden_layers=options["depth"],
        num_attention_heads=options["mixer"]["num_heads"],
        max_position_embeddings=4096,
        rms_norm_eps=options["norm_eps"],
        rope_theta=BASE,
        pad_token_id=codes,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    state = {
        "model.embed_tokens.weight": torch.cat([network.embed.table.weight, network.label.table.weight[:1]]),
        "model.norm.weight": network.norm.weight,
        # The peer may draw the class too, one word in a thousand: it costs nothing and is as long.
        "lm_head.weight": torch.cat([network.head.weight, torch.zeros(1, dim)]),
    }
    for i, block in enumerate(network.blocks):
        own: dict[str, Tensor] = dict(block.named_parameters())
        there = f"model.layers.{i}."
        for name, part in zip(("q", "k", "v"), own["mixer.qkv.weight"].chunk(3), strict=True):
            state[f"{there}self_attn.{name}_proj.weight"] = part
        for name, part in zip(("gate", "up"), own["mlp.up.weight"].chunk(2), strict=True):
            state[f"{there}mlp.{name}_proj.weight"] = part
        state[f"{there}self_attn.o_proj.weight"] = own["mixer.proj.weight"]
        state[f"{there}mlp.down_proj.weight"] = own["mlp.down.weight"]
        state[f"{there}input_layernorm.weight"] = own["mix_norm.weight"]
        state[f"{there}post_attention_layernorm.weight"] = own["mlp_norm.weight"]
    model.load_state_dict(state)
    return model


def generate(model: Any, batch: int, length: int, *, do_sample: bool, static: bool) -> Callable[[], Tensor]:
    first = torch.full((batch, 1), model.config.vocab_size - 1)
    options: dict[str, Any] = {"cache_implementation": "static"} if static else {}
    if do_sample:
        options |= {"top_k": 0, "top_p": 1.0, "temperature": 1.0}

    def run() -> Tensor:
        with torch.inference_mode():
            return model.generate(
                first,
                attention_mask=torch.ones_like(first),
                max_new_tokens=length,
                min_new_tokens=length,
                do_sample=do_sample,
                **options,
            )[:, 1:]

    return run
