"""Visual questions in the files of the data sets: official accuracy by hand, answers for a server, faulty files."""

import json

import pytest
from PIL import Image

from cm3.errors import ConfigError, DataError
from cm3.eval.vqa_task import VisualQuestions, read_questions
from cm3.pipeline import CM3


@pytest.fixture(scope="module")
def model(model_folder):
    return CM3.from_pretrained(model_folder)


def people(*counts):
    """Ten answers of (text, how many people gave it)."""
    said = [text for text, times in counts for _ in range(times)]
    assert len(said) == 10
    return [{"answer": text, "answer_confidence": "yes", "answer_id": id} for id, text in enumerate(said, 1)]


@pytest.fixture
def vqa(tmp_path):
    """Three questions about two pictures as VQAv2 and OK-VQA have them."""
    for id in (9, 42):
        Image.new("RGB", (20, 16), (id, 0, 0)).save(tmp_path / f"COCO_val2014_{id:012d}.jpg")
    questions = [
        {"question_id": 1, "image_id": 42, "question": "How many dogs?"},
        {"question_id": 2, "image_id": 9, "question": "Is it red?"},
        {"question_id": 3, "image_id": 9, "question": "Is it green?"},
    ]
    answers = {
        3: ("yes/no", people(("no", 10))),
        1: ("number", people(("2", 2), ("three", 8))),
        2: ("yes/no", people(("yes", 3), ("no", 6), ("maybe", 1))),
    }
    write(tmp_path / "questions.json", {"data_subtype": "val2014", "questions": questions})
    annotations = [{"question_id": id, "answer_type": kind, "answers": each} for id, (kind, each) in answers.items()]
    write(tmp_path / "annotations.json", {"annotations": annotations})
    return tmp_path


def write(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")
    return str(path)


def task(folder, **settings):
    names = {"questions": str(folder / "questions.json"), "annotations": str(folder / "annotations.json")}
    return VisualQuestions(**{**names, "images": str(folder), **settings})


def reply(monkeypatch, *answers):
    asked, left = [], list(answers)

    def instruct(self, name, contents, **options):
        asked.append((name, contents, options))
        return [left.pop(0) for _ in contents]

    monkeypatch.setattr(CM3, "instruct", instruct)
    return asked


def test_accuracy_is_the_official_one_by_type(model, vqa, monkeypatch):
    asked = reply(monkeypatch, "Two.", "yes", "No")
    result = task(vqa, batch_size=2).run(model)
    values = {name: value.value for name, value in result.metrics.items()}
    assert values["VQA accuracy, answer_type=number"] == pytest.approx(0.6)  # two of ten said so
    # Three of ten said yes: 0.9; all ten said no, which is then compared as it is: "No" is wrong.
    assert values["VQA accuracy, answer_type=yes/no"] == pytest.approx(0.45)
    assert values["VQA accuracy, all"] == pytest.approx(0.5)
    assert result.metrics["VQA accuracy, all"].count == 3
    # Rows 0 and 2 know one another: "no" is not asked for as a number, "three" not as yes or no; row 1 hears "no".
    assert values["VQA accuracy from the question alone, answer_type=number"] == 0
    assert values["VQA accuracy from the question alone, answer_type=yes/no"] == pytest.approx((1 + 1) / 2)
    assert [len(contents) for _, contents, _ in asked] == [2, 1]
    question, image = asked[0][1][0]
    assert (asked[0][0], question, image.size) == ("vqa", "How many dogs?", (20, 16))
    assert asked[0][2]["max_new_tokens"] == 10 and asked[0][2]["temperature"] == 0


def test_answers_are_written_as_the_servers_take_them(model, vqa, monkeypatch):
    reply(monkeypatch, " two ", "yes")
    out = vqa / "out" / "answers.json"
    result = task(vqa, annotations=None, answers_file=str(out), limit=2).run(model)
    assert json.loads(out.read_text()) == [{"question_id": 1, "answer": "two"}, {"question_id": 2, "answer": "yes"}]
    assert list(result.metrics) == ["seconds a question"]
    with pytest.raises(ConfigError, match="comes without people's answers, so nothing would be scored"):
        task(vqa, annotations=None).run(model)


def test_vizwiz_has_one_file(model, tmp_path, monkeypatch):
    Image.new("RGB", (16, 16)).save(tmp_path / "VizWiz_val_00000000.jpg")
    said = [{"answer": each["answer"], "answer_confidence": "no"} for each in people(("unanswerable", 9), ("cat", 1))]
    each = {"image": "VizWiz_val_00000000.jpg", "question": "What is this?", "answers": said}
    path = write(tmp_path / "val.json", [{**each, "answer_type": "unanswerable", "answerable": 0}])
    reply(monkeypatch, "Unanswerable")
    out = tmp_path / "answers.json"
    scored = VisualQuestions(questions=path, images=str(tmp_path), answers_file=str(out)).run(model)
    assert scored.metrics["VQA accuracy, answer_type=unanswerable"].value == 1
    assert json.loads(out.read_text()) == [{"image": "VizWiz_val_00000000.jpg", "answer": "Unanswerable"}]


def test_random_weights_get_through_and_repeat_themselves(model, vqa):
    result = task(vqa, max_new_tokens=3).run(model)
    assert result.metrics == task(vqa, max_new_tokens=3, batch_size=1).run(model).metrics
    assert result.protocol["num_prompts"] == 3 and json.dumps(result.protocol)


def test_pictures_have_the_names_of_the_data_set(vqa):
    first, *_ = read_questions(vqa / "questions.json", None, "pictures")
    assert str(first.image) == "pictures/COCO_val2014_000000000042.jpg" and first.answers == ()
    named, *_ = read_questions(vqa / "questions.json", None, "pictures", "{image_id}.png")
    assert str(named.image) == "pictures/42.png"


def test_faulty_files_are_named(model, vqa):
    write(vqa / "annotations.json", {"annotations": []})
    with pytest.raises(DataError, match="question_id 1 has no annotation in .*annotations.json"):
        task(vqa).run(model)
    write(vqa / "questions.json", {"data_subtype": "val2014", "questions": []})
    with pytest.raises(DataError, match="holds no questions"):
        task(vqa).run(model)
    write(vqa / "questions.json", {"questions": [{"question_id": 1}]})
    with pytest.raises(ConfigError, match="no data_subtype that tells the names of pictures; set image_name"):
        task(vqa).run(model)
    with pytest.raises(DataError, match="is not laid out as VQAv2, OK-VQA or VizWiz .*'image_id'"):
        task(vqa, annotations=None, image_name="{image_id}.jpg").run(model)
    (vqa / "questions.json").write_text("{")
    with pytest.raises(DataError, match="is not valid JSON"):
        task(vqa).run(model)
    with pytest.raises(DataError, match="cannot read nowhere.json"):
        task(vqa, questions="nowhere.json").run(model)
    with pytest.raises(ConfigError, match="limit=0; choose 1 or more"):
        task(vqa, limit=0)
