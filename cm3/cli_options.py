"""Options that several verbs of the `cm3` command share, and how they become arguments of `cm3.pipeline`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cm3.errors import RequestError

if TYPE_CHECKING:
    from cm3.generation.settings import SamplingSettings


def box(text: str) -> tuple[int, int, int, int]:
    """Parse LEFT,TOP,RIGHT,BOTTOM."""
    try:
        left, top, right, bottom = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a box; write LEFT,TOP,RIGHT,BOTTOM in pixels, such as 16,16,48,48"
        ) from None
    return left, top, right, bottom


def interval(text: str) -> tuple[float, float]:
    """Parse START,STOP."""
    try:
        start, stop = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an interval; write START,STOP, such as 0.1,0.8") from None
    return start, stop


def seed(text: str) -> int:
    """Parse a seed."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value < 1 << 63:
        raise argparse.ArgumentTypeError(f"{text!r} is no seed; choose a whole number from 0 to 2**63 - 1")
    return value


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add which model is used, and where."""
    parser.add_argument(
        "--model",
        default="demo",
        metavar="NAME",
        help="a model folder, a Hugging Face Hub name, or `demo`, the model inside this package (default: demo)",
    )
    parser.add_argument("--adapter", metavar="FOLDER", help="an adapter of that model, made by a run with lora.rank")
    parser.add_argument(
        "--quantize",
        choices=("int8",),
        help="round the weights of all blocks to 8 bits: half the memory of bf16 (default: keep them as they are)",
    )
    parser.add_argument("--device", help="cpu, cuda, mps, ... (default: cuda where there is one, else cpu)")


def add_sampling(parser: argparse.ArgumentParser, *, guidance: bool) -> argparse._ArgumentGroup:
    """Add how ids are drawn; returns the group.

    Args:
        guidance: Whether a picture is drawn, with a prompt to compare with.
    """
    group = parser.add_argument_group("sampling", "each is the model's own default where left out")
    if guidance:
        group.add_argument("--sampler", metavar="NAME", help="top-p, temperature, cd-k (contrastive), or mixed")
        group.add_argument(
            "--guidance-scale", type=float, metavar="S", help="weight of classifier-free guidance; 1 turns it off"
        )
        group.add_argument(
            "--guidance-interval",
            type=interval,
            metavar="A,B",
            help="guide or contrast only between these shares of a picture; 0,1 is all of it",
        )
        group.add_argument("--contrast-alpha", type=float, metavar="A", help="cd-k: least plausibility, up to 1")
        group.add_argument("--contrast-k", type=int, metavar="K", help="cd-k: rank that plausibility is relative to")
        group.add_argument(
            "--speculative-window",
            type=int,
            metavar="N",
            help="draw up to N tokens of a picture in one pass: the same pictures, on some machines faster; 0 is off",
        )
    group.add_argument("--temperature", type=float, metavar="T", help="0 takes the likeliest token every time")
    group.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens; 0 is off")
    group.add_argument("--top-p", type=float, metavar="P", help="draw from the smallest set of probability P; 1 is off")
    group.add_argument(
        "--seed",
        type=seed,
        default=0,
        metavar="N",
        help="the same seed gives the same result, alone or in any batch (default: 0)",
    )
    return group


def add_negative(group: argparse._ArgumentGroup) -> None:
    """Add what stands in the place of a prompt that guidance compares with."""
    group.add_argument("--negative", default="", metavar="TEXT", help="what guidance moves away from")


_SAMPLING = (
    "sampler",
    "guidance_scale",
    "image_guidance_scale",
    "guidance_interval",
    "contrast_alpha",
    "contrast_k",
    "temperature",
    "top_k",
    "top_p",
    "speculative_window",
)


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """Return the sampling settings that were given."""
    return {name: getattr(args, name) for name in _SAMPLING if getattr(args, name, None) is not None}


_OFF = {"top_k": 0, "top_p": 1, "guidance_scale": 1, "image_guidance_scale": 1, "guidance_interval": (0, 1)}


def check_effect(given: Mapping[str, Any], settings: SamplingSettings, *, num_samples: int = 1) -> None:
    """Refuse an option of sampling that changes nothing beside the others.

    Args:
        given: The options that were typed; one that only turns something off is fine beside any.
        settings: They and, for the rest, the model's own.
        num_samples: Pictures drawn of a prompt, candidates included.

    Raises:
        RequestError: naming such an option.
    """
    if given.get("sampler") == "mixed" and num_samples == 1:
        raise RequestError(
            "sampler='mixed' draws a prompt's pictures by top-p and cd-k in turn, and a single one by top-p; "
            "choose sampler='cd-k', or ask for several pictures"
        )
    samplers = {settings.of_sample(number).sampler for number in range(max(1, num_samples))}
    contrasts, guides = "cd-k" in samplers, bool(samplers - {"cd-k"})
    outside = tuple(settings.guidance_interval) != (0, 1)  # where cd-k gives way to top-p
    idle: dict[str, str] = {}
    if not contrasts:
        idle |= dict.fromkeys(("contrast_alpha", "contrast_k"), f"with sampler={settings.sampler!r}; choose cd-k")
    if not guides:
        idle |= dict.fromkeys(
            ("guidance_scale", "image_guidance_scale"), "with sampler='cd-k', which takes its place; leave it out"
        )
    if not contrasts and settings.guidance_scale == settings.image_guidance_scale == 1:
        idle["guidance_interval"] = "where nothing is guided; raise guidance_scale, or choose sampler='cd-k'"
    if settings.temperature == 0:
        idle |= dict.fromkeys(("top_k", "top_p"), "at temperature=0, which takes the likeliest; leave one of them out")
    elif "top-p" not in samplers and not (contrasts and outside):
        idle |= dict.fromkeys(("top_k", "top_p"), f"with sampler={settings.sampler!r}; choose top-p")
    for name, reason in idle.items():
        if name in given and given[name] != _OFF.get(name):
            raise RequestError(f"{name}={given[name]} has no effect {reason}")


def add_retrieval(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add documents for the context; returns the group."""
    group = parser.add_argument_group("retrieval")
    group.add_argument(
        "--retrieve", type=int, default=0, metavar="K", help="documents to put before the request (default: 0)"
    )
    group.add_argument("--memory", metavar="FOLDER", help="where they come from; made by `cm3 index build`")
    group.add_argument("--encoder", metavar="NAME", help="the memory's encoder, where it is not under its own name")
    return group


def load_model(args: argparse.Namespace) -> Any:
    """Load the model of `add_model` and open the memory of `add_retrieval`."""
    from cm3.pipeline import CM3

    model = CM3.from_pretrained(args.model, adapter=args.adapter, device=args.device, quantize=args.quantize)
    if getattr(args, "memory", None):
        model.use_memory(args.memory, encoder=args.encoder)
    return model


def warn(finding: str | None, more: str) -> None:
    """Print one line about what was done otherwise than asked, where there is such a thing, and where to see more."""
    if finding:
        print(f"warning: {finding}; {more}", file=sys.stderr)


def require_writable(folder: str | Path) -> None:
    """Look whether files can be written to a folder, which need not exist, before work is done for nothing.

    Raises:
        RequestError: they cannot.
    """
    folder = Path(folder)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        reason = "may not be written to" if existing.is_dir() else "is no folder"
        raise RequestError(f"cannot write to {folder}: {existing} {reason}; choose another --out")
