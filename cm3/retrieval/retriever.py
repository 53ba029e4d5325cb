"""Documents for a context: search a memory by a query's text and by its picture, then apply the rules.

CM3Leon (arXiv 2309.02591), section 2.1.

N queries   E embedding width
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from cm3.retrieval.encoder import Encoder, encode_documents
from cm3.retrieval.memory import Memory
from cm3.retrieval.select import (
    Candidate,
    Item,
    Modality,
    SelectionConfig,
    best,
    draw,
    drop_words,
    pool,
)
from cm3.tokenizers.document import Document, Text

FIRST_CANDIDATES = 32
"""Results of the first search of a query; copies among them are skipped, so more are needed than are kept."""
MOST_CANDIDATES = 2048
"""Results at which a query that still lacks documents gives up."""
_GROWTH = 8

Pool = dict[Modality, list[Candidate]]


class Retriever:
    """Finds the documents of a context in a memory.

    Raises:
        ModelFilesError: the memory was built with another encoder.
    """

    def __init__(self, memory: Memory, encoder: Encoder, config: SelectionConfig | None = None) -> None:
        memory.check_encoder(encoder)
        self.memory = memory
        self.encoder = encoder
        self.config = config or SelectionConfig()

    def for_training(self, documents: Sequence[Document], rngs: Sequence[np.random.Generator]) -> list[list[Candidate]]:
        """K documents of each training example, drawn from those that its text and its picture find.

        Words of the text queries are dropped for the search; copies are recognised by the whole text.

        Args:
            documents: The examples; one that is in the memory under the name of its raw row is not found.
            rngs: One for each example: what it gets does not depend on the others.
        """
        dropped = [self._drop_words(document, rng) for document, rng in zip(documents, rngs)]
        pools = self._pools(documents, dropped, self.config)
        return [draw(pool, self.config, rng) for pool, rng in zip(pools, rngs)]

    def for_prompts(self, documents: Sequence[Document], count: int) -> list[list[Candidate]]:
        """The documents of the highest scores for each prompt, best first, by whatever a prompt has.

        Args:
            documents: A prompt to draw from is a document of its text, a picture to caption one of the picture.
            count: Documents of a prompt at most.
        """
        config = replace(self.config, num_documents=count, per_modality=max(count, self.config.per_modality))
        return [best(pool, config) for pool in self._pools(documents, documents, config)]

    def _drop_words(self, document: Document, rng: np.random.Generator) -> Document:
        segments = tuple(
            Text(drop_words(part.text, self.config.query_dropout, rng)) if isinstance(part, Text) else part
            for part in document.segments
        )
        return replace(document, segments=segments)

    def _pools(self, documents: Sequence[Document], queries: Sequence[Document], config: SelectionConfig) -> list[Pool]:
        """What the rules leave for each document, searched for by its query; more is searched where it is too few."""
        text_NE, image_NE = encode_documents(self.encoder, documents)
        searched: dict[Modality, np.ndarray] = {"image": image_NE, "text": text_NE}
        if queries is not documents:
            searched["text"] = encode_documents(self.encoder, [_texts_only(query) for query in queries])[0]
        items = [
            Item(text_E if text_E.any() else None, image_E if image_E.any() else None, document.metadata.get("row"))
            for document, text_E, image_E in zip(documents, text_NE, image_NE)
        ]
        pools: list[Pool] = [{} for _ in documents]
        pending, count = list(range(len(documents))), FIRST_CANDIDATES
        while pending:
            found = {name: self.memory.candidates(vectors[pending], count) for name, vectors in searched.items()}
            for place, number in enumerate(pending):
                ranked = {name: found[name][place] for name, vectors in searched.items() if vectors[number].any()}
                pools[number] = pool(items[number], ranked, config)
            if count >= min(len(self.memory), MOST_CANDIDATES):
                break
            pending = [number for number in pending if _lacks(pools[number], config)]
            count = min(_GROWTH * count, MOST_CANDIDATES)
        return pools


def _lacks(pooled: Pool, config: SelectionConfig) -> bool:
    return any(len(candidates) < config.per_modality for candidates in pooled.values())


def _texts_only(document: Document) -> Document:
    return Document(tuple(part for part in document.segments if isinstance(part, Text)) or (Text(""),))
