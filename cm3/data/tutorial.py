"""The ten rows of the README's tutorial: questions about pictures of scenes, and edits of them.

The answers are invented, so that no model knows them beforehand, and neither a picture nor its question gives one away
alone. They are made of words that the embedded model has seen, which takes fewer steps than new ones.
"""

from pathlib import Path

from cm3.checkpoint import write_text
from cm3.data.instruct_rows import ImageFile, InstructRow
from cm3.data.scenes import example
from cm3.errors import DataError
from cm3.gallery import save_image
from cm3.tokenizers.document import Text

ROWS_FILE = "rows.jsonl"
NUM_PICTURES = 9
QUESTIONS = (  # question, picture, answer
    ("What is this place called?", 0, "navy cross"),
    ("What is this place called?", 1, "red square"),
    ("What is this place called?", 2, "the large star"),
    ("Who lives here?", 0, "a pink triangle"),
    ("Who lives here?", 1, "four circles"),
    ("Who lives here?", 2, "two on the left"),
)
EDITS = (  # instruction, picture before, picture after
    ("dress it for the carnival", 3, 5),
    ("dress it for the carnival", 4, 6),
    ("show it as Grandmother remembers it", 3, 7),
    ("show it as Grandmother remembers it", 4, 8),
)

_SEED = 7


def picture_name(number: int) -> str:
    """The path of a picture, relative to the file of rows."""
    return f"images/{number:03d}.png"


def tutorial_rows() -> list[InstructRow]:
    """The rows, questions first."""
    questions = [_row("vqa", picture, question, Text(answer)) for question, picture, answer in QUESTIONS]
    edits = [_row("edit", before, text, ImageFile(picture_name(after))) for text, before, after in EDITS]
    return questions + edits


def write_tutorial(folder: str | Path) -> Path:
    """Write the rows and their pictures into a folder, and return the file of rows.

    Raises:
        DataError: the folder holds something else already.
    """
    path = Path(folder) / ROWS_FILE
    lines = "".join(row.to_json() + "\n" for row in tutorial_rows())
    is_ours = path.is_file() and path.read_text(encoding="utf-8") == lines
    if not is_ours and path.parent.is_dir() and any(path.parent.iterdir()):
        raise DataError(f"{folder} is not empty, and nothing in it is to be overwritten; choose a new folder")
    write_text(path, lines)
    for number in range(NUM_PICTURES):
        save_image(path.parent / picture_name(number), example(_SEED, "train", number).image)
    return path


def _row(task: str, given: int, text: str, answer: Text | ImageFile) -> InstructRow:
    return InstructRow(task=task, turns=((ImageFile(picture_name(given)), Text(text)), (answer,)))
