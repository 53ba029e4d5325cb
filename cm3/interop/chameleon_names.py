"""The names of the ids of a Chameleon, as its `tokenizer.json` has them."""

from typing import Any

from cm3.errors import ModelFilesError

BREAK = "<racm3:break>"
"""Begins an image."""
EOSS = "<eoss>"
"""Ends an image."""
SEPARATOR = "<reserved08706>"
"""Ends a turn of a conversation."""
PLACEHOLDER = "<image>"
"""Stands for an image in Hugging Face's texts."""
_PLACEHOLDER_OF_META = "<reserved08707>"
"""What has that id in Meta's vocabulary."""


def names_of_tokenizer(tokenizer: Any, source: str) -> dict[str, int]:
    """The name and id of all that a `tokenizer.json` knows.

    Raises:
        ModelFilesError: it has another form.
    """
    try:
        names = dict(tokenizer["model"]["vocab"])
        names |= {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
        if not all(isinstance(id, int) for id in names.values()):
            raise TypeError("an id is not a whole number")
        return names
    except (KeyError, TypeError, ValueError) as error:
        raise ModelFilesError(f"{source} holds no vocabulary ({error!r}); download it again") from error


def with_placeholder(tokenizer: Any, source: str) -> Any:
    """Meta's `text_tokenizer.json` as Hugging Face has it: one id that was left over is the placeholder of an image.

    Raises:
        ModelFilesError: it has another form.
    """
    try:
        vocabulary = {_as_hugging_face(name): id for name, id in tokenizer["model"]["vocab"].items()}
        added = [{**token, "content": _as_hugging_face(token["content"])} for token in tokenizer["added_tokens"]]
        return {**tokenizer, "model": {**tokenizer["model"], "vocab": vocabulary}, "added_tokens": added}
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelFilesError(f"{source} holds no vocabulary ({error!r}); download it again") from error


def _as_hugging_face(name: str) -> str:
    return PLACEHOLDER if name == _PLACEHOLDER_OF_META else name
