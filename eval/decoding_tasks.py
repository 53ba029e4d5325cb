"""Ways of decoding at 1, 2, 4, 8 samples a caption (CM3Leon section 3.1): on scenes, and on any captioned pictures.

N captions   S candidates of each   R rivals of each   M pictures   E embedding width
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from PIL import Image as PILImage

from cm3.config import check_seed, to_dict
from cm3.data.sources import SourceConfig, open_source
from cm3.errors import ConfigError
from cm3.eval.distances import Gaussian, frechet_estimate
from cm3.eval.document_tasks import ALL, PairSet, caption_of, picture_of, square_of
from cm3.eval.matching import draw_rivals, nearer_than_others, own_ranks
from cm3.eval.protocol import JACKKNIFE, NORMAL, WILSON, protocol
from cm3.eval.report import Estimate, TaskResult, share
from cm3.eval.scene_tasks import SceneSet
from cm3.eval.scenes import matches, read_scene
from cm3.generation.rerank import caption_likelihood
from cm3.pipeline import CM3
from cm3.retrieval.encoder import DEMO, Encoder, open_encoder
from cm3.tokenizers.image import to_square

_GRADER = "cm3.eval.scenes.matches on what read_scene sees"

ARMS: dict[str, dict[str, Any]] = {
    "top-p": {"sampler": "top-p"},
    "top-p, guidance": {"sampler": "top-p", "guidance": True},
    "cd-k, k = 1": {"sampler": "cd-k", "contrast_k": 1},
    "cd-k, k = 8": {"sampler": "cd-k", "contrast_k": 8},
    "mixed, k = 1": {"sampler": "mixed", "contrast_k": 1, "guidance": True},
}
"""The ways of decoding that are compared; mixed is guided top-p and cd-k in turn."""


def settings_of(arm: str, temperature: float, top_p: float, guidance_scale: float) -> dict[str, Any]:
    """The sampling settings of a way of decoding; those without guidance have it at 1, which is off."""
    chosen = dict(ARMS[arm])
    scale = guidance_scale if chosen.pop("guidance", False) else 1.0
    return {**chosen, "temperature": temperature, "top_p": top_p, "guidance_scale": scale}


@dataclass(frozen=True, kw_only=True)
class DecodingStudy:
    """Top-p, guidance, CD-K and their mixture, keeping the best of 1, 2, 4, 8 samples by each of `JUDGES`."""

    scenes: SceneSet = SceneSet()
    """The captions to draw."""
    samples: tuple[int, ...] = (1, 2, 4, 8)
    """Candidates for each caption; the first n of the largest number are the n."""
    temperature: float = 1.0
    """Sampling temperature of all."""
    top_p: float = 0.9
    """Nucleus size of top-p."""
    guidance_scale: float = 2.0
    """Where there is guidance."""
    encoder: str = DEMO
    """See `cm3.retrieval.encoder.open_encoder`."""
    batch_size: int = 20
    """Captions drawn at a time; the pictures do not depend on it."""

    def run(self, model: CM3) -> TaskResult:
        start = time.monotonic()
        examples = list(self.scenes.open())
        encoder = open_encoder(self.encoder, str(model.device))
        most, numbers_N = max(self.samples), np.arange(len(examples))
        metrics: dict[str, Estimate] = {}
        seconds: dict[str, float] = {}
        for arm in ARMS:
            sampling = settings_of(arm, self.temperature, self.top_p, self.guidance_scale)
            right, pictures, clock = [], list[PILImage.Image](), time.monotonic()
            for first in range(0, len(examples), self.batch_size):
                batch = examples[first : first + self.batch_size]
                captions = [example.caption for example in batch]
                samples = model.generate(captions, num_images=most, seed=self.scenes.seed, **sampling)
                pictures += [picture for drawn in samples for picture in drawn]
                right += [
                    matches(read_scene(picture), example.statement).attributes_right
                    for drawn, example in zip(samples, batch, strict=True)
                    for picture in drawn
                ]
            seconds[arm] = (time.monotonic() - clock) / len(right)
            captions = [example.caption for example in examples]
            scores = _scores(model, encoder, captions, pictures, encoder.encode_images(pictures))
            right_M = np.array(right)
            fits = {ranker: _fits(scores[ranker], len(numbers_N), most) for ranker in JUDGES}
            for ranker, count in product(JUDGES, self.samples):
                chosen_N = numbers_N * most + fits[ranker][:, :count].argmax(axis=1)
                how = f"{arm}, best of {count} by {ranker}"
                metrics[f"shape, colour and count right, {how}"] = share(right_M[chosen_N].tolist())
        record = self.scenes.protocol(
            model,
            sampling={"temperature": self.temperature, "top_p": self.top_p, "guidance_scale": self.guidance_scale},
            retrieve=0,
            seed=self.scenes.seed,
            samples_per_prompt=most,
            re_ranking=_RE_RANKING,
            metrics={"grader": _GRADER, **_ranker_definitions(self.encoder, encoder)},
            interval=WILSON,
            details={"ways": ARMS, "seconds a picture": {arm: round(value, 4) for arm, value in seconds.items()}},
        )
        return TaskResult("decoding", metrics, record, time.monotonic() - start)


JUDGES: dict[str, str] = {"caption": "clip", "clip": "caption"}
"""The rankers, and who judges what each has chosen: never itself."""

_RE_RANKING = f"best of the first n by {' and by '.join(JUDGES)}"

Score = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""How well texts and pictures fit, both given by their numbers, [M] and [M] to [M]; higher is better."""


