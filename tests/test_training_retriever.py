"""Training of the retriever: tiny runs that learn, resume, and are refused."""

import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from cm3.config import load_config
from cm3.data.scenes import example
from cm3.data.sources import SourceConfig
from cm3.errors import ConfigError, DataError, ModelFilesError
from cm3.retrieval.clip import ClipConfig
from cm3.retrieval.encoder import open_encoder
from cm3.tokenizers.text import TextTokenizer, TextTokenizerConfig
from cm3.training import retriever
from cm3.training.optimizer import OptimizerConfig
from cm3.training.pairs import Pairs
from cm3.training.retriever import RetrieverRun, RetrieverState


@pytest.fixture(scope="module")
def text_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    captions = [example(0, "train", index).caption for index in range(40)]
    TextTokenizer.train(captions, TextTokenizerConfig(vocabulary_size=320)).save(folder / "tokenizer.model")
    return folder


def tiny_run(output, text_tokenizer, **changes):
    settings = {
        "data": SourceConfig(kind="scenes", limit=16),
        "validation": SourceConfig(kind="scenes", limit=8),
        "text_tokenizer": str(text_tokenizer),
        "clip": ClipConfig(
            vocabulary_size=TextTokenizer.load(text_tokenizer / "tokenizer.model").size,
            patch_size=16,
            width=16,
            image_layers=1,
            text_layers=1,
            num_heads=2,
            embedding_width=8,
        ),
        "steps": 6,
        "batch_size": 8,
        "optimizer": OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        "precision": "fp32",
        "log_interval": 2,
        "evaluation_interval": 3,
        "checkpoint_interval": 0,
        "output": str(output),
    }
    return RetrieverRun(**settings | changes)


def test_a_run_learns_and_writes_an_encoder(tmp_path, text_tokenizer, capsys):
    config = tiny_run(tmp_path, text_tokenizer, steps=60, log_interval=10, evaluation_interval=30)
    folder = retriever.run(config)
    printed = capsys.readouterr().out
    assert "pairs/s" in printed and "validation loss" in printed and f"wrote {folder}" in printed
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    train = [row for row in metrics if row["split"] == "train"]
    assert [row["step"] for row in train] == list(range(10, 61, 10))
    assert train[-1]["loss"] < 0.8 * train[0]["loss"]
    held_out = [row for row in metrics if row["split"] == "validation"]
    assert [row["step"] for row in held_out] == [30, 60] and held_out[1]["loss"] < held_out[0]["loss"]
    encoder = open_encoder(folder)
    scenes = [example(0, "train", index) for index in range(8)]
    text_NE = encoder.encode_texts([scene.caption for scene in scenes])
    nearest = (text_NE @ encoder.encode_images([scene.image for scene in scenes]).T).argmax(1)
    assert (nearest == np.arange(8)).mean() == pytest.approx(held_out[1]["text_to_image"], abs=0.13)
    assert load_config(RetrieverRun, tmp_path / "config.yaml") == config


def test_stopped_and_resumed_equals_uninterrupted(tmp_path, text_tokenizer, monkeypatch, capsys):
    expected = open_encoder(retriever.run(tiny_run(tmp_path / "whole", text_tokenizer))).hash
    part = tiny_run(tmp_path / "part", text_tokenizer)
    train_step = retriever.train_step

    def stop_in_fourth(state, *rest):
        if state.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(state, *rest)

    monkeypatch.setattr(retriever, "train_step", stop_in_fourth)
    assert retriever.run(part) is None
    assert "stopped by SIGTERM after step 4 of 6, saved in" in capsys.readouterr().out.splitlines()[-1]
    monkeypatch.setattr(retriever, "train_step", train_step)
    assert open_encoder(retriever.run(part)).hash == expected
    with pytest.raises(ModelFilesError, match="wrongly shaped"):
        retriever.run(replace(part, clip=replace(part.clip, embedding_width=4)))


def test_words_are_dropped_in_training_and_not_in_evaluation(tmp_path, text_tokenizer, monkeypatch):
    seen = []
    text_batch = retriever.text_batch
    monkeypatch.setattr(retriever, "text_batch", lambda texts, *rest: seen.append(texts) or text_batch(texts, *rest))
    config = tiny_run(tmp_path, text_tokenizer, word_dropout=0.5)
    pairs = Pairs(config.data, 64, 16).batch(8, seed=0, step=0)
    tokenizer = TextTokenizer.load(text_tokenizer / "tokenizer.model")
    state = RetrieverState(config, torch.device("cpu"))
    retriever.train_step(state, pairs, tokenizer, config)
    retriever.evaluate(state, pairs, tokenizer, config)
    dropped, whole = seen
    assert whole == [text for text, _ in pairs]
    assert sum(len(text.split()) for text in dropped) < 0.7 * sum(len(text.split()) for text in whole)


def test_batches_are_functions_of_seed_and_step_without_repeats():
    pairs = Pairs(SourceConfig(kind="scenes", limit=12), 32, max_in_memory=12)
    first = pairs.batch(12, seed=0, step=4)
    assert len({text for text, _ in first}) > 6 and first[0][1].shape == (32, 32, 3)
    again = Pairs(SourceConfig(kind="scenes", limit=12), 32, max_in_memory=0).batch(12, seed=0, step=4)
    assert all(a[0] == b[0] and np.array_equal(a[1], b[1]) for a, b in zip(first, again))
    assert [text for text, _ in pairs.batch(6, seed=0, step=5)] != [text for text, _ in first[:6]]


def test_a_bad_row_gives_way_to_the_next(tmp_path):
    for index in range(4):
        Image.new("RGB", (8, 8), (10 * index, 0, 0)).save(tmp_path / f"{index}.png")
        (tmp_path / f"{index}.txt").write_text(f"number {index}")
    (tmp_path / "2.png").write_bytes(b"broken")
    config = SourceConfig(kind="folder", path=str(tmp_path), max_bad_fraction=0.3)
    assert [Pairs(config, 8, 4)[index][0] for index in range(4)] == ["number 0", "number 1", "number 3", "number 3"]
    with pytest.raises(DataError, match="max_bad_fraction"):
        Pairs(replace(config, max_bad_fraction=0.0), 8, 4)[2]
    with pytest.raises(DataError, match="name text_columns and image_column"):
        Pairs(replace(config, image_column=None), 8, 4)


def test_impossible_settings_are_refused(tmp_path, text_tokenizer):
    for change, message in [
        ({"steps": 0}, "steps=0"),
        ({"batch_size": 1}, "one pair has nothing to differ from"),
        ({"word_dropout": 1.0}, "word_dropout=1.0"),
        ({"seed": -1}, "seed=-1; choose 0 to"),
    ]:
        with pytest.raises(ConfigError, match=message):
            tiny_run(tmp_path, text_tokenizer, **change)
    run = tiny_run(tmp_path, text_tokenizer)
    with pytest.raises(ConfigError, match=r"clip\.vocabulary_size=7, but .* pieces; write that number"):
        retriever.run(replace(run, clip=replace(run.clip, vocabulary_size=7)))
    with pytest.raises(DataError, match="has 16 rows, 32 are needed at a time"):
        retriever.run(replace(run, batch_size=32))
