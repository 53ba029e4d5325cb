"""Text tokenizer: SentencePiece BPE with byte fallback, lossless for every Unicode string.

Byte-pair encoding after Sennrich et al. (arXiv 1508.07909) as in SentencePiece (arXiv 1808.06226). CM3Leon
has 56,320 text ids (arXiv 2309.02591, section 2.1).
"""

import hashlib
import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import sentencepiece

from cm3.checkpoint import atomic_path
from cm3.errors import ConfigError, DataError, ModelFilesError
from cm3.tokenizers.vocabulary import TEXT_SPECIALS

# SentencePiece stores a space as U+2581, so that character itself is always spelt in bytes.
_SPACE_SYMBOL = "\u2581"
# Characters that SentencePiece's trainer reserves (it would drop the whole text), and line ends.
_TRAINING_BREAKS = re.compile("[\0\t\n\r\u2581\u2585]+")
_PROBE = "  A\tb\n\n\0 \u3000\ufb01\u00e9e\u0301 </s><0x41> \U0001f600  "


@dataclass(frozen=True, kw_only=True)
class TextTokenizerConfig:
    """Training of the text tokenizer."""

    vocabulary_size: int = 56320
    """Pieces at most: 4 special, 256 bytes, and the learnt ones (fewer if the texts hold no more)."""

    character_coverage: float = 1.0
    """Share of the characters in the texts that get a piece of their own; the rare rest is spelt in bytes."""

    max_piece_length: int = 16
    """Longest piece, in characters."""

    def __post_init__(self) -> None:
        if self.vocabulary_size <= len(TEXT_SPECIALS) + 256:
            raise ConfigError(
                f"vocabulary_size={self.vocabulary_size} leaves no room beside 4 special and 256 byte "
                "pieces; choose at least 261"
            )
        if not 0 < self.character_coverage <= 1:
            raise ConfigError(f"character_coverage={self.character_coverage} is a share; choose above 0, up to 1")
        if self.max_piece_length < 1:
            raise ConfigError(f"max_piece_length={self.max_piece_length} is too short; choose at least 1")


class TextTokenizer:
    """Text to piece ids and back. `decode(encode(text)) == text` for every Unicode string.

    Pieces 0 to 3 are the specials `<s> <pad> </s> <unk>`; no text encodes to them, not even their own names.

    Args:
        model: a serialised SentencePiece model.

    Raises:
        ModelFilesError: the bytes are not such a model, or one that changes text.
    """

    def __init__(self, model: bytes) -> None:
        try:
            self._processor = sentencepiece.SentencePieceProcessor()
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise ModelFilesError(f"not a SentencePiece model ({error}); train one with `cm3 train`") from error
        self._model = model
        self.size = self._processor.vocab_size()
        """Number of pieces, specials included."""
        pieces = [self._processor.id_to_piece(id) for id in range(self.size)]
        if tuple(pieces[: len(TEXT_SPECIALS)]) != TEXT_SPECIALS:
            raise ModelFilesError(
                f"the text tokenizer starts with {pieces[:4]}, not {list(TEXT_SPECIALS)}; train one with `cm3 train`"
            )
        self._spellings = [self._spelling(id, piece) for id, piece in enumerate(pieces)]
        self._space_symbol_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_SYMBOL.encode()]
        if self.decode(self.encode(_PROBE)) != _PROBE:
            raise ModelFilesError(
                "the text tokenizer changes text (no byte fallback, or it normalises); train one with `cm3 train`"
            )

    @classmethod
    def train(cls, texts: Iterable[str], config: TextTokenizerConfig) -> "TextTokenizer":
        """Learn pieces from `texts`. Equal texts and config give an equal model.

        Raises:
            DataError: there is no text.
            ConfigError: the texts have more characters than `vocabulary_size` can hold.
        """
        lines = _TrainingLines(texts)
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                model_writer=model,
                model_type="bpe",
                vocab_size=config.vocabulary_size,
                hard_vocab_limit=False,
                character_coverage=config.character_coverage,
                required_chars=_SPACE_SYMBOL,  # a space has a piece even where no text holds one
                max_sentencepiece_length=config.max_piece_length,
                byte_fallback=True,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                max_sentence_length=2**30,
                bos_id=TEXT_SPECIALS.index("<s>"),
                pad_id=TEXT_SPECIALS.index("<pad>"),
                eos_id=TEXT_SPECIALS.index("</s>"),
                unk_id=TEXT_SPECIALS.index("<unk>"),
                minloglevel=2,
            )
        except RuntimeError as error:
            if lines.error is not None:
                raise lines.error from None
            if lines.count == 0:
                raise DataError("no text to train a tokenizer from; check the text column and the limit") from error
            raise ConfigError(f"SentencePiece refused vocabulary_size={config.vocabulary_size}: {error}") from error
        return cls(model.getvalue())

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hex) of the model."""
        return hashlib.sha256(self._model).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Text to piece ids, none of them special.

        Raises:
            DataError: the text holds an unpaired surrogate, which is not Unicode text.
        """
        require_unicode(text)
        first, *others = self._processor.encode(text.split(_SPACE_SYMBOL))
        for ids in others:
            first += self._space_symbol_ids + ids
        return first

    def decode(self, ids: Iterable[int]) -> str:
        """Piece ids to text. Specials give nothing; bytes that are not UTF-8 give U+FFFD.

        Raises:
            DataError: an id is not below `size`.
        """
        spelt = []
        for id in ids:
            if not 0 <= id < self.size:
                raise DataError(f"text piece {id} is not below {self.size}; was it made by another tokenizer?")
            spelt.append(self._spellings[id])
        return b"".join(spelt).decode("utf-8", errors="replace")

    def save(self, path: str | Path) -> None:
        """Write the SentencePiece model file."""
        with atomic_path(path) as temporary:
            temporary.write_bytes(self._model)

    @classmethod
    def load(cls, path: str | Path) -> "TextTokenizer":
        """Read a SentencePiece model file.

        Raises:
            ModelFilesError: the file is missing or not a tokenizer of ours.
        """
        try:
            model = Path(path).read_bytes()
        except OSError as error:
            raise ModelFilesError(f"cannot read the text tokenizer {path}: {error.strerror}") from error
        return cls(model)

    def _spelling(self, id: int, piece: str) -> bytes:
        """The UTF-8 bytes that a piece stands for."""
        if self._processor.is_byte(id):
            return bytes([int(piece[1:-1], 16)])
        if self._processor.is_control(id) or self._processor.is_unknown(id):
            return b""
        return piece.replace(_SPACE_SYMBOL, " ").encode()


def require_unicode(text: str) -> None:
    """Raise DataError for a text that holds an unpaired surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"the text is not valid Unicode: unpaired surrogate at character {error.start}; "
            "read it with its right encoding"
        ) from error


class _TrainingLines:
    """Non-empty lines of texts, without the characters that the trainer reserves.

    Keeps the exception that the source of the texts raised, which SentencePiece would hide, and counts lines.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = texts
        self.count = 0
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            for text in self._texts:
                for line in _TRAINING_BREAKS.split(text):
                    if line:
                        self.count += 1
                        yield line
        except Exception as error:
            self.error = error
            raise
