"""A prepared folder of scenes with the real tokenizers of `model_folder`, and a run of two steps that can draw."""

import dataclasses
from pathlib import Path

from tiny_run import tiny_run

from cm3.data.scenes import example
from cm3.data.shards import ShardedDocuments, shard_path, write_index, write_shard
from cm3.model.config import ModelConfig
from cm3.tokenizers.document import Document, DocumentTokenizer, Image, Text
from cm3.training.config import DataConfig, ModelRun


def prepare_scenes(folder: Path, model_folder: Path) -> Path:
    """Write 24 scenes, and before the second of them a text without a picture and the first once more."""
    tokenizer = DocumentTokenizer.load(model_folder)
    scenes = [example(0, "train", index) for index in range(24)]
    documents = [
        Document((Text(scene.caption), Image(scene.image)), {"row": str(number)}) for number, scene in enumerate(scenes)
    ]
    again = dataclasses.replace(documents[0], metadata={"row": "again"})
    documents[1:1] = [Document((Text("no picture here"),), {"row": "text"}), again]
    write_shard(shard_path(folder, 0), tokenizer.tokenize(documents), {})
    write_index(folder, 1, tokenizer.hash)
    tokenizer.save(folder)
    return folder


def scenes_run(prepared: Path, output: Path, **changes) -> ModelRun:
    """Return the settings of a run of two steps on it, exported as it is."""
    model = ModelConfig(
        vocabulary_size=ShardedDocuments(prepared).vocabulary.size,
        width=32,
        num_layers=1,
        num_heads=2,
        max_positions=96,
        dropout=0.1,
    )
    settings = {
        "data": DataConfig(train=str(prepared), validation=str(prepared), sequence_length=96),
        "model": model,
        "steps": 2,
        "evaluation_interval": 0,
        "checkpoint_interval": 0,
        "export_precision": "fp32",
    }
    return tiny_run(prepared, output, **settings | changes)
