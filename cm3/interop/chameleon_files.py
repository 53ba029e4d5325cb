"""What an import needs to know of a Chameleon, whichever format its files have, and its image tokenizer."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from cm3.errors import ModelFilesError, RequestError
from cm3.interop.chameleon_layout import Part
from cm3.interop.taming import THEIR_CODEBOOK, load_vqgan, vqgan_of_tensors
from cm3.model.config import ModelConfig
from cm3.tokenizers.image import ImageTokenizer, WeightPrecision
from cm3.tokenizers.taming import TamingConfig

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Number formats that are read, by their names in safetensors."""
TOKENIZER_JSON = "tokenizer.json"
"""The text tokenizer in Hugging Face's format, which is also where it lies in our folder."""
_CODEBOOK_TOLERANCE = 2**-8
"""Relative difference of the codebooks of one image tokenizer in fp32 and bf16, at most."""


class ForeignTensor(Protocol):
    """A tensor of others, not read yet; `cm3.checkpoint.StoredTensor` is one."""

    @property
    def path(self) -> Path:
        """The file, or one of the files, that it lies in."""

    @property
    def name(self) -> str:
        """Its name there."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def dtype(self) -> str:
        """As safetensors calls it."""

    def read(self) -> Tensor:
        """Return the values; nothing else is read."""


@dataclass(frozen=True, kw_only=True)
class ForeignChameleon:
    """A Chameleon in files of others: all but the weights of its transformer."""

    config: ModelConfig
    """With norms of queries and keys that all heads share, which only the weights can tell."""
    layout: Mapping[str, tuple[Part, ...]]
    """The foreign tensors that each of ours is made of."""
    tensors: Mapping[str, ForeignTensor]
    """The foreign tensors by name: those of the layout, with the shapes that it says."""
    names: Mapping[str, int]
    """The vocabulary: names and their ids."""
    image: ImageTokenizer
    """With or without a decoder."""
    save_text_files: Callable[[Path], None]
    """Writes `TOKENIZER_JSON`, and what else there is of tokenizer and processor, into a folder."""
    origin: str
    """What the model card says of where it comes from."""
    named_sizes: bool = False
    """Some ids name the sizes of images and one ends their rows; see `chameleon_vocabulary`."""


def norms_are_shared(found: ForeignChameleon) -> bool:
    """Whether the norms of queries and keys are the same for all heads of each layer."""
    parts = [part for parts in found.layout.values() for part in parts]
    norms_NK = (found.tensors[part.name].read() for part in parts if "q_norm" in part.name or "k_norm" in part.name)
    return all(bool((norm_NK == norm_NK[:1]).all()) for norm_NK in norms_NK)


def widest_dtype(tensors: Iterable[ForeignTensor]) -> torch.dtype:
    """The type that holds all tensors without loss.

    Raises:
        ModelFilesError: a tensor is of no known type.
    """
    tensors = list(tensors)
    if unknown := [tensor for tensor in tensors if tensor.dtype not in DTYPES]:
        raise ModelFilesError(
            f"{unknown[0].path} has {unknown[0].name} in {unknown[0].dtype}, known are {', '.join(DTYPES)}; use "
            "weights that are not quantised"
        )
    return reduce(torch.promote_types, {DTYPES[tensor.dtype] for tensor in tensors})


def image_tokenizer(
    found: Mapping[str, ForeignTensor], config: TamingConfig, vqgan: str | Path | None, source: Path
) -> ImageTokenizer:
    """The image tokenizer of a folder's weights, or of Chameleon's own checkpoint, which must be the same one.

    Args:
        found: The tensors of the image tokenizer in the folder, by their names in its checkpoint; may be none.
        config: Its shape as the folder has it.
        vqgan: Chameleon's `vqgan.ckpt`; None takes the folder's.
        source: The folder, for errors.

    Raises:
        RequestError: there is none in the folder, and no checkpoint.
        ModelFilesError: the checkpoint cannot be read, or is of another image tokenizer.
    """
    if vqgan is None:
        if not found:
            raise RequestError(f"{source} holds no image tokenizer; give Chameleon's vqgan.ckpt, with --vqgan")
        precision: WeightPrecision = "bf16" if widest_dtype(found.values()) == torch.bfloat16 else "fp32"
        tensors = {name: tensor.read() for name, tensor in found.items()}
        return ImageTokenizer(vqgan_of_tensors(config, tensors, str(source)), precision)
    model = load_vqgan(vqgan)
    if replace(model.config, decoder=False) != replace(config, decoder=False):
        raise ModelFilesError(f"{vqgan} has the shape {model.config}, {source} has {config}; use files of one model")
    if found:
        own, theirs = model.quantizer.codebook_QE, found[THEIR_CODEBOOK].read().float()
        if not torch.allclose(own, theirs, rtol=_CODEBOOK_TOLERANCE, atol=0.0):
            raise ModelFilesError(f"{vqgan} and {source} have different codebooks; use files of one model")
    return ImageTokenizer(model)
