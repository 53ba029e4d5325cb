"""Our small CLIP: two transformers without masks, one for 64x64 pictures and one for captions (arXiv 2103.00020).

B batch   T text tokens   P patches   D width of a tower   E embedding width   H W height, width   C channels
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from PIL import Image as PILImage
from torch import Tensor, nn

from cm3.checkpoint import WEIGHTS_FILE, load_strict, load_tensors, read_json, save_tensors, write_json
from cm3.errors import ConfigError, ModelFilesError
from cm3.pretrained import CONFIG_FILE
from cm3.retrieval.vectors import in_batches
from cm3.tokenizers.document import TEXT_TOKENIZER_FILE
from cm3.tokenizers.image import WeightPrecision, load_image, pixels_to_model, to_square
from cm3.tokenizers.text import TextTokenizer
from cm3.tokenizers.vocabulary import TEXT_SPECIALS

MODEL_TYPE = "open-cm3-clip"
"""What `model_type` in `config.json` says of these encoders."""

MAX_SCALE = 100.0
"""Largest factor of the cosines in the loss (arXiv 2103.00020, section 2.5)."""

_FORMAT_VERSION = 1
_START = TEXT_SPECIALS.index("<s>")
_PADDING = TEXT_SPECIALS.index("<pad>")


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """The two towers."""

    vocabulary_size: int
    """Pieces of the text tokenizer."""
    image_size: int = 64
    """Side of the pictures in pixels; others are cropped to a square and resized."""
    patch_size: int = 8
    """Side of a patch in pixels."""
    width: int = 128
    """Width of both towers."""
    image_layers: int = 4
    """Transformer blocks over the patches."""
    text_layers: int = 2
    """Transformer blocks over the text."""
    num_heads: int = 4
    """Attention heads of a block."""
    embedding_width: int = 128
    """Length of the vectors."""
    max_text_tokens: int = 64
    """Tokens of a text that are read, the start token included; the rest is cut."""

    def __post_init__(self) -> None:
        for name in ("vocabulary_size", "image_layers", "text_layers", "embedding_width", "patch_size", "num_heads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}; choose 1 or more")
        if self.max_text_tokens < 2:
            raise ConfigError(f"max_text_tokens={self.max_text_tokens} leaves no room for text; choose 2 or more")
        if self.image_size % self.patch_size:
            raise ConfigError(f"patch_size={self.patch_size} does not divide image_size={self.image_size}")
        if self.width % self.num_heads:
            raise ConfigError(f"num_heads={self.num_heads} does not divide width={self.width}")


class Block(nn.Module):
    """Pre-norm self-attention over all positions, and an MLP."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
        qkv_BTF = self.qkv(self.attention_norm(x_BTD))
        q_BNTK, k_BNTK, v_BNTK = rearrange(
            qkv_BTF, "b t (three n k) -> three b n t k", three=3, n=self.num_heads
        ).unbind()
        visible = None if mask_BT is None else mask_BT[:, None, None, :]
        mixed_BNTK = F.scaled_dot_product_attention(q_BNTK, k_BNTK, v_BNTK, attn_mask=visible)
        x_BTD = x_BTD + self.out(rearrange(mixed_BNTK, "b n t k -> b t (n k)"))
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))