@dataclass(frozen=True, kw_only=True)
class PairDecodingStudy:
    """The same on any captioned pictures, where no oracle tells right from wrong; three figures stand in for it.

    Own picture found: of the chosen pictures of a caption and of some rivals, the judge (encoder or caption
    likelihood, whichever of `JUDGES` did not choose) finds that the caption's own fits it best. One text is asked
    about several pictures and not the reverse, since a model finds some texts likelier than others whatever the
    picture shows. Nearer to its original: how many originals of other captions are farther in small pixels; chance
    is a half, and neither ranker nor judge has a part in it. Fréchet distance of the chosen pictures to real ones,
    by the encoder, and therefore circular where the encoder chose. The caption likelihood is the model's own, and
    guidance is by its nature in favour of it: judged so, guided ways look better than they are.
    """

    source: SourceConfig
    """The captions to draw, with their originals."""
    within: str | None = None
    """A column; a caption has those of the same value as rivals. Null: all."""
    references: SourceConfig | None = None
    """The real pictures of the Fréchet distance; null takes the originals."""
    encoder: str = DEMO
    """See `cm3.retrieval.encoder.open_encoder`; trained on such pictures, or its figures say little."""
    samples: tuple[int, ...] = (1, 2, 4, 8)
    """Candidates for each caption; the first n of the largest number are the n."""
    temperature: float = 1.0
    """Sampling temperature of all."""
    top_p: float = 0.9
    """Nucleus size of top-p."""
    guidance_scale: float = 2.0
    """Where there is guidance."""
    num_rivals: int = 9
    """Other captions whose pictures stand beside a caption's own."""
    thumbnail_side: int = 16
    """Pictures are compared at this size (box filter), by mean squared difference of RGB."""
    seed: int = 0
    """Seed of the sampling and of the rivals."""
    batch_size: int = 20
    """Captions drawn at a time; the pictures do not depend on it."""

    def __post_init__(self) -> None:
        if not self.samples or min(self.samples) < 1 or self.num_rivals < 1:
            raise ConfigError(f"samples={list(self.samples)}, num_rivals={self.num_rivals}; choose 1 or more of each")
        check_seed(self.seed)

    def run(self, model: CM3) -> TaskResult:
        start = time.monotonic()
        encoder = open_encoder(self.encoder, str(model.device))
        pairs = PairSet(source=self.source)
        documents = pairs.open(*([self.within] if self.within else []))
        captions = [caption_of(document) for document in documents]
        groups = [document.metadata[self.within] if self.within else ALL for document in documents]
        originals = [picture_of(document) for document in documents]
        rivals_NR = draw_rivals(captions, groups, self.num_rivals, self.seed)
        real = (picture_of(document) for document in open_source(self.references)) if self.references else originals
        real_ME = encoder.encode_images([to_square(picture, model.image_size) for picture in real])
        reference = Gaussian.of(real_ME)

        most, numbers_N = max(self.samples), np.arange(len(captions))
        metrics: dict[str, Estimate] = {}
        seconds: dict[str, float] = {}
        for arm in ARMS:
            sampling = settings_of(arm, self.temperature, self.top_p, self.guidance_scale)
            clock, pictures = time.monotonic(), list[PILImage.Image]()
            for first in range(0, len(captions), self.batch_size):
                batch = captions[first : first + self.batch_size]
                samples = model.generate(batch, num_images=most, seed=self.seed, **sampling)
                pictures += [picture for drawn in samples for picture in drawn]
            seconds[arm] = (time.monotonic() - clock) / len(pictures)
            image_ME = encoder.encode_images(pictures)
            scores = _scores(model, encoder, captions, pictures, image_ME)
            fits = {ranker: _fits(scores[ranker], len(numbers_N), most) for ranker in JUDGES}
            for ranker, count in product(JUDGES, self.samples):
                chosen_N = numbers_N * most + fits[ranker][:, :count].argmax(axis=1)
                shown = {number: pictures[place] for number, place in enumerate(chosen_N)}
                ranks = own_ranks(shown, originals, groups, self.thumbnail_side)
                how = f"{arm}, best of {count} by {ranker}"
                metrics[f"own picture found, {how}"] = _found(scores[JUDGES[ranker]], chosen_N, rivals_NR)
                metrics[f"nearer to its original than to another, {how}"] = nearer_than_others(list(ranks.values()))
                metrics[f"encoder Fréchet distance (not FID), {how}"] = frechet_estimate(image_ME[chosen_N], reference)
        record = protocol(
            model,
            captions,
            references={
                **pairs.record(documents),
                "pictures": to_dict(self.references) if self.references else "those of the captions",
                "number": len(real_ME),
            },
            preprocessing=square_of(model),
            sampling={"temperature": self.temperature, "top_p": self.top_p, "guidance_scale": self.guidance_scale},
            retrieve=0,
            seed=self.seed,
            samples_per_prompt=most,
            re_ranking=_RE_RANKING,
            metrics={
                **_ranker_definitions(self.encoder, encoder),
                "own picture found": f"by whoever did not choose, its own before those of {self.num_rivals} other "
                f"captions; chance {1 / (self.num_rivals + 1):.3g}",
                "nearer": f"mean squared difference of RGB at {self.thumbnail_side}x{self.thumbnail_side}; chance 0.5",
                "Fréchet distance": "unbiased covariances, float64, vectors of the encoder, which chose where clip did",
            },
            interval=f"found: {WILSON}; nearer: {NORMAL}; Fréchet: {JACKKNIFE}",
            details={
                "ways": ARMS,
                "rivals": f"of the same {self.within}" if self.within else "all",
                "seconds a picture": {arm: round(value, 4) for arm, value in seconds.items()},
            },
        )
        return TaskResult("decoding of pairs", metrics, record, time.monotonic() - start)


