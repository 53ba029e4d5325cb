"""`cm3 validate`, `convert` and `tutorial`: check instruction data, make it of other formats, write an example."""

from __future__ import annotations

import argparse

FORMATS = ("llava", "instructpix2pix", "coco", "vqav2", "controlnet", "parquet")


def add_validate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `cm3 validate`."""
    parser.add_argument("file", help="a .jsonl file with one row a line; its pictures lie beside it")
    parser.add_argument(
        "--model",
        default="demo",
        metavar="NAME",
        help="whose tokenizers count: a model folder, a Hugging Face Hub name, or `demo` (default: demo)",
    )
    parser.add_argument("--context-length", type=int, metavar="N", help="ids of a row at most (default: the model's)")
    parser.add_argument(
        "--layout",
        default="text_first",
        choices=("text_first", "image_first"),
        help="image_first puts the pictures that the user gives before the text (default: text_first)",
    )
    parser.add_argument("--sheet", metavar="FILE", help="draw a few rows on a page of HTML")
    parser.add_argument("--max-faults", type=int, default=50, metavar="N", help="faults that are named (default: 50)")


def validate(args: argparse.Namespace) -> int:
    """Check a file and return the exit code: 1 if a row would not train, else 0."""
    from cm3.checkpoint import read_json
    from cm3.data.instruct import InstructFile
    from cm3.data.instruct_report import check_file
    from cm3.data.instruct_sheet import write_sheet
    from cm3.pretrained import CONFIG_FILE, resolve_model
    from cm3.tokenizers.document import DocumentTokenizer

    folder = resolve_model(args.model)
    context_length = args.context_length
    if context_length is None:
        context_length = read_json(folder / CONFIG_FILE)["model"]["max_positions"]
    report = check_file(
        args.file,
        DocumentTokenizer.load(folder),
        context_length=context_length,
        layout=args.layout,
        max_faults=args.max_faults,
    )
    for line in report.lines():
        print(line)
    if args.sheet:
        print(write_sheet(args.sheet, InstructFile(args.file), report.good_rows, layout=args.layout))
    return 1 if report.bad else 0


def add_tutorial_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `cm3 tutorial`."""
    parser.add_argument("folder", help="a new folder, `my-data` in the README; rows.jsonl and images/ go there")


def tutorial(args: argparse.Namespace) -> None:
    """Write the rows; print their file."""
    from cm3.data.tutorial import write_tutorial

    print(write_tutorial(args.folder))


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `cm3 convert`."""
    parser.add_argument("format", choices=FORMATS, metavar="FORMAT", help=f"one of {', '.join(FORMATS)}")
    parser.add_argument("input", help="the file or folder to convert; for vqav2 the file of questions")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where instruct.jsonl and pictures go")
    parser.add_argument("--images", metavar="FOLDER", help="where the pictures lie (default: beside the input)")
    parser.add_argument("--copy", action="store_true", help="copy pictures into the folder (default: link to theirs)")
    parser.add_argument(
        "--task", metavar="NAME", help="what the rows teach, such as vqa or edit (default: by the format)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="convert the first N rows only")
    vqav2 = parser.add_argument_group("vqav2")
    vqav2.add_argument("--annotations", metavar="FILE", help="the answers")
    vqav2.add_argument(
        "--image-name", metavar="NAME", help="file of a picture, such as COCO_val2014_{image_id:012d}.jpg"
    )
    parquet = parser.add_argument_group("parquet and instructpix2pix")
    parquet.add_argument("--split", default="train", metavar="NAME", help="of the data set (default: train)")
    parquet.add_argument(
        "--columns",
        type=_column,
        nargs="+",
        default=[],
        metavar="FIELD=COLUMN",
        help="fields of the task whose columns have other names",
    )
    parquet.add_argument(
        "--together",
        action="store_true",
        help="all questions of a picture as one row, to train beside rows of one (default: a row for each)",
    )


def convert(args: argparse.Namespace) -> None:
    """Convert, and say what became of the rows."""
    from cm3.data.converter_formats import convert as convert_data
    from cm3.data.converters import ConvertOptions

    names = ("task", "images", "annotations", "image_name", "split", "together", "limit", "copy")
    options = ConvertOptions(columns=dict(args.columns), **{name: getattr(args, name) for name in names})
    report = convert_data(args.format, args.input, args.out, options)
    for reason in report.reasons:
        print(f"skipped {reason}")
    print(f"{report.path}: {report.written} rows written, {report.skipped} skipped")


def _column(text: str) -> tuple[str, str]:
    field, separator, column = text.partition("=")
    if not (field and separator and column):
        raise argparse.ArgumentTypeError(f"{text!r} is no pair; write FIELD=COLUMN, such as edited_image=output_image")
    return field, column
