"""Every evaluation task at tiny size on a random model: it runs, repeats itself, and says how it measured."""

import json
import math
from dataclasses import fields, replace
from pathlib import Path

import pytest
from PIL import Image as PILImage
from tiny_model import scene_sized_model

from cm3.config import load_config
from cm3.data.scenes import example
from cm3.data.sources import SourceConfig
from cm3.errors import ConfigError, DataError
from cm3.eval.compositional_task import CompositionalGeneration, DpgPictures, DrawingPlan, GenEvalPictures
from cm3.eval.document_tasks import Captioning, PairSet, PictureMatching, Reconstruction
from cm3.eval.frechet_task import FrechetDistance
from cm3.eval.likelihood import Likelihood
from cm3.eval.nlvr_box import BoxCaptioning, BoxGeneration, BoxReconstruction
from cm3.eval.protocol import Protocol
from cm3.eval.run import EvalRun, evaluate
from cm3.eval.scene_tasks import SceneCaptioning, SceneGeneration, SceneInfilling, SceneReconstruction, SceneSet
from cm3.pipeline import CM3
from cm3.pretrained import demo_folder

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*/eval.yaml"))
SCENES = SceneSet(size=2)
KINDS = ("concept", "style", "concept")
NOT_SHARES = ("PSNR", "SSIM", "CIDEr", "BLEU", "CLIPScore", "encoder", "bits per", "seconds a", "spurious objects")
TESTED_BELOW = {"geneval_pictures", "dpg_pictures"}
TESTED_ELSEWHERE = {
    *("retrieved_likelihood", "retrieved_scene_generation", "retrieved_picture_matching"),
    *("decoding", "pair_decoding"),
    *("scene_instructions", "instruction_answers", "instruction_edits", "visual_questions"),
}


@pytest.fixture(scope="module")
def model():
    """Random weights that draw 64x64 pictures of 4x4 codes, the size of scenes and boxes."""
    return scene_sized_model(max_positions=96)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Three rows of pictures with a caption of a box, its objects, and a column to group by."""
    folder = tmp_path_factory.mktemp("rows")
    objects = json.dumps([{"size": "small", "color": "blue", "shape": "circle", "x": 1, "y": 2}])
    lines = []
    for index, kind in enumerate(KINDS):
        example(0, "test", index).image.save(folder / f"{index}.png")
        row = {"image": f"{index}.png", "text": "one small blue circle", "objects": objects, "split_kind": kind}
        row["captions"] = ["one small blue circle", "There's a blue circle."]
        lines.append(json.dumps(row))
    (folder / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return SourceConfig(kind="jsonl", path=str(folder / "rows.jsonl"))


def scene_task(task, **settings):
    return lambda source: task(scenes=SCENES, **settings)


def box_task(task, **settings):
    return lambda source: task(source=source, **settings)


def document_task(task, **settings):
    return lambda source: task(pairs=PairSet(source=source, group_by="split_kind"), **settings)


ONE_SCALE = {"guidance_scales": (2.0,)}
TASKS = {
    "scene_reconstruction": scene_task(SceneReconstruction),
    "scene_generation": scene_task(SceneGeneration, **ONE_SCALE),
    "scene_captioning": scene_task(SceneCaptioning),
    "scene_infilling": scene_task(SceneInfilling),
    "box_reconstruction": box_task(BoxReconstruction),
    "box_generation": box_task(BoxGeneration, **ONE_SCALE),
    "box_captioning": box_task(BoxCaptioning),
    "reconstruction": document_task(Reconstruction),
    "captioning": document_task(Captioning),
    "picture_matching": document_task(PictureMatching, **ONE_SCALE),
    "likelihood": document_task(Likelihood),
    "compositional_generation": lambda source: CompositionalGeneration(
        prompts_per_category=1, drawing=DrawingPlan(samples_per_prompt=2)
    ),
    "frechet": document_task(FrechetDistance, **ONE_SCALE),
}
GENERATING = ("generation", "captioning", "picture_matching", "frechet")


def figures(result):
    """The metrics without the clock's."""
    return {name: str(value) for name, value in result.metrics.items() if not name.startswith("seconds")}


