"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685) of the transformer, in the format of Hugging Face's PEFT.

A frozen matrix W gets a trained product beside it, W x + alpha / rank B A x (section 4.1). An adapter is a folder of
A and B alone, with the hash of the weights that it belongs to. This is the only file that imports peft.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cm3.checkpoint import load_tensors, read_json, save_tensors, write_json, write_text
from cm3.errors import ConfigError, MissingDependencyError, ModelFilesError
from cm3.model.config import ModelConfig
from cm3.model.transformer import Transformer

ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
BASE_FILE = "base.json"
"""Beside PEFT's files: which model the adapter belongs to."""
TARGETS = ("attention.qkv", "attention.out", "feed_forward.up", "feed_forward.out")
"""Matrices of a block that can have an adapter."""
_PREFIX = "base_model.model."
"""What PEFT puts before the names of a model's parts."""


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Which low-rank matrices are trained instead of the weights."""

    rank: int = 0
    """Rows of A and columns of B; 0 is off: all weights are trained."""
    alpha: float = 32.0
    """The product B A is scaled by alpha / rank."""
    dropout: float = 0.0
    """Probability of dropping an element of what goes into A; 0 is off."""
    targets: tuple[str, ...] = TARGETS
    """Matrices of every block that get an adapter: attention.qkv, attention.out, feed_forward.up, feed_forward.out."""
    train_embeddings: bool = False
    """Train the embeddings of ids and positions and the output head too, whole, and save them with the adapter: for
    ids that the model has not learned before."""

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ConfigError(f"lora.rank={self.rank}; choose 0 (off) or more")
        if self.alpha <= 0:
            raise ConfigError(f"lora.alpha={self.alpha}; choose a value above 0")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.dropout={self.dropout}; choose a value from 0 to below 1")
        if unknown := [name for name in self.targets if name not in TARGETS]:
            raise ConfigError(f"lora.targets has {', '.join(unknown)}; choose from {', '.join(TARGETS)}")
        if not self.targets:
            raise ConfigError(f"lora.targets is empty; choose from {', '.join(TARGETS)}, or lora.rank=0 for none")


def adapter_parameter_count(model: ModelConfig, lora: LoRAConfig) -> int:
    """Return how many parameters an adapter has; 0 where it is off."""
    if not lora.rank:
        return 0
    kv_width = model.head_width * model.key_value_heads
    widths = {  # in and out
        "attention.qkv": (model.width, model.width + 2 * kv_width),
        "attention.out": (model.width, model.width),
        "feed_forward.up": (model.width, (2 if model.activation == "swiglu" else 1) * model.ffn_width),
        "feed_forward.out": (model.ffn_width, model.width),
    }
    count = model.num_layers * lora.rank * sum(sum(widths[name]) for name in lora.targets)
    if lora.train_embeddings:
        matrices = model.vocabulary_size * (1 if model.tie_embeddings else 2)
        count += model.width * (matrices + (model.max_positions if model.position == "learned" else 0))
    return count


def weights_hash(transformer: Transformer) -> str:
    """Return the SHA-256 of names and weights, rounded to bf16: the same in every format that a model is loaded in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(transformer.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().bfloat16().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def add_adapter(transformer: Transformer, lora: LoRAConfig) -> None:
    """Put adapters that change nothing yet into a transformer; only they need gradients from now on.

    Raises:
        MissingDependencyError: peft is not installed.
    """
    _inject(transformer, _peft_config(transformer.config, lora))


def merge_adapter(transformer: Transformer, lora: LoRAConfig, tensors: Mapping[str, Tensor]) -> None:
    """Add an adapter's products to the weights of a plain transformer, which stays a plain one.

    Args:
        transformer: What the adapter was trained on.
        lora: Settings of that training.
        tensors: The trained parameters by their names in the transformer, those of `add_adapter`.

    Raises:
        ModelFilesError: a tensor is missing, unexpected, or of another shape.
    """
    _merge(
        transformer, _peft_config(transformer.config, lora), {file_name(n): t for n, t in tensors.items()}, "the run"
    )


def save_adapter(
    folder: str | Path,
    tensors: Mapping[str, Tensor],
    model: ModelConfig,
    lora: LoRAConfig,
    *,
    base: str,
    base_hash: str,
    tokenizer_hash: str,
    card: str,
) -> None:
    """Write an adapter as PEFT does, and `base.json` beside it.

    Args:
        folder: Made where it does not exist; files of the same names are replaced.
        tensors: The trained parameters by their names in the transformer.
        model: The transformer that was adapted.
        lora: Settings of the adapter.
        base: Folder or name of the model that was adapted.
        base_hash: Its `weights_hash`.
        tokenizer_hash: `DocumentTokenizer.hash` of its tokenizers.
        card: Text of README.md.
    """
    folder = Path(folder)
    save_tensors(folder / ADAPTER_WEIGHTS_FILE, {_PREFIX + file_name(name): t for name, t in tensors.items()})
    write_json(folder / BASE_FILE, {"model": base, "weights_hash": base_hash, "tokenizer_hash": tokenizer_hash})
    write_text(folder / "README.md", card)
    config = _peft_config(model, lora)
    config.base_model_name_or_path = base
    config.save_pretrained(str(folder))


def load_adapter(transformer: Transformer, folder: str | Path) -> None:
    """Add the adapter of a folder to the weights of a plain transformer, which stays a plain one.

    Raises:
        MissingDependencyError: peft is not installed.
        ModelFilesError: the folder holds no adapter or a damaged one, or the adapter belongs to another model.
    """
    folder = Path(folder)
    if not (folder / ADAPTER_CONFIG_FILE).is_file() or not (folder / BASE_FILE).is_file():
        raise ModelFilesError(
            f"{folder} lacks {ADAPTER_CONFIG_FILE} or {BASE_FILE}, so it is no adapter; give the folder `adapter` of a "
            "run with lora.rank"
        )
    base, found = read_json(folder / BASE_FILE), weights_hash(transformer)
    if base.get("weights_hash") != found:
        raise ModelFilesError(
            f"the adapter {folder} belongs to the weights {str(base.get('weights_hash'))[:12]} of {base.get('model')}, "
            f"found {found[:12]}; load it into that model"
        )
    try:
        config = _peft().LoraConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError) as error:
        raise ModelFilesError(f"{folder / ADAPTER_CONFIG_FILE} cannot be used ({error}); export it again") from error
    tensors = load_tensors(folder / ADAPTER_WEIGHTS_FILE)
    _merge(transformer, config, {name.removeprefix(_PREFIX): t for name, t in tensors.items()}, str(folder))


