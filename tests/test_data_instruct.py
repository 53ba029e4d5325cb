"""Instruction data: every fault by name, the way to shards and back, the report and the sheet."""

import json

import numpy as np
import PIL.Image
import pyarrow as pa
import pytest

from cm3.data.conditions import edge_map
from cm3.data.instruct import InstructFile
from cm3.data.instruct_report import check_file
from cm3.data.instruct_rows import ImageFile, InstructRow, RowError, parse_row
from cm3.data.instruct_sheet import write_sheet
from cm3.data.shards import ShardedDocuments, shard_path, write_index, write_shard
from cm3.data.sources import SourceConfig, open_source
from cm3.errors import ConfigError, DataError, RequestError
from cm3.tokenizers.document import DocumentTokenizer, Image, Text, TokenizedDocument
from cm3.tokenizers.instruct import ANSWER_CHARACTERS, ANSWERS, answer_spans, tokenize_examples
from cm3.training.prepare import PrepareConfig, run


def turn(role, *parts):
    return {"role": role, "content": [{"image" if part.endswith(".png") else "text": part} for part in parts]}


def row(*turns, **rest):
    """A row of turns that alternate; parts that end in .png are pictures."""
    sides = [turn("assistant" if number % 2 else "user", *parts) for number, parts in enumerate(turns)]
    return {"turns": sides, **rest}


VQA = row(["red.png", "which colour?"], ["red"], task="vqa", id="a/1")
EDIT = row(["red.png", "make it blue"], ["sub/blue.png"], task="edit")
TALK = row(["what is", "red.png"], ["a square"], ["and this?", "sub/blue.png"], ["another", "red.png"])


