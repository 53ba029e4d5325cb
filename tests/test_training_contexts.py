"""Retrieved documents in prepared shards: which, where, how many, and that they depend on nothing else."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cm3.config import dump_config, load_config
from cm3.data.loader import PackedLoader
from cm3.data.shards import ShardedDocuments, shard_path
from cm3.data.sources import SourceConfig, open_source
from cm3.errors import ConfigError, DataError
from cm3.model.objective import ObjectiveConfig
from cm3.retrieval.memory import Memory
from cm3.retrieval.select import SelectionConfig
from cm3.tokenizers.document import DocumentTokenizer
from cm3.training.contexts import RetrievalConfig
from cm3.training.prepare import PrepareConfig, run

COUNT = 24


@pytest.fixture(scope="module")
def config(model_folder, retrieval_folder, tmp_path_factory) -> PrepareConfig:
    """The rows that are the memory too, two documents before each."""
    return PrepareConfig(
        data=SourceConfig(kind="jsonl", path=str(retrieval_folder / "rows.jsonl")),
        text_tokenizer=str(model_folder),
        image_tokenizer=str(model_folder),
        num_sentinels=16,
        rows_per_shard=10,
        batch_size=7,
        retrieval=RetrievalConfig(memory=str(retrieval_folder / "memory")),
        output=str(tmp_path_factory.mktemp("prepared") / "two"),
    )


@pytest.fixture(scope="module")
def documents(config) -> ShardedDocuments:
    return ShardedDocuments(run(config))


@pytest.fixture(scope="module")
def memory(retrieval_folder) -> Memory:
    return Memory.open(retrieval_folder / "memory")


def retrieved_rows(documents, memory) -> list[list[int]]:
    """For each example the memory's rows of the documents in front."""
    pairs = [memory.document(row).segments for row in range(COUNT)]
    found = []
    for number in range(len(documents)):
        document = documents[number]
        context = document.segments[: document.metadata["retrieved"]]
        found.append([pairs.index(context[start : start + 2]) for start in range(0, len(context), 2)])
    return found


def test_documents_stand_before_the_example_and_are_counted(documents, memory, config, model_folder):
    examples = DocumentTokenizer.load(model_folder).tokenize(list(open_source(config.data)))
    assert len(documents) == COUNT
    for number, rows in enumerate(retrieved_rows(documents, memory)):
        assert len(rows) == 2 == len(set(rows))
        assert documents[number].segments[4:] == examples[number].segments and len(documents[number].segments) == 6
        assert documents[number].metadata == {"row": examples[number].metadata["row"], "retrieved": 4}
        assert number not in rows  # never the example itself
    assert len({tuple(rows) for rows in retrieved_rows(documents, memory)}) > COUNT // 2


def test_what_an_example_gets_depends_on_its_row_and_the_seed_alone(documents, memory, config, tmp_path):
    other = replace(config, batch_size=64, num_processes=2, output=str(tmp_path / "again"))
    again = run(other)
    for number in range(3):
        assert shard_path(again, number).read_bytes() == shard_path(config.output, number).read_bytes()
    part = replace(config, data=replace(config.data, limit=5), output=str(tmp_path / "part"))
    expected = retrieved_rows(documents, memory)
    assert retrieved_rows(ShardedDocuments(run(part)), memory) == expected[:5]
    assert config.retrieval is not None
    other = replace(config, retrieval=replace(config.retrieval, seed=1), output=str(tmp_path / "seed"))
    seeded = ShardedDocuments(run(other))
    assert sum(rows != before for rows, before in zip(retrieved_rows(seeded, memory), expected)) > COUNT // 2
    assert [seeded[number].segments[4:] for number in range(COUNT)] == [
        documents[number].segments[4:] for number in range(COUNT)
    ]


def test_the_uniform_distribution_leaves_some_examples_alone(config, retrieval_folder, memory, tmp_path):
    selection = SelectionConfig(num_documents=3, distribution="uniform")
    retrieval = RetrievalConfig(memory=str(retrieval_folder / "memory"), selection=selection)
    documents = ShardedDocuments(run(replace(config, retrieval=retrieval, output=str(tmp_path))))
    counts = [len(rows) for rows in retrieved_rows(documents, memory)]
    assert set(counts) == {0, 1, 2, 3}
    alone = documents[counts.index(0)]
    assert len(alone.segments) == 2 and alone.metadata["retrieved"] == 0
    assert documents.num_retrieved_ids(counts.index(0)) == 0


