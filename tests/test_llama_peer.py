"""The raster generator is Llama to the last weight: the same logits and the same words as transformers' model, cached or not."""

from __future__ import annotations

import pytest
import torch

from genkit import bench

pytest.importorskip("transformers")
suite = bench.load("tokens_ar").__globals__


@torch.no_grad()
def test_logits_and_greedy_words_equal_those_of_transformers():
    network = suite["gpt"](dim=32, depth=2, heads=2, codes=40)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    peer = suite["llama_of"](network)
    ids = torch.randint(40, (3, 9), generator=torch.Generator().manual_seed(0))
    words = torch.cat([torch.full((3, 1), 40), ids], dim=1)
    label = {"label": torch.zeros(3, dtype=torch.int64)}
    ours = network.next_logits(ids, label, suite["row"](10), last=10)
    torch.testing.assert_close(ours, peer(words).logits[..., :40], atol=1e-4, rtol=1e-5)
    peer.lm_head.weight[40] = 0
    greedy = suite["sample"](network, 2, 12, temperature=0.0)()
    for static in (False, True):
        assert torch.equal(suite["generate"](peer, 2, 12, do_sample=False, static=static)(), greedy)


def test_every_case_names_its_peer():
    names = [case.peer_name for case in suite["cases"](True)]
    assert len(names) == 2  # batch 1 and 16, with the faster of the peer's caches
    assert all("LlamaForCausalLM" in name for name in names)
