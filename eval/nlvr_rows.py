"""Instruction rows of NLVR (Suhr et al. 2017, ACL): whether a sentence is true of a picture, and what it shows.

    python -m cm3.eval.nlvr_rows data/nlvr --split train --task vqa --out data/nlvr_rows/train

A picture of the corpus is three boxes of 100x100 side by side, 400x100 with gaps; the square in its middle, which is
what a model sees, would be one box. So the boxes are put into three corners of a square, from left to right and down,
with a gap between them.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from PIL import Image as PILImage

from cm3.data.converters import ConversionReport, ImageStore, task_row, write_rows
from cm3.data.instruct_rows import InstructRow
from cm3.data.readers import Table
from cm3.errors import DataError
from cm3.eval.nlvr_reader import SIDE
from cm3.tokenizers.document import Text
from cm3.tokenizers.image import load_image

BOX_STEP = 150
"""Pixels from the left of a box to that of the next one in a picture of the corpus."""
GAP = 28
"""Pixels between the boxes of the square; at 128x128 a box is then seven codes of eight pixels wide, the gap two."""
GAP_COLOR = (128, 128, 128)
ANSWERS = {0: "false", 1: "true"}

RowTask = Literal["vqa", "long_caption"]


def mosaic(picture: PILImage.Image) -> PILImage.Image:
    """The three boxes of a picture in one square: two above, one below on the left, on the gray of the gaps.

    Raises:
        DataError: the picture is not 400x100.
    """
    if picture.size != (4 * SIDE, SIDE):
        raise DataError(
            f"a picture of NLVR has {4 * SIDE}x{SIDE} pixels, this one {picture.width}x{picture.height}; give those "
            "of the corpus, not resized"
        )
    step = SIDE + GAP
    square = PILImage.new("RGB", (step + SIDE, step + SIDE), GAP_COLOR)
    for number in range(3):
        box = picture.crop((number * BOX_STEP, 0, number * BOX_STEP + SIDE, SIDE))
        square.paste(box, (number % 2 * step, number // 2 * step))
    return square


class Nlvr:
    """Rows of a Parquet table with the columns `image`, `sentence`, `label` (1 true, 0 false, -1 none) and `text`."""

    def __init__(self, path: str, split: str, task: RowTask, store: ImageStore) -> None:
        self._table = Table.from_parquet(path, split, ["image", "sentence", "label", "text"])
        self._task, self._store = task, store

    def raw_rows(self) -> Iterator[tuple[str, Any]]:
        for index in range(len(self._table)):
            row = self._table.row(index)
            if self._task != "vqa" or row["label"] in ANSWERS:
                yield f"row {index}", (index, row)

    def convert(self, name: str, raw: Any) -> list[InstructRow]:
        index, row = raw
        with io.BytesIO() as file:
            mosaic(load_image(row["image"]["bytes"])).save(file, format="PNG")
            image = self._store.data(file.getvalue())
        if self._task == "vqa":
            question = f"{row['sentence'].strip(' .')}. True or false?"
            said = {"question": Text(question), "answer": Text(ANSWERS[row["label"]])}
        else:
            said = {"caption": Text(row["text"])}
        return [task_row(self._task, {"image": image, **said}, str(index))]


def convert(path: str, split: str, task: RowTask, out: str | Path, limit: int | None = None) -> ConversionReport:
    """Write instruction rows of a split: `vqa` of its sentences, or `long_caption` of its exact descriptions.

    Raises:
        DataError: the table cannot be read, or no row of it converted.
    """
    folder = Path(out)
    return write_rows(Nlvr(path, split, task, ImageStore(folder, folder, copy=True)), folder, limit)


def argument_parser() -> argparse.ArgumentParser:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(prog="python -m cm3.eval.nlvr_rows", description="Instruction rows of NLVR.")
    parser.add_argument("path", help="Parquet file, or folder with SPLIT.parquet")
    parser.add_argument("--split", default="train", help="(default: train)")
    parser.add_argument("--task", choices=("vqa", "long_caption"), default="vqa", help="(default: vqa)")
    parser.add_argument("--out", required=True, help="folder for instruct.jsonl and its pictures")
    parser.add_argument("--limit", type=int, help="convert the first rows only")
    return parser


def main(words: Sequence[str] | None = None) -> None:
    """Write the rows that the command line asks for."""
    args = argument_parser().parse_args(words)
    report = convert(args.path, args.split, args.task, args.out, args.limit)
    for reason in report.reasons:
        print(f"skipped {reason}")
    print(f"{report.path}: {report.written} rows written, {report.skipped} skipped")


if __name__ == "__main__":
    main()
