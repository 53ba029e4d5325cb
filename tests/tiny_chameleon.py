"""A Chameleon of `transformers` with small random weights, in the files that Hugging Face's Chameleon has."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

NUM_CODES = 16
FIRST_CODE, EOSS, BREAK, SENTINELS, SEPARATOR, PLACEHOLDER, FIRST_TEXT = 4, 20, 21, range(22, 38), 38, 39, 40
VOCABULARY_SIZE = 96
SIDE = 16


def image_name(code: int) -> str:
    return "IMGIMG" + "".join("ABCDEFGHIJ"[int(digit)] for digit in str(code)) + "Z"


def names() -> dict[str, int]:
    """The vocabulary in the order of the public one, smaller."""
    found = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<eoss>": EOSS, "<racm3:break>": BREAK}
    found |= {image_name(code): FIRST_CODE + code for code in range(NUM_CODES)}
    found |= {f"<reserved{id - 4:05d}>": id for id in SENTINELS}
    found |= {"<reserved08706>": SEPARATOR, "<image>": PLACEHOLDER}
    return found | {f"word{id}": id for id in range(FIRST_TEXT, VOCABULARY_SIZE)}


def tokenizer_json() -> dict[str, Any]:
    marks = {name: id for name, id in names().items() if name.startswith("<")}
    added = [{"id": id, "content": name, "special": True} for name, id in marks.items()]
    vocab = {name: id for name, id in names().items() if name not in marks}
    return {"version": "1.0", "added_tokens": added, "model": {"type": "BPE", "vocab": vocab, "merges": []}}


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> None:
    """Weights of a size at which every part matters, and codes that pictures really have."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.named_parameters():
        if tensor.ndim == 1 or "q_norm" in name or "k_norm" in name:  # norms and biases
            offset = 1.0 if name.endswith("weight") else 0.0
            tensor.copy_(offset + 0.3 * torch.randn(tensor.shape, generator=generator))
        elif tensor.ndim == 4:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / tensor[0].numel() ** 0.5)
        else:
            tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator))


def tiny_chameleon(**changes: Any) -> Any:
    """The model; `changes` go into its config."""
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration, ChameleonVQVAEConfig

    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 1,
        "vocabulary_map": names(),
        "vq_config": ChameleonVQVAEConfig(
            resolution=SIDE,
            base_channels=32,
            channel_multiplier=[1, 2],
            num_res_blocks=1,
            latent_channels=24,
            embed_dim=8,
            num_embeddings=NUM_CODES,
        ),
    }
    model = ChameleonForConditionalGeneration(ChameleonConfig(**{**shape, **changes})).eval()
    randomise(model)
    return model


def save_foreign(model: Any, folder: Path, max_shard_size: str = "40KB") -> Path:
    """The model as its own library saves it, in several shards, with a tokenizer's files beside it."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


@torch.no_grad()
def foreign_logits(model: Any, ids_BT: torch.Tensor, mask_BT: torch.Tensor | None = None) -> torch.Tensor:
    """Scores of all ids; its `forward` would hide those of the images."""
    return model.lm_head(model.model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)[0])
