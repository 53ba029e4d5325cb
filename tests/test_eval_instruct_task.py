"""The scenes' instruction tasks as an evaluation: what the truth, a copy and random weights score."""

import json
from dataclasses import fields

import pytest
from tiny_model import scene_sized_model

from cm3.data.scene_questions import SceneQuestion
from cm3.data.scene_tasks import DEFAULT_MIX, SceneTasks
from cm3.errors import ConfigError, RequestError
from cm3.eval.instruct_requests import ask
from cm3.eval.instruct_task import SceneInstructions
from cm3.eval.protocol import Protocol
from cm3.pipeline import CM3

EVEN = dict.fromkeys(DEFAULT_MIX, 1.0)
SOME = {"edit": 2.0, "vqa": 2.0, "segment": 1.0, "writing": 1.0, "long_caption": 1.0}
TASK = SceneInstructions(size=48, seed=2, mix=EVEN)


@pytest.fixture(scope="module")
def model():
    """Random weights that draw 64x64 pictures of 4x4 codes."""
    return scene_sized_model(max_positions=384)


@pytest.fixture(scope="module")
def examples():
    return list(SceneTasks("test", TASK.size, TASK.seed, EVEN))


def answer_with(monkeypatch, examples, answer):
    """A model that says `answer(example)` to what an example gives."""

    def key(task, parts):
        texts = [part for part in parts if isinstance(part, str)]
        return task, *texts, *(part.tobytes() for part in parts if not isinstance(part, str))

    known = {key(each.task, (*each.texts, *each.images)): answer(each) for each in examples}
    monkeypatch.setattr(CM3, "instruct", lambda self, task, contents, **_: [known[key(task, row)] for row in contents])


def test_the_truth_scores_all_and_stands_beside_its_baselines(model, examples, monkeypatch):
    answer_with(monkeypatch, examples, lambda each: each.answer)
    metrics = TASK.run(model).metrics
    for task in ("edit", "vqa", "grounded", "segment", "segmentation", "edges", "writing", "long_caption"):
        assert metrics[f"{task}: exact"].value == 1
    edits = sum(each.task == "edit" for each in examples)
    assert metrics["edit: exact"].count == metrics["edit: exact, copying the picture"].count == edits > 0
    assert metrics["edit: exact, copying the picture"].value == 0
    assert metrics["edit: all else unchanged, copying the picture"].value == 1
    names = list(metrics)
    assert names[names.index("edit: exact") + 1] == "edit: exact, copying the picture"
    kinds = {each.truth.kind for each in examples if isinstance(each.truth, SceneQuestion)}
    for kind in kinds:
        assert metrics[f"vqa {kind}: exact"].count == metrics[f"vqa {kind}: exact, from the question alone"].count
    assert metrics["vqa: exact, from the question alone"].value < 1


def test_a_model_that_copies_is_as_good_as_the_copy(model, examples, monkeypatch):
    answer_with(monkeypatch, examples, lambda each: each.images[0] if each.task == "edit" else each.answer)
    metrics = TASK.run(model).metrics
    pairs = [(name, name.removesuffix(", copying the picture")) for name in metrics if name.endswith("the picture")]
    assert len(pairs) >= 8
    assert all(metrics[copied] == metrics[own] for copied, own in pairs)


def test_random_weights_get_through_every_task_and_repeat_themselves(model):
    sampling = {"edit": {"guidance_scale": 2.0, "image_guidance_scale": 1.5}, "vqa": {"temperature": 0.5}}
    task = SceneInstructions(size=10, seed=6, mix=SOME, sampling=sampling, max_new_tokens=4, batch_size=3)
    result = task.run(model)
    assert task.run(model).metrics == result.metrics
    tasks = {each.task for each in SceneTasks("test", 10, 6, SOME)}
    assert tasks == {*SOME, "generate"} - {"writing"} and set(result.protocol["sampling"]) == tasks
    used = result.protocol["sampling"]
    assert (used["edit"]["guidance_scale"], used["edit"]["image_guidance_scale"]) == (2.0, 1.5)
    temperatures = [used[name]["temperature"] for name in ("vqa", "long_caption", "edit")]
    assert temperatures == [0.5, 0.0, 1.0] and used["vqa"]["guidance_scale"] == 1.0
    assert set(result.protocol) == {field.name for field in fields(Protocol)} and json.dumps(result.protocol)
    assert result.protocol["num_prompts"] == 10 and result.protocol["references"]["mix"] == SOME
    assert all(0 <= value.value <= 1 for name, value in result.metrics.items() if name.endswith(("exact", "right")))


def test_answers_do_not_depend_on_the_batch_and_stand_in_the_order_of_the_requests(model):
    some = list(SceneTasks("test", 6, 4, {"edit": 1, "vqa": 1}))
    tasks, contents = [each.task for each in some], [(*each.texts, *each.images) for each in some]
    assert {"edit", "vqa"} == set(tasks)

    def answers(size):
        found = ask(model, tasks, contents, sampling={}, seed=3, batch_size=size, max_new_tokens=3)
        return [part if isinstance(part, str) else part.tobytes() for part in found]

    together = answers(8)
    assert [isinstance(part, str) for part in together] == [task == "vqa" for task in tasks]
    assert together == answers(1)
    with pytest.raises(ConfigError, match="batch_size=0; choose 1 or more"):
        answers(0)


def test_what_cannot_be_asked_is_refused_before_the_model_runs(model, model_folder, monkeypatch):
    monkeypatch.setattr(CM3, "instruct", lambda *_, **__: pytest.fail("the model was asked"))
    with pytest.raises(ConfigError, match="asks for a box of a picture, infill.*scene_infilling"):
        SceneInstructions(size=4, mix={"infill": 1.0}).run(model)
    with pytest.raises(ConfigError, match="settings of task 'edges', which is not asked; choose among vqa"):
        SceneInstructions(size=4, mix={"vqa": 1.0}, sampling={"edges": {"temperature": 1.0}}).run(model)
    with pytest.raises(RequestError, match="sampling setting 'guidance' is unknown"):
        SceneInstructions(size=4, mix={"edit": 1.0}, sampling={"edit": {"guidance": 3.0}}).run(model)
    with pytest.raises(ConfigError, match="graded at 64x64 pixels, this model draws 16x16"):
        SceneInstructions(size=4, mix={"edit": 1.0}).run(CM3.from_pretrained(model_folder))