@pytest.mark.parametrize("name", TASKS)
def test_task_runs_and_repeats_itself(name, model, rows):
    task = TASKS[name](rows)
    result = task.run(model)
    assert figures(result) == figures(task.run(model))
    assert json.dumps(result.protocol) and result.seconds > 0
    assert set(result.protocol) == {field.name for field in fields(Protocol)}
    needed = {"metrics", "interval", "model_hash", "tokenizer_hash", "versions"}
    needed |= {"references"} if name != "compositional_generation" else {"prompts"}
    if name.endswith(GENERATING):
        needed |= {"prompts", "num_prompts", "sampling", "retrieve", "seed", "samples_per_prompt", "re_ranking"}
    assert not [part for part in needed - {"prompts", "num_prompts"} if result.protocol[part] in (None, "", {})]
    assert result.metrics
    for metric, estimate in result.metrics.items():
        if estimate.count > 1 and not metric.startswith(NOT_SHARES):
            assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1, metric
        assert estimate.count <= 6, metric
    if name == "scene_infilling":
        assert result.metrics["outside unchanged"].value == 1


def test_every_task_of_an_evaluation_is_tested_here():
    assert {field.name for field in fields(EvalRun)} == {
        "model",
        "quantize",
        "output",
        *TASKS,
        *TESTED_BELOW,
        *TESTED_ELSEWHERE,
    }


def test_compositional_overall_is_the_mean_of_six_categories(model):
    metrics = TASKS["compositional_generation"](None).run(model).metrics
    *categories, overall = metrics.values()
    assert list(metrics)[-1] == "overall" and len(categories) == 6
    assert overall.value == sum(estimate.value for estimate in categories) / 6
    assert all(estimate.count == 1 for estimate in categories)


def test_captions_are_compared_with_all_references_of_a_picture(model, rows, monkeypatch):
    monkeypatch.setattr(CM3, "caption", lambda self, images, **options: ["There's a blue circle."] * len(images))
    one = Captioning(pairs=PairSet(source=rows)).run(model)
    two = Captioning(pairs=PairSet(source=rows), references_column="captions").run(model)
    assert one.metrics["caption equal, all"].value == 0 and two.metrics["caption equal, all"].value == 1
    assert one.metrics["BLEU-4, all"].value < 0.1 and two.metrics["BLEU-4, all"].value == pytest.approx(1)
    assert two.metrics["CIDEr-D, all"].value == 0  # every n-gram is in the references of all pictures
    assert one.protocol["references"]["references"] != two.protocol["references"]["references"]
    with pytest.raises(DataError, match="column 'split_kind' holds 'concept'; references are a list"):
        Captioning(pairs=PairSet(source=rows), references_column="split_kind").run(model)


def test_distance_of_pictures_to_themselves_is_nothing(model, rows, monkeypatch):
    pictures = [example(0, "test", index).image for index in range(3)]
    monkeypatch.setattr(CM3, "generate", lambda self, captions, **options: [[picture] for picture in pictures])
    task = FrechetDistance(pairs=PairSet(source=rows), guidance_scales=(1.0,))
    result = task.run(model)
    assert result.metrics["encoder Fréchet distance (not FID), guidance 1"].value == pytest.approx(0, abs=1e-5)
    assert "CLIPScore (hessel), guidance 1" in result.metrics
    assert not [name for name in result.metrics if name.startswith(("FID", "KID"))]
    assert result.protocol["metrics"]["FID and KID"] == "not measured: inception is null"
    assert result.protocol["details"]["CLIPScore by the encoder that chose"] is False
    ranked = replace(task, best_of=8, rank="clip").run(model).protocol
    assert ranked["re_ranking"] == "best of 8 by clip (demo)"
    assert ranked["details"]["CLIPScore by the encoder that chose"] is True


