"""`cm3 index`, and the verbs that retrieve: memories of every layout, search, changes, refusals."""

import json

import numpy as np
import pytest
from PIL import Image
from tiny_retrieval import CAPTIONS

from cm3.cli import main
from cm3.data.sources import SourceConfig, open_source
from cm3.pipeline import CM3
from cm3.retrieval.encoder import document_vectors, open_encoder
from cm3.retrieval.memory import Memory
from cm3.tokenizers.document import Document, DocumentTokenizer, Text
from cm3.tokenizers.document import Image as ImageSegment


@pytest.fixture
def cm3(capsys):
    """Run the command and return its exit code, what it printed, and its errors."""

    def run(*words):
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def build(cm3, model_folder, retrieval_folder, tmp_path):
    """Build a memory of some data with the small model and encoder; its folder."""

    def run(*words):
        memory = tmp_path / "memory"
        options = ("--out", memory, "--encoder", retrieval_folder / "encoder", "--model", model_folder)
        code, printed, error = cm3("index", "build", *words, *options)
        assert code == 0, error
        assert printed == f"{memory}: {len(Memory.open(memory))} documents\n"
        return memory

    return run


def write_parquet(folder, retrieval_folder):
    import pandas as pd

    folder.mkdir()
    images = [{"bytes": (retrieval_folder / f"{n}.png").read_bytes(), "path": None} for n in range(len(CAPTIONS))]
    pd.DataFrame({"image": images, "text": CAPTIONS}).to_parquet(folder / "train.parquet")


