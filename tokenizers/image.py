"""Pictures in and out: any picture file to RGB, and RGB to a grid of codes and back (CM3Leon, section 2.1)."""

import hashlib
import io
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Integer, UInt8, UInt16
from PIL import Image, ImageOps
from torch import Tensor

from cm3.checkpoint import load_strict, load_tensors, read_json, save_tensors, write_json
from cm3.errors import CM3Error, DataError, ModelFilesError, RequestError
from cm3.tokenizers.taming import TamingConfig, TamingVQGAN
from cm3.tokenizers.vqgan import VQGAN, VQGANConfig

IMAGE_TOKENIZER_WEIGHTS = "image_tokenizer.safetensors"
IMAGE_TOKENIZER_CONFIG = "image_tokenizer.json"
MAX_PIXELS = 1 << 26
"""Largest picture that is read, 67 million pixels; below Pillow's own limit."""

_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Formats that are read; others may run programs (EPS) or hide their size (ICO)."""

_FORMAT_VERSION = 1
_CODEBOOK = "quantizer.codebook_QE"

WeightPrecision = Literal["fp32", "bf16"]


def load_image(source: str | Path | bytes | Image.Image, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Any picture as RGB: EXIF rotation applied, transparency on white, 16 bits to 8, first frame of several.

    Raises:
        DataError: the file is missing, no picture, damaged, empty, or has more than `max_pixels` pixels.
    """
    name = "the image data"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is stricter
            if isinstance(source, Image.Image):
                image = source
            elif isinstance(source, bytes):
                image = Image.open(io.BytesIO(source), formats=_FORMATS)
            elif not isinstance(source, (str, Path)):
                kind = type(source).__name__
                raise DataError(f"a picture is a path, the bytes of a file or a PIL image, found {kind}; convert it")
            else:
                name = str(source)
                image = Image.open(source, formats=_FORMATS)
        _check_size(image.size, name, max_pixels)
        return _to_rgb(ImageOps.exif_transpose(image))
    except CM3Error:
        raise
    except Image.DecompressionBombError as error:
        raise DataError(f"{name} has far more than {max_pixels:,} pixels; make it smaller") from error
    except Image.UnidentifiedImageError as error:
        raise DataError(f"{name} is in no picture format that Pillow knows; give a PNG or JPEG file") from error
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise DataError(f"cannot read {name}: {reason}; check the path and the file") from error
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files
        raise DataError(f"{name} is damaged ({type(error).__name__}: {error}); make the file again") from error


