"""Pictures to files: numbered PNGs with their settings, and contact sheets."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from cm3.checkpoint import atomic_path, write_json
from cm3.errors import RequestError

_MARGIN = 12
_LINE_HEIGHT = 17
_NUMBERED = re.compile(r"\d{3,}\.png|retrieved\.png")


def save_image(path: str | Path, image: Image.Image) -> Path:
    """Write a PNG aside and rename it into place; raises RequestError for another suffix."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise RequestError(f"pictures are written as PNG, but {path} does not end in .png; choose {path.stem}.png")
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG")
    return path


def save_gallery(
    folder: str | Path, pictures: Sequence[tuple[Image.Image, dict[str, Any]]], settings: dict[str, Any]
) -> list[Path]:
    """Write 000.png, 001.png, ... and settings.json, which says how they were made.

    Args:
        folder: Made where it does not exist.
        pictures: Each with what is to be said about it.
        settings: What holds for all of them.
    """
    folder = Path(folder)
    paths = [save_image(folder / f"{index:03d}.png", image) for index, (image, _) in enumerate(pictures)]
    entries = [{"file": path.name, **record} for path, (_, record) in zip(paths, pictures, strict=True)]
    write_json(folder / "settings.json", {**settings, "images": entries})
    return paths


def other_pictures(folder: str | Path, written: Sequence[str | Path]) -> str | None:
    """Words about the pictures in a folder that a run did not write, as earlier ones leave them; None without any.

    Args:
        folder: Of `save_gallery` or `save_document`.
        written: The files of the run.
    """
    own = {Path(path).name for path in written}
    others = sorted(path.name for path in Path(folder).glob("*.png") if _NUMBERED.fullmatch(path.name))
    others = [name for name in others if name not in own]
    if not others:
        return None
    pictures = "a picture that is" if len(others) == 1 else f"{len(others)} pictures that are"
    return f"{folder} also holds {pictures} not of this run ({', '.join(others[:3])}{', ...' if others[3:] else ''})"


def contact_sheet(rows: Sequence[tuple[str, Sequence[Image.Image], Sequence[str]]], *, cell: int = 160) -> Image.Image:
    """Draw one row per (heading, pictures, captions under the pictures) on white.

    Args:
        rows: the captions may be empty, else one for each picture.
        cell: edge of a picture on the sheet in pixels; small pictures are enlarged without smoothing.
    """
    columns = max(len(images) for _, images, _ in rows)
    width = _MARGIN + columns * (cell + _MARGIN)
    font = ImageFont.load_default(13)
    characters = cell // 7
    wrapped = [[textwrap.wrap(caption, characters) for caption in captions] for _, _, captions in rows]
    headings = [textwrap.wrap(heading, width // 7) for heading, _, _ in rows]
    heights = [
        _LINE_HEIGHT * (len(heading) + max((len(lines) for lines in captions), default=0)) + cell + 2 * _MARGIN
        for heading, captions in zip(headings, wrapped, strict=True)
    ]
    sheet = Image.new("RGB", (width, sum(heights) + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    top = _MARGIN
    for (_, images, _), heading, captions, height in zip(rows, headings, wrapped, heights, strict=True):
        draw.multiline_text((_MARGIN, top), "\n".join(heading), fill="black", font=font)
        picture_top = top + _LINE_HEIGHT * len(heading) + 4
        for column, image in enumerate(images):
            left = _MARGIN + column * (cell + _MARGIN)
            resample = Image.Resampling.NEAREST if image.width < cell else Image.Resampling.LANCZOS
            sheet.paste(image.convert("RGB").resize((cell, cell), resample), (left, picture_top))
            draw.rectangle((left - 1, picture_top - 1, left + cell, picture_top + cell), outline="lightgray")
            if captions:
                text = "\n".join(captions[column])
                draw.multiline_text((left, picture_top + cell + 4), text, fill="dimgray", font=font)
        top += height
    return sheet


def save_document(folder: str | Path, document: Any) -> list[str]:
    """Write a document's pictures as 000.png, ... and return its parts as lines: text, or a picture's path."""
    folder = Path(folder)
    lines: list[str] = []
    pictures = 0
    for segment in document.segments:
        if hasattr(segment, "pixels"):
            lines.append(str(save_image(folder / f"{pictures:03d}.png", segment.pixels)))
            pictures += 1
        else:
            lines.append(segment.text)
    return lines
