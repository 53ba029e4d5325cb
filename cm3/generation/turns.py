"""Requests to a model that answers in turns, as Chameleon (arXiv 2405.09818) does: what is asked, a mark, the answer.

With E and E' the ids that open and close a document, B and B' those around the codes of an image, T the one that ends
a turn (ids as in Chameleon's public code):

    words           E text B codes B' text T | text E'
    picture         E text B codes B' text T B | codes
    complete        E text B codes B' | ...

Guidance compares a picture with two other prompts: the pictures alone, `E B codes B' B`, and nothing, `E B`
(equation 3 of InstructPix2Pix). Where the user gives no picture the two are the same, and the scale of the picture has
no effect.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from cm3.errors import ModelFilesError, RequestError
from cm3.generation import grammar
from cm3.generation.grammar import After
from cm3.generation.prompts import Prompts
from cm3.generation.request import Request
from cm3.tokenizers.document import ImageCodes, TextTokens, TokenizedDocument
from cm3.tokenizers.vocabulary import Vocabulary


@dataclass(frozen=True)
class TurnPrompts(Prompts):
    """Makes requests to a model whose layout of documents names a `turn_end`."""

    def words(
        self,
        segments: Sequence[TextTokens | ImageCodes],
        *,
        context: Sequence[TokenizedDocument] = (),
        max_new_tokens: int,
        seeds: Sequence[int] = (0,),
    ) -> Request:
        """An answer in words to texts and pictures, up to the end of the document; it may be empty.

        Args:
            segments: what is asked, in the order of the prompt.
            context: retrieved documents, for which there is no place: must be empty.
            max_new_tokens: budget of new ids; the one that ends the document is one of them.
        """
        _refuse(context)
        layout = self.vocabulary.layout
        return Request(
            prompt_ids=self._asked(segments),
            grammar=grammar.interleaved(self._codes_per_image, After.BREAK, layout, images=False),
            max_new_tokens=max_new_tokens,
            seeds=tuple(seeds),
        )

    def picture(self, segments: Sequence[TextTokens | ImageCodes], *, seeds: Sequence[int] = (0,)) -> Request:
        """A picture as the answer to texts and pictures; none: any picture."""
        begin = self.vocabulary.mark("image_start")
        images = [segment for segment in segments if isinstance(segment, ImageCodes)]
        start = self.vocabulary.mark("start")
        return Request(
            prompt_ids=(*(self._asked(segments) if segments else start), *begin),
            unconditional_ids=(*start, *begin),
            image_only_ids=(*start, *self._joined(images), *begin),
            grammar=grammar.image(self._codes_per_image),
            max_new_tokens=self._codes_per_image,
            seeds=tuple(seeds),
        )

    def text_to_image(
        self,
        text: Sequence[int] | None,
        *,
        negative: Sequence[int] | None = None,
        context: Sequence[TokenizedDocument] = (),
        unconditional_context: Literal["keep", "drop"] = "keep",
        seeds: Sequence[int] = (0,),
    ) -> Request:
        """As `Prompts.text_to_image`, but that there is no place for a context."""
        _refuse(context)
        request, compared = (
            self.picture([] if pieces is None else [TextTokens(np.array(pieces))], seeds=seeds)
            for pieces in (text, negative)
        )
        return replace(request, unconditional_ids=compared.prompt_ids, image_only_ids=compared.prompt_ids)

    def _asked(self, segments: Sequence[TextTokens | ImageCodes]) -> tuple[int, ...]:
        """A document up to the answer."""
        return (*self.vocabulary.mark("start"), *self._joined(segments), *self.vocabulary.mark("turn_end"))

    def _joined(self, segments: Sequence[TextTokens | ImageCodes]) -> list[int]:
        ids: list[int] = []
        for index, segment in enumerate(segments):
            ids += [*(self.vocabulary.mark("between") if index else ()), *self._segment(segment)]
        return ids


def make_prompts(vocabulary: Vocabulary, grid: tuple[int, int]) -> Prompts:
    """Requests in the way of a model with this vocabulary.

    Args:
        vocabulary: Its layout names a `turn_end` where the model answers in turns.
        grid: Height and width of an image in codes.

    Raises:
        ModelFilesError: the model writes images in a way that no layout has yet.
    """
    if vocabulary.layout.turn_end is None:
        return Prompts(vocabulary, grid)
    if "<image_row_end>" in vocabulary.special_ids:
        raise ModelFilesError(
            "this model names the size of every image and the end of each of its rows (a Lumina-mGPT does), which "
            "cannot be written yet; its weights can be exported, other Chameleons can be used"
        )
    return TurnPrompts(vocabulary, grid)


def _refuse(context: Sequence[TokenizedDocument]) -> None:
    if context:
        raise RequestError(
            "this model answers in turns (a Chameleon does) and has no place for retrieved documents; set retrieve=0"
        )
