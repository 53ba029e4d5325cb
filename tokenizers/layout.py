"""Layouts: which special ids stand where in a document."""

from dataclasses import dataclass, fields
from typing import Literal

from cm3.errors import ConfigError

Place = Literal["start", "end", "between", "image_start", "image_end", "turn_end"]
"""A place of a `Layout`."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which special ids stand where in a document, by their names in the vocabulary; None is nothing at that place.

    The default is CM3Leon's (arXiv 2309.02591, figures 8 and 9), `</s> segment <break> segment ... </s>`. In
    Chameleon's images are framed and nothing parts the texts from them: `<s> text (begin codes end) text ... </s>`.

    Raises:
        ConfigError: nothing tells where a segment ends.
    """

    start: str = "</s>"
    """Opens a document."""
    end: str = "</s>"
    """Closes it."""
    between: str | None = "<break>"
    """Parts two segments."""
    image_start: str | None = None
    """Stands before the codes of an image."""
    image_end: str | None = None
    """Stands after them."""
    turn_end: str | None = None
    """Stands before an answer that is a turn of its own; where there is none, nothing is asked in turns."""

    def __post_init__(self) -> None:
        frames = [name is not None for name in (self.image_start, self.image_end)]
        if any(frames) != all(frames) or self.between is None and not any(frames):
            raise ConfigError(f"{self} cannot be read back; name `between`, or both `image_start` and `image_end`")

    @property
    def names(self) -> list[str]:
        """The special ids that it uses."""
        places = (getattr(self, place.name) for place in fields(self))
        return list(dict.fromkeys(name for name in places if name is not None))


CM3_LAYOUT = Layout()
"""CM3Leon's, and that of every vocabulary that names no other."""
