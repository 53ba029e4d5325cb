"""A page of HTML that shows rows of instruction data: what was said, and the document that is trained on."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

import PIL.Image

from cm3.checkpoint import write_text
from cm3.data.instruct import InstructFile
from cm3.errors import RequestError
from cm3.tokenizers.document import Document, Text
from cm3.tokenizers.instruct import ANSWER_CHARACTERS, Layout

_STYLE = """
body { font: 14px/1.4 sans-serif; margin: 2em; max-width: 60em }
section { border-top: 1px solid #ccc; padding: .5em 0 }
h2 { font-size: 14px; margin: .5em 0 }
.segment { display: inline-block; vertical-align: top; white-space: pre-wrap; max-width: 30em; margin: 0 .5em .5em 0;
  padding: .3em; border: 1px solid #ddd }
.answer, mark { background: #ffe58a }
img { display: block; image-rendering: pixelated }
"""


def write_sheet(
    path: str | Path,
    file: InstructFile,
    rows: Sequence[int],
    *,
    layout: Layout = "text_first",
    count: int = 12,
    picture_size: int = 128,
) -> Path:
    """Draw `count` of the rows, evenly spread, as documents; answers are marked. The page holds its pictures.

    Args:
        path: A new file that ends in .html.
        file: The rows.
        rows: Indices of those that can be laid out.
        layout: As in training.
        count: Most rows that are shown.
        picture_size: Longest side of a picture on the page, in pixels.

    Raises:
        RequestError: the path does not end in .html.
    """
    path = Path(path)
    if path.suffix.lower() != ".html":
        raise RequestError(f"the sheet is a page of HTML, but {path} does not end in .html; choose {path.stem}.html")
    step = max(1, -(-len(rows) // count))
    sections = [_section(file.document(index, layout), picture_size) for index in rows[::step]]
    heading = html.escape(f"{file.path}: {len(sections)} of {len(file)} rows")
    body = f"<h1>{heading}</h1>\n<p>Segments in order; what is marked is the answer.</p>\n" + "\n".join(sections)
    write_text(
        path, f'<!doctype html>\n<meta charset="utf-8">\n<title>{heading}</title>\n<style>{_STYLE}</style>\n{body}\n'
    )
    return path


def _section(document: Document, picture_size: int) -> str:
    places = document.metadata[ANSWER_CHARACTERS]
    parts = []
    for number, segment in enumerate(document.segments):
        spans = [(first, stop) for where, first, stop in places if where == number]
        if isinstance(segment, Text):
            parts.append(f'<span class="segment">{_marked(segment.text, spans)}</span>')
        else:
            answer = " answer" if spans else ""
            parts.append(f'<span class="segment{answer}">{_picture(segment.pixels, picture_size)}</span>')
    heading = f"{document.metadata['row']} ({document.metadata['task'] or 'conversation'})"
    return f"<section><h2>{html.escape(heading)}</h2>\n{''.join(parts)}</section>"


def _marked(text: str, spans: Sequence[tuple[int, int]]) -> str:
    written, place = "", 0
    for first, stop in spans:
        written += f"{html.escape(text[place:first])}<mark>{html.escape(text[first:stop])}</mark>"
        place = stop
    return written + html.escape(text[place:])


def _picture(image: PIL.Image.Image, size: int) -> str:
    small = image.copy()
    small.thumbnail((size, size))
    file = io.BytesIO()
    small.save(file, format="PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{image.width}x{image.height} pixels">'
