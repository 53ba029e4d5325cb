"""The model inside the package: it is there, small, and does what `make demo` shows."""

import json

import numpy as np

from cm3.data.scenes import SceneDataset
from cm3.eval.demo import PROMPTS, make_demo
from cm3.eval.scene_tasks import SceneReconstruction, SceneSet
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


def test_its_image_tokenizer_keeps_scenes():
    model = CM3.from_pretrained("demo")
    metrics = SceneReconstruction(scenes=SceneSet(split="validation", size=40)).run(model).metrics
    assert metrics["scenes read back exactly"].value >= 0.95
    assert metrics["PSNR (dB)"].value >= 28


def test_its_captions_are_in_the_words_of_the_scenes():
    model = CM3.from_pretrained("demo")
    scenes = list(SceneDataset("validation", 0, 8))
    captions = model.caption([example.image for example in scenes])
    words = {word for index in range(300) for word in SceneDataset("train", 0, 300)[index].caption.lower().split()}
    known = [np.mean([word in words for word in caption.lower().split()]) for caption in captions]
    assert np.mean(known) > 0.95
