"""CLIPScore over any encoder of ours, under a named convention, because the same pictures read 0.31, 31 or 0.78.

N pairs of a picture and a text   E embedding width

Scoring with the encoder that chose among candidates is circular: use another one, or say so. Texts are cut by the
encoder, which keeps the end token that CLIP reads the vector from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float
from PIL import Image as PILImage

from cm3.errors import DataError
from cm3.eval.report import Estimate, mean
from cm3.retrieval.encoder import Encoder

ClipConvention = Literal["hessel", "torchmetrics", "cosine"]


@dataclass(frozen=True)
class _Convention:
    words: str
    scale: float
    prefix: str
    floor_of_pairs: bool
    """Negative cosines count as 0, each for itself."""
    floor_of_mean: bool
    """Only the mean is raised to 0."""


CONVENTIONS: dict[ClipConvention, _Convention] = {
    "hessel": _Convention("2.5 max(cos, 0), 'A photo depicts ' before the text", 2.5, "A photo depicts ", True, False),
    "torchmetrics": _Convention("max(mean of 100 cos, 0), text as it is", 100.0, "", False, True),
    "cosine": _Convention("mean cosine, text as it is", 1.0, "", False, False),
}
"""hessel: arXiv 2104.08718 and github.com/jmhessel/clipscore. torchmetrics: its CLIPScore. cosine: what GigaGAN's and
many other scripts print."""


def clip_scores(
    encoder: Encoder,
    images: Sequence[PILImage.Image],
    texts: Sequence[str],
    convention: ClipConvention = "hessel",
) -> Float[np.ndarray, " N"]:
    """The score of each picture with its text.

    Raises:
        DataError: not as many texts as pictures.
    """
    return _of_cosines(_cosines(encoder, images, texts, CONVENTIONS[convention].prefix), convention)


def clip_score(
    encoder: Encoder,
    images: Sequence[PILImage.Image],
    texts: Sequence[str],
    convention: ClipConvention = "hessel",
) -> Estimate:
    """The mean score with its 95% interval."""
    return corpus_score(clip_scores(encoder, images, texts, convention), convention)


def corpus_score(scores_N: Float[np.ndarray, " N"], convention: ClipConvention) -> Estimate:
    """The figure of a set from the scores of its pairs."""
    estimate = mean(scores_N.tolist())
    if not CONVENTIONS[convention].floor_of_mean:
        return estimate
    return Estimate(max(estimate.value, 0.0), max(estimate.low, 0.0), max(estimate.high, 0.0), estimate.count)


def reference_clip_scores(
    encoder: Encoder,
    images: Sequence[PILImage.Image],
    texts: Sequence[str],
    references: Sequence[Sequence[str]],
) -> Float[np.ndarray, " N"]:
    """RefCLIPScore of captions: the harmonic mean of CLIPScore (hessel) and the cosine with the closest reference
    (arXiv 2104.08718, section 3); 0 where either is not positive.

    Raises:
        DataError: not as many texts or references as pictures, or a picture without references.
    """
    if len(references) != len(texts) or not all(references):
        raise DataError(f"{len(references)} lists of references for {len(texts)} captions; give each one or more")
    convention = CONVENTIONS["hessel"]
    score_N = clip_scores(encoder, images, texts)
    owner = np.repeat(np.arange(len(references)), [len(alternatives) for alternatives in references])
    written_NE = encoder.encode_texts([convention.prefix + text for text in texts])
    flat = [convention.prefix + text for alternatives in references for text in alternatives]
    cosine_R = (encoder.encode_texts(flat) * written_NE[owner]).sum(axis=1)
    closest_N = np.full(len(texts), -np.inf)
    np.maximum.at(closest_N, owner, cosine_R)
    closest_N = np.maximum(closest_N, 0.0)
    total_N = score_N + closest_N
    return 2 * score_N * closest_N / np.where(total_N > 0, total_N, 1.0)


def _cosines(
    encoder: Encoder, images: Sequence[PILImage.Image], texts: Sequence[str], prefix: str
) -> Float[np.ndarray, " N"]:
    if len(images) != len(texts):
        raise DataError(f"{len(images)} pictures and {len(texts)} texts; CLIPScore needs a text for each picture")
    image_NE, text_NE = encoder.encode_images(images), encoder.encode_texts([prefix + text for text in texts])
    return np.asarray((image_NE * text_NE).sum(axis=1), dtype=np.float64)


def _of_cosines(cosine_N: Float[np.ndarray, " N"], convention: ClipConvention) -> Float[np.ndarray, " N"]:
    settings = CONVENTIONS[convention]
    return settings.scale * (np.maximum(cosine_N, 0.0) if settings.floor_of_pairs else cosine_N)
