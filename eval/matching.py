"""Whether a drawn picture is that of its own caption, beside those of other rows.

Who draws without regard to the captions is at chance here, however well it draws: a half, k of n, or one of ten. Rivals
can be kept to a group, such as drawings of one style, so that what all of a group share decides nothing.

N captions   R rivals of each   F numbers of a small picture
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from PIL import Image as PILImage

from cm3.errors import ConfigError
from cm3.eval.report import Estimate, mean, share
from cm3.tokenizers.image import to_square


class OwnRank(NamedTuple):
    """Where the original of a drawn picture's caption stands among the originals it is compared with."""

    ahead: float
    """Other originals that are nearer to the drawn picture; one at the same distance is half of one."""
    others: int
    """Other originals."""


def thumbnail(image: PILImage.Image, side: int) -> Float[np.ndarray, " F"]:
    """The RGB numbers of a picture's central square at a small size (box filter)."""
    small = to_square(image, max(image.size)).resize((side, side), PILImage.Resampling.BOX)
    return np.asarray(small, dtype=np.float32).ravel()


def own_ranks(
    drawn: Mapping[int, PILImage.Image],
    originals: Sequence[PILImage.Image],
    groups: Sequence[object],
    side: int,
) -> dict[int, OwnRank]:
    """Compare each drawn picture with the originals of its group, by mean squared difference of thumbnails.

    Args:
        drawn: Pictures by the number of their caption.
        originals: The picture of each caption.
        groups: What each caption belongs to.
        side: Of the thumbnails, in pixels.

    Raises:
        ConfigError: a caption is alone in its group.
    """
    original_NF = np.stack([thumbnail(picture, side) for picture in originals])
    ranks = {}
    for number, picture in drawn.items():
        others = [other for other in _members(groups, number) if other != number]
        if not others:
            raise ConfigError(f"group {groups[number]!r} has one picture, which is nearest by itself; take larger ones")
        distance_N = ((original_NF - thumbnail(picture, side)) ** 2).mean(1)
        own, rest = distance_N[number], distance_N[others]
        ranks[number] = OwnRank(float((rest < own).sum() + (rest == own).sum() / 2), len(others))
    return ranks


def nearer_than_others(ranks: Sequence[OwnRank]) -> Estimate:
    """How many of the other originals are farther than the own one, on average; chance is a half."""
    return mean([1 - rank.ahead / rank.others for rank in ranks])


def recall(ranks: Sequence[OwnRank], k: int) -> Estimate:
    """How often the own original is among the k nearest; see `chance_of_recall`."""
    return share(rank.ahead < k for rank in ranks)


def chance_of_recall(ranks: Sequence[OwnRank], k: int) -> float:
    """`recall` of pictures that have nothing to do with their captions."""
    return float(np.mean([min(1.0, k / (rank.others + 1)) for rank in ranks]))


def draw_rivals(captions: Sequence[str], groups: Sequence[object], count: int, seed: int) -> Int[np.ndarray, "N R"]:
    """For each caption the numbers of `count` different ones of its group, drawn at random.

    Raises:
        ConfigError: a group has too few.
    """
    rng, rows = np.random.default_rng(seed), []
    for number, caption in enumerate(captions):
        others = [other for other in _members(groups, number) if captions[other] != caption]
        if len(others) < count:
            raise ConfigError(
                f"group {groups[number]!r} has {len(others)} other captions than {caption!r}, {count} rivals are asked "
                "for; take larger groups or fewer rivals"
            )
        rows.append(rng.choice(others, size=count, replace=False))
    return np.array(rows, dtype=np.int64).reshape(len(rows), count)


def _members(groups: Sequence[object], number: int) -> list[int]:
    return [other for other, group in enumerate(groups) if group == groups[number]]
