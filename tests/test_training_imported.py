"""An imported Chameleon is trained on: its own tokenizers prepare the data, its own layout writes them."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from process_group import process_group
from tiny_run import losses, tiny_run

from cm3.data.shards import ShardedDocuments
from cm3.data.sources import SourceConfig
from cm3.errors import ConfigError
from cm3.model.lora import LoRAConfig
from cm3.model.objective import ObjectiveConfig
from cm3.model.pretrained import load_model, read_model_config
from cm3.pipeline import CM3
from cm3.tokenizers.document import Document, DocumentTokenizer, Text
from cm3.training import prepare, train

pytest.importorskip("deepspeed")
pytest.importorskip("peft")
pytest.importorskip("transformers")

from chameleon_reference import BREAK, CODES, EOSS, FIRST_CODE, SEPARATOR, import_reading, picture, reading_chameleon

CAPTIONS = ["a red circle", "a blue square", "365 green stars"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with an imported model, `ours`, and data prepared with it, `data`: captions, instructions."""
    root = tmp_path_factory.mktemp("imported")
    ours = import_reading(reading_chameleon(), root, decoder=False)
    for number in range(len(CAPTIONS)):
        picture(number).save(root / f"{number}.png")
    turns = [
        {"role": "user", "content": [{"image": f"{number}.png"}, {"text": "What do you see?"}]}
        for number in range(len(CAPTIONS))
    ]
    rows = [
        {"turns": [turn, {"role": "assistant", "content": [{"text": caption}]}]}
        for turn, caption in zip(turns, CAPTIONS, strict=True)
    ]
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokenizers = {"text_tokenizer": str(ours), "image_tokenizer": str(ours)}
    prepare.run(
        prepare.PrepareConfig(
            data=SourceConfig(kind="instruct", path=str(root / "rows.jsonl")), output=str(root / "data"), **tokenizers
        )
    )
    with process_group():
        yield root


def run_of(folder, name, **changes):
    """Two steps from the imported weights."""
    settings = {
        "model": replace(read_model_config(folder / "ours"), dropout=0.1),
        "initialize_from": str(folder / "ours"),
        "objective": ObjectiveConfig(name="causal"),
        "precision": "fp32",
        "steps": 2,
        "ema_decay": 0.0,
        "evaluation_interval": 2,
        "checkpoint_interval": 2,
    }
    run = tiny_run(folder / "data", folder / name, **settings | changes)
    return replace(run, data=replace(run.data, sequence_length=160))


def test_prepared_documents_are_chameleons(folder):
    documents, tokenizer = ShardedDocuments(folder / "data"), DocumentTokenizer.load(folder / "ours")
    assert documents.tokenizer_hash == tokenizer.hash
    for index, caption in enumerate(CAPTIONS):
        ids = documents.ids(index)
        assert len(ids) == documents.lengths[index]
        assert ids[:2].tolist() == [0, BREAK] and ids[2 + CODES] == EOSS and ids[-1] == 2
        codes = tokenizer.image.encode([picture(index)])[0]
        assert ids[2 : 2 + CODES].tolist() == (FIRST_CODE + codes.astype(int)).tolist()
        [[start, stop]] = documents.answer_spans(index)
        assert ids[start - 1] == SEPARATOR
        assert tokenizer.text.decode(tokenizer.vocabulary.ids_to_text(ids[start:stop]).tolist()) == caption


def test_a_run_goes_on_from_the_imported_weights(folder):
    train.run(run_of(folder, "tuned"))
    values = losses(folder / "tuned", "validation")
    assert np.isfinite(list(values.values())).all() and values[2] < values[0]
    before, _ = load_model(folder / "ours", dtype=torch.float32)
    model = CM3.from_pretrained(folder / "tuned" / "model")
    after = model.transformer.state_dict()
    assert all(not torch.equal(tensor, after[name]) for name, tensor in before.state_dict().items())
    assert model.tokenizer.hash == DocumentTokenizer.load(folder / "ours").hash
    assert isinstance(model.complete("a red", max_new_tokens=5), Document)


def test_adapters_of_imported_weights(folder, tmp_path):
    train.run(run_of(folder, "adapted", lora=LoRAConfig(rank=2)))
    options = {"max_new_tokens": 8, "temperature": 0.0}
    plain = CM3.from_pretrained(folder / "ours")
    model = CM3.from_pretrained(folder / "ours", adapter=folder / "adapted" / "adapter")
    weights = model.transformer.state_dict()
    changed = [
        name for name, tensor in plain.transformer.state_dict().items() if not torch.equal(tensor, weights[name])
    ]
    assert changed and all("blocks" in name for name in changed)
    model.save_pretrained(tmp_path / "saved")
    saved = CM3.from_pretrained(tmp_path / "saved")
    expected = model.complete("a red", **options)
    assert saved.complete("a red", **options) == expected and isinstance(expected.segments[0], Text)
    assert saved.defaults == plain.defaults and (tmp_path / "saved" / "tokenizer.json").is_file()


def test_spans_cannot_be_masked(folder):
    with pytest.raises(ConfigError, match="has no sentinels .* use objective.name=causal to train such a model"):
        train.run(run_of(folder, "masked", objective=ObjectiveConfig()))
