"""Requests for what a user asks: pictures from text, text from pictures, parts of either, free completion.

Every prompt followed by what its grammar lets through is a row as training makes it (CM3Leon, section 2.2), with
E `</s>`, B `<break>`, S `<sentinel>`:

    text to image   E [docs] text B | codes
    any image       E [docs] S0 B | codes
    infill text     E [docs] before S0 after [B image] E S0 | text <eoss>
    infill image    E text B codes S0 codes E S0 | codes <eoss>         (one S for every masked run of codes)
    complete        E segment [B segment ...] | ...

Retrieved documents (docs) come before the rest, every one of their segments closed by B, as CM3Leon has it
(figures 8 and 9): two pairs of text and image are E T1 B I1 B T2 B I2 B.

Only the last line holds in every layout of documents. For models that answer in turns see `cm3.generation.turns`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Integer

from cm3.errors import RequestError
from cm3.generation import grammar
from cm3.generation.grammar import After, Span
from cm3.generation.request import Request
from cm3.tokenizers.document import ImageCodes, TextTokens, TokenizedDocument
from cm3.tokenizers.image import mask_runs
from cm3.tokenizers.vocabulary import Vocabulary

Codes = Integer[np.ndarray, "H W"]
"""The codes of one image."""


@dataclass(frozen=True)
class Prompts:
    """Makes requests. Texts are piece ids as `TextTokenizer.encode` returns them, images grids of codes."""

    vocabulary: Vocabulary
    grid: tuple[int, int]
    """Height and width of an image in codes."""

    def text_to_image(
        self,
        text: Sequence[int] | None,
        *,
        negative: Sequence[int] | None = None,
        context: Sequence[TokenizedDocument] = (),
        unconditional_context: Literal["keep", "drop"] = "keep",
        seeds: Sequence[int] = (0,),
    ) -> Request:
        """An image for a caption, or any image (None).

        Args:
            negative: what guidance moves away from; None: any image.
            context: retrieved documents, in their order in the prompt.
            unconditional_context: whether the prompt that guidance compares with keeps the context: "keep"
                overstates the caption alone, "drop" the caption and the context.
        """
        docs = self._context(context)
        compared_docs = docs if unconditional_context == "keep" else []
        return Request(
            prompt_ids=(self._eos, *docs, *self._caption(text), self._break),
            unconditional_ids=(self._eos, *compared_docs, *self._caption(negative), self._break),
            grammar=grammar.image(self._codes_per_image),
            max_new_tokens=self._codes_per_image,
            seeds=tuple(seeds),
        )

    def infill_text(
        self,
        before: Sequence[int],
        after: Sequence[int],
        codes_HW: Codes | None = None,
        *,
        context: Sequence[TokenizedDocument] = (),
        max_new_tokens: int,
        seeds: Sequence[int] = (0,),
    ) -> Request:
        """The text between two texts, of a document of its own or of an image's caption.

        With an image and nothing before and after it is the caption. Take spaces into the generated part:
        pieces of text carry the space before a word, so `before` should not end in one.

        Args:
            context: retrieved documents, in their order in the prompt.
            max_new_tokens: budget of new ids; the `<eoss>` that ends the text is one of them.
        """
        self._require_sentinels()
        sentinel = self.vocabulary.sentinel_id(0)
        prompt = [self._eos, *self._context(context), *self._text(before), sentinel, *self._text(after)]
        if codes_HW is not None:
            prompt += [self._break, *self._image(codes_HW)]
        return Request(
            prompt_ids=(*prompt, self._eos, sentinel),
            grammar=grammar.infill([Span(sentinel, None)], self.vocabulary.eoss_id),
            max_new_tokens=max_new_tokens,
            seeds=tuple(seeds),
        )

    def infill_image(
        self,
        codes_HW: Codes,
        mask_HW: Bool[np.ndarray, "H W"],
        text: Sequence[int] | None,
        *,
        negative: Sequence[int] | None = None,
        seeds: Sequence[int] = (0,),
    ) -> Request:
        """The codes under a mask, from the codes around it and a caption; `filled` puts them in their place.

        One sentinel stands for every run of masked codes in raster order, so one for each row of a box, as
        `ObjectiveConfig.box_probability` trains it.

        Args:
            mask_HW: True where codes are to be made anew.
            text: the caption; None: it is masked too, by the sentinel after those of the image, so that the
                image's are the same in both rows of guidance.
            negative: a caption that guidance moves away from; None: the masked one.

        Raises:
            RequestError: the mask is empty, or has more runs than the vocabulary has sentinels.
        """
        self._require_sentinels()
        ids = self._image(codes_HW)
        if mask_HW.shape != self.grid or not mask_HW.any():
            raise RequestError(
                f"the mask has shape {mask_HW.shape} and {int(mask_HW.sum())} masked codes; an image has "
                f"{self.grid[0]}x{self.grid[1]} codes, mask at least one"
            )
        bounds = mask_runs(mask_HW)
        if len(bounds) >= self.vocabulary.num_sentinels:
            raise RequestError(
                f"the mask has {len(bounds)} runs of codes, the vocabulary {self.vocabulary.num_sentinels} "
                "sentinels; choose a simpler mask"
            )
        sentinels = [self.vocabulary.sentinel_id(index) for index in range(len(bounds))]
        holed: list[int] = []
        end = 0
        for (start, stop), sentinel in zip(bounds, sentinels, strict=True):
            holed += [*ids[end:start], sentinel]
            end = stop
        image = [self._break, *holed, *ids[end:], self._eos, sentinels[0]]
        moved = [Span(id, stop - start) for id, (start, stop) in zip(sentinels, bounds, strict=True)]
        rows = grammar.infill(moved, self.vocabulary.eoss_id)
        return Request(
            prompt_ids=(self._eos, *self._caption(text, len(bounds)), *image),
            unconditional_ids=(self._eos, *self._caption(negative, len(bounds)), *image),
            grammar=rows,
            max_new_tokens=rows.fewest_ids()[rows.start],
            seeds=tuple(seeds),
        )

    def complete(
        self,
        segments: Sequence[TextTokens | ImageCodes],
        *,
        max_new_tokens: int,
        images: bool = True,
        seeds: Sequence[int] = (0,),
    ) -> Request:
        """The rest of a document that begins with these segments (none: a whole document), up to its `</s>`.

        A text goes on where it stops; after an image a new segment begins. Images are written only where the
        budget has room for all of their codes.

        Args:
            images: whether images may be written, too.
        """
        prompt = [*self.vocabulary.mark("start")]
        after = After.BREAK
        for index, segment in enumerate(segments):
            if index > 0:
                prompt += self.vocabulary.mark("between")
            prompt += self._segment(segment)
            if isinstance(segment, ImageCodes):
                after = After.IMAGE
            else:
                after = After.TEXT if len(segment.tokens) else After.BREAK
        return Request(
            prompt_ids=tuple(prompt),
            grammar=grammar.interleaved(self._codes_per_image, after, self.vocabulary.layout, images=images),
            max_new_tokens=max_new_tokens,
            seeds=tuple(seeds),
        )

    def image_codes(self, new_ids: Integer[np.ndarray, " T"]) -> Codes:
        """The image among the new ids of a text-to-image request."""
        return self.vocabulary.ids_to_codes(new_ids).reshape(self.grid)

    def text_tokens(self, new_ids: Integer[np.ndarray, " T"]) -> list[int]:
        """The piece ids among the new ids of a text request, for `TextTokenizer.decode`."""
        return self.vocabulary.ids_to_text(new_ids[self.vocabulary.is_text(new_ids)]).tolist()

    def filled(
        self,
        codes_HW: Codes,
        mask_HW: Bool[np.ndarray, "H W"],
        new_ids: Integer[np.ndarray, " T"],
    ) -> Codes:
        """The image with the new ids of an `infill_image` request under the mask; nothing else changes."""
        codes = codes_HW.copy()
        codes[mask_HW] = self.vocabulary.ids_to_codes(new_ids[self.vocabulary.is_image(new_ids)])
        return codes

    @property
    def _eos(self) -> int:
        return self.vocabulary.eos_id

    @property
    def _break(self) -> int:
        return self.vocabulary.break_id

    @property
    def _codes_per_image(self) -> int:
        return self.grid[0] * self.grid[1]

    def _caption(self, text: Sequence[int] | None, sentinel: int = 0) -> list[int]:
        """A caption, or the sentinel that masks it."""
        return [self.vocabulary.sentinel_id(sentinel)] if text is None else self._text(text)

    def _context(self, documents: Sequence[TokenizedDocument]) -> list[int]:
        ids = []
        for document in documents:
            for segment in document.segments:
                ids += [*self._segment(segment), self._break]
        return ids

    def _segment(self, segment: TextTokens | ImageCodes) -> list[int]:
        if not isinstance(segment, ImageCodes):
            return self._text(segment.tokens)
        codes = self._image(segment.codes_HW)
        return [*self.vocabulary.mark("image_start"), *codes, *self.vocabulary.mark("image_end")]

    def _require_sentinels(self) -> None:
        if not self.vocabulary.num_sentinels:
            raise RequestError(
                "this model has no sentinels (a Chameleon has none) and cannot fill in a part of a text or a picture; "
                "let it complete a document, or draw a whole picture"
            )

    def _text(self, pieces: Sequence[int] | np.ndarray) -> list[int]:
        return self.vocabulary.text_to_ids(pieces).tolist()

    def _image(self, codes_HW: Codes) -> list[int]:
        if codes_HW.shape != tuple(self.grid):
            raise RequestError(
                f"an image has {codes_HW.shape[0]}x{codes_HW.shape[1]} codes, this model's images have "
                f"{self.grid[0]}x{self.grid[1]}; encode it with the model's own image tokenizer"
            )
        return self.vocabulary.codes_to_ids(codes_HW.ravel()).tolist()
