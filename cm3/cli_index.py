"""`cm3 index`: build a memory of documents to retrieve, change it, search it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cm3.cli_options import add_model
from cm3.cli_parser import add_sub_parser


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the four actions."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", title="actions")

    build = add_sub_parser(
        actions,
        "build",
        "make a memory of any rows that can be read",
        "cm3 index build scenes --limit 20000 --out scenes-memory",
    )
    _add_source(build)
    build.add_argument("--out", required=True, metavar="MEMORY", help="the folder to write")
    build.add_argument(
        "--encoder", default="demo", metavar="NAME", help="makes the vectors: `demo`, a folder, or a Hugging Face CLIP"
    )
    build.add_argument(
        "--index",
        default="auto",
        choices=("auto", "flat", "hnsw", "ivf", "ivf-pq"),
        help="how vectors are searched; auto goes by their number (default)",
    )
    build.add_argument("--processes", type=int, default=1, metavar="N", help="that work at a time (default: 1)")
    add_model(build)

    append = add_sub_parser(
        actions,
        "append",
        "add those rows to a memory that it does not have yet",
        "cm3 index append my-memory photos/ --kind folder",
    )
    _add_memory(append)
    _add_source(append)
    append.add_argument("--encoder", metavar="NAME", help="where it is not under the name the memory keeps")
    append.add_argument("--processes", type=int, default=1, metavar="N", help="that work at a time (default: 1)")
    add_model(append)

    delete = add_sub_parser(
        actions, "delete", "let no search find some documents any more", "cm3 index delete my-memory 17 18"
    )
    _add_memory(delete)
    delete.add_argument("row", type=int, nargs="+", help="number of a document, as `cm3 index search` prints it")

    search = add_sub_parser(
        actions,
        "search",
        "find documents by text, picture, or both",
        'cm3 index search my-memory --text "a large red circle"',
    )
    _add_memory(search)
    search.add_argument("--text", default="", help="what they should say or show")
    search.add_argument("--image", metavar="FILE", help="a picture they should resemble")
    search.add_argument("--count", type=int, default=8, metavar="N", help="results (default: 8)")
    search.add_argument("--encoder", metavar="NAME", help="where it is not under the name the memory keeps")
    search.add_argument("--json", action="store_true", help="print one JSON object a line")
    search.add_argument("--out", default="search.png", metavar="FILE", help="contact sheet (default: search.png)")
    add_model(search)


def _add_memory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("memory", metavar="MEMORY", help="a folder that `cm3 index build` wrote")


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", help="a file or folder of rows; `scenes` for the procedural scenes")
    kinds = ("parquet", "hub", "jsonl", "folder", "webdataset")
    parser.add_argument(
        "--kind", choices=kinds, metavar="KIND", help=f"how rows are stored: {', '.join(kinds)} (default: by the name)"
    )
    parser.add_argument("--split", default="train", metavar="NAME", help="of the data set (default: train)")
    parser.add_argument(
        "--text-columns", nargs="*", default=["text"], metavar="NAME", help="no name: pictures alone (default: text)"
    )
    parser.add_argument("--image-column", default="image", metavar="NAME", help="'': texts alone (default: image)")
    parser.add_argument(
        "--where",
        type=_condition,
        action="append",
        default=[],
        metavar="COLUMN=VALUE,...",
        help="parquet, hub: only rows with one of these values; may be given again for another column",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="use the first N rows only")


def _condition(text: str) -> tuple[str, list[str]]:
    column, equals, values = text.partition("=")
    if not column or not equals or not values:
        raise argparse.ArgumentTypeError(f"{text!r} is no condition; write COLUMN=VALUE or COLUMN=VALUE,VALUE")
    return column, values.split(",")


def run(args: argparse.Namespace) -> None:
    """Run one action."""
    _ACTIONS[args.action](args)


def _build(args: argparse.Namespace) -> None:
    from cm3.retrieval.encoder import open_encoder
    from cm3.retrieval.memory import Memory, check_new_memory

    check_new_memory(args.out)
    memory = Memory.build(
        _source(args),
        _tokenizer(args),
        open_encoder(args.encoder, args.device),
        args.out,
        encoder_name=args.encoder,
        index_kind=args.index,
        num_processes=args.processes,
    )
    print(f"{args.out}: {len(memory)} documents")


def _append(args: argparse.Namespace) -> None:
    memory, encoder = _open(args)
    rows, num_known = memory.append(_source(args), _tokenizer(args), encoder, num_processes=args.processes)
    known = f", {num_known} were there already" if num_known else ""
    print(f"{args.memory}: {len(rows)} added{known}, {len(memory)} documents now")


def _delete(args: argparse.Namespace) -> None:
    from cm3.retrieval.memory import Memory

    memory = Memory.open(args.memory)
    num_deleted = memory.delete(args.row)
    num_before = len(set(args.row)) - num_deleted
    before = f", {num_before} had been before" if num_before else ""
    print(f"{args.memory}: {num_deleted} deleted{before}, {len(memory)} documents left")


def _search(args: argparse.Namespace) -> None:
    from cm3.gallery import contact_sheet, save_image
    from cm3.retrieval.search import search

    memory, encoder = _open(args)
    tokenizer = _tokenizer(args)
    memory.check_tokenizer(tokenizer.hash)
    hits = search(memory, encoder, tokenizer, text=args.text, image=args.image, count=args.count)
    pictures = [(hit.image, f"{hit.score:.3f} {hit.text}") for hit in hits if hit.image is not None]
    if pictures:
        images, captions = zip(*pictures, strict=True)
        heading = f"query: {' and '.join(filter(None, (args.text, args.image)))}"
        save_image(args.out, contact_sheet([(heading, images, captions)]))
    for hit in hits:
        record = {"row": hit.row, "score": round(hit.score, 4), "text": hit.text, "name": hit.name}
        print(json.dumps(record) if args.json else f"{hit.score:.4f}\t{hit.row}\t{' '.join(hit.text.splitlines())}")
    if pictures and not args.json:
        print(args.out)


def _open(args: argparse.Namespace) -> tuple[Any, Any]:
    from cm3.retrieval.memory import Memory

    memory = Memory.open(args.memory)
    return memory, memory.open_encoder(args.encoder, args.device)


def _tokenizer(args: argparse.Namespace) -> Any:
    from cm3.pretrained import resolve_model
    from cm3.tokenizers.document import VOCABULARY_FILE, DocumentTokenizer

    prepared = Path(args.model)  # has tokenizers, and no model yet
    return DocumentTokenizer.load(prepared if (prepared / VOCABULARY_FILE).is_file() else resolve_model(args.model))


def _source(args: argparse.Namespace) -> Any:
    from cm3.data.named_source import named_kind
    from cm3.data.sources import SourceConfig, open_source

    kind = args.kind or named_kind(args.data)
    return open_source(
        SourceConfig(
            kind=kind,
            path="" if kind == "scenes" else args.data,
            split=args.split,
            text_columns=tuple(args.text_columns),
            image_column=args.image_column or None,
            where=dict(args.where),
            limit=args.limit,
        )
    )


_ACTIONS: dict[str, Callable[[argparse.Namespace], None]] = {
    "build": _build,
    "append": _append,
    "delete": _delete,
    "search": _search,
}