def adapter_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield (name, parameter) of all adapters in a module."""
    for name, parameter in module.named_parameters():
        if ".lora_" in name or ".modules_to_save." in name:
            yield name, parameter


def file_name(name: str) -> str:
    """Return the name that PEFT gives in its files to a parameter of a transformer with adapters."""
    return name.replace(".modules_to_save.default.", ".").replace(".default.", ".")


def _merge(transformer: Transformer, peft_config: Any, tensors: Mapping[str, Tensor], source: str) -> None:
    tuner = _inject(transformer, peft_config)
    own = {file_name(name): parameter for name, parameter in adapter_parameters(transformer)}
    wrong = sorted(own.keys() ^ tensors.keys())
    wrong += sorted(name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape)
    if not wrong:
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(tensors[name])
        tuner.merge_and_unload()
    else:
        tuner.unload()
    transformer.requires_grad_(True)
    if wrong:
        raise ModelFilesError(
            f"the adapter of {source} does not fit the model: {', '.join(wrong[:4])} missing, unexpected or of another "
            "shape; export it again"
        )


def _inject(transformer: Transformer, peft_config: Any) -> Any:
    return _peft().LoraModel(transformer, peft_config, "default")


def _peft_config(model: ModelConfig, lora: LoRAConfig) -> Any:
    whole = ["embedding"]
    whole += ["position_embedding"] if model.position == "learned" else []
    whole += [] if model.tie_embeddings else ["head"]
    return _peft().LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
        modules_to_save=whole if lora.train_embeddings else None,
    )


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise MissingDependencyError(
            f"adapters need peft, which is not installed ({error}); run `pip install open-cm3[tune]`"
        ) from error
    return peft