def test_memories_of_scenes_of_parquet_and_of_json_lines(
    build, cm3, model_folder, retrieval_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write_parquet(tmp_path / "parquet", retrieval_folder)
    counts = []
    for words in (("scenes", "--limit", 6, "--split", "validation"), ("parquet",), (retrieval_folder / "rows.jsonl",)):
        memory = Memory.open(build(*words, "--index", "flat"))
        counts.append(len(memory))
        assert memory.encoder_name == str(retrieval_folder / "encoder") and memory.index.kind == "flat"
        code, printed, _ = cm3("index", "search", "memory", "--text", "a red star", "--model", model_folder)
        assert code == 0 and printed.count("\n") == min(8, len(memory)) + 1
        memory.folder.rename(tmp_path / f"memory{len(counts)}")
    assert counts == [6, len(CAPTIONS), len(CAPTIONS)]
    assert Memory.open("memory1").metadata(5)["row"] == "scenes/validation:5"
    same = [Memory.open(folder).document(3).segments for folder in ("memory2", "memory3")]
    assert same[0] == same[1]


def test_texts_and_pictures_alone_make_memories(build, retrieval_folder):
    rows = retrieval_folder / "rows.jsonl"
    texts = build(rows, "--limit", 2, "--image-column", "")
    assert [len(Memory.open(texts).document(row).segments) for row in range(2)] == [1, 1]
    texts.rename(texts.with_name("texts"))
    pictures = Memory.open(build(rows, "--limit", 2, "--text-columns"))
    assert pictures.document(1).segments == Memory.open(retrieval_folder / "memory").document(1).segments[1:]


def test_tokenizers_without_a_model_build_the_same_memory(cm3, build, model_folder, retrieval_folder, tmp_path):
    prepared = tmp_path / "prepared"
    DocumentTokenizer.load(model_folder).save(prepared)
    rows = (retrieval_folder / "rows.jsonl", "--encoder", retrieval_folder / "encoder")
    code, _, error = cm3("index", "build", *rows, "--model", prepared, "--out", tmp_path / "other")
    assert code == 0, error
    assert Memory.open(tmp_path / "other").hash == Memory.open(build(retrieval_folder / "rows.jsonl")).hash


def test_search_finds_by_text_by_picture_and_by_both(cm3, model_folder, retrieval_folder, tmp_path):
    documents = list(open_source(SourceConfig(kind="jsonl", path=str(retrieval_folder / "rows.jsonl"))))
    encoder = open_encoder(retrieval_folder / "encoder")
    vectors_ME = document_vectors(encoder, documents)
    picture = retrieval_folder / "9.png"
    text, image = Text(CAPTIONS[9]), ImageSegment(Image.open(picture))
    for words, query in (
        (("--text", text.text), Document((text,))),
        (("--image", picture), Document((image,))),
        (("--text", text.text, "--image", picture), Document((text, image))),
    ):
        sheet = tmp_path / f"{len(words)}.png"
        options = ("--json", "--count", 5, "--out", sheet, "--model", model_folder)
        code, printed, _ = cm3("index", "search", retrieval_folder / "memory", *words, *options)
        hits = [json.loads(line) for line in printed.splitlines()]
        scores_M = (vectors_ME @ document_vectors(encoder, [query]).T)[:, 0]
        expected = np.argsort(-scores_M)[:5].tolist()
        assert code == 0 and [hit["row"] for hit in hits] == expected
        assert [hit["score"] for hit in hits] == pytest.approx(scores_M[expected].tolist(), abs=2e-3)
        assert [hit["text"] for hit in hits] == [CAPTIONS[row] for row in expected]
        assert hits[0]["name"] == documents[expected[0]].metadata["row"]
        assert Image.open(sheet).width > 5 * 160
    assert hits[0]["row"] == 9 and hits[0]["score"] == pytest.approx(1, abs=2e-3)


def test_search_prints_for_people_and_writes_a_sheet(cm3, model_folder, retrieval_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("index", "search", retrieval_folder / "memory", "--text", "a navy star", "--count", 2)
    code, printed, _ = cm3(*words, "--model", model_folder)
    first, second, sheet = printed.splitlines()
    assert code == 0 and sheet == "search.png" and (tmp_path / sheet).is_file()
    (best, row, text), (worse, _, _) = (line.split("\t") for line in (first, second))
    assert float(best) >= float(worse) and text == CAPTIONS[int(row)]


def test_documents_are_added_and_deleted(build, cm3, model_folder, retrieval_folder):
    memory = build(retrieval_folder / "rows.jsonl", "--limit", 4)

    def rows():
        words = ("index", "search", memory, "--text", CAPTIONS[1], "--image", retrieval_folder / "1.png", "--json")
        printed = cm3(*words, "--out", memory / "sheet.png", "--model", model_folder)[1]
        return [json.loads(line)["row"] for line in printed.splitlines()]

    assert rows()[0] == 1 and len(rows()) == 4
    words = ("index", "append", memory, retrieval_folder / "rows.jsonl", "--model", model_folder, "--limit")
    assert cm3(*words, 6)[:2] == (0, f"{memory}: 2 added, 4 were there already, 6 documents now\n")
    for limit in (6, 2):
        code, printed, error = cm3(*words, limit)
        assert (code, printed) == (2, "") and error.count("\n") == 1
        assert f"{memory} holds all {limit} documents of {retrieval_folder / 'rows.jsonl'} already; there is" in error
    assert rows()[0] == 1 and len(rows()) == 6
    assert cm3("index", "delete", memory, 1, 0, 1)[:2] == (0, f"{memory}: 2 deleted, 4 documents left\n")
    assert cm3("index", "delete", memory, 1, 2)[:2] == (
        0,
        f"{memory}: 1 deleted, 1 had been before, 3 documents left\n",
    )
    for rows_again, named in (((1,), "row 1 was"), ((2, 0), "all 2 rows were")):
        code, printed, error = cm3("index", "delete", memory, *rows_again)
        assert (code, printed) == (2, "") and error.startswith(
            f"error: {named} deleted from {memory} before; `cm3 index"
        )
    assert 1 not in rows() and len(rows()) == 3
    assert cm3(*words, 3)[:2] == (0, f"{memory}: 3 added, 6 documents now\n")  # what was deleted may come again
    assert rows()[0] == 7 and len(rows()) == 6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["search", "{memory}"], "nothing to search for"),
        (["search", "{memory}", "--text", " "], "nothing to search for"),
        (["search", "{memory}", "--text", "a", "--count", "0"], "--count 0"),
        (["search", "{memory}", "--image", "missing.png"], "missing.png"),
        (["search", "{memory}", "--text", "a", "--out", "sheet.jpg"], ".png"),
        (["search", "{memory}", "--text", "a", "--encoder", "./nowhere"], "encoder './nowhere' is no folder"),
        (["search", "{memory}", "--text", "a", "--model", "demo"], "build the memory with this model's tokenizers"),
        (["search", "{rows}", "--text", "a"], "holds no finished memory"),
        (["build", "{rows}", "--out", "{memory}", "--encoder", "{encoder}"], "holds a finished memory; append to it"),
        (["build", "scenes", "--out", "new", "--encoder", "{encoder}"], "set limit"),
        (["build", "missing.jsonl", "--out", "new", "--encoder", "{encoder}"], "missing.jsonl is not a file"),
        (["build", "{rows}", "--out", "{pictures}", "--encoder", "{encoder}"], "holds other things, such as 0.png;"),
        (["build", "{rows}", "--out", "{rows}", "--encoder", "{encoder}"], "rows.jsonl is a file, not a folder;"),
        (["build", "nofolder", "--out", "new", "--encoder", "{encoder}"], "nofolder is no file or folder here; check"),
        (["build", "no-one/nothing", "--out", "new", "--encoder", "{encoder}"], "could not be had from the Hub ("),
        (
            ["append", "{memory}", "{pictures}/new"],
            "/new is no file or folder here; check the path, or give --kind hub",
        ),
        (["build", "{rows}", "--out", "new", "--encoder", "./nowhere"], "encoder './nowhere' is no folder"),
        (["append", "{memory}", "{rows}", "--kind", "folder"], "rows.jsonl is not a folder"),
        (["delete", "{memory}", "99"], "row 99 is not in"),
    ],
)
def test_refusals_are_one_line_and_exit_2(cm3, model_folder, retrieval_folder, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    places = {name: retrieval_folder / name for name in ("memory", "encoder")} | {"pictures": retrieval_folder}
    words = [word.format(rows=retrieval_folder / "rows.jsonl", **places) for word in words]
    model = [] if words[0] == "delete" or "--model" in words else ["--model", model_folder]
    code, printed, error = cm3("index", *words, *model)
    assert (code, printed) == (2, "")
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_generate_and_caption_retrieve(cm3, model_folder, retrieval_folder, tmp_path):
    memory, out = retrieval_folder / "memory", tmp_path / "out"
    options = ("--retrieve", 2, "--memory", memory, "--model", model_folder, "--seed", 3)
    code, printed, _ = cm3("generate", "a red star", "--num-images", 2, "--out", out, *options)
    assert code == 0 and printed.split() == [str(out / name) for name in ("000.png", "001.png", "retrieved.png")]
    assert Image.open(out / "retrieved.png").width > Image.open(out / "000.png").width
    settings = json.loads((out / "settings.json").read_text())
    assert (settings["retrieve"], settings["memory"], settings["ranking"]) == (2, str(memory), {})
    model = CM3.from_pretrained(model_folder)
    model.use_memory(memory)
    (drawings,) = model.draw(["a red star"], num_images=2, seed=3, retrieve=2)
    assert settings["images"] == [
        {"file": f"{number:03d}.png", **drawing.record()} for number, drawing in enumerate(drawings)
    ]
    assert [len(entry["retrieved"]) for entry in settings["images"]] == [2, 2]
    assert np.array_equal(np.asarray(Image.open(out / "001.png")), np.asarray(drawings[1].image))

    picture = retrieval_folder / "3.png"
    code, printed, _ = cm3("caption", picture, "--json", *options, "--encoder", retrieval_folder / "encoder")
    assert code == 0
    said = model.describe([picture], retrieve=2, seed=3)[0]
    assert json.loads(printed) == {"path": str(picture), **said.record()} and len(said.retrieved) == 2
    code, _, error = cm3("caption", picture, "--retrieve", 1, "--model", model_folder)
    assert code == 2 and "open one with use_memory, in the shell --memory" in error
