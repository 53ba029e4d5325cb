"""Instruction tasks put to a model: a question about a picture, an edit of it, ... (CM3Leon section 4 and table 5).

A request is a training example up to its answer (see `cm3.tokenizers.instruct`), with E `</s>`, B `<break>` and
S `<sentinel:0>`. An answer in words is a masked part of a text, a picture is what the document ends with:

    words     E Question: ... Answer: S . B image E S | words <eoss>
    picture   E Edit first image following the instruction B image B make the star red B | codes

Guidance compares a picture with documents that have a sentinel in the place of a whole segment, as training has it
whenever it masks that one segment; what was masked would come after the picture. Of which segment:

    image alone, where the user gives texts and pictures      E Edit first ... B image B S B | codes
    nothing, where the user gives texts and pictures          E S B | codes
    nothing, where the user gives texts only                  E S B | codes
    nothing, where the user gives pictures only               E Make a segmentation map ... B S B | codes

The first two are the streams of guidance by picture and text (InstructPix2Pix, equation 3). `E S B` is the prompt of
any picture at all: no training example of one masked segment lacks both the user's picture and the user's text.

A model that answers in turns is asked for words with just what the user gives, in that order, and for a picture with
the wording of the task up to it, see `cm3.generation.turns`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage

from cm3.errors import DataError, RequestError
from cm3.generation import grammar
from cm3.generation.request import Request
from cm3.generation.trained import UNGUIDED, Picture, TrainedModel
from cm3.generation.turns import TurnPrompts
from cm3.tokenizers.document import Document, Image, ImageCodes, Text, TextTokens, TokenizedDocument
from cm3.tokenizers.document_ids import document_to_ids
from cm3.tokenizers.instruct import Layout, answer_spans, lay_out, tokenize_examples
from cm3.tokenizers.instruct_tasks import TASKS, image_fields, is_image_field
from cm3.tokenizers.vocabulary import Vocabulary

MAX_ANSWER_TOKENS = 128
"""Longest answer in words, in text tokens."""


def instruct(
    model: TrainedModel,
    task: str,
    contents: Sequence[Any],
    *,
    seed: int,
    max_new_tokens: int,
    sampling: Mapping[str, Any],
) -> list[str | PILImage.Image]:
    """The answer to each row; arguments as in `CM3.instruct`."""
    if task not in TASKS:
        raise RequestError(f"there is no task {task!r}; choose among {', '.join(TASKS)}")
    draws = bool(image_fields(TASKS[task].assistant))
    if draws:
        model.tokenizer.image.require_decoder()
    settings = model.sampling(sampling if draws else {"temperature": 0.0, **sampling, **UNGUIDED})
    documents = [_document(model, task, number, row) for number, row in enumerate(contents)]
    if not documents:
        return []
    tokenized = tokenize_examples(model.tokenizer, documents)
    requests = [_request(model, document, draws, max_new_tokens, seed) for document in tokenized]
    outputs = [samples[0] for samples in model.engine.run(requests, settings)]
    if not draws:
        return [model.text_of(new_ids).strip() for new_ids in outputs]
    codes_NP = np.stack([model.prompts.image_codes(new_ids).ravel() for new_ids in outputs])
    return [*model.tokenizer.image.decode(codes_NP)]


def paired(pictures: Any, texts: Any, what: str) -> list[list[Any]]:
    """Rows of one picture and one text each, of one of both or of two lists.

    Args:
        pictures: A picture or several; a string is a path.
        texts: A text or several.
        what: What the texts are, for the message.

    Raises:
        RequestError: there are not as many texts as pictures.
    """
    pictures = [pictures] if isinstance(pictures, Picture) else list(pictures)
    texts = [texts] if isinstance(texts, str) else list(texts)
    if len(pictures) != len(texts):
        raise RequestError(
            f"there are {len(pictures)} picture(s) and {len(texts)} {what}(s); give one for each picture"
        )
    return [
        [Path(picture) if isinstance(picture, str) else picture, text]
        for picture, text in zip(pictures, texts, strict=True)
    ]


def words_request(document: TokenizedDocument, vocabulary: Vocabulary, *, max_new_tokens: int, seed: int) -> Request:
    """The words of an answer whose place in a text is empty.

    Args:
        document: Of `tokenize_examples`; something stands after the answer, or it would not be masked.
        vocabulary: The id space.
        max_new_tokens: Budget of new ids; the `<eoss>` that ends the answer is one of them.
        seed: Seed of the sample.
    """
    ids = document_to_ids(document, vocabulary).tolist()
    ((place, _),) = answer_spans(document).tolist()
    assert place < len(ids) - 1, "an answer at the end of its document stays in its place"
    sentinel = vocabulary.sentinel_id(0)
    return Request(
        prompt_ids=(*ids[:place], sentinel, *ids[place:], sentinel),
        grammar=grammar.infill([grammar.Span(sentinel, None)], vocabulary.eoss_id),
        max_new_tokens=max_new_tokens,
        seeds=(seed,),
    )


def picture_request(document: TokenizedDocument, vocabulary: Vocabulary, codes_per_image: int, *, seed: int) -> Request:
    """The picture that a document ends with, and what guidance compares it with, see above.

    Args:
        document: Of `tokenize_examples`, laid out in the first wording of its task.
        vocabulary: The id space.
        codes_per_image: Codes of the picture.
        seed: Seed of the sample.
    """
    wording = TASKS[document.metadata["task"]].wordings[0]
    segments = list(enumerate(document.segments))
    pictures = [number for number, segment in segments if isinstance(segment, ImageCodes)]
    texts = [number for number, segment in segments if isinstance(segment, TextTokens) and "{" in wording[number]]
    anything = (vocabulary.eos_id, vocabulary.sentinel_id(0), vocabulary.break_id)
    return Request(
        prompt_ids=_opening(document, vocabulary),
        unconditional_ids=anything if pictures and texts else _opening(document, vocabulary, texts or pictures),
        image_only_ids=_opening(document, vocabulary, texts) if pictures and texts else None,
        grammar=grammar.image(codes_per_image),
        max_new_tokens=codes_per_image,
        seeds=(seed,),
    )


def _request(model: TrainedModel, document: TokenizedDocument, draws: bool, max_new_tokens: int, seed: int) -> Request:
    """The answer to an instruction, in the way of the model."""
    prompts, vocabulary = model.prompts, model.tokenizer.vocabulary
    if draws:
        if isinstance(prompts, TurnPrompts):
            return prompts.picture(document.segments, seeds=(seed,))
        return picture_request(document, vocabulary, model.tokenizer.image.codes_per_image, seed=seed)
    if isinstance(prompts, TurnPrompts):
        request = prompts.words(document.segments, max_new_tokens=max_new_tokens, seeds=(seed,))
    else:
        request = words_request(document, vocabulary, max_new_tokens=max_new_tokens, seed=seed)
    return request.fitted(model.transformer.config.max_positions)


def _opening(document: TokenizedDocument, vocabulary: Vocabulary, masked: Sequence[int] = ()) -> tuple[int, ...]:
    """The ids up to the next segment, with a sentinel in the place of each masked segment."""
    ids = [vocabulary.eos_id]
    for number, segment in enumerate(document.segments):
        if number in masked:
            ids.append(vocabulary.sentinel_id(masked.index(number)))
        elif isinstance(segment, ImageCodes):
            ids += vocabulary.codes_to_ids(segment.codes_HW.ravel()).tolist()
        else:
            ids += vocabulary.text_to_ids(segment.tokens).tolist()
        ids.append(vocabulary.break_id)
    return tuple(ids)


def _document(model: TrainedModel, task: str, number: int, row: Any) -> Document:
    """A row laid out up to its answer."""
    if isinstance(row, Picture):
        raise RequestError(
            f"row {number} is {type(row).__name__}, not a list; give a list of rows, each a list of texts and pictures"
        )
    parts = [Text(part) if isinstance(part, str) else Image(model.square(part)) for part in row]
    try:
        layout: Layout = "turns" if isinstance(model.prompts, TurnPrompts) else "text_first"
        document = lay_out([parts], task=task, layout=layout)
    except DataError as error:
        raise RequestError(f"row {number}: {error}") from error
    names = [name for name in TASKS[task].user if not is_image_field(name)]
    for place, part in enumerate(part for part in parts if isinstance(part, Text)):
        if not part.text.strip():
            name = names[min(place, len(names) - 1)].rstrip("*")
            raise RequestError(f"the {name} of row {number} is empty; say what is asked for")
    return document
