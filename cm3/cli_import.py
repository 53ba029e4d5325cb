"""`cm3 import`: weights of other projects as a folder that this one reads."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the formats."""
    formats = parser.add_subparsers(dest="format", required=True, metavar="FORMAT", title="formats")

    chameleon = formats.add_parser(
        "chameleon", help="a Chameleon in Hugging Face's format, such as facebook/chameleon-7b"
    )
    _add_places(chameleon, "a folder with config.json, tokenizer.json and safetensors")
    chameleon.add_argument(
        "--vqgan", metavar="FILE", help="Chameleon's vqgan.ckpt: the decoder of pictures, which SOURCE lacks"
    )
    chameleon.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a weight file (default: 5GB)")

    vqgan = formats.add_parser("vqgan", help="a VQ-GAN of taming-transformers, or Chameleon's, as an image tokenizer")
    _add_places(vqgan, "the checkpoint, such as last.ckpt or vqgan.ckpt")
    vqgan.add_argument("--config", dest="settings", metavar="FILE", help="its YAML file (default: the one beside it)")


def _add_places(parser: argparse.ArgumentParser, source: str) -> None:
    parser.add_argument("source", metavar="SOURCE", help=source)
    parser.add_argument("destination", metavar="DESTINATION", help="the folder to write")


def run(args: argparse.Namespace) -> None:
    """Import one model; print what it is."""
    print(f"{args.destination}: {_FORMATS[args.format](args)}")


def _chameleon(args: argparse.Namespace) -> str:
    from cm3.interop.chameleon_hf import import_chameleon
    from cm3.model.config import parameter_count

    config = import_chameleon(args.source, args.destination, vqgan=args.vqgan, max_shard_size=args.max_shard_size)
    return (
        f"{parameter_count(config) / 1e6:,.0f} million parameters, {config.num_layers} layers of width {config.width}, "
        f"{config.vocabulary_size} ids"
    )


def _vqgan(args: argparse.Namespace) -> str:
    from cm3.interop.taming import import_vqgan

    config = import_vqgan(args.source, args.destination, args.settings)
    size, (height, width) = config.image_size, config.grid
    return f"pictures of {size}x{size} pixels, {height}x{width} codes of {config.num_codes}"


_FORMATS: dict[str, Callable[[argparse.Namespace], str]] = {"chameleon": _chameleon, "vqgan": _vqgan}
