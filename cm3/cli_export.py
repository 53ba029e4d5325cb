"""`cm3 export`: a checkpoint of training as a model folder, or a model folder in the format of another project."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from cm3.errors import RequestError

OWN = "cm3"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the places and the format."""
    parser.add_argument(
        "source", metavar="SOURCE", help="a checkpoint folder, or that of a run: its newest good one; see --format"
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="the model folder to write")
    parser.add_argument(
        "--format",
        choices=_FORMATS,
        default=OWN,
        help="cm3: ours, of a checkpoint (default); chameleon: Hugging Face's, of a model folder that is a Chameleon",
    )
    parser.add_argument("--tokenizers", metavar="FOLDER", help="the run's tokenizers, where its data are gone")


def run(args: argparse.Namespace) -> None:
    """Export one model; print where it comes from."""
    print(f"{args.out}: from {_FORMATS[args.format](args)}")


def _own(args: argparse.Namespace) -> str:
    from cm3.training.export import export_checkpoint

    return str(export_checkpoint(args.source, args.out, args.tokenizers))


def _chameleon(args: argparse.Namespace) -> str:
    from cm3.interop.chameleon_export import export_chameleon
    from cm3.pretrained import resolve_model

    if args.tokenizers:
        raise RequestError("--tokenizers goes with a checkpoint; a model folder has its own, so leave it out")
    source = resolve_model(args.source)
    export_chameleon(source, args.out)
    return f"{source}, in Hugging Face's format"


_FORMATS: dict[str, Callable[[argparse.Namespace], str]] = {OWN: _own, "chameleon": _chameleon}
