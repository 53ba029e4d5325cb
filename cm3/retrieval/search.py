"""Looking into a memory: the documents nearest to a text, a picture, or both, with their contents decoded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image as PILImage

from cm3.errors import RequestError
from cm3.retrieval.encoder import Encoder, document_vectors
from cm3.retrieval.memory import Memory
from cm3.tokenizers.document import Document, DocumentTokenizer, Image, Text
from cm3.tokenizers.image import load_image


@dataclass(frozen=True)
class Hit:
    """A document that was found."""

    row: int
    """Its row in the memory."""
    name: str | None
    """Name of its raw row."""
    score: float
    """Inner product of its vector and the query's."""
    text: str
    """Its texts, joined by blanks."""
    image: PILImage.Image | None
    """Its first picture as the image tokenizer decodes it."""


def search(
    memory: Memory,
    encoder: Encoder,
    tokenizer: DocumentTokenizer,
    *,
    text: str = "",
    image: str | Path | None = None,
    count: int = 8,
) -> list[Hit]:
    """Find the `count` nearest documents, best first. No rule of selection applies: a copy of the query is found.

    Args:
        memory: Where to look.
        encoder: The one that the memory was built with.
        tokenizer: The one of its segments.
        text: What the documents should say or show; with a picture, the mean of both vectors is looked for.
        image: A picture that they should resemble.
        count: Documents to find.

    Raises:
        RequestError: there is neither text nor picture, the picture is broken, or the count is below 1.
    """
    if count < 1:
        raise RequestError(f"count={count}; ask for at least 1 document")
    parts: list[Text | Image] = [Text(text)] if text.strip() else []
    if image is not None:
        parts.append(Image(load_image(image)))
    if not parts:
        raise RequestError("nothing to search for; give a text, a picture, or both")
    query_NE = document_vectors(encoder, [Document(tuple(parts))])
    scores_NK, rows_NK = memory.search(query_NE, count)
    found = [(row, score) for row, score in zip(rows_NK[0].tolist(), scores_NK[0].tolist(), strict=True) if row >= 0]
    return [_hit(memory, tokenizer, row, score) for row, score in found]


def _hit(memory: Memory, tokenizer: DocumentTokenizer, row: int, score: float) -> Hit:
    document = tokenizer.detokenize(memory.document(row))
    texts = [part.text for part in document.segments if isinstance(part, Text)]
    pictures = [part.pixels for part in document.segments if isinstance(part, Image)]
    return Hit(row, document.metadata.get("row"), score, " ".join(texts), pictures[0] if pictures else None)
