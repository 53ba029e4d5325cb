"""What a Chameleon writes: which of its ids are text, image codes and marks, how it lays out documents, how it samples.

The public weights have image code k at id 4 + k, but nothing here counts on it: what an id is, its name says. An image
code is `IMGIMG`, the digits of the code as letters (A is 0), `Z`. Text is whatever is neither that, nor a mark, nor
reserved. Unlike CM3Leon, Chameleon has no sentinels.
"""

import re
from collections.abc import Mapping
from itertools import groupby
from typing import Any, Literal

from cm3.errors import ModelFilesError
from cm3.interop.chameleon_names import BREAK, EOSS, PLACEHOLDER, SEPARATOR
from cm3.tokenizers.layout import Layout
from cm3.tokenizers.vocabulary import NUM_IMAGE_SIZES, TEXT_SPECIALS, IdRange, Vocabulary

LAYOUT = Layout(start="<s>", end="</s>", between=None, image_start=BREAK, image_end=EOSS, turn_end=SEPARATOR)
"""`<s>` text (`<racm3:break>` codes `<eoss>`) ... `</s>`, and `<reserved08706>` before an answer."""

GENERATION: dict[str, Any] = {
    "temperature": 0.7,
    "top_p": 0.9,
    "repetition_penalty": 1.2,
    "guidance_scale": 3.0,
    "image_guidance_scale": 1.2,
}
"""The sampling settings of Chameleon's own code, those of text and of pictures in one."""

_IMAGE = re.compile("IMGIMG([A-J]+)Z")
_RESERVED = re.compile(r"<(?:reserved\d+|sentinel:\d+)>")
_DIGITS = str.maketrans("ABCDEFGHIJ", "0123456789")
_REQUIRED = (*TEXT_SPECIALS, BREAK, EOSS, SEPARATOR)
_ROW_END, _SIZE = "<reserved08799>", "<reserved088{:02}>"
"""In Lumina-mGPT: ends a row of codes; a size in units of 32 pixels, of which two begin an image."""


def chameleon_vocabulary(names: Mapping[str, int], size: int, source: str, *, named_sizes: bool = False) -> Vocabulary:
    """Our table of the ids of a Chameleon.

    Args:
        names: Name to id.
        size: Number of ids, rows of the embedding.
        source: Where the names come from, for errors.
        named_sizes: The model is a Lumina-mGPT: some ids name the size of an image, one ends its rows.

    Raises:
        ModelFilesError: a name is missing, or the ids of the image codes are not one run in the order of the codes.
    """
    if missing := [name for name in _REQUIRED if name not in names]:
        raise ModelFilesError(f"{source} has no {', '.join(missing)}, so it is no Chameleon's; choose another")
    if outside := [name for name, id in names.items() if not 0 <= id < size]:
        raise ModelFilesError(f"{source} names ids beyond the {size} of the model: {', '.join(outside[:4])}")
    image_ids = _image_ids(names, source)
    marks = {name: names[name] for name in (*_REQUIRED, PLACEHOLDER) if name in names}
    if named_sizes:
        sizes = {f"<image_size:{number}>": _SIZE.format(number) for number in range(1, NUM_IMAGE_SIZES + 1)}
        marks |= {ours: names[name] for ours, name in ({"<image_row_end>": _ROW_END} | sizes).items() if name in names}
    text_ids = {id for name, id in names.items() if not _RESERVED.fullmatch(name)} - {*marks.values(), *image_ids}

    def kind(id: int) -> Literal["text", "image", "special"]:
        return "image" if id in image_ids else "text" if id in text_ids else "special"

    ranges = []
    for name, run in groupby(range(size), kind):
        first, *rest = run
        ranges.append(IdRange(name if name == "image" else f"{name}_{first}", name, first, 1 + len(rest)))
    return Vocabulary(tuple(ranges), marks, LAYOUT)


def _image_ids(names: Mapping[str, int], source: str) -> range:
    """The ids of the image codes, in the order of the codes."""
    id_of_code = {}
    for name, id in names.items():
        if match := _IMAGE.fullmatch(name):
            id_of_code[int(match[1].translate(_DIGITS))] = id
    if not id_of_code:
        raise ModelFilesError(f"{source} names no image codes (IMGIMGAZ and so on), so it is no Chameleon's")
    first = id_of_code.get(0, 0)
    wrong = [code for code, id in sorted(id_of_code.items()) if id != first + code or code >= len(id_of_code)]
    if wrong:
        raise ModelFilesError(
            f"{source} has image code {wrong[0]} at id {id_of_code[wrong[0]]}, {first + wrong[0]} was expected; only "
            "vocabularies whose image codes are one run in their order can be read"
        )
    return range(first, first + len(id_of_code))
