"""Small text encoders of transformers with random weights, as folders."""

from pathlib import Path
from typing import Any

import pytest
import torch

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "hat"]


def save_encoder(folder: Path, kind: str, width: int = 8) -> Any:
    """A model that reads WORDS, which is returned: "bert", or "t5", the part of it that reads alone."""
    transformers = pytest.importorskip("transformers")
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    if kind == "bert":
        shape = {"hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        model = transformers.BertModel(transformers.BertConfig(vocab_size=len(WORDS), **shape))
    else:
        shape = {"d_model": width, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
        model = transformers.T5EncoderModel(transformers.T5Config(vocab_size=len(WORDS), **shape))
    model.eval().save_pretrained(folder)
    return model
