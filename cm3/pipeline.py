"""CM3: a trained model and what can be asked of it: pictures from text, text from pictures, parts, answers, edits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast, overload

from PIL import Image as PILImage

from cm3 import drawing
from cm3.drawing import Drawing, RankerName
from cm3.errors import RequestError
from cm3.generation import captions, completion, instructions, regions
from cm3.generation.captions import MAX_CAPTION_TOKENS, Caption
from cm3.generation.instructions import MAX_ANSWER_TOKENS
from cm3.generation.trained import Picture, TrainedModel
from cm3.pretrained import DEMO
from cm3.tokenizers.document import Document, Text

__all__ = ["CM3", "MAX_ANSWER_TOKENS", "MAX_CAPTION_TOKENS", "Picture"]


class CM3(TrainedModel):
    """A model that reads and writes text and pictures."""

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
            retrieve: Documents from the memory (`use_memory`) before each prompt, less the least similar where the
                context has no room for all; 0 is none.
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
        return drawing.draw(
            self,
            prompts,
            num_images=num_images,
            seed=seed,
            negative=negative,
            retrieve=retrieve,
            unconditional_context=unconditional_context,
            best_of=best_of,
            rank=rank,
            ranker=ranker,
            sampling=sampling,
        )

    @overload
    def caption(self, image: Picture, *, seed: int = 0, retrieve: int = 0, **sampling: Any) -> str: ...

    @overload
    def caption(self, image: Sequence[Picture], *, seed: int = 0, retrieve: int = 0, **sampling: Any) -> list[str]: ...

    def caption(
        self, image: Picture | Sequence[Picture], *, seed: int = 0, retrieve: int = 0, **sampling: Any
    ) -> str | list[str]:
        """Describe pictures, by filling in the masked text of `</s> <mask> <break> image </s>` (section 2.2).

        A model that answers in turns (an imported Chameleon) is asked what it sees.

        Args:
            image: One picture or several; each is cropped to its central square and resized.
            seed: Seed of each caption.
            retrieve: Documents from the memory (`use_memory`) before each picture, less the least similar where
                the context has no room for all; 0 is none.
            sampling: Fields of `SamplingSettings`; the likeliest tokens are taken where no temperature is given, and
                guidance is off.

        Returns:
            The caption, or one for each of several pictures.

        Raises:
            RequestError: a picture is missing or broken.
        """
        images = [image] if isinstance(image, Picture) else list(image)
        texts = [each.text for each in self.describe(images, seed=seed, retrieve=retrieve, **sampling)]
        return texts[0] if isinstance(image, Picture) else texts

    def describe(
        self, images: Sequence[Picture], *, seed: int = 0, retrieve: int = 0, **sampling: Any
    ) -> list[Caption]:
        """Describe pictures as `caption` does, and tell which documents were retrieved for each.

        Args:
            images: The pictures.
            seed: As in `caption`, as are the others.
        """
        if isinstance(images, Picture):
            raise RequestError(f"images is one {type(images).__name__}, describe takes a list of pictures")
        return captions.describe(self, images, seed=seed, retrieve=retrieve, sampling=sampling)

    def instruct(
        self,
        task: str,
        contents: Sequence[Sequence[str | Path | bytes | PILImage.Image]],
        *,
        seed: int = 0,
        max_new_tokens: int = MAX_ANSWER_TOKENS,
        **sampling: Any,
    ) -> list[str | PILImage.Image]:
        """Give the model instructions of one task that it was tuned for, all in one batch.

        Args:
            task: Name in `cm3.tokenizers.instruct_tasks.TASKS`, such as vqa, edit, grounded or segmentation.
            contents: For each instruction what the user gives, such as `[Path("photo.png"), "How many stars?"]`. A
                string is a text; a path, encoded bytes and pixels are pictures, cropped to their central square and
                resized. Texts and pictures are taken in their order each.
            seed: Seed of each answer, which depends on nothing else in the batch.
            max_new_tokens: Longest answer in words, in text tokens; less where the context leaves less. Pictures
                always have all of their codes.
            sampling: Fields of `SamplingSettings`. Words: the likeliest tokens are taken where no temperature is
                given, and guidance is off. Pictures: `guidance_scale` overstates the user's text (the picture, in
                tasks that take no text) and, in tasks that take both, `image_guidance_scale` the user's picture;
                see `cm3.generation.instructions`.

        Returns:
            For each instruction its answer: words, or a picture.

        Raises:
            RequestError: there is no such task, it takes other texts and pictures, a text is empty, an instruction
                is longer than the context, or a setting is out of its range.
            DataError: a picture is missing or broken.
        """
        return instructions.instruct(self, task, contents, seed=seed, max_new_tokens=max_new_tokens, sampling=sampling)

    @overload
    def answer(self, image: Picture, question: str, *, seed: int = 0, **sampling: Any) -> str: ...

    @overload
    def answer(
        self, image: Sequence[Picture], question: Sequence[str], *, seed: int = 0, **sampling: Any
    ) -> list[str]: ...

    def answer(
        self, image: Picture | Sequence[Picture], question: str | Sequence[str], *, seed: int = 0, **sampling: Any
    ) -> str | list[str]:
        """Answer questions about pictures: `instruct` with the task vqa.

        Args:
            image: A picture, or several; a string is a path.
            question: What is asked about it, or about each.
            seed: Seed of each answer.
            sampling: As in `instruct`, `max_new_tokens` included.
        """
        rows = instructions.paired(image, question, "question")
        answers = cast("list[str]", self.instruct("vqa", rows, seed=seed, **sampling))
        return answers[0] if isinstance(image, Picture) else answers

    @overload
    def edit(
        self, image: Picture, instruction: str, *, seed: int = 0, image_guidance_scale: float = 1.0, **sampling: Any
    ) -> PILImage.Image: ...

    @overload
    def edit(
        self,
        image: Sequence[Picture],
        instruction: Sequence[str],
        *,
        seed: int = 0,
        image_guidance_scale: float = 1.0,
        **sampling: Any,
    ) -> list[PILImage.Image]: ...

    def edit(
        self,
        image: Picture | Sequence[Picture],
        instruction: str | Sequence[str],
        *,
        seed: int = 0,
        image_guidance_scale: float = 1.0,
        **sampling: Any,
    ) -> PILImage.Image | list[PILImage.Image]:
        """Change pictures as instructions say: `instruct` with the task edit.

        Args:
            image: A picture, or several; a string is a path.
            instruction: What to change in it, or in each.
            seed: Seed of each picture.
            image_guidance_scale: How far to overstate the picture, `guidance_scale` being that of the instruction;
                1 is off and costs a third less. CM3Leon has 1.5 and 7.5.
            sampling: As in `instruct`.

        Returns:
            The changed picture, of the model's size, or one for each of several.
        """
        rows = instructions.paired(image, instruction, "instruction")
        sampling |= {"image_guidance_scale": image_guidance_scale}
        pictures = cast("list[PILImage.Image]", self.instruct("edit", rows, seed=seed, **sampling))
        return pictures[0] if isinstance(image, Picture) else pictures

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
            RequestError: the picture is broken, the box is empty or leaves its central square, or the model has no
                sentinels (an imported Chameleon).
        """
        return regions.infill(self, image, box=box, prompt=prompt, negative=negative, seed=seed, sampling=sampling)

    def complete(
        self, beginning: str | Document, *, max_new_tokens: int | None = None, seed: int = 0, **sampling: Any
    ) -> Document:
        """Write on from a beginning, in text and pictures as the model chooses, to the end of the document.

        A model whose image tokenizer has no decoder writes text only.

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
        return completion.complete(self, document, max_new_tokens=max_new_tokens, seed=seed, sampling=sampling)
