"""Shards: what was written comes back, without the tokenizers, and only with the right ones."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cm3.data.shards import ShardedDocuments, read_shard_metadata, shard_path, write_index, write_shard
from cm3.errors import DataError
from cm3.tokenizers.document import ImageCodes, TextTokens, TokenizedDocument
from cm3.tokenizers.document_ids import document_to_ids
from cm3.tokenizers.vocabulary import Vocabulary

VOCABULARY = Vocabulary.build(text_size=300, image_codes=256, num_sentinels=8)
HASH = "a" * 64


def text(*tokens: int) -> TextTokens:
    return TextTokens(np.array(tokens, dtype=np.int32))


def image(height: int, width: int) -> ImageCodes:
    return ImageCodes(np.arange(height * width, dtype=np.uint16).reshape(height, width))


def write(folder, *shards):
    for number, documents in enumerate(shards):
        write_shard(shard_path(folder, number), documents, {"made_by": "test"})
    VOCABULARY.save(folder / "vocabulary.json")
    write_index(folder, len(shards), HASH)
    return folder


DOCUMENTS = [
    TokenizedDocument((text(4, 5, 6), image(2, 3)), {"row": "a:0"}),
    TokenizedDocument((text(7),)),
    TokenizedDocument((image(4, 4), text(), text(9, 10), image(1, 2)), {"retrieved": 2}),
    TokenizedDocument((image(2, 2),)),
]


def test_documents_come_back_in_order_across_shards(tmp_path):
    documents = ShardedDocuments(write(tmp_path, DOCUMENTS[:2], [], DOCUMENTS[2:]))
    assert [documents[i].segments for i in range(len(documents))] == [d.segments for d in DOCUMENTS]
    assert documents[0].metadata == {"row": "a:0", "retrieved": 0}
    with pytest.raises(IndexError, match="document 4 was asked for"):
        documents[4]


def test_ids_and_lengths_are_those_of_the_layout(tmp_path):
    documents = ShardedDocuments(write(tmp_path, DOCUMENTS))
    for index, document in enumerate(DOCUMENTS):
        expected = document_to_ids(document, VOCABULARY)
        np.testing.assert_array_equal(documents.ids(index), expected)
        assert documents.lengths[index] == len(expected)


def test_retrieved_context_ends_before_the_first_id_of_the_rest(tmp_path):
    documents = ShardedDocuments(write(tmp_path, DOCUMENTS))
    assert documents.num_retrieved_ids(0) == 0
    count = documents.num_retrieved_ids(2)  # </s> image <break> nothing <break>
    assert count == 1 + 16 + 1 + 0 + 1
    assert documents.ids(2)[count] == 9


segments = st.lists(
    st.builds(lambda t: text(*t), st.lists(st.integers(0, 2**31 - 1), max_size=5))
    | st.builds(image, st.integers(1, 3), st.integers(1, 3)),
    min_size=1,
    max_size=5,
)


@given(st.lists(segments, min_size=1, max_size=4))
def test_any_segments_round_trip(tmp_path_factory, documents):
    written = [TokenizedDocument(tuple(parts)) for parts in documents]
    read = ShardedDocuments(write(tmp_path_factory.mktemp("shards"), written))
    assert [read[i].segments for i in range(len(read))] == [document.segments for document in written]


def test_codes_are_stored_in_two_bytes_and_open_with_datasets(tmp_path):
    from datasets import Dataset

    write(tmp_path, DOCUMENTS)
    table = Dataset.from_file(str(shard_path(tmp_path, 0)))
    assert table.features["codes"].feature.dtype == "uint16"
    assert table.features["text"].feature.dtype == "int32"
    assert table[0]["codes"] == [0, 1, 2, 3, 4, 5]


def test_shards_of_other_tokenizers_are_refused(tmp_path):
    write(tmp_path, DOCUMENTS)
    assert ShardedDocuments(tmp_path, HASH).tokenizer_hash == HASH
    with pytest.raises(DataError, match="prepared with tokenizers aaaaaaaaaaaa, asked for bbbbbbbbbbbb"):
        ShardedDocuments(tmp_path, "b" * 64)


def test_a_folder_that_is_not_complete_is_refused(tmp_path):
    with pytest.raises(DataError, match="no complete shards.*cm3 prepare"):
        ShardedDocuments(tmp_path)
    write(tmp_path, DOCUMENTS[:1], DOCUMENTS[1:])
    shard_path(tmp_path, 1).unlink()
    with pytest.raises(DataError, match=r"00001\.arrow is missing or damaged"):
        ShardedDocuments(tmp_path)


def test_a_damaged_shard_is_refused_and_has_no_metadata(tmp_path):
    write(tmp_path, DOCUMENTS)
    assert read_shard_metadata(shard_path(tmp_path, 0)) == {"made_by": "test"}
    shard_path(tmp_path, 0).write_bytes(b"damaged")
    assert read_shard_metadata(shard_path(tmp_path, 0)) is None
    with pytest.raises(DataError, match="missing or damaged"):
        ShardedDocuments(tmp_path)


def test_an_empty_folder_and_another_format_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"no documents; see its report\.json"):
        ShardedDocuments(write(tmp_path / "empty", []))
    folder = write(tmp_path / "old", DOCUMENTS)
    index = folder / "shards" / "index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "format_version": 99}))
    with pytest.raises(DataError, match="shards of format 99, this version reads 1"):
        ShardedDocuments(folder)


def test_a_shard_that_fails_leaves_nothing_behind(tmp_path):
    class Broken(list):
        def __iter__(self):
            yield DOCUMENTS[0]
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write_shard(shard_path(tmp_path, 0), Broken(), {})
    assert not list(tmp_path.rglob("*.arrow"))
