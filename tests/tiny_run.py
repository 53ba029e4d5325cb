"""A prepared folder of a few documents and the settings of a training run of seconds, for the tests of training."""

import json
import shutil
from pathlib import Path

import numpy as np

from cm3.data.shards import ShardedDocuments, shard_path, write_index, write_shard
from cm3.generation.settings import SamplingSettings
from cm3.model.config import ModelConfig
from cm3.model.pretrained import TOKENIZER_FILES
from cm3.tokenizers.document import ImageCodes, TextTokens, TokenizedDocument
from cm3.tokenizers.vocabulary import Vocabulary
from cm3.training.config import DataConfig, ModelRun
from cm3.training.optimizer import OptimizerConfig

VOCABULARY = Vocabulary.build(40, 16, num_sentinels=4)
TOKENIZER_HASH = "0123456789abcdef" * 4


def prepare(folder: Path, num_documents: int = 48) -> Path:
    """Write documents of a caption and a picture whose codes the caption decides, as `cm3 prepare` would."""
    rng = np.random.default_rng(0)
    documents = []
    for number in range(num_documents):
        word = int(rng.integers(4, 20))
        caption = np.full(int(rng.integers(2, 5)), word, dtype=np.int32)
        codes_HW = np.full((2, 2), word % 16, dtype=np.uint16)
        documents.append(TokenizedDocument((TextTokens(caption), ImageCodes(codes_HW)), {"row": str(number)}))
    write_shard(shard_path(folder, 0), documents, {})
    write_index(folder, 1, TOKENIZER_HASH)
    for name in TOKENIZER_FILES:
        (folder / name).write_bytes(name.encode())
    VOCABULARY.save(folder / "vocabulary.json")
    return folder


def mark_as_retrieved(prepared: Path, folder: Path, number: int) -> Path:
    """Copy a prepared folder; the caption of one document is now retrieved context, whose loss has its own weight."""
    shutil.copytree(prepared, folder)
    documents = ShardedDocuments(prepared)
    marked = [
        TokenizedDocument(documents[n].segments, {"row": str(n), "retrieved": int(n == number)})
        for n in range(len(documents))
    ]
    write_shard(shard_path(folder, 0), marked, {})
    return folder


def tiny_run(prepared: Path, output: Path, **changes) -> ModelRun:
    """Return the settings of a run of 12 steps with accumulation, dropout and an average of the weights."""
    settings = {
        "data": DataConfig(train=str(prepared), validation=str(prepared), sequence_length=32),
        "model": ModelConfig(
            vocabulary_size=VOCABULARY.size, width=32, num_layers=2, num_heads=2, max_positions=32, dropout=0.1
        ),
        "optimizer": OptimizerConfig(learning_rate=1e-2, warmup_steps=3),
        "generation": SamplingSettings(guidance_scale=2.0),
        "steps": 12,
        "batch_rows": 4,
        "micro_batch_rows": 2,
        "ema_decay": 0.9,
        "evaluation_interval": 6,
        "evaluation_rows": 4,
        "checkpoint_interval": 4,
        "log_interval": 1,
        "output": str(output),
    }
    return ModelRun(**settings | changes)


def losses(output: Path, split: str = "train", key: str = "loss") -> dict[int, float]:
    """Return the losses of a run by step."""
    lines = map(json.loads, (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {line["step"]: line[key] for line in lines if line["split"] == split}