def test_the_loader_weights_retrieved_documents(documents):
    objective = ObjectiveConfig(name="causal", retrieved_loss_weight=0.25)
    length = int(documents.lengths.max())
    assert 2 * documents.lengths.min() > length  # so that a row holds one document
    loader = PackedLoader(documents, documents.vocabulary, objective, sequence_length=length, rows=1, evaluation=True)
    numbers = {documents.ids(number).tobytes(): number for number in range(COUNT)}
    for batch in loader:
        is_document_T = batch["document_ids_BT"][0] == 0
        number = numbers.pop(batch["ids_BT"][0][is_document_T].numpy().tobytes())
        own = documents[number].segments[4:]
        own_ids = len(own[0].tokens) + 1 + own[1].codes_HW.size + 1
        expected = np.full(documents.lengths[number], 0.25)
        expected[0], expected[-own_ids:] = 0.0, 1.0
        assert batch["weights_BT"][0][is_document_T].tolist() == expected.tolist()
    assert not numbers


def test_a_memory_may_move_but_another_one_is_refused(config, retrieval_folder, tmp_path):
    shutil.copytree(retrieval_folder / "memory", tmp_path / "memory")
    assert config.retrieval is not None
    settings = replace(config, retrieval=replace(config.retrieval, memory=str(tmp_path / "memory")))
    settings = replace(settings, output=str(tmp_path / "prepared"))
    path = shard_path(run(settings), 0)
    before = path.stat().st_mtime_ns
    moved = (tmp_path / "memory").rename(tmp_path / "moved")
    settings = replace(settings, retrieval=replace(settings.retrieval, memory=str(moved)))
    assert shard_path(run(settings), 0).stat().st_mtime_ns == before

    memory = Memory.open(moved)
    used = {row for rows in retrieved_rows(ShardedDocuments(settings.output), memory) for row in rows}
    memory.delete([min(used)])
    with pytest.raises(ConfigError, match=r"prepared with other settings \(other memory\); choose another output"):
        run(settings)
    settings = replace(settings, output=str(tmp_path / "deleted"))
    assert min(used) not in {row for rows in retrieved_rows(ShardedDocuments(run(settings)), memory) for row in rows}

    shutil.rmtree(moved)
    source = open_source(replace(config.data, limit=20))
    Memory.build(source, DocumentTokenizer.load(config.output), memory.open_encoder(), moved)
    settings = replace(settings, retrieval=replace(settings.retrieval, encoder=memory.encoder_name))
    with pytest.raises(ConfigError, match=r"\(.*other memory\)"):
        run(settings)
    with pytest.raises(ConfigError, match=r"\(retrieval: \{.*\} there, null now\)"):
        run(replace(settings, retrieval=None))


def test_retrieval_is_set_in_yaml_and_on_the_command_line(config, tmp_path):
    path = tmp_path / "prepare.yaml"
    path.write_text(dump_config(config, stage="prepare"))
    assert load_config(PrepareConfig, path) == config
    words = ["--retrieval.selection.num_documents", "1", "--retrieval.selection.distribution", "uniform"]
    assert config.retrieval is not None
    selection = SelectionConfig(num_documents=1, distribution="uniform")
    assert load_config(PrepareConfig, path, words).retrieval == replace(config.retrieval, selection=selection)
    with pytest.raises(ConfigError, match=r"retrieval\.selection\.num_docs.*did you mean"):
        load_config(PrepareConfig, path, ["--retrieval.selection.num_docs", "1"])
    assert load_config(PrepareConfig, path, ["--retrieval", "null"]).retrieval is None


def test_a_memory_of_other_tokenizers_is_refused(config, tmp_path):
    with pytest.raises(DataError, match="was built with tokenizers .*; build the memory with this model's"):
        run(replace(config, num_sentinels=8, output=str(tmp_path)))
    assert not list(Path(tmp_path).iterdir())
