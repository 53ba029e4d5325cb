"""Memories: what they hold, resuming, appending, deleting, what is refused; and retrieval from them without leaks."""

import json
from dataclasses import replace

import numpy as np
import pytest
from tiny_retrieval import HashEncoder

from cm3.data.sources import SourceConfig, open_source
from cm3.errors import ConfigError, DataError, ModelFilesError
from cm3.retrieval import parts
from cm3.retrieval.encoder import document_vectors, encode_documents
from cm3.retrieval.memory import Memory
from cm3.retrieval.retriever import Retriever
from cm3.retrieval.select import SelectionConfig, similarity
from cm3.tokenizers.document import Document, DocumentTokenizer, Text

SCENES = SourceConfig(kind="scenes", limit=14, seed=3)
ENCODER = HashEncoder()


@pytest.fixture(scope="module")
def tokenizer(model_folder):
    return DocumentTokenizer.load(model_folder)


def build(folder, tokenizer, config=SCENES, **settings):
    settings = {"rows_per_part": 5, "batch_size": 3, **settings}
    return Memory.build(open_source(config), tokenizer, ENCODER, folder, **settings)


@pytest.fixture(scope="module")
def memory(tmp_path_factory, tokenizer):
    """14 scenes in parts of 5, 5 and 4."""
    return build(tmp_path_factory.mktemp("memory") / "scenes", tokenizer, encoder_name="tiny")


@pytest.fixture(scope="module")
def documents():
    return list(open_source(SCENES))


def test_a_memory_holds_what_the_source_has(memory, documents, tokenizer):
    memory = Memory.open(memory.folder, encoder=ENCODER, tokenizer_hash=tokenizer.hash)
    assert len(memory) == 14 and memory.rows.tolist() == list(range(14)) and memory.encoder_name == "tiny"
    for row in (0, 4, 5, 13):
        assert memory.document(row).segments == tokenizer.tokenize([documents[row]])[0].segments
        assert memory.document(row).metadata == documents[row].metadata == {"row": f"scenes/train:{row}"}
    assert memory.find(["scenes/train:6", "scenes/train:2", "other"]) == [2, 6]
    with pytest.raises(IndexError, match="row 14 was asked for"):
        memory.document(14)


def test_search_is_by_the_mixed_vectors(memory, documents):
    vectors_ME = document_vectors(ENCODER, documents)
    scores_NK, rows_NK = memory.search(vectors_ME, 3)
    assert rows_NK[:, 0].tolist() == list(range(14)) and np.allclose(scores_NK[:, 0], 1, atol=2e-3)
    expected = np.sort(vectors_ME @ vectors_ME.T, axis=1)[:, ::-1][:, :3]
    assert np.allclose(scores_NK, expected, atol=2e-3)  # the parts hold half precision
    text_NE, image_NE = encode_documents(ENCODER, documents)
    first = next(memory.candidates(vectors_ME[5:6], 2)[0])
    assert (first.row, first.name) == (5, "scenes/train:5")
    assert np.allclose(first.text_E, text_NE[5], atol=1e-3) and np.allclose(first.image_E, image_NE[5], atol=1e-3)


def test_an_interrupted_build_goes_on(tmp_path, tokenizer, memory, monkeypatch):
    make, made = parts.PartWriter.make, []

    def fail_in_the_third(writer, index):
        if index == 2:
            raise KeyboardInterrupt
        return make(writer, index)

    monkeypatch.setattr(parts.PartWriter, "make", fail_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "new", tokenizer)
    with pytest.raises(ModelFilesError, match="holds no finished memory"):
        Memory.open(tmp_path / "new")
    monkeypatch.setattr(parts.PartWriter, "make", make)
    write_vectors = parts.write_vectors
    monkeypatch.setattr(
        parts, "write_vectors", lambda path, *rest: made.append(path.name) or write_vectors(path, *rest)
    )
    resumed = build(tmp_path / "new", tokenizer)
    assert made == ["00002.arrow"]
    queries_NE = ENCODER.encode_texts(["a", "b"])
    assert all(np.array_equal(a, b) for a, b in zip(resumed.search(queries_NE, 14), memory.search(queries_NE, 14)))
    with pytest.raises(DataError, match="holds a finished memory; append to it"):
        build(tmp_path / "new", tokenizer)


