"""Documents of text and pictures to tokens and ids, and back: the tokenizers of a model and their files."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cm3.errors import DataError, ModelFilesError
from cm3.tokenizers.document_ids import document_from_ids, document_to_ids
from cm3.tokenizers.image import ImageTokenizer
from cm3.tokenizers.json_text import JsonTextTokenizer
from cm3.tokenizers.segments import Document, Image, ImageCodes, Text, TextTokens, TokenizedDocument
from cm3.tokenizers.text import TextTokenizer
from cm3.tokenizers.vocabulary import Vocabulary

__all__ = [
    "JSON_TEXT_TOKENIZER_FILE",
    "TEXT_TOKENIZER_FILE",
    "VOCABULARY_FILE",
    "Document",
    "DocumentTokenizer",
    "Image",
    "ImageCodes",
    "Text",
    "TextTokens",
    "TokenizedDocument",
    "has_json_text_tokenizer",
    "load_text_tokenizer",
]

TEXT_TOKENIZER_FILE = "tokenizer.model"
JSON_TEXT_TOKENIZER_FILE = "tokenizer.json"
"""What an imported model has in its place."""

VOCABULARY_FILE = "vocabulary.json"


class DocumentTokenizer:
    """Text tokenizer, image tokenizer and the vocabulary that joins their ids.

    Raises:
        ModelFilesError: the vocabulary has not as many text or image ids as the tokenizers.
    """

    def __init__(self, text: TextTokenizer | JsonTextTokenizer, image: ImageTokenizer, vocabulary: Vocabulary) -> None:
        found = (text.size, image.num_codes)
        expected = (vocabulary.text_size, vocabulary.image_range.size)
        if found != expected:
            raise ModelFilesError(
                f"the tokenizers have {found[0]} text pieces and {found[1]} image codes, the vocabulary "
                f"{expected[0]} and {expected[1]}; use the files of one model"
            )
        self.text = text
        self.image = image
        self.vocabulary = vocabulary

    def tokenize(self, documents: Sequence[Document]) -> list[TokenizedDocument]:
        """Tokenize documents; the images of all of them are encoded together."""
        images = [part.pixels for document in documents for part in document.segments if isinstance(part, Image)]
        codes_BHW = iter(self.image.encode(images).reshape(-1, *self.image.grid))

        def tokens(part: Text | Image) -> TextTokens | ImageCodes:
            if isinstance(part, Image):
                return ImageCodes(next(codes_BHW))
            return TextTokens(np.array(self.text.encode(part.text), dtype=np.int32))

        return [TokenizedDocument(tuple(map(tokens, document.segments)), document.metadata) for document in documents]

    def detokenize(self, document: TokenizedDocument) -> Document:
        """The text as it was, and the images as the image tokenizer decodes them."""
        codes = [part.codes_HW.ravel() for part in document.segments if isinstance(part, ImageCodes)]
        images = iter(self.image.decode(np.stack(codes)) if codes else [])

        def content(part: TextTokens | ImageCodes) -> Text | Image:
            if isinstance(part, ImageCodes):
                return Image(next(images))
            return Text(self.text.decode(part.tokens.tolist()))

        return Document(tuple(map(content, document.segments)), document.metadata)

    def to_ids(self, document: TokenizedDocument) -> np.ndarray:
        """The ids of a document, int64 of shape (T,), see `document_to_ids`.

        Raises:
            DataError: as `document_to_ids`, or an image has another grid than the image tokenizer's.
        """
        for index, part in enumerate(document.segments):
            if isinstance(part, ImageCodes) and part.codes_HW.shape != self.image.grid:
                raise DataError(
                    f"segment {index} is an image of {part.codes_HW.shape} codes, this tokenizer's have "
                    f"{self.image.grid}; tokenize the picture again"
                )
        return document_to_ids(document, self.vocabulary)

    def from_ids(self, ids: np.ndarray | Sequence[int]) -> TokenizedDocument:
        """The exact inverse of `to_ids`, see `document_from_ids`."""
        return document_from_ids(ids, self.vocabulary, self.image.grid)

    @property
    def hash(self) -> str:
        """SHA-256 (hex) over both tokenizers and the vocabulary; shards and checkpoints carry it."""
        parts = (self.text.hash, self.image.hash, self.vocabulary.hash)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.model` or `tokenizer.json`, the image tokenizer's files and `vocabulary.json`."""
        folder = Path(folder)
        is_json = isinstance(self.text, JsonTextTokenizer)
        names = (JSON_TEXT_TOKENIZER_FILE, TEXT_TOKENIZER_FILE)
        name, stale = names if is_json else reversed(names)
        self.text.save(folder / name)
        (folder / stale).unlink(missing_ok=True)
        self.image.save(folder)
        self.vocabulary.save(folder / VOCABULARY_FILE)

    @classmethod
    def load(cls, folder: str | Path) -> "DocumentTokenizer":
        """Read what `save` wrote. Raises ModelFilesError where files are missing or do not fit together."""
        folder = Path(folder)
        return cls(load_text_tokenizer(folder), ImageTokenizer.load(folder), Vocabulary.load(folder / VOCABULARY_FILE))


def load_text_tokenizer(folder: str | Path) -> TextTokenizer | JsonTextTokenizer:
    """The text tokenizer of a folder; that of an imported model needs the vocabulary beside it."""
    folder = Path(folder)
    if has_json_text_tokenizer(folder):
        return JsonTextTokenizer.load(folder / JSON_TEXT_TOKENIZER_FILE, Vocabulary.load(folder / VOCABULARY_FILE))
    return TextTokenizer.load(folder / TEXT_TOKENIZER_FILE)


def has_json_text_tokenizer(folder: str | Path) -> bool:
    """Whether the text tokenizer of a folder is that of an imported model; its vocabulary then is, too."""
    folder = Path(folder)
    return (folder / JSON_TEXT_TOKENIZER_FILE).is_file() and not (folder / TEXT_TOKENIZER_FILE).is_file()
