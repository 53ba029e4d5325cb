"""`cm3 show` of evaluations: model, tasks and examples, from the config and what is here."""

import json
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml

from cm3.checkpoint import read_json
from cm3.cli import main
from cm3.config import STAGE_KEY, read_yaml
from cm3.data.tutorial import write_tutorial
from cm3.errors import ConfigError
from cm3.eval.run import TASKS, EvalRun, load_evaluation, tasks_of
from cm3.eval.show import examples_of, show_evaluation
from cm3.model.config import ModelConfig, parameter_count
from cm3.pretrained import demo_folder
from cm3.training.stages import config_class_of

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = sorted(CONFIGS.glob("*/*.yaml"))
EVALUATIONS = [path for path in FILES if STAGE_KEY not in read_yaml(path)]


def shown(capsys, *words):
    assert main(["show", *map(str, words)]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("path", EVALUATIONS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_evaluation_says_what_it_measures_on(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = load_evaluation(str(path))
    report = show_evaluation(config)
    settings = yaml.safe_load(report.partition("\n\nmodel ")[0])
    left_out = {"quantize"} if config.quantize is None else set()
    assert set(settings) == {"model", "quantize", "output", *tasks_of(config)} - left_out, "what is null is not shown"
    for name, task in tasks_of(config).items():
        examples = examples_of(task)
        assert examples and f"  {name}" in report and examples in report


def test_the_embedded_model_and_its_scenes(capsys):
    report = shown(capsys, CONFIGS / "demo" / "eval.yaml", "--scene_captioning", "null")
    settings, _, lines = report.partition("\n\n")
    said = dict(line.strip().split("  ", 1) for line in lines.splitlines() if "  " in line.strip())
    said = {name: value.strip() for name, value in said.items()}
    size = parameter_count(ModelConfig(**read_json(demo_folder() / "config.json")["model"]))
    assert said == {
        "model": f"demo, {size:,} parameters",
        "report": "runs/demo/eval/results.md",
        "scene_reconstruction": "200 scenes of the split test",
        "scene_generation": "200 scenes of the split test",
        "scene_infilling": "200 scenes of the split test",
        "compositional_generation": "50 prompts of each of 6 categories",
        "frechet": "200 scenes of the split test",
    }
    assert "guidance_scales:" in settings and "captioning" not in report


def test_rows_are_counted_where_they_are(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = CONFIGS / "tutorial" / "eval.yaml"
    missing = shown(capsys, config)
    assert missing.count("all rows of my-data/rows.jsonl, which is not here") == 2
    assert "runs/tutorial/tuned/model, which is no folder here: to be trained, or on the Hub" in missing
    write_tutorial("my-data")
    limited = shown(capsys, config, "--instruction_answers.rows.limit", "4", "--instruction_edits", "null")
    assert "  instruction_answers  4 rows of my-data/rows.jsonl" in limited and "edits" not in limited
    Path("rows.jsonl").write_text("\n".join(json.dumps({"text": "a star", "image": "a.png"}) for _ in range(3)))
    source = "{source: {kind: jsonl, path: rows.jsonl}}"
    Path("eval.yaml").write_text(f"output: out\nreconstruction:\n  pairs: {source}\n")
    assert "  reconstruction  3 rows of rows.jsonl" in shown(capsys, "eval.yaml")


@pytest.mark.parametrize(
    ("verb", "config", "message"),
    [
        ("train", "demo/eval.yaml", "has no key stage; it is one of text_tokenizer, image_tokenizer, retriever, model"),
        ("train", "demo/prepare_train.yaml", "says stage: prepare; `cm3 prepare` runs it"),
        ("prepare", "demo/model.yaml", "says stage: model; `cm3 train` runs it"),
        ("eval", "demo/model.yaml", "says stage: model, so it is no evaluation; `cm3 train` runs it"),
    ],
)
def test_a_config_of_another_verb_is_sent_there(verb, config, message, capsys):
    assert main([verb, str(CONFIGS / config)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("text", ["title: nothing\n", "output: x\nmodel: {width: 64}\ndata: {train: y}\n"])
def test_a_file_that_is_neither_is_refused(text, tmp_path, capsys):
    (tmp_path / "notes.yaml").write_text(text)
    assert main(["show", str(tmp_path / "notes.yaml")]) == 2
    assert "has no key stage; it is one of" in capsys.readouterr().err


def test_no_setting_of_training_has_the_name_of_a_task():
    trained = {config_class_of(str(path)) for path in FILES if path not in EVALUATIONS}
    assert len(trained) >= 5
    assert not {field.name for kind in trained for field in fields(kind)} & set(TASKS)


def parts_of(settings):
    yield settings
    for field in fields(settings):
        if is_dataclass(value := getattr(settings, field.name)):
            yield from parts_of(value)


def kinds_of(settings_class):
    yield settings_class
    for hint in get_type_hints(settings_class).values():
        for kind in filter(is_dataclass, (hint, *get_args(hint))):
            yield from kinds_of(kind)


def test_a_seed_that_random_generators_do_not_take_is_refused(capsys):
    parts = [part for path in EVALUATIONS for part in parts_of(load_evaluation(str(path)))]
    seeded = {type(part): part for part in parts if hasattr(part, "seed")}
    assert set(seeded) == {kind for kind in kinds_of(EvalRun) if hasattr(kind, "seed")}
    assert len(seeded) > 8
    for part in seeded.values():
        for seed in (-1, 1 << 31):
            with pytest.raises(ConfigError, match=f"seed={seed}; choose 0 to 2147483647"):
                replace(part, seed=seed)
    assert main(["eval", str(CONFIGS / "demo" / "eval.yaml"), "--scene_generation.scenes.seed", "-1"]) == 2
    error = capsys.readouterr().err
    assert "seed=-1; choose 0 to 2147483647" in error and error.count("\n") == 1
