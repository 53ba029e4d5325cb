"""`cm3 import`: weights of other projects as a folder that this one reads."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from cm3.cli_parser import add_sub_parser


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the formats."""
    formats = parser.add_subparsers(dest="format", required=True, metavar="FORMAT", title="formats")

    chameleon = add_sub_parser(
        formats,
        "chameleon",
        "a Chameleon, Anole or Lumina-mGPT, in Hugging Face's format or in Meta's own",
        "cm3 import chameleon chameleon-7b my-chameleon --vqgan tokenizer/vqgan.ckpt",
    )
    _add_places(chameleon, "a folder with config.json, tokenizer.json and safetensors, or with models/7b and tokenizer")
    chameleon.add_argument(
        "--vqgan",
        metavar="FILE",
        help="Chameleon's vqgan.ckpt: the decoder of pictures, which Hugging Face's format lacks",
    )
    chameleon.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a weight file (default: 5GB)")

    vqgan = add_sub_parser(
        formats,
        "vqgan",
        "a VQ-GAN of taming-transformers, Chameleon's or LlamaGen's, as an image tokenizer",
        "cm3 import vqgan vq_ds16_c2i.pt my-vq --image-size 256",
    )
    _add_places(vqgan, "the checkpoint, such as last.ckpt, vqgan.ckpt or vq_ds16_c2i.pt")
    vqgan.add_argument(
        "--config",
        dest="settings",
        metavar="FILE",
        help="its YAML file (default: the one beside it); LlamaGen has none",
    )
    vqgan.add_argument(
        "--image-size", type=int, metavar="PIXELS", help="side of the pictures, of LlamaGen's (default: 256)"
    )


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
    from cm3.interop.vqgan import import_vqgan

    config = import_vqgan(args.source, args.destination, args.settings, image_size=args.image_size)
    size, (height, width) = config.image_size, config.grid
    return f"pictures of {size}x{size} pixels, {height}x{width} codes of {config.num_codes}"


_FORMATS: dict[str, Callable[[argparse.Namespace], str]] = {"chameleon": _chameleon, "vqgan": _vqgan}
