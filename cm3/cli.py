"""The `cm3` command: one verb per thing a person does. Parses, calls, prints; no logic of its own."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cm3 import __version__
from cm3.errors import CM3Error


@dataclass(frozen=True)
class Verb:
    """One sub-command: its summary, its options, and what it runs."""

    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]
    example: str


def _box(text: str) -> tuple[int, int, int, int]:
    try:
        left, top, right, bottom = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a box; write LEFT,TOP,RIGHT,BOTTOM in pixels, such as 16,16,48,48"
        ) from None
    return left, top, right, bottom


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default="demo",
        metavar="NAME",
        help="a model folder, a Hugging Face Hub name, or `demo`, the model inside this package (default: demo)",
    )
    parser.add_argument("--device", help="cpu, cuda, mps, ... (default: cuda where there is one, else cpu)")


def _add_sampling(parser: argparse.ArgumentParser, *, guidance: bool) -> None:
    group = parser.add_argument_group("sampling", "each is the model's own default where left out")
    if guidance:
        group.add_argument(
            "--guidance-scale",
            type=float,
            metavar="S",
            help="weight of classifier-free guidance; 1 turns it off",
        )
    group.add_argument("--temperature", type=float, metavar="T", help="0 takes the likeliest token every time")
    group.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens; 0 is off")
    group.add_argument("--top-p", type=float, metavar="P", help="draw from the smallest set of probability P; 1 is off")
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        help="the same seed gives the same result, alone or in any batch (default: 0)",
    )


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    names = ("guidance_scale", "temperature", "top_k", "top_p")
    return {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}


def _load(args: argparse.Namespace) -> Any:
    from cm3.pipeline import CM3

    return CM3.from_pretrained(args.model, device=args.device)


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="+", help="what to draw; several prompts are drawn in one batch")
    parser.add_argument("--num-images", type=int, default=1, metavar="N", help="pictures a prompt (default: 1)")
    parser.add_argument("--out", default="out", metavar="FOLDER", help="where 000.png ... and settings.json go")
    _add_sampling(parser, guidance=True)
    _add_model(parser)


def _generate(args: argparse.Namespace) -> None:
    from cm3.gallery import save_gallery

    model = _load(args)
    images = model.generate(args.prompt, num_images=args.num_images, seed=args.seed, **_sampling(args))
    settings = {"model": args.model, "seed": args.seed, **model.settings(**_sampling(args))}
    for path in save_gallery(args.out, args.prompt, images, settings):
        print(path)


def _caption_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", nargs="+", help="picture files")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    _add_sampling(parser, guidance=False)
    _add_model(parser)


def _caption(args: argparse.Namespace) -> None:
    model = _load(args)
    captions = model.caption(args.image, seed=args.seed, **_sampling(args))
    for path, caption in zip(args.image, captions, strict=True):
        if args.json:
            print(json.dumps({"path": path, "caption": caption}))
        else:
            print(f"{path}\t{' '.join(caption.splitlines())}")


def _infill_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", help="picture file")
    parser.add_argument(
        "--box",
        type=_box,
        required=True,
        metavar="L,T,R,B",
        help="the part to draw anew, in pixels of the picture",
    )
    parser.add_argument("--prompt", default="", help="what the finished picture shows (default: left open)")
    parser.add_argument("--out", default="filled.png", metavar="FILE", help="(default: filled.png)")
    _add_sampling(parser, guidance=True)
    _add_model(parser)


def _infill(args: argparse.Namespace) -> None:
    from cm3.gallery import save_image

    filled = _load(args).infill(args.image, box=args.box, prompt=args.prompt, seed=args.seed, **_sampling(args))
    print(save_image(args.out, filled))


def _complete_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", help="the beginning; the model writes on, with pictures if it draws them")
    parser.add_argument("--out", default="completed", metavar="FOLDER", help="where pictures go (default: completed)")
    _add_sampling(parser, guidance=False)
    _add_model(parser)


def _complete(args: argparse.Namespace) -> None:
    from cm3.gallery import save_document

    document = _load(args).complete(args.text, seed=args.seed, **_sampling(args))
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
        "train a text tokenizer, an image tokenizer or a model",
        _config_arguments,
        _train,
        "cm3 train configs/demo/model.yaml --steps 100",
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
    """Run one verb; return the exit code: 0, or 2 after a one-line error on stderr."""
    args = build_parser().parse_args(argv)
    try:
        VERBS[args.verb].run(args)
    except (CM3Error, OSError) as error:
        print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