@pytest.fixture
def write(tmp_path):
    """Write rows, and the two pictures that they show; their file."""
    (tmp_path / "sub").mkdir()
    PIL.Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    PIL.Image.new("RGB", (20, 16), "blue").save(tmp_path / "sub" / "blue.png")

    def run(*rows):
        lines = [each if isinstance(each, str) else json.dumps(each) for each in rows]
        (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return tmp_path / "rows.jsonl"

    return run


@pytest.fixture(scope="module")
def tokenizer(model_folder) -> DocumentTokenizer:
    return DocumentTokenizer.load(model_folder)


def faults(line) -> list[str]:
    with pytest.raises(RowError) as caught:
        parse_row(line if isinstance(line, bytes) else json.dumps(line).encode())
    return list(caught.value.faults)


def test_a_row_is_read_and_written_back():
    value = {**TALK, "id": "x"}
    read = parse_row(b"\xef\xbb\xbf" + json.dumps(value).encode())
    assert read.turns[0] == (Text("what is"), ImageFile("red.png"))
    assert read.turns[3] == (Text("another"), ImageFile("red.png"))
    assert (read.task, read.id) == (None, "x")
    assert json.loads(read.to_json()) == value
    task = InstructRow(turns=((ImageFile("ü/1.png"), Text("„q“\n")), (Text("a"),)), task="vqa")
    assert parse_row(task.to_json().encode()) == task


def test_the_example_of_the_documentation_is_a_row():
    import cm3.data.instruct as module

    example = module.__doc__.partition("\n\n")[2].partition("\n\n")[0]
    assert parse_row(" ".join(example.split()).encode()).task == "vqa"


def changed(place, value):
    """VQA with another value at a place, a path of keys; None takes the key away."""
    copy = json.loads(json.dumps(VQA))
    target = copy
    for key in place[:-1]:
        target = target[key]
    if value is None:
        del target[place[-1]]
    else:
        target[place[-1]] = value
    return copy


PART = ("turns", 0, "content", 0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"not json", "not valid JSON (Expecting value: line 1 column 1 (char 0)); write one object a line, in UTF-8"),
        (b'{"turns": "\xff"}', "not valid JSON ('utf-8' codec can't decode byte 0xff"),
        (b"[" * 100_000, "not valid JSON (maximum recursion"),
        (b'{"id": "a", "id": "b"}', "not valid JSON (the key 'id' stands twice in one object)"),
        ([1], "a line must hold a JSON object with the key 'turns', found a list"),
        ({}, "turns must be a list of objects with 'role' and 'content', found no such key"),
        ({"turns": []}, "turns must be a list of objects with 'role' and 'content', found an empty list"),
        (changed(["turn"], 1), "unknown key 'turn'; did you mean 'turns'?"),
        (changed(["id"], 7), "id is a number; give a text that is not empty, or leave it out"),
        (changed(["task"], "vqaa"), "task is \"vqaa\"; did you mean 'vqa'?, or leave it out for a conversation"),
        (changed(["task"], ["vqa"]), 'task is ["vqa"]'),
        (changed(["turns", 0], "hello"), "turns[0] must be an object with 'role' and 'content', found a string"),
        (changed(["turns", 0, "from"], "x"), "turns[0]: unknown key 'from'; choose among role, content"),
        (changed(["turns", 0, "role"], "human"), "turns[0].role is \"human\", must be 'user'; turns are the user's"),
        (changed(["turns", 1, "role"], "user"), "turns[1].role is \"user\", must be 'assistant'"),
        (changed(["turns", 1, "role"], None), "turns[1].role is null, must be 'assistant'"),
        (changed(["turns", 1], None), "the turns end with the user's; add the assistant's answer, which is what is"),
        (changed(["turns", 1, "content"], "red"), "turns[1].content must be a list with a segment or more, such as ["),
        (changed(["turns", 1, "content"], []), "found an empty list"),
        (changed(PART, "red"), 'turns[0].content[0] must be {"text": ...} or {"image": ...}, found a string'),
        (changed(PART, {}), "turns[0].content[0] holds neither text nor image; give one of text and image"),
        (changed(PART, {"text": "a", "image": "b"}), "turns[0].content[0] holds text and image; give one of"),
        (changed(PART, {"txt": "a"}), "turns[0].content[0]: unknown key 'txt'; did you mean 'text'?"),
        (changed(PART, {"text": True}), "turns[0].content[0].text must be a string, found true"),
        (changed(PART, {"text": " \n"}), "turns[0].content[0].text is empty; fill it in or leave the segment out"),
        (changed(PART, {"text": "\ud83d"}), "turns[0].content[0].text holds half of a surrogate pair"),
        (changed(PART, {"image": 3}), "turns[0].content[0].image must be a string, found a number"),
        (changed(PART, {"image": ""}), "is empty or holds a null character"),
        (changed(PART, {"image": "a\0b.png"}), "is empty or holds a null character"),
        (changed(PART, {"image": "/etc/passwd"}), '"/etc/passwd" is absolute; move or link the picture into this'),
        (changed(PART, {"image": "~/a.png"}), "is absolute"),
        (changed(PART, {"image": "C:/a.png"}), "is absolute"),
        (changed(PART, {"image": "a/../../b.png"}), '"a/../../b.png" leaves this file\'s folder by `..`'),
        (changed(PART, {"image": "a\\b.png"}), "has a backslash; write / between folders"),
        (changed(PART, {"image": "https://host/a.png"}), "is an address; download the picture"),
        (changed(PART, {"text": "a"}), "task 'vqa' takes a picture (image) and a text (question) from the user"),
    ],
)
def test_each_fault_is_named_with_its_place_and_its_cure(line, message):
    assert any(message in fault for fault in faults(line)), faults(line)


def test_all_faults_of_a_row_are_found():
    line = {"id": "", "turns": [{"role": "x", "content": [{"text": ""}, {"image": "/a"}]}], "more": 1}
    assert len(faults(line)) == 6  # key, id, role, text, path, no answer


def test_pictures_that_are_missing_broken_or_huge(write, tmp_path):
    file = InstructFile(write(row(["no.png", "broken.png", "huge.png", "red.png"], ["x"])))
    (tmp_path / "broken.png").write_bytes((tmp_path / "red.png").read_bytes()[:40])
    PIL.Image.new("1", (8200, 8200)).save(tmp_path / "huge.png")
    file.row(0)  # by their names nothing is wrong
    with pytest.raises(RowError) as caught:
        file.document(0)
    for number, (fault, words) in enumerate(
        zip(caught.value.faults, ["no.png: No such file", "broken.png", "8200x8200 pixels, more than"], strict=True)
    ):
        assert fault.startswith(f"turns[0].content[{number}].image: ") and words in fault


