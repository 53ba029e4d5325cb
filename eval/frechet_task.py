"""How near drawn pictures are to real ones as sets, and how well they fit their texts, from one round of drawing."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
from PIL import Image as PILImage

from cm3.config import check_seed, to_dict
from cm3.data.sources import SourceConfig, open_source
from cm3.drawing import RANKERS, RankerName
from cm3.errors import ConfigError
from cm3.eval.clip_metrics import CONVENTIONS, ClipConvention, clip_score
from cm3.eval.distances import Gaussian, frechet_estimate, kernel_estimate
from cm3.eval.document_tasks import PairSet, caption_of, picture_of, square_of
from cm3.eval.inception import FidConvention, open_inception
from cm3.eval.protocol import JACKKNIFE, NORMAL, protocol, ranking
from cm3.eval.report import Estimate, TaskResult
from cm3.pipeline import CM3
from cm3.pretrained import DEMO
from cm3.retrieval.encoder import open_encoder
from cm3.tokenizers.image import to_square

Encode = Callable[[Sequence[PILImage.Image]], np.ndarray]
"""Pictures to vectors, [N, D]."""

_FRECHET_NAME = "encoder Fréchet distance (not FID)"
_KERNEL_NAME = "encoder kernel distance (not KID)"


@dataclass(frozen=True, kw_only=True)
class InceptionConfig:
    """What turns the distances into FID and KID."""

    weights: str
    """File pt_inception-2015-12-05-6726825d.pth of pytorch-fid, or the same one of torch-fidelity."""
    convention: FidConvention = "pytorch-fid"
    """How pictures are brought to 299x299, see `cm3.eval.inception`; the paper used pytorch-fid."""


@dataclass(frozen=True, kw_only=True)
class FrechetDistance:
    """Draw captions and compare the pictures as a set with real ones: Fréchet and kernel distance of the vectors of
    an encoder, and CLIPScore with it. FID and KID come with `inception` and no other way."""

    pairs: PairSet
    """The captions to draw, one picture each for every sample; COCO FID-30k gives one caption of each picture."""
    references: SourceConfig | None = None
    """The real pictures; null takes those that belong to the captions."""
    encoder: str = DEMO
    """The encoder of distances and CLIPScore, see `open_encoder`."""
    clip_convention: ClipConvention = "hessel"
    """Scale and prefix of CLIPScore: hessel, torchmetrics or cosine."""
    inception: InceptionConfig | None = None
    """Weights for FID and KID; null leaves both out."""
    guidance_scales: tuple[float, ...] = (3.0,)
    """Every scale gets the same captions and seeds; 1 is guidance off."""
    samples_per_prompt: int = 1
    """Pictures of each caption; all of them count."""
    best_of: int = 1
    """Candidates for each picture; 1 is no ranking. The paper's FID has 8, ranked by CLIP."""
    rank: RankerName | None = None
    """How the best candidate is found, see `CM3.draw`."""
    ranker: str = DEMO
    """The encoder that ranks; scoring with the same one is circular, and the record says so."""
    kernel_subset_size: int = 1000
    """Pictures in a subset of the kernel distance, 100 of which are drawn; smaller sets are taken whole."""
    seed: int = 0
    """Seed of the sampling."""
    batch_size: int = 64
    """Captions drawn at a time; the pictures do not depend on it."""

    def __post_init__(self) -> None:
        if self.samples_per_prompt < 1 or self.batch_size < 1 or not self.guidance_scales:
            raise ConfigError("samples_per_prompt, batch_size and the number of guidance_scales must be at least 1")
        check_seed(self.seed)

    def run(self, model: CM3) -> TaskResult:
        start = time.monotonic()
        encoders = {"encoder": open_encoder(self.encoder, str(model.device))}
        if self.inception is not None:  # first, so that missing weights do not cost a round of drawing
            inception = open_inception(self.inception.weights, self.inception.convention, str(model.device))
        pairs = replace(self.pairs, source=replace(self.pairs.source, image_column=None))
        documents = pairs.open()
        captions = [caption_of(document) for document in documents]
        spaces = {_FRECHET_NAME: encoders["encoder"].encode_images}
        if self.inception is not None:
            spaces[f"FID ({self.inception.convention})"] = inception.encode_images
        features = self._real_features(model, spaces)
        metrics: dict[str, Estimate] = {}
        for scale in self.guidance_scales:
            drawn = self._draw(model, captions, scale)
            for name, encode in spaces.items():
                kernel = name.replace("FID", "KID") if name.startswith("FID") else _KERNEL_NAME
                own_ND = encode(drawn)
                metrics[f"{name}, guidance {scale:g}"] = frechet_estimate(own_ND, Gaussian.of(features[name]))
                metrics[f"{kernel}, guidance {scale:g}"] = kernel_estimate(
                    own_ND, features[name], subset_size=self.kernel_subset_size
                )
            texts = list(np.repeat(np.array(captions, dtype=object), self.samples_per_prompt))
            name = f"CLIPScore ({self.clip_convention}), guidance {scale:g}"
            metrics[name] = clip_score(encoders["encoder"], drawn, texts, self.clip_convention)
        circular = self.rank is not None and "clip" in RANKERS[self.rank] and self.ranker == self.encoder
        record = protocol(
            model,
            captions,
            references={
                **self.pairs.record(documents),
                "pictures": to_dict(self.references) if self.references else "those of the captions",
                "number": len(features[_FRECHET_NAME]),
            },
            preprocessing=square_of(model),
            sampling=model.settings(),
            guidance_scales=self.guidance_scales,
            retrieve=0,
            seed=self.seed,
            samples_per_prompt=self.samples_per_prompt,
            re_ranking=ranking(self.best_of, self.rank, self.ranker),
            metrics={
                "encoder": f"{self.encoder}, {encoders['encoder'].hash}",
                "Fréchet distance": "unbiased covariances, float64; agrees with torch-fidelity and clean-fid",
                "kernel distance": f"(x.y/D+1)^3, unbiased, mean of 100 subsets of {self.kernel_subset_size}, draws "
                "of torch-fidelity with seed 2020",
                "FID and KID": f"Inception-v3 pool3, {self.inception.convention}, weights {inception.weights_hash}"
                if self.inception
                else "not measured: inception is null",
                "CLIPScore": CONVENTIONS[self.clip_convention].words,
            },
            interval=f"Fréchet: {JACKKNIFE}; kernel: 95%, from disjoint groups; CLIPScore: {NORMAL}",
            details={"CLIPScore by the encoder that chose": circular, "files": "none; 8 bits in memory, never JPEG"},
        )
        return TaskResult("frechet", metrics, record, time.monotonic() - start)

    def _real_features(self, model: CM3, spaces: Mapping[str, Encode]) -> dict[str, np.ndarray]:
        """The vectors of the real pictures in each space; a batch of pictures is held at a time."""
        documents = iter(open_source(self.references or self.pairs.source))
        parts: dict[str, list[np.ndarray]] = {name: [] for name in spaces}
        while batch := [to_square(picture_of(item), model.image_size) for item in islice(documents, self.batch_size)]:
            for name, encode in spaces.items():
                parts[name].append(encode(batch))
        return {name: np.concatenate(arrays) for name, arrays in parts.items()}

    def _draw(self, model: CM3, captions: Sequence[str], scale: float) -> list[PILImage.Image]:
        """All pictures, those of one caption side by side."""
        drawn: list[PILImage.Image] = []
        for first in range(0, len(captions), self.batch_size):
            samples = model.generate(
                list(captions[first : first + self.batch_size]),
                num_images=self.samples_per_prompt,
                seed=self.seed,
                guidance_scale=scale,
                best_of=self.best_of,
                rank=self.rank,
                ranker=self.ranker,
            )
            drawn += [image for images in samples for image in images]
        return drawn
