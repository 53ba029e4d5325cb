"""Pictures in the folder layouts of GenEval and DPG-Bench, so that the upstream programs can score them, and back.

GenEval (github.com/djghosh13/geneval): `00000/metadata.jsonl` with one JSON object, `00000/samples/0000.png`, ...;
four pictures a prompt. DPG-Bench (github.com/TencentQQGYLab/ELLA, `dpg_bench`): one PNG for each prompt, named by its
id, with one picture or a 2x2 grid of four. Its program takes every file of the folder for a picture, cuts the grid at
`--resolution`, and reads the id up to the first dot of the name; the functions here refuse what would go wrong there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage

from cm3.checkpoint import write_text
from cm3.errors import DataError
from cm3.eval.report import Estimate, average, proportion
from cm3.gallery import save_image
from cm3.tokenizers.image import load_image

GENEVAL_TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
"""The `tag`s of GenEval's prompts."""

_GRID = 2


@dataclass(frozen=True)
class GenEvalPrompt:
    """A line of GenEval's `evaluation_metadata.jsonl`."""

    text: str
    tag: str
    metadata: Mapping[str, Any]
    """The whole line, which the upstream program reads again beside the pictures."""


def read_geneval_prompts(path: str | Path) -> list[GenEvalPrompt]:
    """Read GenEval's `evaluation_metadata.jsonl`; the place of a line is its folder's number.

    Raises:
        DataError: naming the line that is no GenEval prompt, or a file without prompts.
    """
    prompts = [_geneval_prompt(line, f"{path}:{number}") for number, line in _lines(path)]
    if not prompts:
        raise DataError(f"{path} has no prompts; give GenEval's prompts/evaluation_metadata.jsonl")
    return prompts


def write_geneval(
    folder: str | Path, prompts: Sequence[GenEvalPrompt], images: Sequence[Sequence[PILImage.Image]]
) -> Path:
    """Write pictures of prompts as GenEval's `evaluate_images.py FOLDER` reads them.

    Args:
        folder: New or empty, since pictures of an earlier run would be scored as well.
        prompts: In the order of the file.
        images: For each prompt the same number of pictures; published figures have four.

    Raises:
        DataError: the folder holds something, or the pictures do not fit the prompts.
    """
    folder = new_folder(folder)
    counts = {len(samples) for samples in images}
    if len(images) != len(prompts) or len(counts) != 1 or 0 in counts:
        raise DataError(
            f"{len(prompts)} prompts have {len(images)} lists of {' or '.join(map(str, sorted(counts)))} pictures; "
            "GenEval weighs every picture alike, so give each prompt the same number"
        )
    for index, (prompt, samples) in enumerate(zip(prompts, images, strict=True)):
        place = folder / f"{index:05d}"
        write_text(place / "metadata.jsonl", json.dumps(dict(prompt.metadata), ensure_ascii=False) + "\n")
        for number, image in enumerate(samples):
            save_image(place / "samples" / f"{number:04d}.png", image)
    return folder


def read_geneval(folder: str | Path) -> list[tuple[GenEvalPrompt, list[PILImage.Image]]]:
    """The prompts and pictures of a folder in GenEval's layout, whoever wrote it, in the order of its numbers.

    Raises:
        DataError: there are none, or one is broken.
    """
    places = sorted((path for path in Path(folder).glob("*") if path.name.isdigit()), key=lambda path: int(path.name))
    if not places:
        raise DataError(f"{folder} has no numbered folders such as 00000; give the folder that holds them")
    read = []
    for place in places:
        path = place / "metadata.jsonl"
        ((_, line),) = list(_lines(path))[:1] or [(1, "")]
        pictures = sorted((place / "samples").glob("*.png"), key=lambda picture: picture.stem)
        read.append((_geneval_prompt(line, f"{path}:1"), [load_image(picture) for picture in pictures]))
    return read


def read_geneval_results(path: str | Path) -> dict[str, Estimate]:
    """Figures from the `results.jsonl` that GenEval's `evaluate_images.py` wrote.

    By task the share of right pictures, and `overall`: their unweighted mean, which is what papers print. The share
    of prompts with any right picture, which the program prints too, is higher by construction and left out.

    Raises:
        DataError: naming the line that is no result, or a task without any.
    """
    marks: dict[str, list[bool]] = {task: [] for task in GENEVAL_TASKS}
    for number, line in _lines(path):
        row = _json(line, f"{path}:{number}")
        if row.get("tag") not in marks or not isinstance(row.get("correct"), bool):
            raise DataError(f"{path}:{number} is no result of GenEval; it needs tag and correct, found {sorted(row)}")
        marks[row["tag"]].append(row["correct"])
    if missing := [task for task, values in marks.items() if not values]:
        raise DataError(f"{path} has no results for {', '.join(missing)}; score the pictures of all prompts")
    shares = {task: proportion(sum(values), len(values)) for task, values in marks.items()}
    return {**shares, "overall": average(list(shares.values()))}


