"""Text tokenizer of an imported model: a `tokenizer.json`, run by Hugging Face's `tokenizers`.

Such a file holds one table of ids for text, image codes and marks. Which of them are text is what the vocabulary says;
the pieces here are those, counted from 0, as everywhere in this project.
"""

import hashlib
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cm3.checkpoint import atomic_path
from cm3.errors import DataError, MissingDependencyError, ModelFilesError
from cm3.tokenizers.text import require_unicode
from cm3.tokenizers.vocabulary import Vocabulary


class JsonTextTokenizer:
    """Text to piece ids and back, with the interface of `TextTokenizer`.

    `decode(encode(text)) == text` for every text where the file's BPE works on bytes and has no normaliser, as
    Chameleon's. Otherwise the text comes back normalised (Unicode forms, spaces at the ends), and a character without
    a piece is refused. No text encodes to anything but text: the names of image codes and marks are spelt in
    characters, where the library alone would take them for the ids that they name.

    Args:
        definition: The contents of the file.
        vocabulary: The id space. Its text ids are the pieces, in the order of its text ranges.

    Raises:
        ModelFilesError: the file is damaged, or lacks a text id of the vocabulary.
        MissingDependencyError: `tokenizers` is not installed.
    """

    def __init__(self, definition: bytes, vocabulary: Vocabulary) -> None:
        self._definition = definition
        self._vocabulary = vocabulary
        self._tokenizer = _parsed(definition)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.size = vocabulary.text_size
        """Number of pieces."""
        ids = vocabulary.text_to_ids(np.arange(self.size))
        unnamed = [id for id in ids.tolist() if self._tokenizer.id_to_token(id) is None]
        if unnamed:
            raise ModelFilesError(
                f"tokenizer.json has nothing at id {unnamed[0]}, which is text in vocabulary.json; use the files of "
                "one model"
            )

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hex) of the file."""
        return hashlib.sha256(self._definition).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Text to piece ids, none of them special.

        Raises:
            DataError: the text holds an unpaired surrogate, or a character for which there is no piece.
        """
        require_unicode(text)
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        ids: list[int] = encoding.ids
        if not self._vocabulary.is_text(np.array(ids)).all():
            ids = self._spelt_out(text, encoding)
        return self._vocabulary.ids_to_text(ids).tolist()

    def decode(self, ids: Iterable[int]) -> str:
        """Piece ids to text. Specials give nothing; bytes that are not UTF-8 give U+FFFD.

        Raises:
            DataError: an id is not below `size`.
        """
        joint_ids = self._vocabulary.text_to_ids(list(ids))
        is_text = self._vocabulary.is_text(joint_ids)
        return str(self._tokenizer.decode(joint_ids[is_text].tolist(), skip_special_tokens=False))

    def save(self, path: str | Path) -> None:
        """Write the file, as it was read."""
        with atomic_path(path) as temporary:
            temporary.write_bytes(self._definition)

    @classmethod
    def load(cls, path: str | Path, vocabulary: Vocabulary) -> "JsonTextTokenizer":
        """Read a `tokenizer.json`.

        Raises:
            ModelFilesError: the file is missing or damaged, or does not fit the vocabulary.
            MissingDependencyError: `tokenizers` is not installed.
        """
        try:
            definition = Path(path).read_bytes()
        except OSError as error:
            raise ModelFilesError(f"cannot read the text tokenizer {path}: {error.strerror}") from error
        return cls(definition, vocabulary)

    def _spelt_out(self, text: str, encoding: Any) -> list[int]:
        """The ids of a text, with characters in the place of whatever was taken for something else than text."""
        spelt: list[int] = []
        for id, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            if self._vocabulary.is_text(id):
                spelt.append(id)
                continue
            for place in range(start, stop):
                ids = self._tokenizer.encode(text[place], add_special_tokens=False).ids
                if not self._vocabulary.is_text(np.array(ids)).all():
                    raise DataError(
                        f"the text tokenizer has no piece for {text[place]!r}, character {place} of a text; replace it"
                    )
                spelt += ids
        return spelt


def _parsed(definition: bytes) -> Any:
    """The tokenizer of the library."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingDependencyError(
            f"a tokenizer.json needs tokenizers, which is not installed ({error}); run `pip install open-cm3[interop]`"
        ) from error
    try:
        return Tokenizer.from_buffer(definition)
    except Exception as error:  # the library raises nothing more special
        raise ModelFilesError(f"tokenizer.json cannot be read ({error}); download it again") from error
