"""The model inside the package: it is there, small, and does what `make demo` shows."""

import json

import pytest
from tiny_model import scene_sized_model

from cm3.data.scenes import SceneDataset
from cm3.eval.demo import PROMPTS, main, make_demo
from cm3.eval.scene_tasks import SceneInfilling, SceneReconstruction, SceneSet
from cm3.eval.scenes import caption_score, matches, read_scene
from cm3.pipeline import CM3
from cm3.pretrained import demo_folder


def test_it_is_small_and_complete():
    files = [path for path in demo_folder().rglob("*") if path.is_file()]
    assert {"config.json", "model.safetensors", "README.md", "tokenizer.model"} <= {path.name for path in files}
    assert sum(path.stat().st_size for path in files) < 40e6


def test_make_demo_writes_pictures_settings_and_a_sheet(tmp_path):
    sheet = make_demo(tmp_path, num_images=1)
    assert sheet.is_file()
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert [entry["prompt"] for entry in settings["images"]] == list(PROMPTS)


def test_the_sheet_is_made_with_other_models_and_prompts_too(tmp_path, monkeypatch, capsys):
    scene_sized_model(256).save_pretrained(tmp_path / "model")
    sheet = make_demo(tmp_path / "out", str(tmp_path / "model"), ["a cat", "two dogs"], num_images=2)
    assert sheet.is_file() and len(list(sheet.parent.glob("0*.png"))) == 4
    monkeypatch.setattr("sys.argv", ["demo", "--model", str(tmp_path / "missing")])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2 and "missing" in capsys.readouterr().err


def test_its_image_tokenizer_keeps_scenes():
    model = CM3.from_pretrained("demo")
    metrics = SceneReconstruction(scenes=SceneSet(split="validation", size=40)).run(model).metrics
    assert metrics["scenes read back exactly"].value >= 0.95
    assert metrics["PSNR (dB)"].value >= 28


def test_its_captions_name_what_is_there():
    model = CM3.from_pretrained("demo")
    scenes = list(SceneDataset("validation", 0, 30))
    captions = model.caption([example.image for example in scenes])
    scores = [caption_score(example.scene, caption) for example, caption in zip(scenes, captions)]
    assert sum(score.objects_right for score in scores) >= 0.9 * sum(score.objects for score in scores)
    assert sum(score.spurious for score in scores) <= 0.1 * sum(score.objects for score in scores)


def test_it_fills_a_box_with_what_is_asked_for():
    task = SceneInfilling(scenes=SceneSet(split="validation", size=20), guidance_scale=1.0)
    metrics = task.run(CM3.from_pretrained("demo")).metrics
    assert metrics["prompt's object in the box"].value >= 0.8
    assert metrics["outside unchanged"].value == 1.0


def test_best_of_eight_draws_what_is_asked():
    model = CM3.from_pretrained("demo")
    scenes = list(SceneDataset("validation", 0, 20))
    drawings = model.draw([example.caption for example in scenes], best_of=8, rank="caption")
    right = [
        matches(read_scene(drawing.image), example.statement).attributes_right
        for (drawing,), example in zip(drawings, scenes)
    ]
    assert sum(right) >= 0.8 * len(right)
