"""Chameleon as `transformers` has it (`ChameleonForConditionalGeneration`), with random weights: to compare with.

Chameleon (arXiv:2405.09818, section 2.3) is our transformer with RMSNorm, SwiGLU, rotary positions, normalised queries
and keys, and an output head of its own; `as_chameleon` sets these switches.

B batch   T tokens
"""

import importlib.util
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from cm3.errors import ConfigError, MissingDependencyError
from cm3.model.config import ModelConfig

_SWITCHES: dict[str, Any] = {
    "norm": "rmsnorm",
    "activation": "swiglu",
    "position": "rope",
    "qk_norm": True,
    "tie_embeddings": False,
    "dropout": 0.0,
    "norm_epsilon": 1e-5,
}
_IGNORED = -100  # a label that `transformers` leaves out of the loss


def has_transformers() -> bool:
    """Whether `transformers` is installed; does not import it."""
    return importlib.util.find_spec("transformers") is not None


def as_chameleon(config: ModelConfig) -> ModelConfig:
    """The config of a Chameleon of the same width, depth and vocabulary.

    A SwiGLU keeps its inner width; otherwise it is Chameleon's default, which has about as many weights.
    """
    width = config.feed_forward_width if config.activation == "swiglu" else None
    return replace(config, feed_forward_width=width, **_SWITCHES)


def require_chameleon(config: ModelConfig) -> None:
    """Raise ConfigError where the config is no Chameleon's."""
    wrong = [name for name, value in _SWITCHES.items() if getattr(config, name) != value]
    if wrong:
        raise ConfigError(
            f"Chameleon wants {', '.join(f'model.{name}={_SWITCHES[name]}' for name in wrong)}; see `as_chameleon`"
        )


def foreign_chameleon(config: ModelConfig) -> nn.Module:
    """The class of `transformers` in the sizes of a config, without its image tokenizer.

    Raises:
        ConfigError: the config is no Chameleon.
        MissingDependencyError: `transformers` is not installed.
    """
    require_chameleon(config)
    try:
        from transformers import ChameleonConfig, ChameleonForConditionalGeneration, ChameleonVQVAEConfig
    except ImportError as error:
        raise MissingDependencyError(
            f"Chameleon needs transformers, which is not installed ({error}); run `pip install open-cm3[interop]`"
        ) from error
    smallest: dict[str, Any] = {
        "embed_dim": 32,
        "num_embeddings": 16,
        "latent_channels": 32,
        "base_channels": 32,
        "resolution": 16,
    }
    model: Any = ChameleonForConditionalGeneration(
        ChameleonConfig(
            vocab_size=config.vocabulary_size,
            hidden_size=config.width,
            intermediate_size=config.ffn_width,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.key_value_heads,
            max_position_embeddings=config.max_positions,
            initializer_range=config.init_std,
            rms_norm_eps=config.norm_epsilon,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            swin_norm=config.norm_order == "swin",
            tie_word_embeddings=False,
            use_cache=False,
            vocabulary_map={},
            vq_config=ChameleonVQVAEConfig(channel_multiplier=[1], num_res_blocks=1, **smallest),
        )
    )
    model.model.vqmodel = None  # read for pixels only
    return model


def foreign_loss(model: Any, ids_BT: Tensor, real_BT: Tensor) -> Tensor:
    """The mean loss of all next ids, by the model's own loss function.

    Its `forward` would forbid image ids in the output; here their logits stay as they are.

    Args:
        model: Of `foreign_chameleon`.
        ids_BT: Rows, each one context.
        real_BT: False at padding, which is not predicted.
    """
    hidden_BTD = model.model(input_ids=ids_BT, use_cache=False)[0]
    labels_BT = ids_BT.masked_fill(~real_BT, _IGNORED)
    loss: Tensor = model.loss_function(
        logits=model.lm_head(hidden_BTD), labels=labels_BT, vocab_size=model.config.vocab_size
    )
    return loss
