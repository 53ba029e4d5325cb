"""Shards: what was written comes back, without the tokenizers, and only with the right ones."""

import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cm3.data import shard_sums
from cm3.data.shard_sums import look_at_shard, share
from cm3.data.shards import ShardedDocuments, read_shard_metadata, shard_path, write_index, write_shard
from cm3.errors import DataError
from cm3.tokenizers.document import ImageCodes, TextTokens, TokenizedDocument
from cm3.tokenizers.document_ids import document_to_ids
from cm3.tokenizers.vocabulary import Vocabulary

ROOT = Path(__file__).resolve().parent.parent
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


def test_a_shard_ends_in_the_crc_of_all_before_it(tmp_path):
    path = shard_path(write(tmp_path, DOCUMENTS), 0)
    content = path.read_bytes()
    assert content[-16:] == f"\ncrc32 {zlib.crc32(content[:-16]):08x}\n".encode()
    assert content[-24:-16] == b"\xff\xff\xff\xff" + bytes(4)  # where Arrow ends
    state = look_at_shard(path)
    assert state.fault == "" and state.num_bytes == len(content) - 16


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    """The bytes of a shard."""
    return shard_path(write(tmp_path_factory.mktemp("whole"), DOCUMENTS), 0).read_bytes()


@given(data=st.data())
def test_any_changed_byte_is_found(whole, tmp_path_factory, data):
    place, change = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(1, 255))
    path = tmp_path_factory.getbasetemp() / "changed.arrow"
    path.write_bytes(whole[:place] + bytes([whole[place] ^ change]) + whole[place + 1 :])
    assert look_at_shard(path).fault
    read_shard_metadata(path)  # finds something or nothing, and does not fail


@given(data=st.data())
def test_any_end_that_is_missing_is_found_but_that_of_the_checksum_alone(whole, tmp_path_factory, data):
    size = data.draw(st.integers(0, len(whole) - 1).filter(lambda size: size != len(whole) - 16))
    path = tmp_path_factory.getbasetemp() / "cut.arrow"
    path.write_bytes(whole[:size])
    assert look_at_shard(path).fault == "is cut off, or its end is damaged"
    path.write_bytes(whole[:size] + bytes(len(whole) - size))  # a disk that lost its last blocks
    assert look_at_shard(path).fault


def test_damaged_shards_are_named_with_their_checksums_and_the_cure(tmp_path, capsys):
    folder = write(tmp_path, *([document] for document in DOCUMENTS))
    assert len(ShardedDocuments(folder, check=True)) == 4
    assert f"{folder}: 4 shards, 0.0 MB compared with checksums in " in capsys.readouterr().out
    path = shard_path(folder, 1)
    content = bytearray(path.read_bytes())
    column = content.index(np.int32(7).tobytes(), len(content) // 2)  # the one piece of its text
    content[column] ^= 1
    path.write_bytes(content)
    assert ShardedDocuments(folder)[1].segments == (text(6),), "without a look it is read as if nothing were"
    with pytest.raises(DataError) as caught:
        ShardedDocuments(folder, check=True)
    found, written = f"{zlib.crc32(content[:-16]):08x}", content[-9:-1].decode()
    assert str(caught.value) == (
        f"of the 4 shards of {folder} 1 cannot be trained on: {path} has the checksum {found}, but was written with "
        f"{written}; copy them again, or run `cm3 prepare {folder}/config.yaml --output {folder}`, which makes only "
        "these anew"
    )
    shard_path(folder, 3).unlink()
    with pytest.raises(DataError, match=r"2 cannot be trained on: .*1\.arrow has .*; .*3\.arrow is missing; copy"):
        ShardedDocuments(folder, check=True)


def test_what_takes_long_is_announced(tmp_path, monkeypatch, capsys):
    folder = write(tmp_path, DOCUMENTS[:2], DOCUMENTS[2:])
    monkeypatch.setattr(shard_sums, "_ANNOUNCED_BYTES", 1000)
    ShardedDocuments(folder, check=True)
    before, after = capsys.readouterr().out.splitlines()
    assert before == (
        f"{folder}: comparing 2 shards, 0.0 MB, with their checksums; data.check_shards=false leaves that out"
    )
    assert after.startswith(f"{folder}: 2 shards, 0.0 MB compared with checksums in ")


def test_shards_of_before_there_were_checksums_are_read_and_counted(tmp_path, capsys):
    folder = write(tmp_path, DOCUMENTS[:2], DOCUMENTS[2:])
    path = shard_path(folder, 0)
    path.write_bytes(path.read_bytes()[:-16])
    documents = ShardedDocuments(folder, check=True)
    assert [documents[i].segments for i in range(len(documents))] == [d.segments for d in DOCUMENTS]
    assert capsys.readouterr().out.endswith("; 1 of an earlier version have no checksum\n")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"00000\.arrow is cut off, or its end is damaged"):
        ShardedDocuments(folder, check=True)


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=9), st.integers(0, 20))
def test_processes_that_see_one_folder_share_it_and_every_copy_is_read(places, num_shards):
    for place in set(places):
        read = [range(num_shards)[share(places, number)] for number, other in enumerate(places) if other == place]
        assert sorted(number for part in read for number in part) == list(range(num_shards))


TWO_PROCESSES = """
import os, sys, types, torch.distributed as dist
from cm3.data.shards import ShardedDocuments
from cm3.errors import DataError
from cm3.data import shard_sums
from cm3.distributed import rank, world_size
looked, look = [], shard_sums.look_at_shard
shard_sums.look_at_shard = lambda path: looked.append(path.name) or look(path)
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=rank(), world_size=world_size())
for folder in sys.argv[2:]:
    try:
        ShardedDocuments(folder, check=True)
        print(sorted(looked))
    except DataError as error:
        print(error)
    looked.clear()
os.statvfs = lambda path: types.SimpleNamespace(f_fsid=rank())  # disks that were made alike, each with a copy
ShardedDocuments(sys.argv[2], check=True)
print(sorted(looked))
"""


def test_two_processes_read_a_half_each_and_both_hear_of_a_fault(tmp_path):
    good = write(tmp_path / "good", *([document] for document in DOCUMENTS))
    bad = write(tmp_path / "bad", *([document] for document in DOCUMENTS))
    shard_path(bad, 2).write_bytes(b"damaged")
    started = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, tmp_path / "rendezvous", good, bad],
            env={**os.environ, "RANK": str(number), "WORLD_SIZE": "2"},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    first, second = (process.communicate(timeout=300)[0].splitlines() for process in started)
    assert f"{good}: 4 shards, 0.0 MB compared with checksums" in first[0]
    assert first[1:2] == ["['00000.arrow', '00002.arrow']"] and second[:1] == ["['00001.arrow', '00003.arrow']"]
    assert "1 cannot be trained on" in first[2] and first[2] == second[1]
    assert first[4:] == second[2:] == [str([f"{number:05d}.arrow" for number in range(4)])]
