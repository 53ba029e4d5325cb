"""CLIPScore under each convention, with an encoder whose vectors are known."""

import math

import numpy as np
import pytest
from PIL import Image

from cm3.errors import DataError
from cm3.eval.clip_metrics import CONVENTIONS, clip_score, clip_scores, corpus_score, reference_clip_scores


class Compass:
    """Texts that end in a number of degrees, and pictures whose red value is one, as unit vectors of that angle."""

    width, hash = 2, "compass"

    def __init__(self):
        self.texts = []

    def encode_texts(self, texts):
        self.texts += texts
        return self._vectors([float(text.split()[-1]) for text in texts])

    def encode_images(self, images):
        return self._vectors([image.getpixel((0, 0))[0] for image in images])

    def _vectors(self, degrees):
        angles = np.radians(np.array(degrees))
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


IMAGES = [Image.new("RGB", (2, 2), (angle, 0, 0)) for angle in (0, 0, 0)]
TEXTS = ["at 0", "at 60", "at 120"]  # cosines 1, 1/2, -1/2


@pytest.mark.parametrize(
    ("convention", "scores", "figure"),
    [
        ("hessel", [2.5, 1.25, 0.0], 1.25),
        ("torchmetrics", [100, 50, -50], 100 / 3),
        ("cosine", [1, 0.5, -0.5], 1 / 3),
    ],
)
def test_conventions_differ_in_scale_and_floor(convention, scores, figure):
    assert clip_scores(Compass(), IMAGES, TEXTS, convention) == pytest.approx(scores, abs=1e-4)
    estimate = clip_score(Compass(), IMAGES, TEXTS, convention)
    assert estimate.value == pytest.approx(figure, abs=1e-4) and estimate.count == 3


def test_torchmetrics_raises_only_the_mean_to_zero():
    assert corpus_score(np.array([-50.0, -10.0, 30.0]), "torchmetrics").value == 0
    assert corpus_score(np.array([-0.5, -0.1, 0.3]), "cosine").value == pytest.approx(-0.1)


@pytest.mark.parametrize(
    ("convention", "prefix"), [("hessel", "A photo depicts "), ("torchmetrics", ""), ("cosine", "")]
)
def test_only_the_original_has_a_prefix(convention, prefix):
    encoder = Compass()
    clip_scores(encoder, IMAGES, TEXTS, convention)
    assert encoder.texts == [prefix + text for text in TEXTS]
    assert prefix.strip() in CONVENTIONS[convention].words


def test_reference_score_is_the_harmonic_mean_with_the_closest_reference():
    references = [["at 60", "at 90"], ["at 120", "at 240"], ["at 120"]]
    scores = reference_clip_scores(Compass(), IMAGES, TEXTS, references)
    # picture 0: 2.5 and cos 60; picture 1: 1.25 and cos 60; picture 2: 0 whatever the references
    assert scores == pytest.approx([2 * 2.5 * 0.5 / 3, 2 * 1.25 * 0.5 / 1.75, 0], abs=1e-4)


def test_reference_score_of_opposite_references_is_zero():
    scores = reference_clip_scores(Compass(), IMAGES[:1], TEXTS[:1], [["at 180"]])
    assert scores.tolist() == [0.0] and not math.isnan(scores[0])


def test_every_picture_needs_its_text():
    with pytest.raises(DataError, match="3 pictures and 2 texts; CLIPScore needs a text for each picture"):
        clip_scores(Compass(), IMAGES, TEXTS[:2])
    with pytest.raises(DataError, match="give each one or more"):
        reference_clip_scores(Compass(), IMAGES, TEXTS, [["at 0"], [], ["at 0"]])


def test_texts_longer_than_the_encoder_reads_are_scored():
    from cm3.retrieval.encoder import open_encoder

    encoder = open_encoder("demo", "cpu")
    long = "a large red circle left of a small blue square " * 40
    picture = [Image.new("RGB", (64, 64), "white")]
    (score,) = clip_scores(encoder, picture, [long], "cosine")
    assert -1 <= score <= 1
    assert score == clip_scores(encoder, picture, [long + "and more"], "cosine")[0]
