"""Retrieved documents for the context of a request (CM3Leon section 2.1): found in a memory by what is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cm3.retrieval.memory import Memory
from cm3.retrieval.retriever import Retriever
from cm3.retrieval.select import SelectionConfig
from cm3.tokenizers.document import Document, TokenizedDocument


@dataclass(frozen=True, eq=False)
class ContextDocument:
    """A document of the memory that stands in a context."""

    document: TokenizedDocument
    """Its segments."""
    row: int
    """Its row in the memory."""
    score: float
    """Inner product of its vector with that of the request."""

    def record(self) -> dict[str, Any]:
        """What `settings.json` says about it."""
        return {"row": self.row, "name": self.document.metadata.get("row"), "score": round(self.score, 4)}


class ContextFinder:
    """Finds documents for requests in one memory.

    Args:
        folder: The memory.
        tokenizer_hash: Of the model that is to read the documents.
        encoder: The encoder that the memory was built with; None opens it by the name that is kept there.
        device: Where the encoder runs.
        max_similarity: Documents more similar than this to the request, or to one another, are left out.

    Raises:
        ModelFilesError: there is no memory, or it is of another encoder.
        DataError: it was built with other tokenizers.
    """

    def __init__(
        self,
        folder: str | Path,
        tokenizer_hash: str,
        *,
        encoder: str | Path | None,
        device: str,
        max_similarity: float,
    ) -> None:
        memory = Memory.open(folder, tokenizer_hash=tokenizer_hash)
        config = SelectionConfig(max_similarity=max_similarity)
        self._retriever = Retriever(memory, memory.open_encoder(encoder, device), config)

    def find(self, requests: Sequence[Document], count: int) -> list[list[ContextDocument]]:
        """At most `count` documents for each request (a text to draw, a picture to describe), best first."""
        memory = self._retriever.memory
        return [
            [ContextDocument(memory.document(item.row), item.row, item.score) for item in items]
            for items in self._retriever.for_prompts(requests, count)
        ]
