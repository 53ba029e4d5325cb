"""The paper's protocols and the sets with their own instruction rows: each config loads, and stand-ins go through."""

import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from cm3.cli import build_parser
from cm3.config import load_config
from cm3.eval import coco_rows, nlvr_rows
from cm3.eval.run import EvalRun, evaluate

CONFIGS = Path(__file__).parent.parent / "configs"
PAPER = sorted((CONFIGS / "paper").glob("*.yaml"))
SETS = ("emoji_edit", "nlvr", "nlvr_box", "easy_vqa", "grocery", "paper")
PROGRAMS = {"cm3.eval.coco_rows": coco_rows, "cm3.eval.nlvr_rows": nlvr_rows}


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_the_papers_protocols_load(path):
    config = load_config(EvalRun, path)
    assert config.output == f"runs/paper/{path.stem}"
    if path.stem == "coco_fid30k":
        task = config.frechet
        assert (task.best_of, task.rank, task.inception.convention) == (8, "clip", "pytorch-fid")
        assert task.ranker != task.encoder  # scoring with the encoder that chose would be circular
    elif path.stem == "coco_captions":
        assert config.captioning.references_column == "captions"
    else:
        assert (config.visual_questions.annotations or config.visual_questions.answers_file) or path.stem == "vizwiz"


def commands():
    """Commands that the headers give to bring data into their form."""
    for path in sorted(path for name in SETS for path in (CONFIGS / name).glob("*.yaml")):
        header = path.read_text(encoding="utf-8").replace("\\\n#", "")
        yield from ((path, line.strip()) for line in re.findall(r"^#   ((?:cm3|python) .+)$", header, re.MULTILINE))


def test_the_commands_in_headers_parse():
    found = list(commands())
    assert {path.parent.name for path, _ in found} == set(SETS)
    for _, command in found:
        words = shlex.split(command.replace("TASK", "vqa"))
        if words[0] == "cm3":
            args = build_parser().parse_args(words[1:])
        else:
            assert words[:2] == ["python", "-m"]
            args = PROGRAMS[words[2]].argument_parser().parse_args(words[3:])
        assert args.out.startswith("data/")


@pytest.fixture
def coco(tmp_path):
    """Four pictures with two captions each, as COCO and Karpathy lay them out, and questions about two of them."""
    (tmp_path / "val2014").mkdir()
    images, captions, karpathy = [], [], []
    for id, color in enumerate(("red", "blue", "green", "white")):
        name = f"COCO_val2014_{id:012d}.png"
        Image.new("RGB", (24, 20), color).save(tmp_path / "val2014" / name)
        texts = [f"a {color} picture", f"all is {color}"]
        images.append({"id": id, "file_name": name})
        captions += [{"id": 10 * id + n, "image_id": id, "caption": text} for n, text in enumerate(texts)]
        sentences = [{"raw": text} for text in texts]
        picture = {"filepath": "val2014", "filename": name, "cocoid": id}
        karpathy.append({**picture, "split": "test" if id else "train", "sentences": sentences})
    asked = [{"question_id": id, "image_id": id, "question": "Which colour?"} for id in (0, 1)]
    people = [{"answer": "red"}] * 7 + [{"answer": "crimson"}] * 3
    annotations = [{"question_id": id, "answers": people, "answer_type": "other"} for id in (0, 1)]
    files = {
        "captions": {"images": images, "annotations": captions},
        "karpathy": {"images": karpathy},
        "questions": {"data_subtype": "val2014", "questions": asked},
        "annotations": {"annotations": annotations},
    }
    for name, value in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    return tmp_path


def run(name, model_folder, coco, *overrides):
    words = ["--model", str(model_folder), "--output", str(coco / "out"), *overrides]
    table = evaluate(str(CONFIGS / "paper" / f"{name}.yaml"), words)
    [result] = json.loads((coco / "out" / "results.json").read_text())["results"]
    assert result["protocol"]["model_hash"] and all(f"| {metric} |" in table for metric in result["metrics"])
    return result


def test_fid_of_the_best_of_eight_goes_through(model_folder, coco):
    rows = str(coco / "fid.jsonl")
    words = ["fid30k", str(coco / "captions.json"), "--images", str(coco / "val2014"), "--out", rows, "--count", "3"]
    coco_rows.main(words)
    # The Inception weights and CLIP are not here: without the first the distance is the encoder's, and not called FID.
    stand_ins = ["--frechet.inception", "null", "--frechet.encoder", "demo", "--frechet.ranker", "demo"]
    data = ["--frechet.pairs.source.path", rows, "--frechet.references.path", str(coco / "val2014")]
    result = run("coco_fid30k", model_folder, coco, *data, *stand_ins)
    assert result["protocol"]["re_ranking"] == "best of 8 by clip (demo)"
    assert result["protocol"]["references"]["number"] == 4 and result["protocol"]["num_prompts"] == 3
    assert "encoder Fréchet distance (not FID), guidance 3" in result["metrics"]


def test_captions_of_karpathys_split_go_through(model_folder, coco):
    rows = str(coco / "test.jsonl")
    coco_rows.main(["karpathy", str(coco / "karpathy.json"), "--images", str(coco), "--out", rows])
    result = run("coco_captions", model_folder, coco, "--captioning.pairs.source.path", rows)
    assert result["metrics"]["CIDEr-D, all"]["count"] == 3


def test_visual_questions_go_through(model_folder, coco):
    words = [f"--visual_questions.{name}={coco}/{name}.json" for name in ("questions", "annotations")]
    words += [f"--visual_questions.images={coco}/val2014"]
    words += ["--visual_questions.image_name", "COCO_val2014_{image_id:012d}.png"]
    result = run("okvqa", model_folder, coco, *words)
    assert result["metrics"]["VQA accuracy, answer_type=other"]["count"] == 2
    assert result["metrics"]["VQA accuracy from the question alone, all"]["value"] == 1
    assert result["protocol"]["details"]["max_new_tokens"] == 10