def test_geneval_pictures_lie_as_its_program_reads_them(model, tmp_path, capsys):
    prompts = tmp_path / "metadata.jsonl"
    prompts.write_text('{"tag": "colors", "include": [{"class": "bus", "count": 1}], "prompt": "a red bus"}\n')
    plan = DrawingPlan(samples_per_prompt=2, guidance_scale=2.0)
    task = GenEvalPictures(prompts=str(prompts), folder=str(tmp_path / "out"), drawing=plan)
    result = task.run(model)
    assert {path.name for path in (tmp_path / "out/00000/samples").iterdir()} == {"0000.png", "0001.png"}
    assert result.protocol["samples_per_prompt"] == 2 and result.protocol["sampling"]["guidance_scale"] == 2.0
    assert f"evaluate_images.py {tmp_path / 'out'}" in capsys.readouterr().out
    with pytest.raises(DataError, match="is not empty"):
        task.run(model)


def test_dpg_pictures_are_grids_of_four(model, tmp_path):
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts/12.txt").write_text("a red star")
    result = DpgPictures(prompts=str(tmp_path / "prompts"), folder=str(tmp_path / "out")).run(model)
    with PILImage.open(tmp_path / "out/12.png") as grid:
        assert grid.size == (128, 128)
    assert "--resolution 64 --pic-num 4" in result.protocol["details"]["next"]
    with pytest.raises(ConfigError, match="samples_per_prompt=3, and DPG-Bench reads 1 or 4"):
        DpgPictures(prompts="", folder="", drawing=DrawingPlan(samples_per_prompt=3))


def test_figures_are_given_for_each_group(model, rows):
    metrics = Reconstruction(pairs=PairSet(source=rows, group_by="split_kind")).run(model).metrics
    groups = ("all", "split_kind=concept", "split_kind=style")
    names = [f"PSNR (dB), {group}" for group in groups]
    assert {name: metrics[name].count for name in names} == dict(zip(names, [3, 2, 1]))
    assert list(metrics) == [f"{measure}, {group}" for group in groups for measure in ("PSNR (dB)", "SSIM")]
    everything, concept, style = (metrics[name].value for name in names)
    assert math.isclose(3 * everything, 2 * concept + style)


def test_an_evaluation_is_one_command(model_folder, rows, tmp_path):
    config = tmp_path / "eval.yaml"
    config.write_text(
        f"model: {model_folder}\noutput: {tmp_path / 'out'}\n"
        f"reconstruction:\n  pairs:\n    source: {{kind: jsonl, path: {rows.path}}}\n"
    )
    table = evaluate(str(config), ["--reconstruction.pairs.source.limit", "2"])
    assert (tmp_path / "out" / "results.md").read_text() == table
    assert "| reconstruction | PSNR (dB), all |" in table
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    assert report["results"][0]["metrics"]["PSNR (dB), all"]["count"] == 2
    assert len(report["model_hash"]) == len(report["tokenizer_hash"]) == 64
    assert report["config"]["reconstruction"]["pairs"]["source"]["limit"] == 2


def test_an_evaluation_without_a_task_is_refused(tmp_path):
    config = tmp_path / "eval.yaml"
    config.write_text("output: nowhere\n")
    with pytest.raises(ConfigError, match="names no task"):
        evaluate(str(config))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.parent.name)
def test_the_evaluations_of_this_repository_load(path):
    config = load_config(EvalRun, path)
    assert config.output.startswith(f"runs/{path.parent.name}/")
    if path.parent.name == "demo":
        tasks = (config.scene_reconstruction, config.scene_generation, config.scene_captioning, config.scene_infilling)
        assert all(task is not None and task.scenes == SceneSet(split="test", size=200) for task in tasks)
        defaults = json.loads((demo_folder() / "generation_config.json").read_text())
        assert config.scene_generation.guidance_scales == (defaults["guidance_scale"], 1.0)
        assert config.scene_generation.temperature == defaults["temperature"]