def _check_size(size: tuple[int, int], name: str, max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise DataError(f"{name} has {width}x{height} pixels, more than the {max_pixels:,} allowed; make it smaller")
    if width * height == 0:
        raise DataError(f"{name} is empty ({width}x{height} pixels)")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        image = _deep_to_gray(image)
    if "transparency" in image.info or image.mode in ("RGBA", "RGBa", "LA", "La", "PA"):
        image = image.convert("LA") if image.mode == "La" else image
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _deep_to_gray(image: Image.Image) -> Image.Image:
    """Integer and float pixels to 8 bits: 16-bit scale if any value is above 255, floats in [0, 1] to 255."""
    values_HW = np.nan_to_num(np.asarray(image).astype(np.float64))
    largest = values_HW.max()
    if image.mode.startswith("I;16") or largest > 255:
        values_HW = values_HW / 257
    elif image.mode == "F" and largest <= 1:
        values_HW = values_HW * 255
    return Image.fromarray(values_HW.round().clip(0, 255).astype(np.uint8))


def central_square(image: Image.Image) -> tuple[int, int, int]:
    """Left, top and side of the largest square in the middle of a picture."""
    side = min(image.size)
    return (image.width - side) // 2, (image.height - side) // 2, side


def to_square(image: Image.Image, size: int) -> Image.Image:
    """The central square of a picture as RGB of `size` x `size` pixels (Lanczos)."""
    left, top, side = central_square(image)
    square = image.convert("RGB").crop((left, top, left + side, top + side))
    return square if side == size else square.resize((size, size), Image.Resampling.LANCZOS)


def box_mask(
    box: tuple[int, int, int, int], image_size: tuple[int, int], grid: tuple[int, int]
) -> Bool[np.ndarray, "H W"]:
    """The codes that a box of pixels touches.

    Args:
        box: left, top, right, bottom in pixels; right and bottom are the first pixels outside.
        image_size: height and width in pixels.
        grid: height and width in codes.

    Raises:
        RequestError: the box is empty or leaves the picture.
    """
    left, top, right, bottom = box
    height, width = image_size
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise RequestError(
            f"box {left},{top},{right},{bottom} does not lie in the {width}x{height} picture; give "
            f"left,top,right,bottom with 0 <= left < right <= {width} and 0 <= top < bottom <= {height}"
        )
    rows, columns = np.arange(grid[0]), np.arange(grid[1])
    touched_H = (rows * height < bottom * grid[0]) & ((rows + 1) * height > top * grid[0])
    touched_W = (columns * width < right * grid[1]) & ((columns + 1) * width > left * grid[1])
    return touched_H[:, None] & touched_W[None, :]


def mask_runs(mask_HW: Bool[np.ndarray, "H W"]) -> list[tuple[int, int]]:
    """Start and stop of every run of masked codes in raster order."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask_HW.ravel(), [False]])))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def pixels_to_model(pixels_BHWC: Tensor) -> Tensor:
    """uint8 BHWC to floats BCHW in [-1, 1], in channels_last memory (the faster layout for convolutions)."""
    image_BCHW = pixels_BHWC.permute(0, 3, 1, 2).float() / 127.5 - 1
    return image_BCHW.contiguous(memory_format=torch.channels_last)


def model_to_pixels(image_BCHW: Tensor) -> Tensor:
    """Floats BCHW in [-1, 1] to uint8 BHWC; values outside are clipped."""
    return ((image_BCHW.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


class ImageTokenizer:
    """A trained VQ-GAN behind a uint8 interface.

    It computes in full fp32 whatever surrounds it: codes near a tie fall otherwise in 16 bit (or TF32), and a model
    that was trained on the codes of one precision does not understand those of another.

    Args:
        model: the network; its weights are rounded in place if `precision` is bf16.
        precision: what the weights are stored in (the codebook stays fp32).
        batch_size: pictures in one forward pass, which bounds the memory.
    """

    def __init__(
        self,
        model: VQGAN | TamingVQGAN,
        precision: WeightPrecision = "fp32",
        batch_size: int = 64,
    ) -> None:
        self.model = model.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.precision = precision
        self.batch_size = batch_size
        if precision == "bf16":
            for name, tensor in model.state_dict().items():
                if name != _CODEBOOK:
                    tensor.copy_(tensor.bfloat16())

    @property
    def config(self) -> VQGANConfig | TamingConfig:
        """Shape of the network."""
        return self.model.config

    @property
    def image_size(self) -> int:
        """Side of the pictures in pixels."""
        return self.config.image_size

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of a picture in codes."""
        return self.config.grid

    @property
    def has_decoder(self) -> bool:
        """Whether it can make pictures of codes; some imported ones only read pictures."""
        return not isinstance(self.config, TamingConfig) or self.config.decoder

    def require_decoder(self) -> None:
        """Raise RequestError where there is no decoder, before codes are made for nothing."""
        if not self.has_decoder:
            raise RequestError(
                "this image tokenizer has no decoder, so it cannot make pictures of codes; import the model again with "
                "the file that holds it (Chameleon's vqgan.ckpt) as --vqgan"
            )

    @property
    def num_codes(self) -> int:
        """Codebook entries."""
        return self.config.num_codes

    @property
    def codes_per_image(self) -> int:
        """Codes of one picture."""
        return self.grid[0] * self.grid[1]

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.model.quantizer.codebook_QE.device

    def to(self, device: str | torch.device) -> "ImageTokenizer":
        """Move the network; returns self."""
        self.model.to(device)
        return self

    def encode(self, images: Sequence[Image.Image] | UInt8[np.ndarray, "B H W 3"]) -> UInt16[np.ndarray, "B P"]:
        """Codes in raster order; PIL pictures of any size and mode are cropped to a square and resized.

        Raises:
            DataError: an array has another size than the tokenizer's, or a PIL picture cannot be read.
        """
        parts = [np.empty((0, self.codes_per_image), np.uint16)]
        for start in range(0, len(images), self.batch_size):
            pixels_BHWC = self._pixels(images[start : start + self.batch_size])
            with torch.inference_mode(), _full_precision(self.device):
                codes_BP = self.model.encode(pixels_to_model(torch.from_numpy(pixels_BHWC).to(self.device)))
            parts.append(codes_BP.cpu().numpy().astype(np.uint16))
        return np.concatenate(parts)

    def decode(self, codes_BP: Integer[np.ndarray, "B P"]) -> list[Image.Image]:
        """Pictures of codes.

        Raises:
            RequestError: there is no decoder.
            DataError: wrong number of codes, or a code outside the codebook.
        """
        self.require_decoder()
        if codes_BP.shape[1] != self.codes_per_image:
            raise DataError(f"a picture has {self.codes_per_image} codes, {codes_BP.shape[1]} were given")
        if codes_BP.size and not 0 <= int(codes_BP.min()) <= int(codes_BP.max()) < self.num_codes:
            raise DataError(
                f"codes {codes_BP.min()} to {codes_BP.max()} were given; the codebook has 0 to {self.num_codes - 1}"
            )
        images: list[Image.Image] = []
        for start in range(0, len(codes_BP), self.batch_size):
            part_BP = torch.from_numpy(codes_BP[start : start + self.batch_size].astype(np.int64)).to(self.device)
            with torch.inference_mode(), _full_precision(self.device):
                image_BCHW = self.model.decode(part_BP, self.grid)
            images += [Image.fromarray(pixels_HWC) for pixels_HWC in model_to_pixels(image_BCHW).cpu().numpy()]
        return images

    def _pixels(self, images: Sequence[Image.Image] | np.ndarray) -> np.ndarray:
        size = self.image_size
        if isinstance(images, np.ndarray):
            if images.shape[1:] != (size, size, 3) or images.dtype != np.uint8:
                raise DataError(
                    f"pictures must be uint8 of shape (B, {size}, {size}, 3), found {images.dtype} of {images.shape}"
                )
            return np.ascontiguousarray(images)
        return np.stack([np.asarray(to_square(load_image(image), size)) for image in images])

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hex) of configuration and weights: equal hash, equal codes."""
        digest = hashlib.sha256(json.dumps(asdict(self.config), sort_keys=True).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(np.ascontiguousarray(tensor.float().cpu().numpy()).tobytes())
        return digest.hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write `image_tokenizer.safetensors` and `image_tokenizer.json` into a folder."""
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        tensors = {
            name: tensor if name == _CODEBOOK else tensor.to(dtype) for name, tensor in self.model.state_dict().items()
        }
        save_tensors(Path(folder) / IMAGE_TOKENIZER_WEIGHTS, tensors)
        name = "taming" if isinstance(self.model, TamingVQGAN) else "vqgan"
        settings = {"format_version": _FORMAT_VERSION, "precision": self.precision, name: asdict(self.config)}
        write_json(Path(folder) / IMAGE_TOKENIZER_CONFIG, settings)

    @classmethod
    def load(cls, folder: str | Path) -> "ImageTokenizer":
        """Read what `save` wrote.

        Raises:
            ModelFilesError: a file is missing, damaged, of a newer format, or the two do not fit.
        """
        path = Path(folder) / IMAGE_TOKENIZER_CONFIG
        settings = read_json(path)
        version = settings.get("format_version") if isinstance(settings, dict) else None
        if version != _FORMAT_VERSION:
            raise ModelFilesError(
                f"{path} has format_version {version}; this version of open-cm3 reads {_FORMAT_VERSION}"
            )
        model = _network_from_json(settings, path)
        source = Path(folder) / IMAGE_TOKENIZER_WEIGHTS
        load_strict(model, load_tensors(source), str(source))
        return cls(model, settings.get("precision", "fp32"))


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Neither autocast nor TF32, which cuDNN's convolutions use by default."""
    with torch.autocast(device.type, enabled=False), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def _network_from_json(settings: dict[str, Any], path: Path) -> VQGAN | TamingVQGAN:
    try:
        values = settings["taming" if "taming" in settings else "vqgan"]
        shape: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return TamingVQGAN(TamingConfig(**shape)) if "taming" in settings else VQGAN(VQGANConfig(**shape))
    except (TypeError, AttributeError, KeyError, CM3Error) as error:
        raise ModelFilesError(f"{path} holds no valid VQ-GAN configuration: {error}") from error
