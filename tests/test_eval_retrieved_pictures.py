"""Pictures drawn behind retrieved documents, next to their originals: what counts, and what may not be retrieved."""

import json
import shutil

import pytest
from PIL import Image as PILImage
from tiny_retrieval import CAPTIONS

from cm3.data.sources import SourceConfig, open_source
from cm3.drawing import Drawing
from cm3.errors import ConfigError, DataError
from cm3.eval.document_tasks import PairSet
from cm3.eval.retrieved_pictures import RetrievedPictureMatching, named_by
from cm3.pipeline import CM3
from cm3.retrieval.encoder import open_encoder
from cm3.retrieval.memory import Memory
from cm3.tokenizers.document import Document, Text

ASKED = (0, 1, 6, 7)
"""Rows that are left out of the memory: two shapes of two colours."""


@pytest.fixture(scope="module")
def model(model_folder):
    return CM3.from_pretrained(model_folder)


@pytest.fixture(scope="module")
def split(retrieval_folder, tmp_path_factory, model):
    """The rows asked about, a memory of the others, and one of all."""
    folder = tmp_path_factory.mktemp("split")
    for number in range(len(CAPTIONS)):
        shutil.copy(retrieval_folder / f"{number}.png", folder)
    rows = [
        {"text": text, "image": f"{number}.png", "color": text.split()[1], "subject": text.split()[2].upper()}
        for number, text in enumerate(CAPTIONS)
    ]
    parts = {"asked": [rows[n] for n in ASKED], "others": [row for n, row in enumerate(rows) if n not in ASKED]}
    for name, chosen in (*parts.items(), ("all", rows)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, chosen)))
    encoder = open_encoder(retrieval_folder / "encoder")
    for name in ("others", "all"):
        source = open_source(SourceConfig(kind="jsonl", path=str(folder / f"{name}.jsonl")))
        name_of_encoder = str(retrieval_folder / "encoder")
        Memory.build(source, model.tokenizer, encoder, folder / f"memory_{name}", encoder_name=name_of_encoder)
    return folder


def task(split, memory="memory_others", **settings):
    source = SourceConfig(kind="jsonl", path=str(split / "asked.jsonl"))
    defaults = {"max_similarity": 1.01, "thumbnail_side": 4}
    return RetrievedPictureMatching(pairs=PairSet(source=source), memory=str(split / memory), **defaults | settings)


def test_every_number_of_documents_is_measured_beside_the_first_document(model, split):
    result = task(split, within="color", subject_column="subject").run(model)
    shown = ["0 documents", "1 documents", "2 documents", "the first document itself"]
    measures = ["nearer to its original than to another", "recall@1", "recall@10"]
    expected = {f"{measure}, {name}, all" for measure in measures for name in shown}
    assert expected | {f"subject named by one of {n} documents" for n in (1, 2)} == set(result.metrics)
    assert all(0 <= estimate.value <= 1 and estimate.count == 4 for estimate in result.metrics.values())
    assert result.protocol["details"]["chance"] == {"recall@1, all": 0.5, "recall@10, all": 1.0}
    assert result.protocol["details"]["rivals"] == "originals of the same color"
    assert result.sheet is not None


def test_the_figures_follow_the_drawings(model, split, monkeypatch):
    """Originals for drawings are always nearest; another caption's original for the drawing never is."""
    originals = [PILImage.open(split / f"{number}.png") for number in ASKED]
    retrieved = []

    def shifted(self, captions, *, retrieve, **options):
        retrieved.append(retrieve)
        places = [CAPTIONS.index(caption) for caption in captions]
        swap = {ASKED[n]: originals[n if retrieve else (n + 2) % 4] for n in range(4)}
        return [[Drawing(swap[place], CAPTIONS[place], seed=0)] for place in places]

    monkeypatch.setattr(CM3, "draw", shifted)
    metrics = task(split, documents=(0, 1), batch_size=3).run(model).metrics
    assert retrieved == [0, 0, 1, 1]
    assert metrics["nearer to its original than to another, 1 documents, all"].value == 1
    assert metrics["recall@1, 1 documents, all"].value == 1
    assert metrics["recall@1, 0 documents, all"].value == 0
    assert metrics["nearer to its original than to another, 0 documents, all"].value < 1


def test_an_original_in_the_memory_is_refused(model, split):
    with pytest.raises(DataError, match="memory_all holds the original of .*asked.jsonl:1.*leave these pictures out"):
        task(split, memory="memory_all").run(model)


def test_a_memory_without_anything_admissible_is_refused(model, split):
    with pytest.raises(ConfigError, match="holds no document for any of the captions; raise max_similarity"):
        task(split, max_similarity=-1.0).run(model)


def test_no_documents_are_no_study(split):
    with pytest.raises(ConfigError, match="retrieves none; name a number of 1 or more"):
        task(split, documents=(0,))


def test_a_subject_is_named_where_a_text_holds_its_name(model, split):
    model.use_memory(split / "memory_others", max_similarity=1.01)
    found = model.retrieved([Document((Text("a red circle"),))] * 2, 3)
    texts = [
        " ".join(part.text for part in model.tokenizer.detokenize(item.document).segments[:1]) for item in found[0]
    ]
    colors = [text.split()[1] for text in texts]
    first, second = named_by(found, [colors[0].upper(), "a shape that is not there"])
    assert first == [color == colors[0] for color in colors] and first[0]
    assert second == [False] * 3
    assert not any(named_by(found, [colors[0][:-1]] * 2)[0]), "a part of a word names nothing"