class Tower(nn.Module):
    """Blocks over embedded tokens, their mean, and a projection to a unit vector."""

    def __init__(self, config: ClipConfig, num_layers: int, num_positions: int) -> None:
        super().__init__()
        self.position_TD = nn.Parameter(0.02 * torch.randn(num_positions, config.width))
        self.blocks = nn.ModuleList(Block(config.width, config.num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(config.width)
        self.projection = nn.Linear(config.width, config.embedding_width, bias=False)

    def forward(self, x_BTD: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        x_BTD = x_BTD + self.position_TD[: x_BTD.shape[1]]
        for block in self.blocks:
            x_BTD = block(x_BTD, mask_BT)
        x_BTD = self.norm(x_BTD)
        if mask_BT is None:
            mean_BD = x_BTD.mean(1)
        else:
            weight_BT1 = mask_BT[..., None].to(x_BTD.dtype)
            mean_BD = (x_BTD * weight_BT1).sum(1) / weight_BT1.sum(1)
        return F.normalize(self.projection(mean_BD).float(), dim=-1)


class Clip(nn.Module):
    """The two towers and the learned temperature, whose inverse is `log_scale.exp()`."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.config = config
        num_patches = (config.image_size // config.patch_size) ** 2
        self.patches = nn.Linear(3 * config.patch_size**2, config.width)
        self.pieces = nn.Embedding(config.vocabulary_size, config.width)
        nn.init.normal_(self.pieces.weight, std=0.02)
        self.image = Tower(config, config.image_layers, num_patches)
        self.text = Tower(config, config.text_layers, config.max_text_tokens)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode_images(self, image_BCHW: Float[Tensor, "B C H W"]) -> Float[Tensor, "B E"]:
        """Unit vectors of pictures in [-1, 1]."""
        size = self.config.patch_size
        patches_BPD = rearrange(image_BCHW, "b c (h y) (w x) -> b (h w) (y x c)", y=size, x=size)
        vectors_BE: Tensor = self.image(self.patches(patches_BPD))
        return vectors_BE

    def encode_texts(self, tokens_BT: Int[Tensor, "B T"], mask_BT: Bool[Tensor, "B T"]) -> Float[Tensor, "B E"]:
        """Unit vectors of texts; the mask is True where there is a token."""
        vectors_BE: Tensor = self.text(self.pieces(tokens_BT), mask_BT)
        return vectors_BE


class Contrast(NamedTuple):
    """The symmetric InfoNCE loss, and how often the nearest of the batch is the right one."""

    loss: Tensor
    text_to_image: Tensor
    image_to_text: Tensor


def info_nce(text_BE: Float[Tensor, "B E"], image_BE: Float[Tensor, "B E"], log_scale: Float[Tensor, ""]) -> Contrast:
    """Symmetric InfoNCE of pairs of unit vectors (arXiv 2103.00020, figure 3); the scale is at most `MAX_SCALE`."""
    logits_BB = log_scale.clamp(max=math.log(MAX_SCALE)).exp() * text_BE @ image_BE.T
    target_B = torch.arange(len(logits_BB), device=logits_BB.device)
    loss = (F.cross_entropy(logits_BB, target_B) + F.cross_entropy(logits_BB.T, target_B)) / 2
    hits = [(logits.argmax(1) == target_B).float().mean() for logits in (logits_BB, logits_BB.T)]
    return Contrast(loss, *hits)


def text_batch(
    texts: Sequence[str], tokenizer: TextTokenizer, max_tokens: int
) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """Tokens of texts behind a start token, cut at `max_tokens`, and the mask that is True where they are."""
    rows = [[_START, *tokenizer.encode(text)[: max_tokens - 1]] for text in texts]
    length_B1 = torch.tensor([len(row) for row in rows])[:, None]
    tokens_BT = torch.full((len(rows), int(length_B1.max())), _PADDING)
    for row, tokens_T in zip(rows, tokens_BT):
        tokens_T[: len(row)] = torch.tensor(row)
    return tokens_BT, torch.arange(tokens_BT.shape[1]) < length_B1


class ClipEncoder:
    """A trained `Clip` with its text tokenizer: an `Encoder`.

    Args:
        model: Its weights are rounded to `precision`, so that saving changes no vector.
        tokenizer: Has as many pieces as the model embeds.
        precision: Number format of the file; computing is in float32.
        device: Torch device; None is a GPU if there is one.
    """

    batch_size = 256
    """Texts or pictures encoded at a time."""

    def __init__(
        self,
        model: Clip,
        tokenizer: TextTokenizer,
        precision: WeightPrecision = "bf16",
        device: str | torch.device | None = None,
    ) -> None:
        if tokenizer.size != model.config.vocabulary_size:
            raise ModelFilesError(
                f"the text tokenizer has {tokenizer.size} pieces, the encoder embeds "
                f"{model.config.vocabulary_size}; use the files of one encoder"
            )
        self.config, self.tokenizer, self.precision = model.config, tokenizer, precision
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.width = model.config.embedding_width
        self.model = model.eval().requires_grad_(False).to(self.device)
        for tensor in self.model.state_dict().values():
            tensor.copy_(tensor.to(self._dtype))

    @property
    def _dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hex) of configuration, weights and text tokenizer."""
        digest = hashlib.sha256(json.dumps(asdict(self.config), sort_keys=True).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(np.ascontiguousarray(tensor.float().cpu().numpy()).tobytes())
        digest.update(self.tokenizer.hash.encode())
        return digest.hexdigest()

    def encode_texts(self, texts: Sequence[str]) -> Float[np.ndarray, "N E"]:
        """Unit vectors of texts, see `cm3.retrieval.encoder.Encoder`."""

        def encode(part: Sequence[str]) -> Tensor:
            tokens_BT, mask_BT = text_batch(part, self.tokenizer, self.config.max_text_tokens)
            return self.model.encode_texts(tokens_BT.to(self.device), mask_BT.to(self.device))

        return in_batches(encode, texts, self.batch_size, self.width)

    def encode_images(self, images: Sequence[PILImage.Image]) -> Float[np.ndarray, "N E"]:
        """Unit vectors of pictures, see `cm3.retrieval.encoder.Encoder`."""

        def encode(part: Sequence[PILImage.Image]) -> Tensor:
            pixels_BHWC = np.stack([np.asarray(to_square(load_image(image), self.config.image_size)) for image in part])
            return self.model.encode_images(pixels_to_model(torch.from_numpy(pixels_BHWC).to(self.device)))

        return in_batches(encode, images, self.batch_size, self.width)

    def save(self, folder: str | Path) -> None:
        """Write `config.json`, `model.safetensors` and `tokenizer.model` into a folder."""
        folder = Path(folder)
        self.tokenizer.save(folder / TEXT_TOKENIZER_FILE)
        tensors = {name: tensor.to(self._dtype) for name, tensor in self.model.state_dict().items()}
        save_tensors(folder / WEIGHTS_FILE, tensors)
        values = {"model_type": MODEL_TYPE, "format_version": _FORMAT_VERSION, "precision": self.precision}
        write_json(folder / CONFIG_FILE, values | asdict(self.config))

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device | None = None) -> ClipEncoder:
        """Read what `save` wrote.

        Raises:
            ModelFilesError: files are missing, damaged, of another model or of another version.
        """
        folder = Path(folder)
        values = read_json(folder / CONFIG_FILE)
        if (found := values.pop("model_type", None)) != MODEL_TYPE:
            raise ModelFilesError(f"{folder} holds a model of type {found!r}, not {MODEL_TYPE!r}; choose another")
        if (version := values.pop("format_version", None)) != _FORMAT_VERSION:
            raise ModelFilesError(f"{folder} has format {version}, this version reads {_FORMAT_VERSION}; train it anew")
        precision = values.pop("precision", "fp32")
        try:
            model = Clip(ClipConfig(**values))
        except (TypeError, ConfigError) as error:
            raise ModelFilesError(f"{folder / CONFIG_FILE} is no configuration of an encoder: {error}") from error
        load_strict(model, load_tensors(folder / WEIGHTS_FILE), str(folder))
        return cls(model, TextTokenizer.load(folder / TEXT_TOKENIZER_FILE), precision, device)
