"""A Chameleon of `transformers` with small random weights, in the files of Hugging Face and of Meta."""

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


VQ_YAML = """
model:
  target: taming.models.vqgan.VQModel
  params:
    ckpt_path: vqgan.ckpt
    embed_dim: 8
    n_embed: 16
    ddconfig: {double_z: false, z_channels: 24, resolution: 16, in_channels: 3, out_ch: 3, ch: 32, ch_mult: [1, 2],
               num_res_blocks: 1, attn_resolutions: [], dropout: 0.0}
    lossconfig: {target: taming.modules.losses.vqperceptual.DummyLoss}
"""
"""The settings of the image tokenizer, as its trainer writes them."""


def save_vqgan(model: Any, folder: Path) -> Path:
    """The image tokenizer with a random decoder, as Meta's `tokenizer/vqgan.ckpt`."""
    from cm3.tokenizers.taming import TamingConfig, TamingVQGAN

    shape: dict[str, Any] = {"image_size": SIDE, "base_channels": 32, "channel_multipliers": (1, 2)}
    whole = TamingVQGAN(
        TamingConfig(**shape, num_residual_blocks=1, latent_width=24, num_codes=NUM_CODES, code_width=8)
    )
    decoder = {name: tensor for name, tensor in whole.state_dict().items() if name.startswith("decoder.")}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": {**model.model.vqmodel.state_dict(), **decoder}}, folder / "vqgan.ckpt")
    (folder / "vqgan.yaml").write_text(VQ_YAML)
    return folder / "vqgan.ckpt"


def share_norms(model: Any, shards: int) -> Any:
    """The norms of a model that was trained in so many parts: equal for the heads of a part."""
    with torch.no_grad():
        for layer in model.model.layers:
            for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
                for tensor in (norm.weight, norm.bias):
                    tensor.copy_(tensor[:: len(tensor) // shards].repeat_interleave(len(tensor) // shards, 0).clone())
    return model


def neighbours(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head with number i and number i + K/2, which a position turns together, side by side."""
    width = len(rows) // heads
    pairs = [(head * width + i, head * width + i + width // 2) for head in range(heads) for i in range(width // 2)]
    return rows[[index for pair in pairs for index in pair]]


def meta_parts(model: Any, shards: int) -> list[dict[str, torch.Tensor]]:
    """The weights in Meta's format: the contents of each file."""
    config, parts = model.config, [{} for _ in range(shards)]

    def put(name: str, tensor: torch.Tensor, axis: int | None) -> None:
        pieces = [tensor] * shards if axis is None else tensor.chunk(shards, axis)
        for part, piece in zip(parts, pieces, strict=True):
            part[name] = piece.detach().clone()

    put("tok_embeddings.weight", model.model.embed_tokens.weight, 1)
    put("norm.weight", model.model.norm.weight, None)
    put("output.weight", model.lm_head.weight, 0)
    for index, layer in enumerate(model.model.layers):
        prefix, attention = f"layers.{index}.", layer.self_attn
        put(f"{prefix}attention.wq.weight", neighbours(attention.q_proj.weight, config.num_attention_heads), 0)
        put(f"{prefix}attention.wk.weight", neighbours(attention.k_proj.weight, config.num_key_value_heads), 0)
        put(f"{prefix}attention.wv.weight", attention.v_proj.weight, 0)
        put(f"{prefix}attention.wo.weight", attention.o_proj.weight, 1)
        for name, norm in (("q", attention.q_norm), ("k", attention.k_norm)):
            for kind in ("weight", "bias"):
                tensor = getattr(norm, kind)
                for part, head in zip(parts, range(0, len(tensor), len(tensor) // shards), strict=True):
                    part[f"{prefix}attention.{name}_normalization.{kind}"] = neighbours(tensor[head].detach(), 1)
        put(f"{prefix}attention_norm.weight", layer.input_layernorm.weight, None)
        put(f"{prefix}ffn_norm.weight", layer.post_attention_layernorm.weight, None)
        for name, module, axis in (("w1", "gate_proj", 0), ("w3", "up_proj", 0), ("w2", "down_proj", 1)):
            put(f"{prefix}feed_forward.{name}.weight", getattr(layer.mlp, module).weight, axis)
    put("rope.freqs", torch.ones(config.hidden_size // config.num_attention_heads // 2), None)
    return parts


def save_meta(model: Any, root: Path, shards: int, name: str = "7b") -> Path:
    """The model as Meta releases it: `models/7b` and `tokenizer`."""
    config, folder = model.config, root / "models" / name
    folder.mkdir(parents=True)
    for index, part in enumerate(meta_parts(model, shards)):
        torch.save(part, folder / ("consolidated.pth" if shards == 1 else f"consolidated.{index:02}.pth"))
    params = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        "ffn_dim_multiplier": 0.5,  # 48 of a width of 32
        "multiple_of": 16,
        "norm_eps": 1e-5,
        "rope_theta": config.rope_parameters["rope_theta"],
        "qk_normalization": True,
        "swin_norm": config.swin_norm,
    }
    (folder / "params.json").write_text(json.dumps({"model": params, "seed": 1}))
    (folder / "consolidate_params.json").write_text(json.dumps({"model_parallel_size": shards}))
    save_vqgan(model, root / "tokenizer")
    text = json.dumps(tokenizer_json()).replace("<image>", "<reserved08707>")
    (root / "tokenizer" / "text_tokenizer.json").write_text(text)
    return root


@torch.no_grad()
def foreign_logits(model: Any, ids_BT: torch.Tensor, mask_BT: torch.Tensor | None = None) -> torch.Tensor:
    """Scores of all ids; its `forward` would hide those of the images."""
    return model.lm_head(model.model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)[0])
