"""A trained model with its tokenizers: a folder in and out, and the parts that every request is made with."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image as PILImage

from cm3.checkpoint import read_json
from cm3.errors import ModelFilesError, RequestError
from cm3.generation.context import ContextDocument, ContextFinder
from cm3.generation.engine import Engine
from cm3.generation.settings import SamplingSettings
from cm3.generation.turns import make_prompts
from cm3.model.lora import load_adapter
from cm3.model.pretrained import CARD_FILE, GENERATION_FILE, load_model, save_model
from cm3.model.quantized import check_quantization, is_quantized, quantize_blocks
from cm3.model.transformer import Transformer
from cm3.pretrained import resolve_model
from cm3.tokenizers.document import Document, DocumentTokenizer
from cm3.tokenizers.image import load_image, to_square

Picture = str | Path | bytes | PILImage.Image
"""A picture as a path, encoded bytes, or pixels."""

UNGUIDED = {"sampler": "top-p", "guidance_scale": 1.0, "image_guidance_scale": 1.0}
"""Settings of requests that have no prompt to compare with."""

_Model = TypeVar("_Model", bound="TrainedModel")


class TrainedModel:
    """What is loaded and saved together, and what requests to it have in common.

    Args:
        transformer: The model, on the device where it is to run.
        tokenizer: Text and image tokenizers and the joint vocabulary that the model was trained with.
        defaults: Sampling settings where a call leaves them out.
        card: Text of the model card.
    """

    def __init__(
        self,
        transformer: Transformer,
        tokenizer: DocumentTokenizer,
        defaults: SamplingSettings | None = None,
        card: str = "",
    ) -> None:
        self.transformer = transformer
        self.tokenizer = tokenizer
        self.defaults = defaults or SamplingSettings()
        self.card = card
        self.engine = Engine(transformer, tokenizer.vocabulary)
        self.prompts = make_prompts(tokenizer.vocabulary, tokenizer.image.grid)
        self._contexts: ContextFinder | None = None

    @classmethod
    def from_pretrained(
        cls: type[_Model],
        name: str | Path = "demo",
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        adapter: str | Path | None = None,
        quantize: str | None = None,
        revision: str | None = None,
        token: str | None = None,
    ) -> _Model:
        """Load a model.

        Args:
            name: `demo` (inside this package), a folder, or `owner/name` on the Hugging Face Hub.
            device: Where it runs; None takes CUDA where there is one, else the CPU.
            dtype: Number format of the transformer; None is bf16 on CUDA and with `quantize`, and fp32 elsewhere.
            adapter: Folder of an adapter that was trained on this model; it is merged into the weights.
            quantize: "int8" rounds the matrices of all blocks to 8 bits, after an adapter was merged: half the memory
                of bf16. Such a model can be neither trained nor saved. None keeps the weights as they are.
            revision: Branch, tag or commit on the Hub.
            token: Hub token for private repositories.

        Raises:
            RequestError: the name leads nowhere, the device does not exist here, or there is no such rounding.
            ModelFilesError: files are missing, damaged, or do not belong together.
        """
        check_quantization(quantize)
        target = _device(device)
        folder = resolve_model(name, revision=revision, token=token)
        tokenizer = DocumentTokenizer.load(folder)
        tokenizer.image.to(target)
        dtype = dtype or (torch.bfloat16 if quantize or target.type == "cuda" else torch.float32)
        # an adapter is merged in fp32; what is rounded to 8 bits was not rounded before
        first_dtype = torch.float32 if adapter else None if quantize else dtype
        transformer, _ = load_model(folder, tokenizer_hash=tokenizer.hash, dtype=first_dtype)
        if adapter:
            load_adapter(transformer, adapter)
        if quantize:
            quantize_blocks(transformer)
        transformer.to(device=target, dtype=dtype)
        values = read_json(folder / GENERATION_FILE)
        unknown = set(values) - {field.name for field in fields(SamplingSettings)}
        if unknown:
            raise ModelFilesError(f"{folder / GENERATION_FILE} has unknown settings {', '.join(sorted(unknown))}")
        card = folder / CARD_FILE
        return cls(
            transformer,
            tokenizer,
            SamplingSettings(**values),
            card.read_text("utf-8") if card.is_file() else "",
        )

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write everything `from_pretrained` needs into a folder; weights in `dtype` (default: as they are).

        Raises:
            RequestError: the weights were quantized.
        """
        if is_quantized(self.transformer):
            raise RequestError(
                "a model with int8 weights cannot be saved: nobody could tell its rounded weights from the trained "
                "ones; load it without quantize, save that, and quantize when loading"
            )
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(folder)
        save_model(
            folder,
            self.transformer.state_dict(),
            self.transformer.config,
            tokenizer_folder=folder,
            tokenizer_hash=self.tokenizer.hash,
            card=self.card,
            generation=asdict(self.defaults),
            dtype=dtype or next(self.transformer.parameters()).dtype,
        )

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload the model to the Hugging Face Hub and return its address.

        Args:
            repo_id: `owner/name`; made where it does not exist.
            private: Whether a new repository is private.
            token: Hub token; None uses the saved one.
        """
        from tempfile import TemporaryDirectory

        from huggingface_hub import HfApi

        api = HfApi(token=token)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            api.create_repo(repo_id, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload with open-cm3"))

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        return self.engine.device

    @property
    def image_size(self) -> int:
        """Side of a picture in pixels."""
        return self.tokenizer.image.image_size

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of the transformer's weights, in their number format."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.transformer.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @property
    def precision(self) -> str:
        """Number format of the transformer, such as "float32" or "int8 blocks, bfloat16"."""
        dtype = str(self.transformer.embedding.weight.dtype).removeprefix("torch.")
        return f"int8 blocks, {dtype}" if is_quantized(self.transformer) else dtype

    def settings(self, **sampling: Any) -> dict[str, Any]:
        """The sampling settings of a call that passes `sampling`: the model's defaults, replaced where given."""
        return asdict(self.sampling(sampling))

    def sampling(self, values: Mapping[str, Any]) -> SamplingSettings:
        """The model's defaults, replaced where values are given; raises RequestError for unknown names."""
        names = [field.name for field in fields(SamplingSettings)]
        for name in values:
            if name not in names:
                raise RequestError(f"sampling setting {name!r} is unknown; choose among {', '.join(names)}")
        return replace(self.defaults, **values)

    def use_memory(self, folder: str | Path, *, encoder: str | Path | None = None, max_similarity: float = 0.9) -> None:
        """Open a memory, from which `retrieve=K` of later calls takes documents into the context.

        Args:
            folder: What `cm3 index build` wrote with this model's tokenizers.
            encoder: The encoder it was built with, see `open_encoder`; None opens it by the name that is kept there.
            max_similarity: Documents more similar than this to the request, or to one another, are left out.

        Raises:
            ModelFilesError: there is no memory, or it is of another encoder.
            DataError: it was built with other tokenizers.
        """
        self._contexts = ContextFinder(
            folder, self.tokenizer, encoder=encoder, device=str(self.device), max_similarity=max_similarity
        )

    def reconstruct(self, images: Sequence[Picture]) -> list[PILImage.Image]:
        """Encode pictures to codes and decode them again: the best that the image tokenizer can show."""
        pictures = [self.square(image) for image in images]
        return self.tokenizer.image.decode(self.tokenizer.image.encode(pictures))

    def retrieved(self, requests: Sequence[Document], count: int) -> list[list[ContextDocument]]:
        """For each request at most `count` documents of the memory."""
        if count < 0:
            raise RequestError(f"retrieve={count}; choose 0 or more documents")
        if count == 0:
            return [[] for _ in requests]
        if self._contexts is None:
            raise RequestError(
                f"retrieve={count} needs a memory to search; open one with use_memory, in the shell --memory"
            )
        return self._contexts.find(requests, count)

    def square(self, image: Picture) -> PILImage.Image:
        """A picture as the model sees it: its central square, in the model's size."""
        return to_square(load_image(image), self.image_size)

    def encode(self, pictures: Sequence[PILImage.Image]) -> np.ndarray:
        """Codes of square pictures, of shape (pictures, height, width)."""
        return self.tokenizer.image.encode(list(pictures)).reshape(-1, *self.tokenizer.image.grid)

    def pieces(self, text: str) -> list[int] | None:
        """The pieces of a text; None, a masked text, for a blank one."""
        return self.tokenizer.text.encode(text) if text.strip() else None

    def text_of(self, new_ids: np.ndarray) -> str:
        """The text among new ids."""
        return self.tokenizer.text.decode(self.prompts.text_tokens(new_ids))


def _device(name: str | torch.device | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise RequestError(
            f"device {str(name)!r} cannot be used here ({str(error).splitlines()[0]}); choose cpu, or leave it out"
        ) from None
    return device
