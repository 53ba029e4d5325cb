"""Retrieved documents for the context of a request (CM3Leon section 2.1): found in a memory by what is asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cm3.generation.request import Request
from cm3.retrieval.memory import Memory
from cm3.retrieval.retriever import Retriever
from cm3.retrieval.select import SelectionConfig
from cm3.tokenizers.document import Document, DocumentTokenizer, TextTokens, TokenizedDocument


@dataclass(frozen=True, eq=False)
class ContextDocument:
    """A document of the memory that stands in a context."""

    document: TokenizedDocument
    """Its segments."""
    row: int
    """Its row in the memory."""
    score: float
    """Inner product of its vector with that of the request."""
    text: str
    """Its texts, parted by spaces."""

    def record(self) -> dict[str, Any]:
        """What `settings.json` says about it."""
        name = self.document.metadata.get("row")
        return {"row": self.row, "name": name, "score": round(self.score, 4), "text": self.text}


def context_record(retrieved: Sequence[ContextDocument], left_out: Sequence[ContextDocument]) -> dict[str, Any]:
    """What `settings.json` says about the documents of a request; nothing where none were asked for."""
    lists = {"retrieved": retrieved, "left_out": left_out}
    return {name: [item.record() for item in items] for name, items in lists.items() if items}


def fitted_request(
    make: Callable[..., Request], found: Sequence[ContextDocument], max_positions: int
) -> tuple[Request, int]:
    """A request behind as many of the documents found as the context has room for, and how many these are.

    The least similar go first, so that one long document fails neither its own request nor the others of its batch.
    A request that is too long alone is returned alone, for the engine to refuse.

    Args:
        make: Makes the request behind the documents that it gets as `context`.
        found: Documents, best first.
        max_positions: Context of the model.
    """
    for count in range(len(found), 0, -1):
        request = make(context=[item.document for item in found[:count]])
        prompts = (request.prompt_ids, request.unconditional_ids or (), request.image_only_ids or ())
        if max(map(len, prompts)) + request.max_new_tokens <= max_positions:
            return request, count
    return make(context=[]), 0


def left_out_summary(left_out: Sequence[Sequence[ContextDocument]]) -> str | None:
    """One line about the documents that requests had no room for; None where there was room for all.

    Args:
        left_out: Of each request.
    """
    counts = [len(items) for items in left_out if items]
    if not counts:
        return None
    documents = "1 retrieved document" if sum(counts) == 1 else f"{sum(counts)} retrieved documents"
    requests = "the request" if len(left_out) == 1 else f"{len(counts)} of {len(left_out)} requests"
    return f"{documents} did not fit the context of {requests}; left out, the least similar first"


class ContextFinder:
    """Finds documents for requests in one memory.

    Args:
        folder: The memory.
        tokenizer: That of the model that is to read the documents.
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
        tokenizer: DocumentTokenizer,
        *,
        encoder: str | Path | None,
        device: str,
        max_similarity: float,
    ) -> None:
        memory = Memory.open(folder, tokenizer_hash=tokenizer.hash)
        self._tokenizer = tokenizer
        config = SelectionConfig(max_similarity=max_similarity)
        self._retriever = Retriever(memory, memory.open_encoder(encoder, device), config)

    def find(self, requests: Sequence[Document], count: int) -> list[list[ContextDocument]]:
        """At most `count` documents for each request (a text to draw, a picture to describe), best first."""
        return [
            [self._document(item.row, item.score) for item in items]
            for items in self._retriever.for_prompts(requests, count)
        ]

    def _document(self, row: int, score: float) -> ContextDocument:
        document = self._retriever.memory.document(row)
        texts = [part.tokens.tolist() for part in document.segments if isinstance(part, TextTokens)]
        return ContextDocument(document, row, score, " ".join(map(self._tokenizer.text.decode, texts)))