def read_dpg_prompts(folder: str | Path) -> dict[str, str]:
    """The prompts of DPG-Bench's folder `prompts` (`ID.txt` each) by id, sorted.

    Raises:
        DataError: there are none, or one is empty.
    """
    prompts = {path.stem: path.read_text("utf-8").strip() for path in sorted(Path(folder).glob("*.txt"))}
    if not prompts:
        raise DataError(f"{folder} has no .txt files; give the folder dpg_bench/prompts")
    if empty := [name for name, text in prompts.items() if not text]:
        raise DataError(f"{Path(folder) / empty[0]}.txt is empty; download the prompts again")
    return prompts


def write_dpg(folder: str | Path, images: Mapping[str, Sequence[PILImage.Image]]) -> list[str]:
    """Write pictures by prompt id as DPG-Bench's `compute_dpg_bench.py` reads them.

    Args:
        folder: New or empty.
        images: For each id one picture, or four; all square and of one size.

    Returns:
        The arguments that the program needs with these pictures.

    Raises:
        DataError: the folder holds something, an id would be misread, or the pictures do not fit.
    """
    folder = new_folder(folder)
    counts = {len(samples) for samples in images.values()}
    if counts not in ({1}, {_GRID**2}):
        raise DataError(
            f"DPG-Bench takes 1 or 4 pictures of every prompt, found {sorted(counts)}; draw as many of each"
        )
    sizes = {image.size for samples in images.values() for image in samples}
    width, height = next(iter(sizes))
    if len(sizes) > 1 or width != height:
        raise DataError(f"DPG-Bench cuts squares of one size, the pictures have {sorted(sizes)}; resize them")
    if wrong := [name for name in images if "." in name or "/" in name or not name]:
        raise DataError(f"id {wrong[0]!r} cannot name a file of DPG-Bench, which reads ids up to the first dot")
    for name, samples in images.items():
        save_image(folder / f"{name}.png", samples[0] if len(samples) == 1 else _grid(samples))
    return ["--image-root-path", str(folder), "--resolution", str(width), "--pic-num", str(counts.pop())]


def read_dpg(folder: str | Path, resolution: int) -> dict[str, list[PILImage.Image]]:
    """The pictures of a folder in DPG-Bench's layout by id, whoever wrote it: one each, or the four of a grid.

    Raises:
        DataError: a file that is neither of these at this resolution.
    """
    read = {}
    for path in sorted(Path(folder).iterdir()):
        image = load_image(path)
        if image.size not in ((resolution, resolution), (_GRID * resolution, _GRID * resolution)):
            raise DataError(
                f"{path} has {image.width}x{image.height} pixels, no grid of {resolution}; name its resolution"
            )
        corners = [(x, y) for y in range(0, image.height, resolution) for x in range(0, image.width, resolution)]
        read[path.name.split(".")[0]] = [image.crop((x, y, x + resolution, y + resolution)) for x, y in corners]
    return read


def _grid(samples: Sequence[PILImage.Image]) -> PILImage.Image:
    """Four pictures: left to right, then the next row, as the program cuts them."""
    tiles = [np.asarray(image.convert("RGB")) for image in samples]
    rows = [np.concatenate(tiles[start : start + _GRID], axis=1) for start in range(0, len(tiles), _GRID)]
    return PILImage.fromarray(np.concatenate(rows, axis=0))


def new_folder(folder: str | Path) -> Path:
    """The folder, which does not exist yet or is empty.

    Raises:
        DataError: it holds something.
    """
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise DataError(f"{folder} is not empty, and what lies there would be scored too; name a new folder")
    return folder


def _lines(path: str | Path) -> list[tuple[int, str]]:
    """Numbers and contents of the lines that hold anything."""
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}; check the path") from error
    return [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _json(line: str, name: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{name} is not JSON ({error.msg}); give one object a line") from error
    if not isinstance(row, dict):
        raise DataError(f"{name} is not an object but {type(row).__name__}; give one object a line")
    return row


def _geneval_prompt(line: str, name: str) -> GenEvalPrompt:
    row = _json(line, name)
    text, tag, include = row.get("prompt"), row.get("tag"), row.get("include")
    if not isinstance(text, str) or not text.strip() or not isinstance(include, list) or tag not in GENEVAL_TASKS:
        raise DataError(
            f"{name} is no GenEval prompt; it needs prompt, include and a tag of {', '.join(GENEVAL_TASKS)}, "
            f"found tag {tag!r} and keys {sorted(row)}"
        )
    return GenEvalPrompt(text, tag, row)