def test_documents_know_rows_tasks_answers_and_draw_their_wording(write):
    file = InstructFile(write(EDIT, "", *[VQA] * 12))
    edit = file.document(0)
    assert edit.metadata == {"task": "edit", "row": f"{file.path}:1", "id": None, ANSWER_CHARACTERS: [[3, 0, 1]]}
    assert [part.pixels.getpixel((0, 0)) for part in edit.segments if isinstance(part, Image)] == [
        (255, 0, 0),
        (0, 0, 255),
    ]
    drawn = [file.document(index).segments[0].text for index in range(1, 13)]
    assert set(drawn) == {
        "Question: which colour? Answer: red.",
        "Question: which colour?\nred",
        "Question: which colour? The answer is red.",
    }
    assert drawn == [file.document(index).segments[0].text for index in range(1, 13)]
    assert drawn != [file.document(index, seed=1).segments[0].text for index in range(1, 13)]
    assert [file.texts(index) for index in range(1, 13)] == [[text] for text in drawn]
    assert isinstance(file.document(1, "image_first").segments[0], Image)
    assert file.name(1) == f"{file.path}:3" and file.document(1).metadata["id"] == "a/1"


def test_a_condition_that_is_left_out_is_computed_from_the_answer(write, tmp_path):
    PIL.Image.linear_gradient("L").save(tmp_path / "grey.png")
    file = InstructFile(
        write(
            row(["one"], ["red.png"], task="edges"),
            row(["one", "grey.png"], ["red.png"], task="edges"),
            row(["one"], ["red.png"], task="depth"),
        )
    )
    computed, given = (file.document(index).segments[1].pixels for index in range(2))
    assert computed.size == (16, 16) and given.size == (256, 256)
    assert computed.getextrema() == ((0, 0),) * 3  # one colour has no edges
    assert file.texts(0) == ["Make high quality image from canny edge features", "one"]
    with pytest.raises(RowError, match="task 'depth' takes a picture"):
        file.row(2)


def test_edges_are_where_the_brightness_changes():
    picture = np.zeros((12, 20, 3), np.uint8)
    picture[:, 10:] = 200
    found_HW = np.asarray(edge_map(PIL.Image.fromarray(picture)))[..., 0]
    assert set(np.unique(found_HW)) == {0, 255}
    columns = np.flatnonzero(found_HW.any(axis=0))
    assert found_HW[:, columns].all()  # also at the upper and lower end
    assert columns.min() >= 9 and columns.max() <= 12


def test_a_source_gives_documents_and_names_bad_rows(write):
    path = str(write(VQA, EDIT, "broken", changed(PART, {"image": "no.png"})))
    source = open_source(SourceConfig(kind="instruct", path=path, max_bad_fraction=0.5, layout="image_first"))
    documents = list(source)
    assert [len(document.segments) for document in documents] == [2, 4]
    assert isinstance(documents[0].segments[0], Image)
    assert [reason.split(": ")[0] for reason in source.report.bad_rows] == [f"{path}:3", f"{path}:4"]
    assert "not valid JSON" in source.report.bad_rows[0] and "no.png" in source.report.bad_rows[1]
    texts = open_source(SourceConfig(kind="instruct", path=path, max_bad_fraction=0.5)).texts()
    assert any("which colour?" in text for text in texts)
    with pytest.raises(ConfigError, match="kind=instruct has no columns; leave metadata_columns out"):
        SourceConfig(kind="instruct", path=path, metadata_columns=("id",))
    with pytest.raises(DataError, match="nowhere is not a file"):
        open_source(SourceConfig(kind="instruct", path="nowhere"))


def test_prepared_shards_keep_the_places_of_answers(write, model_folder, tokenizer, tmp_path):
    path = write(VQA, EDIT, TALK)
    settings = {"text_tokenizer": str(model_folder), "image_tokenizer": str(model_folder), "num_sentinels": 16}
    data = SourceConfig(kind="instruct", path=str(path))
    documents = ShardedDocuments(run(PrepareConfig(data=data, output=str(tmp_path / "out"), **settings)))
    file = InstructFile(path)
    expected = tokenize_examples(tokenizer, [file.document(index) for index in range(3)])
    assert documents.num_moved_answers.tolist() == [1, 0, 0]  # VQA's stands amid its text, the others end theirs
    for index in range(3):
        assert documents[index].segments == expected[index].segments
        assert documents[index].metadata[ANSWERS] == expected[index].metadata[ANSWERS]
        np.testing.assert_array_equal(documents.answer_spans(index), answer_spans(expected[index]))
    (start, stop) = documents.answer_spans(0)[0]
    answer = tokenizer.vocabulary.ids_to_text(documents.ids(0)[start:stop]).tolist()
    assert tokenizer.text.decode(answer).strip() == "red"


