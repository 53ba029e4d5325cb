"""What is said of a folder that is no model folder."""

import pytest

from cm3.errors import ModelFilesError
from cm3.pretrained import resolve_model


@pytest.mark.parametrize(
    ("files", "advice"),
    [
        (["model/config.json", "checkpoints/latest"], "it is the folder of a run, whose model is {}/model: give that"),
        (["adapter/adapter_config.json"], "a run that trained an adapter: give its model, and {}/adapter as adapter"),
        (["checkpoints/latest", "model/README.md"], "has not ended: `cm3 export {} --out FOLDER` makes a model of it"),
        (["notes.txt"], "give one that `cm3 train`, `cm3 export` or save_pretrained wrote"),
    ],
)
def test_a_folder_without_a_model_gets_advice(files, advice, tmp_path):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    with pytest.raises(ModelFilesError) as raised:
        resolve_model(tmp_path)
    said = str(raised.value)
    assert said.startswith(f"{tmp_path} has no config.json, so it is no model folder; ")
    assert said.endswith(advice.format(tmp_path)) and "\n" not in said


def test_a_model_of_another_project_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelFilesError, match="holds a model of type 'llama', this code runs 'open-cm3'"):
        resolve_model(tmp_path)
