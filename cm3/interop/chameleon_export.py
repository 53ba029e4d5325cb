"""A Chameleon of ours as a folder in Hugging Face's format, which `transformers` and vLLM load.

Weights go through memory a file at a time. The format has a place for the encoder of the image tokenizer and none for
its decoder.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cm3.checkpoint import (
    check_shapes,
    new_folder,
    read_json,
    require_empty,
    stored_tensors,
    stream_model_weights,
    write_json,
)
from cm3.errors import ConfigError
from cm3.interop.chameleon import require_chameleon
from cm3.interop.chameleon_files import TOKENIZER_JSON, widest_dtype
from cm3.interop.chameleon_hf import carry_text_files, vq_tensors
from cm3.interop.chameleon_layout import chameleon_layout, split_parts
from cm3.interop.chameleon_names import PLACEHOLDER, SEPARATOR, names_of_tokenizer
from cm3.interop.chameleon_settings import foreign_settings
from cm3.model.config import ModelConfig
from cm3.model.pretrained import read_model_config
from cm3.model.transformer import Transformer
from cm3.pretrained import CONFIG_FILE
from cm3.tokenizers.document import VOCABULARY_FILE
from cm3.tokenizers.image import ImageTokenizer
from cm3.tokenizers.taming import TamingVQGAN
from cm3.tokenizers.vocabulary import Vocabulary


def export_chameleon(source: str | Path, destination: str | Path, *, max_shard_size: int | str = "5GB") -> ModelConfig:
    """Write a Chameleon of ours in Hugging Face's format; `import_chameleon` of that gives the same weights again.

    The decoder of the image tokenizer, for which the format has no place, stays behind.

    Args:
        source: A model folder that `import_chameleon` wrote, or one that was trained on from such.
        destination: The folder to write; must not exist, or be empty.
        max_shard_size: Bytes of a weight file at most, as a number or such as "5GB".

    Raises:
        RequestError: the destination holds something.
        ConfigError: the model is no Chameleon.
        ModelFilesError: a file is missing or damaged, or the folder cannot be written.
    """
    source, destination = Path(source), Path(destination)
    require_empty(destination)
    config = read_model_config(source)
    require_chameleon(replace(config, dropout=0.0))
    vocabulary, tokenizer = Vocabulary.load(source / VOCABULARY_FILE), ImageTokenizer.load(source)
    image = tokenizer.model
    if not isinstance(image, TamingVQGAN):
        raise ConfigError(f"{source} has an image tokenizer of our own, for which Chameleon's format has no place")
    stored = stored_tensors(source)
    with torch.device("meta"):
        own = {name: tuple(tensor.shape) for name, tensor in Transformer(config).state_dict().items()}
    check_shapes(own, {name: tensor.shape for name, tensor in stored.items()}, str(source), "Transformer")
    dtype = widest_dtype(stored.values())
    layout = chameleon_layout(config)
    owner = {part.name: name for name, parts in layout.items() for part in parts}
    encoder = vq_tensors(image, torch.float32 if tokenizer.precision == "fp32" else dtype)
    planned = {
        part.name: torch.empty(part.shape, dtype=dtype, device="meta") for parts in layout.values() for part in parts
    }

    def make(foreign: str) -> Tensor:
        if foreign in encoder:
            return encoder[foreign]
        name = owner[foreign]
        return dict(split_parts(stored[name].read().to(dtype), layout[name]))[foreign]

    names = names_of_tokenizer(read_json(source / TOKENIZER_JSON), str(source / TOKENIZER_JSON))
    with new_folder(destination) as folder:
        stream_model_weights(folder, planned | encoder, make, max_shard_size)
        write_json(folder / CONFIG_FILE, foreign_settings(config, image.config, vocabulary, names, dtype))
        carry_text_files(source, folder)
        for name, values in _text_settings(tokenizer.codes_per_image).items():
            if not (folder / name).is_file():
                write_json(folder / name, values)
    return config


def _text_settings(codes_per_image: int) -> dict[str, dict[str, Any]]:
    """What their classes of tokenizer and processor look for beside `tokenizer.json`, for models that came without."""
    processor: dict[str, Any] = {"processor_class": "ChameleonProcessor"}
    return {
        "tokenizer_config.json": processor
        | {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "sep_token": SEPARATOR,
            "padding_side": "left",
        },
        "processor_config.json": processor | {"image_seq_length": codes_per_image, "image_token": PLACEHOLDER},
        "preprocessor_config.json": processor | {"image_processor_type": "ChameleonImageProcessor"},
    }
