"""CM3: a trained model with its tokenizers. Pictures from text, text from pictures, and parts of either filled in."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
from PIL import Image as PILImage

from cm3.checkpoint import read_json
from cm3.drawing import Drawing, RankerName, check_negative, check_ranking, fit
from cm3.errors import ModelFilesError, RequestError
from cm3.generation.context import ContextDocument, ContextFinder
from cm3.generation.engine import Engine
from cm3.generation.prompts import Prompts, box_mask
from cm3.generation.rerank import caption_likelihood, choose, own_likelihood
from cm3.generation.settings import SamplingSettings
from cm3.model.pretrained import CARD_FILE, GENERATION_FILE, load_model, save_model
from cm3.model.transformer import Transformer
from cm3.pretrained import DEMO, resolve_model
from cm3.retrieval.encoder import open_encoder
from cm3.tokenizers.document import Document, DocumentTokenizer, Image, Text, TokenizedDocument
from cm3.tokenizers.image import central_square, load_image, to_square

Picture = str | Path | bytes | PILImage.Image
"""A picture as a path, encoded bytes, or pixels."""

MAX_CAPTION_TOKENS = 128
"""Longest caption in text tokens."""

_UNGUIDED = {"sampler": "top-p", "guidance_scale": 1.0, "image_guidance_scale": 1.0}
"""Settings of requests that have no prompt to compare with."""


class CM3:
    """A model that reads and writes text and pictures.

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
        self._engine = Engine(transformer, tokenizer.vocabulary)
        self._prompts = Prompts(tokenizer.vocabulary, tokenizer.image.grid)
        self._contexts: ContextFinder | None = None

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path = "demo",
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        token: str | None = None,
    ) -> CM3:
        """Load a model.

        Args:
            name: `demo` (inside this package), a folder, or `owner/name` on the Hugging Face Hub.
            device: Where it runs; None takes CUDA where there is one, else the CPU.
            dtype: Number format of the transformer; None is bf16 on CUDA and fp32 elsewhere.
            revision: Branch, tag or commit on the Hub.
            token: Hub token for private repositories.

        Raises:
            RequestError: the name leads nowhere, or the device does not exist here.
            ModelFilesError: files are missing, damaged, or do not belong together.
        """
        target = _device(device)
        folder = resolve_model(name, revision=revision, token=token)
        tokenizer = DocumentTokenizer.load(folder)
        tokenizer.image.to(target)
        dtype = dtype or (torch.bfloat16 if target.type == "cuda" else torch.float32)
        transformer, _ = load_model(folder, tokenizer_hash=tokenizer.hash, device=target, dtype=dtype)
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
        """Write everything `from_pretrained` needs into a folder; weights in `dtype` (default: as they are)."""
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
        api.create_repo(repo_id, private=private, exist_ok=True)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload with open-cm3"))

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        return self._engine.device

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

    def settings(self, **sampling: Any) -> dict[str, Any]:
        """The sampling settings of a call that passes `sampling`: the model's defaults, replaced where given."""
        return asdict(self._settings(sampling))

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
            folder, self.tokenizer.hash, encoder=encoder, device=str(self.device), max_similarity=max_similarity
        )

    @overload
    def generate(self, prompt: str, *, num_images: int = 1, seed: int = 0, **options: Any) -> list[PILImage.Image]: ...

    @overload
    def generate(
        self, prompt: Sequence[str], *, num_images: int = 1, seed: int = 0, **options: Any
    ) -> list[list[PILImage.Image]]: ...

    def generate(
        self, prompt: str | Sequence[str], *, num_images: int = 1, seed: int = 0, **options: Any
    ) -> list[PILImage.Image] | list[list[PILImage.Image]]:
        """Draw pictures.

        Args:
            prompt: What to draw, or several such texts, which share one batch.
            num_images: Pictures for each prompt.
            seed: Picture `i` of a prompt is drawn with seed + i, and depends on nothing else in the batch.
            options: Anything else that `draw` takes: sampling settings such as `guidance_scale=3.0`, `negative`,
                `retrieve`, `best_of` and `rank`.

        Returns:
            The pictures of the prompt, or such a list for each of several prompts.

        Raises:
            RequestError: an empty prompt, a prompt longer than the context, or a setting out of its range.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        drawings = self.draw(prompts, num_images=num_images, seed=seed, **options)
        lists = [[drawing.image for drawing in samples] for samples in drawings]
        return lists[0] if isinstance(prompt, str) else lists

    def draw(
        self,
        prompts: Sequence[str],
        *,
        num_images: int = 1,
        seed: int = 0,
        negative: str = "",
        retrieve: int = 0,
        unconditional_context: Literal["keep", "drop"] = "keep",
        best_of: int = 1,
        rank: RankerName | None = None,
        ranker: str | Path = DEMO,
        **sampling: Any,
    ) -> list[list[Drawing]]:
        """Draw pictures, and tell how each came about.

        Args:
            prompts: What to draw.
            num_images: Pictures for each prompt.
            seed: Candidate `j` of picture `i` of a prompt is drawn with seed + i * best_of + j.
            negative: What the pictures should not show, in the place of the prompt that guidance moves away from.
            retrieve: Documents from the memory (`use_memory`) before each prompt; 0 is none.
            unconditional_context: Whether what guidance compares with keeps these documents: "keep" overstates the
                prompt alone, "drop" the prompt and the documents.
            best_of: Candidates for each picture, of which the best by `rank` is kept; 1 is no ranking.
            rank: By the model's own likelihood of a candidate, by that of the prompt as its caption, by how well an
                encoder finds that prompt and picture fit (clip), or by both the first and the last. See
                `cm3.generation.rerank`.
            ranker: The encoder of clip, see `open_encoder`.
            sampling: Fields of `SamplingSettings` that replace the model's defaults.

        Returns:
            For each prompt its drawings.

        Raises:
            RequestError: an empty prompt, a request longer than the context, or a setting out of its range.
        """
        if num_images < 1:
            raise RequestError(f"num_images={num_images}; ask for at least 1")
        if unconditional_context not in ("keep", "drop"):
            raise RequestError(f"unconditional_context={unconditional_context!r} is unknown; choose keep or drop")
        for text in prompts:
            if not text.strip():
                raise RequestError('the prompt is empty; say what to draw, such as "a small green star"')
        rankers, settings = check_ranking(best_of, rank), self._settings(sampling)
        check_negative(negative, settings)
        if not prompts:
            return []
        found = self._find([Document((Text(text),)) for text in prompts], retrieve)
        requests = [
            self._prompts.text_to_image(
                self.tokenizer.text.encode(text),
                negative=self._pieces(negative),
                context=[item.document for item in items],
                unconditional_context=unconditional_context,
                seeds=tuple(range(seed, seed + num_images * best_of)),
            )
            for text, items in zip(prompts, found, strict=True)
        ]
        outputs = self._engine.run(requests, settings)
        codes = np.stack([self._prompts.image_codes(ids).ravel() for samples in outputs for ids in samples])
        pictures = self.tokenizer.image.decode(codes)
        scores: dict[str, list[float]] = {}
        if "likelihood" in rankers:
            likelihoods = own_likelihood(self.transformer, self.tokenizer.vocabulary, requests, outputs)
            scores["likelihood"] = [score for samples in likelihoods for score in samples]
        if "caption" in rankers:
            texts = [self.tokenizer.text.encode(text) for text in prompts for _ in range(num_images * best_of)]
            grids = list(codes.reshape(-1, *self.tokenizer.image.grid))
            scores["caption"] = caption_likelihood(self.transformer, self._prompts, texts, grids)
        if "clip" in rankers:
            scores["clip"] = fit(open_encoder(ranker, str(self.device)), prompts, pictures)
        drawings = []
        for start in range(0, len(pictures), best_of):
            number, first_seed = start // (num_images * best_of), seed + start % (num_images * best_of)
            rivals = {name: tuple(values[start : start + best_of]) for name, values in scores.items()}
            best = choose(rivals) if rivals else 0
            drawings.append(
                Drawing(pictures[start + best], prompts[number], first_seed + best, tuple(found[number]), rivals, best)
            )
        return [drawings[start : start + num_images] for start in range(0, len(drawings), num_images)]

    @overload
    def caption(self, image: Picture, *, seed: int = 0, retrieve: int = 0, **sampling: Any) -> str: ...

    @overload
    def caption(self, image: Sequence[Picture], *, seed: int = 0, retrieve: int = 0, **sampling: Any) -> list[str]: ...

    def caption(
        self, image: Picture | Sequence[Picture], *, seed: int = 0, retrieve: int = 0, **sampling: Any
    ) -> str | list[str]:
        """Describe pictures, by filling in the masked text of `</s> <mask> <break> image </s>` (section 2.2).

        Args:
            image: One picture or several; each is cropped to its central square and resized.
            seed: Seed of each caption.
            retrieve: Documents from the memory (`use_memory`) before each picture; 0 is none.
            sampling: Fields of `SamplingSettings`; the likeliest tokens are taken where no temperature is given, and
                guidance is off.

        Returns:
            The caption, or one for each of several pictures.

        Raises:
            RequestError: a picture is missing or broken.
        """
        several = not isinstance(image, Picture)
        images: list[Any] = list(image) if several else [image]  # type: ignore[arg-type]
        pictures = [self._square(picture) for picture in images]
        if not pictures:
            return []
        found = self._find([Document((Image(picture),)) for picture in pictures], retrieve)
        contexts = [[item.document for item in items] for items in found]
        requests = [
            self._prompts.infill_text(
                [],
                [],
                codes_HW,
                context=context,
                max_new_tokens=self._caption_budget(context),
                seeds=(seed,),
            )
            for codes_HW, context in zip(self._encode(pictures), contexts, strict=True)
        ]
        settings = self._settings({"temperature": 0.0, **sampling, **_UNGUIDED})
        captions = [self._text(samples[0]) for samples in self._engine.run(requests, settings)]
        return captions if several else captions[0]

    def infill(
        self,
        image: Picture,
        *,
        box: tuple[int, int, int, int],
        prompt: str = "",
        negative: str = "",
        seed: int = 0,
        **sampling: Any,
    ) -> PILImage.Image:
        """Draw the inside of a box anew; every pixel outside of it stays as it is.

        Args:
            image: The picture, of any size; the box must lie in its central square, which is what the model sees.
            box: Left, top, right, bottom in pixels of the picture; right and bottom are the first outside.
            prompt: What the finished picture shows; empty lets the model choose.
            negative: What it should not show, in the place of the prompt that guidance moves away from.
            seed: Seed of the drawing.
            sampling: Fields of `SamplingSettings` that replace the model's defaults.

        Raises:
            RequestError: the picture is broken, or the box is empty or leaves its central square.
        """
        settings = self._settings(sampling)
        check_negative(negative, settings)
        original = load_image(image)
        left, top, side = _square_around(original, box)
        square = to_square(original, self.image_size)
        inner = (  # rounded outwards, in integers: a float could round past the picture
            (box[0] - left) * self.image_size // side,
            (box[1] - top) * self.image_size // side,
            -((left - box[2]) * self.image_size // side),
            -((top - box[3]) * self.image_size // side),
        )
        codes_HW = self._encode([square])[0]
        mask_HW = box_mask(inner, (self.image_size, self.image_size), self.tokenizer.image.grid)
        request = self._prompts.infill_image(
            codes_HW, mask_HW, self._pieces(prompt), negative=self._pieces(negative), seeds=(seed,)
        )
        new_ids = self._engine.run([request], settings)[0][0]
        filled_HW = self._prompts.filled(codes_HW, mask_HW, request, new_ids)
        drawn = self.tokenizer.image.decode(filled_HW.reshape(1, -1))[0]
        drawn = drawn.resize((side, side), PILImage.Resampling.LANCZOS)
        patch = drawn.crop((box[0] - left, box[1] - top, box[2] - left, box[3] - top))
        result = original.copy()
        result.paste(patch, box[:2])
        return result

    def complete(
        self, beginning: str | Document, *, max_new_tokens: int | None = None, seed: int = 0, **sampling: Any
    ) -> Document:
        """Write on from a beginning, in text and pictures as the model chooses, to the end of the document.

        Args:
            beginning: A text, or a document of texts and pictures.
            max_new_tokens: Budget of new ids; None is what the context leaves. A picture is begun only if it fits.
            seed: Seed of the drawing.
            sampling: Fields of `SamplingSettings`; guidance is off.

        Returns:
            The whole document, the beginning included.

        Raises:
            RequestError: the beginning fills the context.
        """
        document = Document((Text(beginning),)) if isinstance(beginning, str) else beginning
        tokenized = self.tokenizer.tokenize([document])[0]
        length = len(self.tokenizer.to_ids(tokenized)) - 1
        room = self.transformer.config.max_positions - length
        if room < 2:
            raise RequestError(
                f"the beginning takes {length} of the model's {self.transformer.config.max_positions} positions, "
                "which leaves no room; shorten it"
            )
        request = self._prompts.complete(
            tokenized.segments,
            max_new_tokens=room if max_new_tokens is None else min(room, max_new_tokens),
            seeds=(seed,),
        )
        new_ids = self._engine.run([request], self._settings({**sampling, **_UNGUIDED}))[0][0]
        ids = np.concatenate([np.asarray(request.prompt_ids), new_ids])
        return self.tokenizer.detokenize(self.tokenizer.from_ids(ids))

    def reconstruct(self, images: Sequence[Picture]) -> list[PILImage.Image]:
        """Encode pictures to codes and decode them again: the best that the image tokenizer can show."""
        pictures = [self._square(image) for image in images]
        return self.tokenizer.image.decode(self.tokenizer.image.encode(pictures))

    def _find(self, requests: Sequence[Document], count: int) -> list[list[ContextDocument]]:
        """The retrieved documents of each request."""
        if count < 0:
            raise RequestError(f"retrieve={count}; choose 0 or more documents")
        if count == 0:
            return [[] for _ in requests]
        if self._contexts is None:
            raise RequestError(f"retrieve={count} needs a memory to search; open one with use_memory or --memory")
        return self._contexts.find(requests, count)

    def _caption_budget(self, context: Sequence[TokenizedDocument]) -> int:
        """New ids of a caption: what the context leaves, and where that is nothing, too many, which is refused."""
        prompt_length = self._prompts.grid[0] * self._prompts.grid[1] + 5
        prompt_length += sum(len(self.tokenizer.to_ids(document)) - 1 for document in context)
        return min(MAX_CAPTION_TOKENS, max(2, self.transformer.config.max_positions - prompt_length))

    def _settings(self, sampling: dict[str, Any]) -> SamplingSettings:
        names = [field.name for field in fields(SamplingSettings)]
        for name in sampling:
            if name not in names:
                raise RequestError(f"sampling setting {name!r} is unknown; choose among {', '.join(names)}")
        return replace(self.defaults, **sampling)

    def _square(self, image: Picture) -> PILImage.Image:
        return to_square(load_image(image), self.image_size)

    def _encode(self, pictures: Sequence[PILImage.Image]) -> np.ndarray:
        """Codes of square pictures, of shape (pictures, height, width)."""
        return self.tokenizer.image.encode(list(pictures)).reshape(-1, *self.tokenizer.image.grid)

    def _pieces(self, text: str) -> list[int] | None:
        """The pieces of a text; None, a masked text, for a blank one."""
        return self.tokenizer.text.encode(text) if text.strip() else None

    def _text(self, new_ids: np.ndarray) -> str:
        return self.tokenizer.text.decode(self._prompts.text_tokens(new_ids))


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


def _square_around(image: PILImage.Image, box: tuple[int, int, int, int]) -> tuple[int, int, int]:
    """Left, top and side of the picture's central square; raises RequestError unless it holds the box."""
    left, top, side = central_square(image)
    if not (left <= box[0] < box[2] <= left + side and top <= box[1] < box[3] <= top + side):
        raise RequestError(
            f"box {','.join(map(str, box))} does not lie in the central square of the {image.width}x{image.height} "
            f"picture; give LEFT,TOP,RIGHT,BOTTOM with {left} <= LEFT < RIGHT <= {left + side} and "
            f"{top} <= TOP < BOTTOM <= {top + side}"
        )
    return left, top, side
