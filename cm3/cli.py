"""The `cm3` command: one verb per thing a person does. Parses, calls, prints; no logic of its own."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cm3 import __version__, cli_bench, cli_compare, cli_export, cli_import, cli_index, cli_instruct, cli_requests
from cm3.cli_parser import SETTINGS, Parser, add_sub_parser, in_shell_words
from cm3.errors import CM3Error


@dataclass(frozen=True)
class Verb:
    """One sub-command: its summary, its options, and what it runs."""

    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int | None]
    """Returns the exit code where it is not always 0."""
    example: str


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = f"{parser.prog} [-h] config [{SETTINGS} value ...]"
    parser.add_argument("config", help="a YAML file; see configs/")
    overrides = parser.add_argument(
        "overrides",
        nargs=argparse.REMAINDER,
        metavar=f"{SETTINGS} value",
        help="settings that replace the file's; --help after the file lists them all",
    )
    overrides.required = False  # older versions of argparse count them among what is missing where the config is


def _train(args: argparse.Namespace) -> None:
    from cm3.training.stages import train

    train(args.config, args.overrides)


def _prepare(args: argparse.Namespace) -> None:
    from cm3.training.stages import prepare

    prepare(args.config, args.overrides)


def _show(args: argparse.Namespace) -> None:
    from cm3.training.stages import show

    print(show(args.config, args.overrides))


def _eval(args: argparse.Namespace) -> None:
    from cm3.eval.run import evaluate

    print(evaluate(args.config, args.overrides), end="")


VERBS: dict[str, Verb] = {
    "generate": Verb(
        "pictures from words",
        cli_requests.add_generate_arguments,
        cli_requests.generate,
        'cm3 generate "a large red circle" --num-images 4 --seed 0 --out out/',
    ),
    "caption": Verb(
        "words from pictures",
        cli_requests.add_caption_arguments,
        cli_requests.caption,
        "cm3 caption out/000.png out/001.png",
    ),
    "answer": Verb(
        "the answer to a question about a picture",
        cli_requests.add_answer_arguments,
        cli_requests.answer,
        'cm3 answer photo.png "How many circles are there?"',
    ),
    "edit": Verb(
        "change a picture as an instruction says",
        cli_requests.add_edit_arguments,
        cli_requests.edit,
        'cm3 edit photo.png "make the circle red" --out edited.png',
    ),
    "infill": Verb(
        "draw a part of a picture anew",
        cli_requests.add_infill_arguments,
        cli_requests.infill,
        'cm3 infill photo.png --box 16,16,48,48 --prompt "a green star"',
    ),
    "complete": Verb(
        "continue a text, with pictures where the model draws them",
        cli_requests.add_complete_arguments,
        cli_requests.complete,
        'cm3 complete "a large red"',
    ),
    "train": Verb(
        "train a tokenizer, a model, or an encoder for retrieval",
        _config_arguments,
        _train,
        "cm3 train configs/demo/model.yaml --steps 100",
    ),
    "index": Verb(
        "documents to retrieve: build a memory, change it, search it",
        cli_index.add_arguments,
        cli_index.run,
        'cm3 index search memory --text "a large red circle"',
    ),
    "prepare": Verb(
        "turn raw text-image rows into tokenised shards",
        _config_arguments,
        _prepare,
        "cm3 prepare configs/demo/prepare_train.yaml",
    ),
    "show": Verb(
        "print a run's settings, size, FLOPs and memory; run nothing",
        _config_arguments,
        _show,
        "cm3 show configs/pretrain/cm3leon_7b.yaml",
    ),
    "eval": Verb(
        "score a model and write results.json and results.md",
        _config_arguments,
        _eval,
        "cm3 eval configs/demo/eval.yaml --model demo",
    ),
    "export": Verb(
        "a model folder from a checkpoint of training, or in the format of another project",
        cli_export.add_arguments,
        cli_export.run,
        "cm3 export runs/demo/model --out my-model",
    ),
    "import": Verb(
        "a model folder from weights of another project",
        cli_import.add_arguments,
        cli_import.run,
        "cm3 import chameleon chameleon-7b my-chameleon --vqgan tokenizer/vqgan.ckpt",
    ),
    "validate": Verb(
        "check instruction data: faults, figures, a page of examples",
        cli_instruct.add_validate_arguments,
        cli_instruct.validate,
        "cm3 validate data/instruct.jsonl --sheet sheet.html",
    ),
    "tutorial": Verb(
        "write the ten rows of the README's tutorial, with their pictures",
        cli_instruct.add_tutorial_arguments,
        cli_instruct.tutorial,
        "cm3 tutorial my-data",
    ),
    "convert": Verb(
        "make instruction data of LLaVA, COCO, VQAv2, ControlNet, InstructPix2Pix or Parquet",
        cli_instruct.add_convert_arguments,
        cli_instruct.convert,
        "cm3 convert coco captions_val2017.json --images val2017 --out data",
    ),
    "compare": Verb(
        "figures of several evaluations side by side",
        cli_compare.add_arguments,
        cli_compare.run,
        "cm3 compare --group plain runs/a0/eval runs/a1/eval --group new runs/b0/eval",
    ),
    "bench": Verb(
        "measure what the parts cost on this machine",
        cli_bench.add_arguments,
        cli_bench.run,
        "cm3 bench index --vectors 20000",
    ),
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command; importing nothing heavy."""
    parser = Parser(
        prog="cm3",
        description="Text to pictures and pictures to text with one CM3Leon-style transformer.",
        epilog='cm3 VERB --help says what a verb takes. To begin with:\n  cm3 generate "a small green star"',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"cm3 {__version__}")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # added by the deepspeed launcher
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", title="verbs")
    for name, verb in VERBS.items():
        verb.add_arguments(add_sub_parser(verbs, name, verb.summary, verb.example))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; return the exit code: 0, 1 where rows fail `validate`, 2 after a one-line error on stderr."""
    args = build_parser().parse_args(argv)
    try:
        return VERBS[args.verb].run(args) or 0
    except (CM3Error, OSError) as error:
        message = in_shell_words(" ".join(str(error).splitlines()), vars(args))
        print(f"error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
