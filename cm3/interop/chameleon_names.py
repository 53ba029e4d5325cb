"""The vocabulary of a Chameleon by the names of its ids: which are text, image codes and marks.

The public weights have image code k at id 4 + k, but nothing here counts on it: an image id is one whose name says so,
`IMGIMG`, the digits of the code as letters (A is 0), `Z`.
"""

import re
from collections.abc import Mapping
from typing import Any

from cm3.errors import ModelFilesError
from cm3.tokenizers.vocabulary import TEXT_SPECIALS, IdRange, Vocabulary

BREAK = "<racm3:break>"
"""Begins an image; our `<break>`."""
EOSS = "<eoss>"
"""Ends an image."""
SEPARATOR = "<reserved08706>"
"""Ends a turn of a conversation."""
PLACEHOLDER = "<image>"
"""Stands for an image in Hugging Face's texts; once `<reserved08707>`."""
_MAX_SENTINELS = 512

_IMAGE = re.compile("IMGIMG([A-J]+)Z")
_UNUSED = re.compile(r"<reserved\d+>")
_DIGITS = str.maketrans("ABCDEFGHIJ", "0123456789")


def names_of_tokenizer(tokenizer: Any, source: str) -> dict[str, int]:
    """The name and id of all that a `tokenizer.json` knows.

    Raises:
        ModelFilesError: it has another form.
    """
    try:
        names = dict(tokenizer["model"]["vocab"])
        return names | {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    except (KeyError, TypeError, ValueError) as error:
        raise ModelFilesError(f"{source} holds no vocabulary ({error!r}); download it again") from error


def chameleon_vocabulary(names: Mapping[str, int], size: int, source: str) -> Vocabulary:
    """Our table of the ids of a Chameleon.

    The sentinels of the CM3 objective, which Chameleon does not use, are the first run of ids that have no name or a
    reserved one, behind the marks of images: in the public weights exactly the 512 that CM3Leon's sentinels had.

    Args:
        names: Name to id.
        size: Number of ids, rows of the embedding.
        source: Where the names come from, for errors.

    Raises:
        ModelFilesError: a name is missing, or the ids of the image codes are not one run in the order of the codes.
    """
    if missing := [name for name in (*TEXT_SPECIALS, BREAK, EOSS) if name not in names]:
        raise ModelFilesError(f"{source} has no {', '.join(missing)}, so it is no Chameleon's; choose another")
    if outside := [name for name, id in names.items() if not 0 <= id < size]:
        raise ModelFilesError(f"{source} names ids beyond the {size} of the model: {', '.join(outside[:4])}")
    first, num_codes = _image_ids(names, source)
    marks = {"<break>": names[BREAK], "<eoss>": names[EOSS]}
    sentinels = _unused_run(names, size, behind=max(first + num_codes - 1, *marks.values()))
    if not sentinels:
        raise ModelFilesError(f"{source} has no unused ids behind the marks of images, which would be sentinels")
    kinds: list[tuple[str, Any, int, int]] = [
        ("image", "image", first, num_codes),
        ("break", "special", marks["<break>"], 1),
        ("eoss", "special", marks["<eoss>"], 1),
        ("sentinel", "special", sentinels.start, len(sentinels)),
    ]
    ranges: list[IdRange] = []
    for name, kind, start, count in sorted(kinds, key=lambda kind: kind[2]):
        end = ranges[-1].stop if ranges else 0
        if start > end:
            ranges.append(IdRange(f"text_{end}", "text", end, start - end))
        ranges.append(IdRange(name, kind, start, count))
    if ranges[-1].stop < size:
        ranges.append(IdRange(f"text_{ranges[-1].stop}", "text", ranges[-1].stop, size - ranges[-1].stop))
    special_ids = {name: names[name] for name in TEXT_SPECIALS} | marks
    special_ids |= {f"<sentinel:{index}>": id for index, id in enumerate(sentinels)}
    special_ids |= {
        ours: names[name] for ours, name in (("<separator>", SEPARATOR), ("<image>", PLACEHOLDER)) if name in names
    }
    return Vocabulary(tuple(ranges), special_ids)


def _image_ids(names: Mapping[str, int], source: str) -> tuple[int, int]:
    """The id of image code 0, and how many codes there are."""
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
    return first, len(id_of_code)


def _unused_run(names: Mapping[str, int], size: int, behind: int) -> range:
    """The first run of ids behind `behind` that no name is made for."""
    used = {id for name, id in names.items() if not _UNUSED.fullmatch(name) or name == SEPARATOR}
    start = next((id for id in range(behind + 1, size) if id not in used), size)
    stop = next((id for id in range(start, size) if id in used), size)
    return range(start, min(stop, start + _MAX_SENTINELS))