def test_parts_of_other_content_are_made_anew(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(Memory, "_open_index", lambda memory: exit("killed before the index"))
    with pytest.raises(SystemExit):
        build(tmp_path, tokenizer)
    monkeypatch.undo()
    other = build(tmp_path, tokenizer, replace(SCENES, seed=4))
    expected = tokenizer.tokenize(list(open_source(replace(SCENES, seed=4))))
    assert [other.document(row).segments for row in range(14)] == [document.segments for document in expected]


def test_several_processes_make_the_same_memory(tmp_path, tokenizer, memory):
    build(tmp_path / "new", tokenizer, num_processes=2)
    for name in ("shards/00000.arrow", "shards/00002.arrow", "vectors/00001.arrow", "index/vectors.f32"):
        assert (tmp_path / "new" / name).read_bytes() == (memory.folder / name).read_bytes()


def test_append_and_delete(tmp_path, tokenizer):
    memory = build(tmp_path, tokenizer, replace(SCENES, limit=6))
    more = list(open_source(replace(SCENES, limit=7, seed=8)))
    assert memory.append(open_source(replace(SCENES, limit=7, seed=8)), tokenizer, ENCODER) == (range(6, 13), 0)
    queries_NE = document_vectors(ENCODER, more)
    assert memory.search(queries_NE, 1)[1][:, 0].tolist() == list(range(6, 13))
    assert (memory.delete([8, 0, 8]), memory.delete([9, 0])) == (2, 1)
    for opened in (memory, Memory.open(tmp_path)):
        assert opened.rows.tolist() == [1, 2, 3, 4, 5, 6, 7, 10, 11, 12]
        scores_NK, rows_NK = opened.search(queries_NE, 12)
        assert rows_NK[[0, 4], 0].tolist() == [6, 10] and not {0, 8, 9} & set(rows_NK.ravel().tolist())
        assert (rows_NK[:, 10:] == -1).all()
        assert opened.find(["scenes/train:2"]) == [2]  # the appended one of this name, row 8, is deleted
    with pytest.raises(DataError, match="row 13 is not in .* rows 0 to 12"):
        memory.delete([13])
    for rows, message in (([8], r"row 8 was deleted from .* before"), ([0, 9], "all 2 rows were deleted")):
        with pytest.raises(DataError, match=message):
            memory.delete(rows)
    assert memory.delete(range(13)) == 10
    assert len(memory) == 0 and (memory.search(queries_NE, 2)[1] == -1).all()


def forbid_reading(monkeypatch):
    monkeypatch.setattr(DocumentTokenizer, "tokenize", lambda *_: pytest.fail("rows were read again"))


def test_append_leaves_out_what_is_there(tmp_path, tokenizer, documents, monkeypatch):
    memory = build(tmp_path, tokenizer, replace(SCENES, limit=6))
    ten = open_source(replace(SCENES, limit=10))
    assert memory.append(ten, tokenizer, ENCODER) == (range(6, 10), 6)
    whole = build(tmp_path / "whole", tokenizer, replace(SCENES, limit=10))
    for opened in (memory, Memory.open(tmp_path)):
        assert [opened.metadata(row)["row"] for row in range(10)] == [f"scenes/train:{row}" for row in range(10)]
        queries_NE = document_vectors(ENCODER, documents)
        for found, expected in zip(opened.search(queries_NE, 10), whole.search(queries_NE, 10), strict=True):
            assert np.array_equal(found, expected)
    before = memory.hash
    with monkeypatch.context() as patched:
        forbid_reading(patched)
        with pytest.raises(DataError, match="holds all 10 documents of scenes already; there is none to add"):
            Memory.open(tmp_path).append(ten, tokenizer, ENCODER)
    with pytest.raises(DataError, match="holds all 4 documents of scenes already"):  # the rows are cut in other parts
        memory.append(open_source(replace(SCENES, limit=4)), tokenizer, ENCODER)
    assert (len(memory), Memory.open(tmp_path).hash) == (10, before)
    memory.delete([2, 7])
    assert memory.append(ten, tokenizer, ENCODER) == (range(10, 12), 8)
    assert [memory.metadata(row)["row"] for row in (10, 11)] == ["scenes/train:2", "scenes/train:7"]


def test_an_interrupted_append_goes_on(tmp_path, tokenizer, monkeypatch):
    memory = build(tmp_path, tokenizer, replace(SCENES, limit=6))
    with monkeypatch.context() as patched:
        patched.setattr("cm3.retrieval.memory.write_index", lambda *_: exit("killed before the index of shards"))
        with pytest.raises(SystemExit):
            memory.append(open_source(SCENES), tokenizer, ENCODER)
    forbid_reading(monkeypatch)
    memory = Memory.open(tmp_path)
    assert len(memory) == 6
    assert memory.append(open_source(SCENES), tokenizer, ENCODER) == (range(6, 14), 6)


def test_a_folder_with_other_things_is_no_place_for_a_memory(tmp_path, tokenizer):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"")
    tokenizer.save(tmp_path / "prepared")  # as `cm3 prepare` leaves it
    (tmp_path / "prepared" / "shards").mkdir()
    (tmp_path / "file").write_text("")
    for name, message in (
        ("photos", "photos holds other things, such as cat.png; choose a new or empty folder"),
        ("prepared", "prepared holds other things, such as "),
        ("file", "file is a file, not a folder"),
    ):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(DataError, match=message):
            build(tmp_path / name, tokenizer)
        assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".DS_Store").write_text("")
    assert len(build(tmp_path / "empty", tokenizer, replace(SCENES, limit=2))) == 2


