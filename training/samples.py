"""Sample sheets of a run: pictures that its present weights draw, and captions that they write."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor

from cm3.checkpoint import load_strict
from cm3.data.shards import ShardedDocuments
from cm3.distributed import is_main
from cm3.errors import ConfigError, RequestError
from cm3.gallery import contact_sheet, save_image
from cm3.generation.request import check_request
from cm3.generation.settings import SamplingSettings
from cm3.generation.turns import TurnPrompts, make_prompts
from cm3.model.lora import merge_adapter
from cm3.model.pretrained import load_model
from cm3.model.transformer import Transformer
from cm3.pipeline import CM3
from cm3.pretrained import resolve_model
from cm3.tokenizers.document import DocumentTokenizer, ImageCodes, TextTokens, TokenizedDocument
from cm3.training.average import WeightAverage
from cm3.training.config import ModelRun
from cm3.training.engine import Engine, from_main
from cm3.training.metrics import MetricsWriter

PICTURES_PER_PROMPT = 3
HELD_OUT = 4
"""Pictures of the validation data that are described, and whose captions are drawn where no prompts are given."""
_SEARCHED = 1000


class SampleSheets:
    """Draws `samples/step_00001000.png` of a run: for each prompt three pictures with the captions that the model gives
    them, then captions of held-out pictures. Prompts, seeds and pictures are the same every time.

    The first process draws, with its own copy of the weights, while the others wait at their next exchange; the copy
    is why nothing of the training changes. A collective, as are its methods.

    Args:
        config: Of the run.
        data: Its validation data.

    Raises:
        ModelFilesError: the tokenizers cannot be read, there is nothing to draw, or a prompt does not fit the context.
    """

    def __init__(self, config: ModelRun, data: ShardedDocuments | None) -> None:
        self._config = config
        self._folder = Path(config.output) / "samples"
        self._defaults = dataclasses.replace(config.generation, image_guidance_scale=1.0)  # no picture in a prompt
        from_main(lambda: self._open(data))

    def draw(self, step: int, engine: Engine, average: WeightAverage | None, writer: MetricsWriter | None) -> None:
        """Draw a sheet with the weights, or with their average, and hand it to the writer of the first process.

        A sheet that cannot be made, for want of memory or of room on the disk, is left out with a warning: it is no
        reason to end a run.
        """
        tensors: dict[str, Tensor] = {}
        for name, tensor in average.tensors.items() if average else engine.state("weights"):
            if is_main():
                tensors[name.removeprefix("model.")] = tensor
        if writer is None:
            return
        try:
            sheet, captions = self._draw(self._model(tensors, engine.device))
            save_image(self._folder / f"step_{step:08d}.png", sheet)
            writer.samples(step, sheet, captions)
        except (OSError, torch.OutOfMemoryError) as error:
            print(f"warning: no samples of step {step}: {error}", flush=True)
        if engine.device.type == "cuda":
            torch.cuda.empty_cache()

    def _open(self, data: ShardedDocuments | None) -> None:
        """Read the tokenizers, choose what is drawn and described, and make sure that it can be."""
        self._tokenizer = DocumentTokenizer.load(self._config.data.train_folder)
        pairs = list(self._pairs(data)) if data else []
        self._pictures = [codes_HW for _, codes_HW in pairs]
        self._prompts = list(self._config.sample_prompts) or [text for text, _ in pairs]
        if not self._prompts:
            raise ConfigError(
                f"sample_interval={self._config.sample_interval} finds nothing to draw: data.validation="
                f"{self._config.data.validation} has no caption with a picture among its first {_SEARCHED} documents; "
                "give sample_prompts"
            )
        if not all(prompt.strip() for prompt in self._prompts):
            raise ConfigError("sample_prompts has an empty text; say what to draw, or leave it out")
        image = self._tokenizer.image
        if not image.has_decoder:
            raise ConfigError(
                f"sample_interval={self._config.sample_interval}, but the image tokenizer has no decoder to draw with; "
                "import the model again with --vqgan, or set sample_interval to 0"
            )
        prompts = make_prompts(self._tokenizer.vocabulary, image.grid)
        drawn = [prompts.text_to_image(self._tokenizer.text.encode(prompt)) for prompt in self._prompts]
        codes_HW = np.zeros(image.grid, dtype=np.uint16)
        if isinstance(prompts, TurnPrompts):
            described = prompts.words([ImageCodes(codes_HW)], max_new_tokens=2)
        else:
            described = prompts.infill_text([], [], codes_HW, max_new_tokens=2)
        wanted = [*((request, self._defaults) for request in drawn), (described, SamplingSettings())]
        for number, (request, settings) in enumerate(wanted):
            try:
                check_request(number, request, settings, self._config.model.max_positions)
            except RequestError as error:
                raise ConfigError(f"sample_prompts cannot be served: {error}") from error

    def _pairs(self, data: ShardedDocuments) -> Iterator[tuple[str, np.ndarray]]:
        """Yield caption and codes of the first documents that are one text and one image, no caption twice."""
        seen: set[str] = set()
        for index in range(min(len(data), _SEARCHED)):
            pair = _pair(data[index])
            if pair is None or data.lengths[index] > self._config.data.sequence_length:
                continue
            text = self._tokenizer.text.decode(pair[0].tokens.tolist())
            if text in seen or not text.strip():
                continue
            seen.add(text)
            yield text, pair[1].codes_HW
            if len(seen) == HELD_OUT:
                return

    def _model(self, weights: dict[str, Tensor], device: torch.device) -> CM3:
        """Return what the run would export, were it to end now, in the number format that `CM3` chooses."""
        if self._config.lora.rank:
            transformer, _ = load_model(resolve_model(str(self._config.initialize_from)), dtype=torch.float32)
            merge_adapter(transformer, self._config.lora, weights)
        else:
            with torch.device("meta"):
                transformer = Transformer(self._config.model)
            transformer.to_empty(device="cpu")
            load_strict(transformer, weights, "the run")
        transformer.to(device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
        self._tokenizer.image.to(device)
        return CM3(transformer.eval(), self._tokenizer, self._defaults)

    def _draw(self, model: CM3) -> tuple[PILImage.Image, list[str]]:
        """Return the sheet, and a line for each picture on it."""
        drawn = model.generate(self._prompts, num_images=PICTURES_PER_PROMPT)
        rows = [(f"drawn: {prompt}", images, model.caption(images)) for prompt, images in zip(self._prompts, drawn)]
        if self._pictures:
            held_out = self._tokenizer.image.decode(np.stack([codes_HW.ravel() for codes_HW in self._pictures]))
            rows.append(("held out, and described", held_out, model.caption(held_out)))
        return contact_sheet(rows), [f"{heading}: {caption}" for heading, _, captions in rows for caption in captions]


def _pair(document: TokenizedDocument) -> tuple[TextTokens, ImageCodes] | None:
    """Return text and image of a document that is one of each, apart from what was retrieved for it."""
    parts = document.segments[document.metadata.get("retrieved", 0) :]
    texts = [part for part in parts if isinstance(part, TextTokens) and len(part.tokens)]
    images = [part for part in parts if isinstance(part, ImageCodes)]
    return (texts[0], images[0]) if len(parts) == 2 and len(texts) == len(images) == 1 else None
