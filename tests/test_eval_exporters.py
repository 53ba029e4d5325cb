"""Folder layouts of GenEval and DPG-Bench: as the upstream programs read them, back again, and what is refused."""

import json

import numpy as np
import pytest
from PIL import Image

from cm3.errors import DataError
from cm3.eval.exporters import (
    GENEVAL_TASKS,
    read_dpg,
    read_dpg_prompts,
    read_geneval,
    read_geneval_prompts,
    read_geneval_results,
    write_dpg,
    write_geneval,
)

METADATA = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {
        "tag": "counting",
        "include": [{"class": "clock", "count": 2}],
        "exclude": [{"class": "clock", "count": 3}],
        "prompt": "a photo of two clocks",
    },
]


def plain(color, side=8):
    return Image.new("RGB", (side, side), color)


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in METADATA))
    return read_geneval_prompts(path)


def test_geneval_prompts_are_read_whole(prompts):
    assert [(prompt.text, prompt.tag) for prompt in prompts] == [
        ("a photo of a bench", "single_object"),
        ("a photo of two clocks", "counting"),
    ]
    assert [prompt.metadata for prompt in prompts] == METADATA


def test_geneval_folder_is_what_its_program_looks_for(prompts, tmp_path):
    images = [[plain((number, index, 0)) for index in range(4)] for number in range(2)]
    folder = write_geneval(tmp_path / "out", prompts, images)
    assert sorted(path.name for path in folder.iterdir()) == ["00000", "00001"]
    place = folder / "00001"
    with (place / "metadata.jsonl").open() as file:
        assert json.load(file) == METADATA[1]  # the program loads the file as one object
    assert sorted(path.name for path in (place / "samples").iterdir()) == [f"{i:04d}.png" for i in range(4)]
    assert np.asarray(Image.open(place / "samples" / "0002.png"))[0, 0].tolist() == [1, 2, 0]
    read = read_geneval(folder)
    assert [prompt for prompt, _ in read] == prompts
    assert [[image.getpixel((0, 0)) for image in samples] for _, samples in read] == [
        [(number, index, 0) for index in range(4)] for number in range(2)
    ]


def test_geneval_refuses_pictures_that_would_be_weighed_wrongly(prompts, tmp_path):
    with pytest.raises(DataError, match="2 lists of 1 or 2 pictures; GenEval weighs every picture alike"):
        write_geneval(tmp_path / "out", prompts, [[plain("red")], [plain("red"), plain("blue")]])
    with pytest.raises(DataError, match="2 prompts have 1 lists"):
        write_geneval(tmp_path / "out", prompts, [[plain("red")]])
    with pytest.raises(DataError, match="is not empty, and what lies there would be scored too"):
        write_geneval(tmp_path, prompts, [[plain("red")]] * 2)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "2 is not JSON"),
        ("[1]", "2 is not an object but list"),
        ('{"prompt": "a", "include": [], "tag": "counting up"}', "found tag 'counting up'"),
        ('{"prompt": " ", "include": [], "tag": "counting"}', "2 is no GenEval prompt"),
    ],
)
def test_broken_geneval_lines_are_named(line, message, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(METADATA[0]) + "\n" + line + "\n")
    with pytest.raises(DataError, match=message):
        read_geneval_prompts(path)


def test_missing_geneval_files_are_named(tmp_path):
    with pytest.raises(DataError, match="cannot read .*nowhere"):
        read_geneval_prompts(tmp_path / "nowhere")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="has no prompts; give GenEval's prompts/evaluation_metadata.jsonl"):
        read_geneval_prompts(tmp_path / "empty.jsonl")
    with pytest.raises(DataError, match="has no numbered folders"):
        read_geneval(tmp_path)


def test_geneval_overall_is_the_mean_of_tasks_not_of_pictures(tmp_path):
    rows = [{"tag": task, "correct": True} for task in GENEVAL_TASKS[:5]]
    rows += [{"tag": GENEVAL_TASKS[5], "correct": False}] * 15
    path = tmp_path / "results.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    figures = read_geneval_results(path)
    assert figures["overall"].value == pytest.approx(5 / 6)
    assert figures["color_attr"].value == 0 and figures["color_attr"].count == 15
    path.write_text("\n".join(map(json.dumps, rows[:5])))
    with pytest.raises(DataError, match="has no results for color_attr; score the pictures of all prompts"):
        read_geneval_results(path)
    path.write_text('{"tag": "counting", "correct": 1}')
    with pytest.raises(DataError, match="results.jsonl:1 is no result of GenEval"):
        read_geneval_results(path)


COLORS = ("red", "green", "blue", "yellow")


def test_dpg_grid_is_cut_by_its_program_in_the_order_of_samples(tmp_path):
    arguments = write_dpg(tmp_path / "out", {"partiprompts0": [plain(color) for color in COLORS]})
    assert arguments[1:] == [str(tmp_path / "out"), "--resolution", "8", "--pic-num", "4"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["partiprompts0.png"]
    grid = Image.open(tmp_path / "out" / "partiprompts0.png")
    corners = [(0, 0, 8, 8), (8, 0, 16, 8), (0, 8, 8, 16), (8, 8, 16, 16)]  # compute_dpg_bench.py, crop_tuples_list
    assert [grid.crop(corner).getcolors() for corner in corners] == [plain(color).getcolors() for color in COLORS]
    back = read_dpg(tmp_path / "out", 8)
    assert [image.getpixel((4, 4)) for image in back["partiprompts0"]] == [plain(c).getpixel((0, 0)) for c in COLORS]


def test_dpg_takes_one_picture_as_it_is(tmp_path):
    assert write_dpg(tmp_path / "out", {"a": [plain("red")], "b": [plain("blue")]})[-1] == "1"
    assert {name: len(images) for name, images in read_dpg(tmp_path / "out", 8).items()} == {"a": 1, "b": 1}


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ({"a": [plain("red")] * 2}, r"takes 1 or 4 pictures of every prompt, found \[2\]"),
        ({"a": [plain("red")] * 4, "b": [plain("red")]}, r"found \[1, 4\]"),
        ({"a": [plain("red"), plain("red", 9)] * 2}, "squares of one size"),
        ({"a": [Image.new("RGB", (8, 6))]}, "squares of one size"),
        ({"a.b": [plain("red")]}, "id 'a.b' cannot name a file of DPG-Bench, which reads ids up to the first dot"),
    ],
)
def test_dpg_refuses_what_its_program_would_misread(images, message, tmp_path):
    with pytest.raises(DataError, match=message):
        write_dpg(tmp_path / "out", images)
    assert not (tmp_path / "out").exists()


def test_dpg_prompts_are_read_by_id(tmp_path):
    for name, text in (("256", "two cats\n"), ("1", "a dog")):
        (tmp_path / f"{name}.txt").write_text(text)
    assert read_dpg_prompts(tmp_path) == {"1": "a dog", "256": "two cats"}
    (tmp_path / "3.txt").write_text(" ")
    with pytest.raises(DataError, match="3.txt is empty"):
        read_dpg_prompts(tmp_path)
    with pytest.raises(DataError, match="has no .txt files"):
        read_dpg_prompts(tmp_path / "nowhere")


def test_dpg_pictures_of_another_resolution_are_refused(tmp_path):
    write_dpg(tmp_path / "out", {"a": [plain("red")]})
    with pytest.raises(DataError, match="has 8x8 pixels, no grid of 5"):
        read_dpg(tmp_path / "out", 5)