def test_an_index_that_lags_behind_is_made_anew(tmp_path, tokenizer, documents):
    memory = build(tmp_path, tokenizer)
    settings = json.loads((tmp_path / "memory.json").read_text())
    (tmp_path / "memory.json").write_text(json.dumps(settings | {"deleted": [5]}))  # killed before the index
    rows_NK = Memory.open(tmp_path).search(document_vectors(ENCODER, documents), 14)[1]
    assert 5 not in rows_NK and 5 in memory.search(document_vectors(ENCODER, documents), 14)[1]


def test_what_does_not_fit_a_memory_is_refused(tmp_path, tokenizer, memory):
    other = HashEncoder()
    other.hash = "another"
    with pytest.raises(ModelFilesError, match=r"built with encoder 0123456789ab \(tiny\), asked for another"):
        Memory.open(memory.folder, encoder=other)
    with pytest.raises(ModelFilesError, match="use that encoder"):
        Retriever(memory, other)
    with pytest.raises(DataError, match="asked for another; build the memory with this model's tokenizers"):
        Memory.open(memory.folder, tokenizer_hash="another")
    with pytest.raises(ConfigError, match="rows_per_part=0"):
        build(tmp_path, tokenizer, rows_per_part=0)
    rows = [{"text": "good", "image": "missing.png"}, {"text": "bad", "image": "missing.png"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match="max_bad_fraction"):
        build(tmp_path / "new", tokenizer, SourceConfig(kind="jsonl", path=str(tmp_path / "rows.jsonl")))


def test_texts_alone_make_a_memory_with_metadata(tmp_path, tokenizer):
    rows = [{"text": f"number {index}", "topic": {"id": index}} for index in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path = str(tmp_path / "rows.jsonl")
    config = SourceConfig(kind="jsonl", path=path, image_column=None, metadata_columns=("topic",))
    memory = build(tmp_path / "memory", tokenizer, config)
    candidate = next(memory.candidates(ENCODER.encode_texts(["number 2"]), 1)[0])
    assert (candidate.row, candidate.image_E) == (2, None) and candidate.score == pytest.approx(1, abs=1e-3)
    assert memory.metadata(2)["topic"] == {"id": 2}


def rngs(count):
    return [np.random.default_rng((0, number)) for number in range(count)]


def test_no_example_gets_itself_or_a_copy(memory, documents, tmp_path, tokenizer):
    """The leakage test: over a whole set that is also the memory, under its own names and under others."""
    config = SelectionConfig(num_documents=4)
    renamed = [replace(document, metadata={}) for document in documents]
    text_NE, image_NE = encode_documents(ENCODER, documents)
    for asked in (documents, renamed):
        found = Retriever(memory, ENCODER, config).for_training(asked, rngs(14))
        for number, candidates in enumerate(found):
            assert len(candidates) == 4 == len({candidate.row for candidate in candidates})
            for candidate in candidates:
                assert candidate.row != number
                assert max(candidate.text_E @ text_NE[number], candidate.image_E @ image_NE[number]) <= 0.9
                assert all(other is candidate or similarity(other, candidate) <= 0.9 for other in candidates)
    dropping_nothing = Retriever(memory, ENCODER, replace(config, query_dropout=0.0)).for_training(documents, rngs(14))
    assert [[c.row for c in row] for row in dropping_nothing] != [[c.row for c in row] for row in found]


def test_what_an_example_gets_does_not_depend_on_the_others(memory, documents):
    retriever = Retriever(memory, ENCODER, SelectionConfig(num_documents=2, distribution="uniform"))
    together = retriever.for_training(documents, rngs(14))
    alone = retriever.for_training(documents[5:6], rngs(14)[5:6])[0]
    assert [candidate.row for candidate in alone] == [candidate.row for candidate in together[5]]
    assert {len(candidates) for candidates in together} == {0, 1, 2}


def test_prompts_get_the_best_of_what_they_have(memory, documents):
    retriever = Retriever(memory, ENCODER)
    (found,) = retriever.for_prompts([Document((Text("a red circle"),))], 2)
    scores_NK, rows_NK = memory.search(ENCODER.encode_texts(["a red circle"]), 2)
    assert [candidate.row for candidate in found] == rows_NK[0].tolist()
    picture = Document(documents[3].segments[1:])
    (found,) = retriever.for_prompts([picture], 2)
    assert len(found) == 2 and 3 not in [candidate.row for candidate in found] and found[0].score >= found[1].score


def test_more_is_searched_where_the_first_results_are_copies(memory, documents, monkeypatch):
    monkeypatch.setattr("cm3.retrieval.retriever.FIRST_CANDIDATES", 1)
    retriever = Retriever(memory, ENCODER, SelectionConfig(num_documents=4))
    assert [len(found) for found in retriever.for_training(documents, rngs(14))] == [4] * 14
    monkeypatch.setattr("cm3.retrieval.retriever.MOST_CANDIDATES", 1)
    assert max(len(found) for found in retriever.for_training(documents, rngs(14))) <= 2
