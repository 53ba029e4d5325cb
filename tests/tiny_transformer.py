"""Small transformers with random weights, one of CM3Leon's kind and one of Chameleon's."""

import torch

from cm3.model.config import ModelConfig
from cm3.model.transformer import Transformer

KINDS = {
    "cm3leon": {},
    "chameleon": {
        "norm": "rmsnorm",
        "activation": "swiglu",
        "position": "rope",
        "qk_norm": True,
        "qk_norm_per_head": True,
        "num_key_value_heads": 2,
        "tie_embeddings": False,
    },
}


def transformer_of(kind, **changes):
    """The same weights at every call."""
    torch.manual_seed(0)
    shape = {"vocabulary_size": 40, "width": 32, "num_layers": 2, "num_heads": 4, "max_positions": 24}
    config = ModelConfig(**shape, zero_init_outputs=False, init_std=0.2, **KINDS[kind], **changes)
    return Transformer(config).eval()


@torch.no_grad()
def logits(transformer):
    """Of two rows that hold all ids, float32."""
    return transformer.logits(transformer(torch.arange(40).reshape(2, 20))).float()
