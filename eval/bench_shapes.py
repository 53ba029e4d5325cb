"""What the benchmarks of training run on: models of named sizes, and random documents such as each of them reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from cm3.data.shards import ShardedDocuments, shard_path, write_index, write_shard
from cm3.errors import ConfigError
from cm3.model.config import ModelConfig, named_size
from cm3.tokenizers.document import VOCABULARY_FILE, ImageCodes, TextTokens, TokenizedDocument
from cm3.tokenizers.vocabulary import Vocabulary

SIZES = ("demo", "350m", "760m", "7b")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model, the documents that it reads, and the rows of a step on one device."""

    model: ModelConfig
    vocabulary: Vocabulary
    longest_caption: int
    """Pieces; captions are as long as this or shorter, all lengths alike."""
    image_side: int
    """Codes in a row, and in a column, of a picture."""
    documents: int
    """Documents that are made."""
    sequence_length: int
    rows: int
    packing: Literal["documents", "stream"]
    """As the config of the size has it, see `PackedLoader`."""


def shape(size: str) -> Shape:
    """The demo's transformer (`configs/demo/model.yaml`), or a published size with the paper's documents and rows.

    Raises:
        ConfigError: for an unknown size.
    """
    if size not in SIZES:
        raise ConfigError(f"size {size!r} is unknown; choose one of {', '.join(SIZES)}")
    if size == "demo":
        vocabulary = Vocabulary.build(512, 1024, num_sentinels=64)
        model = ModelConfig(
            vocabulary_size=vocabulary.size,
            width=192,
            num_layers=6,
            num_heads=6,
            feed_forward_width=512,
            max_positions=512,
            activation="swiglu",
            position="rope",
            qk_norm=True,
            init_std=0.02,
        )
        return Shape(
            model=model,
            vocabulary=vocabulary,
            longest_caption=28,
            image_side=8,
            documents=4096,
            sequence_length=512,
            rows=8,
            packing="documents",
        )
    vocabulary = Vocabulary.build(56_320, 8_192, num_sentinels=512)
    return Shape(
        model=named_size(size, vocabulary_size=vocabulary.size),
        vocabulary=vocabulary,
        longest_caption=17,
        image_side=32,
        documents=256,
        sequence_length=4096,
        rows={"350m": 8, "760m": 4, "7b": 1}[size],
        packing="stream",
    )


def write_documents(folder: Path, shape: Shape, seed: int) -> ShardedDocuments:
    """Make a prepared folder of captions and pictures of random tokens, and open it."""
    rng = np.random.default_rng(seed)
    text = shape.vocabulary.text_size
    codes = shape.vocabulary.image_range.size

    def document(number: int) -> TokenizedDocument:
        caption = rng.integers(4, text, rng.integers(1, shape.longest_caption, endpoint=True))  # 0 to 3 are special
        codes_HW = rng.integers(0, codes, (shape.image_side, shape.image_side))
        segments = (TextTokens(caption.astype(np.int32)), ImageCodes(codes_HW.astype(np.uint16)))
        return TokenizedDocument(segments, {"row": f"random:{number}"})

    write_shard(shard_path(folder, 0), [document(number) for number in range(shape.documents)], {})
    shape.vocabulary.save(folder / VOCABULARY_FILE)
    write_index(folder, 1, "of no tokenizer")
    return ShardedDocuments(folder)