def test_shards_keep_answers_behind_retrieved_documents_and_read_old_files(write, tokenizer, tmp_path):
    (example,) = tokenize_examples(tokenizer, [InstructFile(write(VQA)).document(0)])
    longer = TokenizedDocument(example.segments[1:] + example.segments, {**example.metadata, "retrieved": 1})
    plain = TokenizedDocument(example.segments)
    path = shard_path(tmp_path, 0)
    write_shard(path, [plain, longer], {})
    write_index(tmp_path, 1, tokenizer.hash)
    tokenizer.vocabulary.save(tmp_path / "vocabulary.json")
    documents = ShardedDocuments(tmp_path)
    assert documents.answer_spans(0).shape == (0, 2) and ANSWERS not in documents[0].metadata
    assert documents.num_moved_answers.tolist() == [-1, 1]
    np.testing.assert_array_equal(documents.answer_spans(1), answer_spans(example) + 16 + 1)
    table = pa.ipc.open_stream(path.read_bytes()).read_all().drop_columns(["answers"])  # as before there were any
    with pa.OSFile(str(path), "wb") as stream, pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    old = ShardedDocuments(tmp_path)
    assert old.num_moved_answers.tolist() == [-1, -1] and old.answer_spans(1).shape == (0, 2)
    assert old[1].segments == longer.segments


def test_the_report_counts_what_would_train_and_names_what_would_not(write, tokenizer, tmp_path):
    (tmp_path / "again.png").write_bytes((tmp_path / "red.png").read_bytes())
    long = row(["red.png", "word " * 60], ["x"])
    same = row(["again.png", "which colour?"], ["red"], task="vqa")
    bad = {"turns": [{"role": "user", "content": [{"text": ""}]}]}
    path = write(VQA, "", EDIT, same, TALK, long, bad, changed(PART, {"image": "no.png"}))
    report = check_file(path, tokenizer, context_length=90, max_faults=3)
    assert (report.rows, report.bad, report.num_faults) == (7, 3, 4)
    assert [fault.line for fault in report.faults] == [6, 7, 7]
    file = InstructFile(path)
    documents = tokenize_examples(tokenizer, [file.document(index) for index in range(5)])
    assert report.lengths == [len(tokenizer.to_ids(document)) for document in documents]
    assert report.image_tokens == 16 * (1 + 2 + 1 + 3 + 1) and report.images == 8
    pieces = sum(len(part.tokens) for each in documents for part in each.segments if hasattr(part, "tokens"))
    assert report.text_tokens == pieces
    assert (report.turns, report.text_answers, report.image_answers) == (12, 5, 2)
    assert (report.too_long, report.duplicates, report.good_rows) == (1, 1, [0, 1, 2, 3])
    assert report.tasks == {"vqa": 2, "edit": 1, "conversation": 2}
    lines = report.lines()
    assert lines[0].startswith(f"{path}:6: the row has {report.lengths[4]} ids, the context 90; shorten its texts")
    assert lines[1] == f"{path}:7: turns[0].content[0].text is empty; fill it in or leave the segment out"
    assert lines[3] == "and 1 faults more"
    assert lines[4:7] == [
        "7 rows, 3 would not train",
        "tasks: conversation 2, edit 1, vqa 2",
        "12 turns, 8 pictures; answers: 5 texts, 2 pictures",
    ]
    assert "longer than the context of 90: 1 rows (20.0%)" in lines and lines[-1] == "duplicates: 1 rows"
    with pytest.raises(DataError, match="has no rows; write one JSON object a line"):
        check_file(write(""), tokenizer, context_length=90)
    with pytest.raises(ConfigError, match="a context of 0 ids holds no row"):
        check_file(path, tokenizer, context_length=0)


def test_the_sheet_shows_documents_marks_answers_and_escapes_texts(write, tmp_path):
    script = "<script>alert(1)</script>"
    file = InstructFile(write(row(["red.png", script], [f"{script}&"], task="science"), EDIT, TALK, VQA))
    page = write_sheet(tmp_path / "sheet.html", file, [0, 1, 3], count=2).read_text(encoding="utf-8")
    assert "<script" not in page
    assert "Answer:<mark> &lt;script&gt;alert(1)&lt;/script&gt;&amp;</mark>.</span>" in page
    assert page.count("<section>") == 2 and f"{file.path}:1 (science)" in page and f"{file.path}:4 (vqa)" in page
    assert page.count('src="data:image/png;base64,') == 2
    edit = write_sheet(tmp_path / "edit.html", file, [1]).read_text(encoding="utf-8")
    assert edit.count('class="segment answer"') == 1 and edit.count("<img") == 2
    with pytest.raises(RequestError, match=r"does not end in \.html; choose sheet\.html"):
        write_sheet(tmp_path / "sheet.pdf", file, [0])
