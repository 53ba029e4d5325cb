"""The `cm3` command: one verb per thing a person does. Parses, calls, prints; no logic of its own."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cm3 import __version__, cli_bench, cli_compare, cli_index, cli_instruct
from cm3.cli_options import add_model, add_retrieval, add_sampling, box, load_model, sampling
from cm3.errors import CM3Error


@dataclass(frozen=True)
class Verb:
    """One sub-command: its summary, its options, and what it runs."""

    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int | None]
    """Returns the exit code where it is not always 0."""
    example: str


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="+", help="what to draw; several prompts are drawn in one batch")
    parser.add_argument("--num-images", type=int, default=1, metavar="N", help="pictures a prompt (default: 1)")
    parser.add_argument("--out", default="out", metavar="FOLDER", help="where 000.png ... and settings.json go")
    add_sampling(parser, guidance=True)
    add_retrieval(parser).add_argument(
        "--unconditional-context",
        choices=("keep", "drop"),
        default="keep",
        help="whether what guidance compares with keeps the retrieved documents (default: keep)",
    )
    group = parser.add_argument_group("re-ranking")
    group.add_argument("--best-of", type=int, default=1, metavar="N", help="candidates a picture (default: 1)")
    group.add_argument(
        "--rank",
        metavar="HOW",
        help="keep the best by likelihood (the model's own), caption (the prompt's, given the picture), clip, or both",
    )
    group.add_argument("--ranker", default="demo", metavar="NAME", help="the encoder of clip (default: demo)")
    add_model(parser)


def _generate(args: argparse.Namespace) -> None:
    from cm3.drawing import ranking_summary
    from cm3.gallery import save_gallery

    model = load_model(args)
    names = ("seed", "negative", "retrieve", "unconditional_context", "best_of", "rank", "ranker")
    request = {name: getattr(args, name) for name in names}
    samples = model.draw(args.prompt, num_images=args.num_images, **request, **sampling(args))
    drawings = [drawing for drawings in samples for drawing in drawings]
    summary = ranking_summary(drawings)
    settings = {"model": args.model, **request, "memory": args.memory, **model.settings(**sampling(args))}
    pictures = [(drawing.image, drawing.record()) for drawing in drawings]
    for path in save_gallery(args.out, pictures, {**settings, "ranking": summary}):
        print(path)
    for name, means in summary.items():
        print(f"mean {name}: {means['first']:.3f} without re-ranking, {means['chosen']:.3f} with")


def _caption_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", nargs="+", help="picture files")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    add_sampling(parser, guidance=False)
    add_retrieval(parser)
    add_model(parser)


def _caption(args: argparse.Namespace) -> None:
    model = load_model(args)
    captions = model.caption(args.image, seed=args.seed, retrieve=args.retrieve, **sampling(args))
    for path, caption in zip(args.image, captions, strict=True):
        if args.json:
            print(json.dumps({"path": path, "caption": caption}))
        else:
            print(f"{path}\t{' '.join(caption.splitlines())}")


def _infill_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", help="picture file")
    parser.add_argument(
        "--box",
        type=box,
        required=True,
        metavar="L,T,R,B",
        help="the part to draw anew, in pixels of the picture",
    )
    parser.add_argument("--prompt", default="", help="what the finished picture shows (default: left open)")
    parser.add_argument("--out", default="filled.png", metavar="FILE", help="(default: filled.png)")
    add_sampling(parser, guidance=True)
    add_model(parser)


def _infill(args: argparse.Namespace) -> None:
    from cm3.gallery import save_image

    options = {"prompt": args.prompt, "negative": args.negative, "seed": args.seed, **sampling(args)}
    print(save_image(args.out, load_model(args).infill(args.image, box=args.box, **options)))


def _complete_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", help="the beginning; the model writes on, with pictures if it draws them")
    parser.add_argument("--out", default="completed", metavar="FOLDER", help="where pictures go (default: completed)")
    add_sampling(parser, guidance=False)
    add_model(parser)


def _complete(args: argparse.Namespace) -> None:
    from cm3.gallery import save_document

    document = load_model(args).complete(args.text, seed=args.seed, **sampling(args))
    for line in save_document(args.out, document):
        print(line)


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a YAML file; see configs/")
    parser.add_argument(
        "overrides",
        nargs=argparse.REMAINDER,
        metavar="--key value",
        help="settings that replace the file's; --help after the file lists them all",
    )


def _train(args: argparse.Namespace) -> None:
    from cm3.training.stages import train

    train(args.config, args.overrides)


def _prepare(args: argparse.Namespace) -> None:
    from cm3.training.stages import prepare

    prepare(args.config, args.overrides)


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="a checkpoint folder, or that of a run: its newest good one")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="the model folder to write")
    parser.add_argument("--tokenizers", metavar="FOLDER", help="where the data of the run no longer lie at their place")


def _export(args: argparse.Namespace) -> None:
    from cm3.training.export import export_checkpoint

    print(f"{args.out}: from {export_checkpoint(args.checkpoint, args.out, args.tokenizers)}")


def _show(args: argparse.Namespace) -> None:
    from cm3.training.stages import show

    print(show(args.config, args.overrides))


def _eval(args: argparse.Namespace) -> None:
    from cm3.eval.run import evaluate

    print(evaluate(args.config, args.overrides), end="")


VERBS: dict[str, Verb] = {
    "generate": Verb(
        "pictures from words",
        _generate_arguments,
        _generate,
        'cm3 generate "a large red circle left of a small blue square" --num-images 4 --seed 0 --out out/',
    ),
    "caption": Verb("words from pictures", _caption_arguments, _caption, "cm3 caption out/000.png out/001.png"),
    "infill": Verb(
        "draw a part of a picture anew",
        _infill_arguments,
        _infill,
        'cm3 infill photo.png --box 16,16,48,48 --prompt "a green star" --out filled.png',
    ),
    "complete": Verb(
        "continue a text, with pictures where the model draws them",
        _complete_arguments,
        _complete,
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
        "a model folder from a checkpoint of training",
        _export_arguments,
        _export,
        "cm3 export runs/demo/model --out my-model",
    ),
    "validate": Verb(
        "check instruction data: faults, figures, a page of examples",
        cli_instruct.add_validate_arguments,
        cli_instruct.validate,
        "cm3 validate data/instruct.jsonl --sheet sheet.html",
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
        "cm3 compare --group plain runs/plain_0/eval runs/plain_1/eval --group retrieved runs/retrieved_0/eval",
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
    parser = argparse.ArgumentParser(
        prog="cm3", description="Text to pictures and pictures to text with one CM3Leon-style transformer."
    )
    parser.add_argument("--version", action="version", version=f"cm3 {__version__}")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # added by the deepspeed launcher
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", title="verbs")
    for name, verb in VERBS.items():
        sub = verbs.add_parser(
            name,
            help=verb.summary,
            description=verb.summary.capitalize() + ".",
            epilog=f"example: {verb.example}",
        )
        verb.add_arguments(sub)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; return the exit code: 0, 1 where rows fail `validate`, 2 after a one-line error on stderr."""
    args = build_parser().parse_args(argv)
    try:
        return VERBS[args.verb].run(args) or 0
    except (CM3Error, OSError) as error:
        print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
