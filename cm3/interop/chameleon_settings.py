"""The settings of a Chameleon in Hugging Face's `config.json`, to ours and back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cm3.errors import ConfigError, ModelFilesError
from cm3.interop.taming import taming_config
from cm3.model.config import ModelConfig
from cm3.tokenizers.taming import TamingConfig
from cm3.tokenizers.vocabulary import Vocabulary


def model_config(settings: Mapping[str, Any], path: Path) -> ModelConfig:
    """Our settings of their `config.json`, with norms of queries and keys that all heads share.

    Args:
        settings: Under the names of `config.json`.
        path: The file that they are from, for errors.

    Raises:
        ModelFilesError: a setting is missing or makes another network than ours.
    """
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    fixed: dict[str, tuple[Any, Any]] = {
        "hidden_act": (settings.get("hidden_act", "silu"), "silu"),
        "attention_bias": (settings.get("attention_bias", False), False),
        "mlp_bias": (settings.get("mlp_bias", False), False),
        "tie_word_embeddings": (settings.get("tie_word_embeddings", False), False),
        "rope_type": (rope.get("rope_type", rope.get("type", "default")), "default"),
        # the norms of queries and keys have this one always, ours have the same in all
        "rms_norm_eps": (settings.get("rms_norm_eps", 1e-5), 1e-5),
    }
    if other := [f"{name}={found!r} (not {known!r})" for name, (found, known) in fixed.items() if found != known]:
        raise ModelFilesError(f"{path} has {', '.join(other)}, which is not a Chameleon that this code knows")
    try:
        return ModelConfig(
            vocabulary_size=settings["vocab_size"],
            width=settings["hidden_size"],
            num_layers=settings["num_hidden_layers"],
            num_heads=settings["num_attention_heads"],
            num_key_value_heads=settings.get("num_key_value_heads"),
            feed_forward_width=settings["intermediate_size"],
            max_positions=settings["max_position_embeddings"],
            norm="rmsnorm",
            activation="swiglu",
            position="rope",
            rope_theta=rope.get("rope_theta", settings.get("rope_theta", 10_000.0)),
            qk_norm=True,
            norm_order="swin" if settings.get("swin_norm") else "pre",
            tie_embeddings=False,
            init_std=settings.get("initializer_range", 0.02),
            zero_init_outputs=False,
        )
    except (KeyError, TypeError, ConfigError) as error:
        raise ModelFilesError(f"{path} cannot be used ({error}); download it again") from error


def vq_config(settings: Mapping[str, Any], path: Path) -> TamingConfig:
    """The shape of the image tokenizer in their `config.json`, without a decoder."""
    found = settings.get("vq_config") or {}
    try:
        return taming_config(
            image_size=found.get("resolution", 512),
            attention_sizes=found.get("attn_resolutions") or (),
            base_channels=found.get("base_channels", 128),
            channel_multipliers=tuple(found.get("channel_multiplier", (1, 1, 2, 2, 4))),
            num_residual_blocks=found.get("num_res_blocks", 2),
            latent_width=found.get("latent_channels", 256),
            num_codes=found.get("num_embeddings", 8192),
            code_width=found.get("embed_dim", 256),
            decoder=False,
            fixed={
                "double_latent": (found.get("double_latent", False), False),
                "in_channels": (found.get("in_channels", 3), 3),
                "attn_type": (found.get("attn_type", "vanilla"), "vanilla"),
            },
        )
    except (TypeError, ConfigError, ModelFilesError) as error:
        raise ModelFilesError(f"{path} has a vq_config that cannot be used: {error}") from error


def foreign_settings(
    config: ModelConfig, vq: TamingConfig, vocabulary: Vocabulary, names: Mapping[str, int], dtype: torch.dtype
) -> dict[str, Any]:
    """Their `config.json` of our settings: the inverse of `model_config` and `vq_config`."""
    special = vocabulary.special_ids
    return {
        "architectures": ["ChameleonForConditionalGeneration"],
        "model_type": "chameleon",
        "torch_dtype": str(dtype).removeprefix("torch."),
        "vocab_size": config.vocabulary_size,
        "hidden_size": config.width,
        "intermediate_size": config.ffn_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.key_value_heads,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "initializer_range": config.init_std,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_theta,  # as old releases of transformers read it
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "model_parallel_size": 1,
        "swin_norm": config.norm_order == "swin",
        "tie_word_embeddings": False,
        "bos_token_id": special["<s>"],
        "eos_token_id": special["</s>"],
        "pad_token_id": special["<pad>"],
        "vocabulary_map": dict(names),
        "vq_config": {
            "embed_dim": vq.code_width,
            "num_embeddings": vq.num_codes,
            "double_latent": False,
            "latent_channels": vq.latent_width,
            "resolution": vq.image_size,
            "in_channels": 3,
            "base_channels": vq.base_channels,
            "channel_multiplier": list(vq.channel_multipliers),
            "num_res_blocks": vq.num_residual_blocks,
            "attn_resolutions": [vq.image_size // 2**level for level in vq.attention_levels] or None,
            "dropout": 0.0,
            "attn_type": "vanilla",
        },
    }
