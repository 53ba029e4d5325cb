"""The `cm3` command: what it prints, writes and refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tiny_retrieval import CAPTIONS

from cm3.cli import VERBS, main

CONFIGS = Path(__file__).parents[1] / "configs"


def run(capsys, *words):
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_generate_then_caption_then_infill(model_folder, tmp_path, capsys):
    out = tmp_path / "out"
    prompts = ["a large red circle", "a small green star"]
    code, printed, _ = run(
        capsys,
        "generate",
        *prompts,
        "--num-images",
        2,
        "--seed",
        4,
        "--top-k",
        9,
        "--out",
        out,
        "--model",
        model_folder,
    )
    assert code == 0
    assert printed.split() == [str(out / f"{index:03d}.png") for index in range(4)]
    settings = json.loads((out / "settings.json").read_text())
    assert settings["top_k"] == 9 and settings["guidance_scale"] == 2.0
    assert [(entry["prompt"], entry["seed"]) for entry in settings["images"]] == [
        (prompt, seed) for prompt in prompts for seed in (4, 5)
    ]

    code, printed, _ = run(capsys, "caption", out / "000.png", out / "001.png", "--model", model_folder)
    assert code == 0
    lines = [line.split("\t") for line in printed.splitlines()]
    assert [path for path, _ in lines] == [str(out / "000.png"), str(out / "001.png")]
    code, printed, _ = run(capsys, "caption", out / "000.png", "--json", "--model", model_folder)
    assert json.loads(printed) == {"path": lines[0][0], "caption": lines[0][1]}

    filled = tmp_path / "filled.png"
    words = ("infill", out / "000.png", "--box", "4,4,12,12", "--prompt", "a green star", "--out", filled)
    code, printed, _ = run(capsys, *words, "--model", model_folder)
    assert (code, printed.strip()) == (0, str(filled))
    assert Image.open(filled).size == (16, 16)
    settings = json.loads((tmp_path / "filled.settings.json").read_text())
    given = {"image": str(out / "000.png"), "box": [4, 4, 12, 12], "prompt": "a green star", "guidance_scale": 2.0}
    assert {name: settings[name] for name in given} == given


def test_answer_prints_words_and_edit_writes_a_picture(model_folder, tmp_path, capsys):
    photo, edited = tmp_path / "photo.png", tmp_path / "edited.png"
    Image.effect_noise((30, 20), 90).save(photo)
    words = ("answer", photo, "How many stars?", "--model", model_folder)
    code, printed, _ = run(capsys, *words)
    assert code == 0 and printed.count("\n") == 1
    code, as_json, _ = run(capsys, *words, "--json")
    reply = json.loads(as_json)
    assert (code, reply["path"], reply["question"]) == (0, str(photo), "How many stars?")
    assert " ".join(reply["answer"].splitlines()) == printed.strip("\n")

    words = ("edit", photo, "make it red", "--guidance-scale", 3, "--seed", 5, "--out", edited, "--model", model_folder)
    code, printed, _ = run(capsys, *words, "--image-guidance-scale", 1.5)
    assert (code, printed.strip()) == (0, str(edited))
    settings = json.loads((tmp_path / "edited.settings.json").read_text())
    given = {"image": str(photo), "instruction": "make it red", "seed": 5, "top_p": 0.95}
    given |= {"guidance_scale": 3.0, "image_guidance_scale": 1.5, "model": str(model_folder)}
    assert {name: settings[name] for name in given} == given
    both, size = Image.open(edited).tobytes(), Image.open(edited).size
    assert size == (16, 16)
    assert run(capsys, *words)[0] == 0 and Image.open(edited).tobytes() != both


def test_documents_are_on_record_and_what_does_not_fit_is_left_out(model_folder, retrieval_folder, tmp_path, capsys):
    memory = ("--memory", retrieval_folder / "memory", "--model", model_folder)
    words = ("caption", retrieval_folder / "7.png", "--json", *memory)
    code, printed, warnings = run(capsys, *words, "--retrieve", 2)
    record = json.loads(printed)
    assert (code, warnings) == (0, "") and set(record) == {"path", "caption", "retrieved"}
    assert [document["text"] for document in record["retrieved"]] == [
        CAPTIONS[document["row"]] for document in record["retrieved"]
    ]
    first, second = (document["score"] for document in record["retrieved"])
    assert first >= second
    code, printed, warnings = run(capsys, *words, "--retrieve", 20)
    fitting, left_out = (json.loads(printed)[name] for name in ("retrieved", "left_out"))
    assert code == 0 and fitting[:2] == record["retrieved"] and 2 <= len(fitting) < len(fitting + left_out) == 20
    end = "did not fit the context of the request; left out, the least similar first; --json names them\n"
    assert warnings == f"warning: {len(left_out)} retrieved documents {end}"
    code, printed, warnings = run(capsys, *words, "--retrieve", len(fitting) + 1)
    assert json.loads(printed)["left_out"] == left_out[:1] and warnings == f"warning: 1 retrieved document {end}"

    words = ("generate", "a red star", "a blue box", "--num-images", 2, "--retrieve", 20, "--out", tmp_path, *memory)
    code, _, warnings = run(capsys, *words)
    images = json.loads((tmp_path / "settings.json").read_text())["images"]
    assert code == 0 and [len(entry["retrieved"] + entry["left_out"]) for entry in images] == [20] * 4
    count = len(images[0]["left_out"] + images[2]["left_out"])
    assert warnings.startswith(f"warning: {count} retrieved documents did not fit the context of 2 of 2 requests")
    assert warnings.endswith("; settings.json names them\n") and warnings.count("\n") == 1


def test_generate_says_how_it_ranked_and_sampled(model_folder, tmp_path, capsys):
    ranking = ("--best-of", 3, "--rank", "likelihood", "--seed", 7)
    sampling = ("--sampler", "mixed", "--negative", "a blue square", "--guidance-interval", "0,0.5", "--contrast-k", 4)
    code, printed, _ = run(
        capsys, "generate", "a red star", *ranking, *sampling, "--out", tmp_path, "--model", model_folder
    )
    assert code == 0
    settings = json.loads((tmp_path / "settings.json").read_text())
    given = {"best_of": 3, "rank": "likelihood", "negative": "a blue square", "sampler": "mixed", "contrast_k": 4}
    assert {name: settings[name] for name in given} == given and settings["guidance_interval"] == [0, 0.5]
    (entry,) = settings["images"]
    scores = entry["scores"]["likelihood"]
    assert len(scores) == 3 and scores[entry["chosen"]] == max(scores) and entry["seed"] == 7 + entry["chosen"]
    assert settings["ranking"] == {"likelihood": {"first": scores[0], "chosen": max(scores)}}
    last = f"mean likelihood: {scores[0]:.3f} without re-ranking, {max(scores):.3f} with"
    assert printed.splitlines() == [str(tmp_path / "000.png"), last]


def test_pictures_of_an_earlier_run_are_said_to_be_there(model_folder, tmp_path, capsys):
    (tmp_path / "photo.png").write_bytes(b"not of any run")
    words = ("generate", "a red star", "--out", tmp_path, "--model", model_folder, "--num-images")
    assert run(capsys, *words, 3)[2] == ""
    (tmp_path / "retrieved.png").write_bytes(b"of a run that retrieved")
    warnings = [run(capsys, *words, count)[2] for count in (3, 1)]
    also, settings = f"warning: {tmp_path} also holds", "settings.json names those that are"
    assert warnings[0] == f"{also} a picture that is not of this run (retrieved.png); {settings}\n"
    assert warnings[1] == f"{also} 3 pictures that are not of this run (001.png, 002.png, retrieved.png); {settings}\n"
    images = json.loads((tmp_path / "settings.json").read_text())["images"]
    assert [entry["file"] for entry in images] == ["000.png"] and (tmp_path / "002.png").is_file()


def test_complete_prints_text_and_pictures(model_folder, tmp_path, capsys):
    code, printed, _ = run(capsys, "complete", "a large red", "--out", tmp_path, "--model", model_folder)
    assert code == 0 and printed.startswith("a large red")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", ""], "prompt is empty"),
        (["generate", "a star", "--num-images", "0"], "error: --num-images 0; ask for at least 1"),
        (["generate", "a star " * 200], "positions"),
        (["generate", "a star", "--best-of", "2"], "--best-of 2 needs a ranker to choose by; give --rank NAME, one of"),
        (["generate", "a star", "--guidance-scale", "-1"], "--guidance-scale -1.0 cannot be used; choose"),
        (["generate", "a star", "--guidance-interval", "0.5,0.5"], "--guidance-interval 0.5,0.5 cannot be used"),
        (["generate", "a star", "--retrieve", "1"], "needs a memory"),
        (["generate", "a star", "--retrieve", "1", "--memory", "missing"], "missing holds no finished memory"),
        (
            ["generate", "a star", "--negative", "a box", "--guidance-scale", "1"],
            "--negative 'a box' has no effect at --guidance-scale 1; raise --guidance-scale, or choose --sampler cd-k",
        ),
        (["generate", "a star", "--out", "{picture}"], "is no folder; choose another --out"),
        (["infill", "{picture}", "--box", "4,4,8,8", "--out", "{picture}/a.png"], "is no folder"),
        (["caption", "missing.png"], "missing.png"),
        (["caption", __file__], "no picture format"),
        (["infill", "{picture}", "--box", "0,0,99,99"], "central square"),
        (
            ["infill", "{picture}", "--box", "4,4,8,8", "--sampler", "mixed"],
            "choose --sampler cd-k, or ask for several",
        ),
        (
            ["edit", "{picture}", "make it red", "--contrast-k", "2"],
            "error: --contrast-k 2 has no effect with --sampler",
        ),
        (["infill", "{picture}", "--box", "4,4,8,8", "--out", "filled.jpg"], ".png"),
        (["answer", "missing.png", "How many?"], "missing.png"),
        (["answer", "{picture}", " "], "the question of row 0 is empty"),
        (["answer", "{picture}", "How many? " * 100], "positions"),
        (["edit", "{picture}", ""], "the instruction of row 0 is empty"),
        (["edit", "{picture}", "make it red", "--image-guidance-scale", "-1"], "--image-guidance-scale -1.0 cannot"),
        (["edit", "{picture}", "make it red", "--out", "edited.jpg"], ".png"),
        (["train", "missing.yaml"], "missing.yaml"),
        (["train", str(CONFIGS / "demo" / "model.yaml"), "--seed", "-1"], "seed=-1; choose 0 to 2147483647"),
    ],
)
def test_refusals_are_one_line_and_exit_2(model_folder, tmp_path, capsys, words, message):
    Image.new("RGB", (16, 16)).save(tmp_path / "picture.png")
    words = [word.format(picture=tmp_path / "picture.png") for word in words]
    model = [] if words[0] == "train" else ["--model", model_folder]
    code, _, error = run(capsys, *words, *model)
    assert code == 2
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_an_unknown_model_is_refused(capsys):
    code, _, error = run(capsys, "generate", "a star", "--model", "./nowhere")
    assert code == 2 and "'./nowhere'" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["infill", "photo.png", "--box", "1,2,3"], "LEFT,TOP,RIGHT,BOTTOM"),
        (["generate", "a star", "--guidance-interval", "0.5"], "START,STOP"),
        (["answer", "photo.png"], "question"),
        (["edit", "photo.png", "make it red", "--image-guidance-scale", "much"], "--image-guidance-scale"),
        (["generate", "a star", "--seed", "-1"], "'-1' is no seed; choose a whole number from 0 to 2**63 - 1"),
        (["bench", "index", "--seed", "one"], "'one' is no seed"),
    ],
)
def test_a_box_or_an_interval_that_is_none_is_refused(capsys, words, message):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([verb, "--help"])
    assert stopped.value.code == 0
    assert f"example:\n  cm3 {verb} " in capsys.readouterr().out


def test_help_needs_no_torch():
    code = (
        "import sys, cm3.cli\ntry: cm3.cli.main(['--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_the_argument_that_the_deepspeed_launcher_adds_is_taken(capsys):
    code, _, error = run(capsys, "--local_rank=0", "train", "missing.yaml")
    assert code == 2 and "missing.yaml" in error


def test_help_after_a_config_lists_its_settings(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", str(CONFIGS / "demo" / "model.yaml"), "--help"])
    assert stopped.value.code == 0
    assert "--optimizer.learning_rate" in capsys.readouterr().out