def _fits(score: Score, num_texts: int, most: int) -> np.ndarray:
    """The score of every picture with its own text, of which each has `most`: [N, S]."""
    texts_M = np.repeat(np.arange(num_texts), most)
    return score(texts_M, np.arange(len(texts_M))).reshape(-1, most)


def _ranker_definitions(name: str, encoder: Encoder) -> dict[str, str]:
    return {
        "clip": f"cosine by {name} {encoder.hash[:12]}",
        "caption": "mean log-probability of the caption's ids behind the picture, whose codes are read anew",
    }


def _scores(
    model: CM3, encoder: Encoder, captions: Sequence[str], pictures: Sequence[PILImage.Image], image_ME: np.ndarray
) -> Mapping[str, Score]:
    """The two scores of captions with pictures."""
    text_NE, codes_MHW = encoder.encode_texts(captions), model.encode(pictures)
    pieces = [model.tokenizer.text.encode(caption) for caption in captions]

    def clip(texts_M: np.ndarray, pictures_M: np.ndarray) -> np.ndarray:
        cosine_M: np.ndarray = (text_NE[texts_M] * image_ME[pictures_M]).sum(axis=1)
        return cosine_M

    def caption(texts_M: np.ndarray, pictures_M: np.ndarray) -> np.ndarray:
        texts = [pieces[number] for number in texts_M]
        return np.array(caption_likelihood(model.transformer, model.prompts, texts, list(codes_MHW[pictures_M])))

    return {"clip": clip, "caption": caption}


def _found(judge: Score, chosen_N: np.ndarray, rivals_NR: np.ndarray) -> Estimate:
    """How often a caption's own picture fits it better than each rival's; a tie does not count."""
    numbers_N1 = np.arange(len(chosen_N))[:, None]
    shown_NR = chosen_N[np.concatenate([numbers_N1, rivals_NR], axis=1)]
    fit_NR = judge(np.repeat(numbers_N1, shown_NR.shape[1]), shown_NR.ravel()).reshape(shown_NR.shape)
    return share((fit_NR[:, 0] > fit_NR[:, 1:].max(axis=1)).tolist())
