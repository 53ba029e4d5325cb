"""`cm3 generate`, `caption`, `answer`, `edit`, `infill` and `complete`: what a trained model can be asked for."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from cm3.cli_options import (
    add_model,
    add_negative,
    add_retrieval,
    add_sampling,
    box,
    check_effect,
    load_model,
    require_writable,
    sampling,
    warn,
)


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `cm3 generate`."""
    parser.add_argument("prompt", nargs="+", help="what to draw; several prompts are drawn in one batch")
    parser.add_argument("--num-images", type=int, default=1, metavar="N", help="pictures a prompt (default: 1)")
    parser.add_argument(
        "--out", default="out", metavar="FOLDER", help="where 000.png ... and settings.json go (default: out)"
    )
    add_negative(add_sampling(parser, guidance=True))
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


def generate(args: argparse.Namespace) -> None:
    """Draw pictures into a folder; print their files, and what ranking did."""
    from cm3.drawing import ranking_summary, retrieval_sheet
    from cm3.gallery import other_pictures, save_gallery, save_image
    from cm3.generation.context import left_out_summary

    require_writable(args.out)
    model = load_model(args)
    check_effect(sampling(args), model.sampling(sampling(args)), num_samples=args.num_images * args.best_of)
    names = ("seed", "negative", "retrieve", "unconditional_context", "best_of", "rank", "ranker")
    request = {name: getattr(args, name) for name in names}
    samples = model.draw(args.prompt, num_images=args.num_images, **request, **sampling(args))
    drawings = [drawing for drawings in samples for drawing in drawings]
    summary = ranking_summary(drawings)
    settings = {
        "model": args.model,
        "quantize": args.quantize,
        **request,
        "memory": args.memory,
        **model.settings(**sampling(args)),
    }
    pictures = [(drawing.image, drawing.record()) for drawing in drawings]
    paths = save_gallery(args.out, pictures, {**settings, "ranking": summary})
    if args.retrieve:
        paths.append(save_image(f"{args.out}/retrieved.png", retrieval_sheet(model, samples)))
    for path in paths:
        print(path)
    warn(left_out_summary([drawings[0].left_out for drawings in samples]), "settings.json names them")
    warn(other_pictures(args.out, paths), "settings.json names those that are")
    for name, means in summary.items():
        print(f"mean {name}: {means['first']:.3f} without re-ranking, {means['chosen']:.3f} with")


def add_caption_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `cm3 caption`."""
    parser.add_argument("image", nargs="+", help="picture files")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object a line, retrieved documents included"
    )
    add_sampling(parser, guidance=False)
    add_retrieval(parser)
    add_model(parser)


def caption(args: argparse.Namespace) -> None:
    """Print a caption of each picture."""
    from cm3.generation.context import left_out_summary

    model = load_model(args)
    captions = model.describe(args.image, seed=args.seed, retrieve=args.retrieve, **sampling(args))
    for path, each in zip(args.image, captions, strict=True):
        if args.json:
            print(json.dumps({"path": path, **each.record()}))
        else:
            print(f"{path}\t{' '.join(each.text.splitlines())}")
    warn(left_out_summary([each.left_out for each in captions]), "--json names them")


def add_answer_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `cm3 answer`."""
    parser.add_argument("image", help="picture file; its central square is what the model sees")
    parser.add_argument("question", help="what to ask about it, in quotes")
    parser.add_argument("--json", action="store_true", help="print path, question and answer as one JSON object")
    add_sampling(parser, guidance=False)
    add_model(parser)


def answer(args: argparse.Namespace) -> None:
    """Print the answer to a question about a picture."""
    reply = load_model(args).answer(args.image, args.question, seed=args.seed, **sampling(args))
    if args.json:
        print(json.dumps({"path": args.image, "question": args.question, "answer": reply}))
    else:
        print(" ".join(reply.splitlines()))


def add_edit_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `cm3 edit`."""
    parser.add_argument("image", help="picture file; its central square is what the model sees, and changes")
    parser.add_argument("instruction", help="what to change, in quotes")
    parser.add_argument(
        "--out", default="edited.png", metavar="FILE", help="the picture to write (default: edited.png)"
    )
    add_sampling(parser, guidance=True).add_argument(
        "--image-guidance-scale",
        type=float,
        default=1.0,
        metavar="S",
        help="how far to overstate the picture, as --guidance-scale does the instruction; 1 turns it off (default: 1)",
    )
    add_model(parser)


def edit(args: argparse.Namespace) -> None:
    """Change a picture as an instruction says; print the file."""
    require_writable(Path(args.out).parent)
    model = load_model(args)
    check_effect(sampling(args), model.sampling(sampling(args)))
    picture = model.edit(args.image, args.instruction, seed=args.seed, **sampling(args))
    request = {"image": args.image, "instruction": args.instruction}
    _write(args, picture, request | {"seed": args.seed} | model.settings(**sampling(args)))


def add_infill_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `cm3 infill`."""
    parser.add_argument("image", help="picture file")
    parser.add_argument(
        "--box",
        type=box,
        required=True,
        metavar="L,T,R,B",
        help="the part to draw anew, in pixels of the picture",
    )
    parser.add_argument(
        "--prompt", default="", metavar="TEXT", help="what the finished picture shows (default: left open)"
    )
    parser.add_argument(
        "--out", default="filled.png", metavar="FILE", help="the picture to write (default: filled.png)"
    )
    add_negative(add_sampling(parser, guidance=True))
    add_model(parser)


def infill(args: argparse.Namespace) -> None:
    """Draw a part of a picture anew; print the file."""
    require_writable(Path(args.out).parent)
    model = load_model(args)
    check_effect(sampling(args), model.sampling(sampling(args)))
    request = {"prompt": args.prompt, "negative": args.negative, "seed": args.seed}
    picture = model.infill(args.image, box=args.box, **request, **sampling(args))
    _write(args, picture, {"image": args.image, "box": args.box} | request | model.settings(**sampling(args)))


def add_complete_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `cm3 complete`."""
    parser.add_argument("text", help="the beginning; the model writes on, with pictures if it draws them")
    parser.add_argument("--out", default="completed", metavar="FOLDER", help="where pictures go (default: completed)")
    add_sampling(parser, guidance=False)
    add_model(parser)


def complete(args: argparse.Namespace) -> None:
    """Print a text with its continuation, and the files of pictures in it."""
    from cm3.gallery import save_document

    document = load_model(args).complete(args.text, seed=args.seed, **sampling(args))
    for line in save_document(args.out, document):
        print(line)


def _write(args: argparse.Namespace, picture: Any, settings: dict[str, Any]) -> None:
    """Write a picture, and beside it how it was made."""
    from cm3.checkpoint import write_json
    from cm3.gallery import save_image

    path = save_image(args.out, picture)
    write_json(path.with_suffix(".settings.json"), {"model": args.model, "quantize": args.quantize, **settings})
    print(path)
