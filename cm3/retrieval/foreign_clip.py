"""Hugging Face CLIP weights (arXiv 2103.00020) as an encoder; the only file of the package that imports transformers.

N rows   E embedding width
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image as PILImage
from torch import Tensor

from cm3.checkpoint import read_json
from cm3.errors import MissingDependencyError, ModelFilesError, RequestError
from cm3.retrieval.vectors import in_batches, unit_rows
from cm3.tokenizers.image import load_image

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_HUB_FILES = ["*.json", "merges.txt"]
_SETTINGS_FILES = ("preprocessor_config.json", "processor_config.json")  # of transformers 4, and of 5
_TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
_WEIGHTS_PATTERNS = ("model*.safetensors", "pytorch_model*.bin")


@cache
def has_transformers() -> bool:
    """Whether transformers is installed; does not import it."""
    return importlib.util.find_spec("transformers") is not None


def _require_transformers(what: str) -> None:
    """Raises MissingDependencyError, naming the extra, if transformers is not installed."""
    if not has_transformers():
        raise MissingDependencyError(f"{what} needs transformers; run: pip install 'open-cm3[interop]'")


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How a CLIP reads pictures: the short side resized (bicubic), the centre cropped, channels normalised."""

    size: int = 224
    """Length of the short side after resizing, in pixels."""
    crop_size: int = 224
    """Side of the square that is cropped."""
    mean: tuple[float, ...] = CLIP_MEAN
    """Subtracted from each channel in [0, 1]."""
    std: tuple[float, ...] = CLIP_STD
    """Each channel is divided by it."""
    round_crop: bool = False
    """Round half a pixel of the crop's place to the even neighbour, as torchvision and OpenCLIP, not down."""

    def __call__(self, images: Sequence[PILImage.Image]) -> Float[torch.Tensor, "B 3 H W"]:
        """Pixel values of pictures of any size."""
        pixels_BHWC = np.stack([np.asarray(self._square(load_image(image))) for image in images])
        image_BCHW = torch.from_numpy(pixels_BHWC).permute(0, 3, 1, 2) / 255
        mean_C11, std_C11 = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return ((image_BCHW - mean_C11) / std_C11).contiguous()

    def _square(self, image: PILImage.Image) -> PILImage.Image:
        short = min(image.size)
        width, height = (int(self.size * side / short) for side in image.size)
        resized = image.resize((width, height), PILImage.Resampling.BICUBIC)
        spare = width - self.crop_size, height - self.crop_size
        left, top = (round(pixels / 2) if self.round_crop else pixels // 2 for pixels in spare)
        return resized.crop((left, top, left + self.crop_size, top + self.crop_size))

    @classmethod
    def load(cls, folder: str | Path) -> Preprocessing:
        """Read the settings of a Hugging Face folder.

        Raises:
            ModelFilesError: there are none, or they ask for other steps than CLIP's.
        """
        path = next((Path(folder) / name for name in _SETTINGS_FILES if (Path(folder) / name).is_file()), None)
        if path is None:
            raise ModelFilesError(f"{folder} has no {_SETTINGS_FILES[0]}; download it with the weights")
        values = read_json(path)
        values = values.get("image_processor", values)
        steps = ("do_resize", "do_center_crop", "do_normalize", "do_rescale")
        if off := [step for step in steps if not values.get(step, True)]:
            raise ModelFilesError(f"{path} switches {', '.join(off)} off, which no CLIP of this kind does")
        if (resample := values.get("resample", PILImage.Resampling.BICUBIC)) != PILImage.Resampling.BICUBIC:
            raise ModelFilesError(f"{path} asks for resample={resample}; CLIP resizes with 3 (bicubic)")
        size, crop_size = values.get("size", 224), values.get("crop_size", 224)
        settings = cls(
            size=size["shortest_edge"] if isinstance(size, dict) else size,
            crop_size=crop_size["height"] if isinstance(crop_size, dict) else crop_size,
            mean=tuple(values.get("image_mean", CLIP_MEAN)),
            std=tuple(values.get("image_std", CLIP_STD)),
        )
        if settings.crop_size > settings.size:
            raise ModelFilesError(f"{path} crops {settings.crop_size} pixels out of {settings.size}; check the file")
        return settings


class ForeignClipEncoder:
    """A `transformers.CLIPModel` with its tokenizer: an `Encoder`.

    Args:
        model: In float32.
        tokenizer: Its texts end in the end token, also where they are cut.
        preprocessing: How pictures are read.
        source_hash: SHA-256 (hex) of the files it was made of.
        device: Torch device; None is a GPU if there is one.
    """

    batch_size = 64
    """Texts or pictures encoded at a time."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        preprocessing: Preprocessing,
        source_hash: str,
        device: str | torch.device | None = None,
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = model.float().eval().requires_grad_(False).to(self.device)
        self.tokenizer = tokenizer
        self.preprocessing = preprocessing
        self.width: int = model.config.projection_dim
        self._max_tokens: int = model.config.text_config.max_position_embeddings
        self._source_hash = source_hash

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hex) of the files and the preprocessing."""
        return hashlib.sha256(f"{self._source_hash}\n{self.preprocessing}".encode()).hexdigest()

    def encode_texts(self, texts: Sequence[str]) -> Float[np.ndarray, "N E"]:
        """Unit vectors of texts, see `cm3.retrieval.encoder.Encoder`."""

        def encode(part: Sequence[str]) -> Tensor:
            tokens = self.tokenizer(
                list(part), padding=True, truncation=True, max_length=self._max_tokens, return_tensors="pt"
            ).to(self.device)
            pooled_BD = self.model.text_model(tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
            vectors_BE: Tensor = self.model.text_projection(pooled_BD)
            return vectors_BE

        return unit_rows(in_batches(encode, texts, self.batch_size, self.width))

    def encode_images(self, images: Sequence[PILImage.Image]) -> Float[np.ndarray, "N E"]:
        """Unit vectors of pictures, see `cm3.retrieval.encoder.Encoder`."""

        def encode(part: Sequence[PILImage.Image]) -> Tensor:
            pooled_BD = self.model.vision_model(self.preprocessing(part).to(self.device)).pooler_output
            vectors_BE: Tensor = self.model.visual_projection(pooled_BD)
            return vectors_BE

        return unit_rows(in_batches(encode, images, self.batch_size, self.width))

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device | None = None) -> ForeignClipEncoder:
        """Read a folder in Hugging Face's layout: configuration, weights, tokenizer and preprocessing.

        Raises:
            MissingDependencyError: transformers is not installed.
            ModelFilesError: a file is missing, damaged, or does not fit the others.
        """
        _require_transformers(f"the CLIP in {folder}")
        from transformers import CLIPModel

        preprocessing = Preprocessing.load(folder)
        tokenizer = load_tokenizer(folder)
        try:
            loaded: Any = CLIPModel.from_pretrained(str(folder), output_loading_info=True, local_files_only=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelFilesError(f"cannot read the CLIP in {folder}: {error}") from error
        model, report = loaded
        if report["missing_keys"] or report["mismatched_keys"]:
            wrong = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
            raise ModelFilesError(
                f"the weights in {folder} lack or differ in {', '.join(wrong[:8])}; download them again"
            )
        weights = next(paths for pattern in _WEIGHTS_PATTERNS if (paths := sorted(Path(folder).glob(pattern))))
        return cls(model, tokenizer, preprocessing, hash_files([*weights, *tokenizer_files(folder)]), device)


def empty_model(settings: dict[str, Any]) -> Any:
    """A `transformers.CLIPModel` with random weights.

    Args:
        settings: Those of `transformers.CLIPConfig`.

    Raises:
        MissingDependencyError: transformers is not installed.
    """
    _require_transformers("a CLIP of foreign weights")
    from transformers import CLIPConfig, CLIPModel

    return CLIPModel(CLIPConfig(**settings))


def tokenizer_files(folder: str | Path) -> list[Path]:
    """The files of a CLIP's tokenizer: `tokenizer.json`, or `vocab.json` and `merges.txt`.

    Raises:
        ModelFilesError: there are none.
    """
    for names in _TOKENIZER_FILES:
        paths = [Path(folder) / name for name in names]
        if all(path.is_file() for path in paths):
            return paths
    raise ModelFilesError(
        f"{folder} has no tokenizer (tokenizer.json, or vocab.json and merges.txt); every CLIP on the Hub "
        "has these files: put them there"
    )


def load_tokenizer(folder: str | Path) -> Any:
    """Read the tokenizer of a CLIP, see `tokenizer_files`.

    Raises:
        MissingDependencyError: transformers is not installed.
        ModelFilesError: there is none.
    """
    _require_transformers("the tokenizer of a CLIP")
    from transformers import CLIPTokenizer

    tokenizer_files(folder)
    return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)


def download_clip(name: str) -> Path:
    """The files of a CLIP on the Hugging Face Hub, from its cache where they are there.

    Raises:
        RequestError: the name leads nowhere, or there is no network.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        for weights in _WEIGHTS_PATTERNS:  # some repositories have only the older kind, some both
            folder = Path(snapshot_download(name, allow_patterns=[*_HUB_FILES, weights]))
            if any(folder.glob(weights)):
                break
        return folder
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RequestError(
            f"encoder {name!r} is no folder here and could not be had from the Hub ({reason}); check the name"
        ) from None


def hash_files(paths: Sequence[Path]) -> str:
    """SHA-256 (hex) of the contents of files."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
