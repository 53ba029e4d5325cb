"""Rows of COCO for the paper's protocols: 30,000 pictures with one caption each, and Karpathy's test split.

    python -m cm3.eval.coco_rows fid30k annotations/captions_val2014.json --images val2014 --out fid30k.jsonl
    python -m cm3.eval.coco_rows karpathy dataset_coco.json --images FOLDER --out karpathy_test.jsonl

Rows are what `kind: jsonl` of `cm3.data.sources` reads: `image`, a path relative to the file, `text`, `captions` and
`id`. Papers do not say which 30,000 captions they drew; here it is that of different pictures, by a seed.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cm3.checkpoint import write_text
from cm3.errors import DataError

FID_PICTURES = 30_000

Row = dict[str, Any]


def fid_rows(annotations: str | Path, images: str | Path, count: int = FID_PICTURES, seed: int = 0) -> list[Row]:
    """Different pictures of COCO's caption annotations, in the order they were drawn, with one caption each.

    Raises:
        DataError: the file cannot be read or has fewer captioned pictures.
    """
    value = _read(annotations)
    try:
        names = {each["id"]: each["file_name"] for each in value["images"]}
        captions: dict[int, list[str]] = defaultdict(list)
        for each in sorted(value["annotations"], key=lambda each: each["id"]):
            captions[each["image_id"]].append(each["caption"].strip())
        ids = sorted(captions)
        if count > len(ids):
            raise DataError(f"{annotations} has {len(ids)} captioned pictures, {count} were asked for; ask for fewer")
        rng = np.random.default_rng(seed)
        rows = []
        for id in (ids[place] for place in rng.permutation(len(ids))[:count]):
            text = captions[id][rng.integers(len(captions[id]))]
            rows.append({"image": str(Path(images, names[id])), "text": text, "captions": captions[id], "id": id})
    except (KeyError, TypeError) as error:
        raise DataError(f"{annotations} is no file of COCO captions ({type(error).__name__}: {error})") from error
    return rows


def karpathy_rows(dataset: str | Path, images: str | Path, split: str = "test") -> list[Row]:
    """The pictures of one of Karpathy's splits with all of their captions; `text` is the first.

    Raises:
        DataError: the file cannot be read, or has no such split.
    """
    value = _read(dataset)
    try:
        rows = []
        for each in value["images"]:
            if each["split"] != split:
                continue
            captions = [sentence["raw"].strip() for sentence in each["sentences"]]
            image = Path(images, each.get("filepath", ""), each["filename"])
            rows.append({"image": str(image), "text": captions[0], "captions": captions, "id": each["cocoid"]})
    except (KeyError, TypeError) as error:
        raise DataError(f"{dataset} is not Karpathy's dataset_coco.json ({type(error).__name__}: {error})") from error
    if not rows:
        raise DataError(f"{dataset} has no pictures of the split {split!r}; choose test, val, train or restval")
    return rows


def write_rows(rows: Iterable[Row], out: str | Path) -> None:
    """Write rows as JSONL, the paths of pictures relative to the file."""
    folder = Path(out).resolve().parent
    relative = ({**row, "image": os.path.relpath(Path(row["image"]).resolve(), folder)} for row in rows)
    write_text(Path(out), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in relative))


def _read(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; check the path") from error
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}); give the file as it was downloaded") from error


def argument_parser() -> argparse.ArgumentParser:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(prog="python -m cm3.eval.coco_rows", description="Rows of COCO for cm3 eval.")
    parser.add_argument("protocol", choices=("fid30k", "karpathy"))
    parser.add_argument("annotations", help="captions_val2014.json, or Karpathy's dataset_coco.json")
    parser.add_argument("--images", required=True, help="folder of the pictures; of karpathy the one with val2014/")
    parser.add_argument("--out", required=True, help="the .jsonl file to write")
    parser.add_argument("--count", type=int, default=FID_PICTURES, help="pictures of fid30k (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of fid30k (default: %(default)s)")
    return parser


def main(words: Sequence[str] | None = None) -> None:
    """Write the rows that the command line asks for."""
    args = argument_parser().parse_args(words)
    if args.protocol == "fid30k":
        rows = fid_rows(args.annotations, args.images, args.count, args.seed)
    else:
        rows = karpathy_rows(args.annotations, args.images)
    write_rows(rows, args.out)
    print(f"{args.out}: {len(rows)} rows")


if __name__ == "__main__":
    main()
