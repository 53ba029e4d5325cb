"""Retrieved documents for training examples, chosen once when shards are made (CM3Leon section 2.1)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from cm3.retrieval.memory import Memory
from cm3.retrieval.retriever import Retriever
from cm3.retrieval.select import SelectionConfig
from cm3.tokenizers.document import Document, TokenizedDocument


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
    """What stands in the contexts of training examples."""

    memory: str
    """Folder of the memory, made with the same tokenizers by `cm3 index build`."""
    encoder: str | None = None
    """The encoder that the memory was built with; null opens it by the name that is kept there."""
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    """How many documents, and which."""
    seed: int = 0
    """Seed of what selection draws."""


class Contexts:
    """Puts retrieved documents before training examples.

    Args:
        config: Where from, and which.
        tokenizer_hash: Of the examples.
        device: Where the encoder runs.

    Raises:
        ModelFilesError: there is no memory, or it is of another encoder.
        DataError: the memory was built with other tokenizers.
    """

    def __init__(self, config: RetrievalConfig, tokenizer_hash: str, device: str) -> None:
        memory = Memory.open(config.memory, tokenizer_hash=tokenizer_hash)
        self._retriever = Retriever(memory, memory.open_encoder(config.encoder, device), config.selection)
        self._seed = config.seed
        self.content = [memory.hash, asdict(config.selection), config.seed]
        """All that decides what is found, wherever memory and encoder lie."""

    def extended(
        self, documents: Sequence[Document], tokenized: Sequence[TokenizedDocument]
    ) -> list[TokenizedDocument]:
        """The examples behind what is retrieved for them: `T1 I1 T2 I2 text image`.

        What an example gets is a function of the seed, its raw row and the memory. `metadata["retrieved"]` counts
        the segments in front.

        Args:
            documents: The examples, which search.
            tokenized: The same, as they are to stand in the shards.
        """
        rngs = [self._generator(document) for document in documents]
        found = self._retriever.for_training(documents, rngs)
        memory = self._retriever.memory
        contexts = [[part for item in items for part in memory.document(item.row).segments] for items in found]
        return [
            TokenizedDocument((*context, *document.segments), {**document.metadata, "retrieved": len(context)})
            for context, document in zip(contexts, tokenized, strict=True)
        ]

    def _generator(self, document: Document) -> np.random.Generator:
        name = f"{self._seed} {document.metadata.get('row')}"
        return np.random.default_rng(list(hashlib.sha256(name.encode()).digest()))
