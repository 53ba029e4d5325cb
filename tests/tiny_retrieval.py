"""Encoders, documents and a memory of seconds, for the tests of retrieval."""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from cm3.data.sources import SourceConfig, open_source
from cm3.retrieval.clip import Clip, ClipConfig, ClipEncoder
from cm3.retrieval.memory import Memory
from cm3.retrieval.vectors import unit_rows
from cm3.tokenizers.document import DocumentTokenizer

COLORS, SHAPES = ("red", "green", "blue", "yellow", "navy", "purple"), ("circle", "star", "square", "triangle")
CAPTIONS = [f"a {color} {shape}" for color in COLORS for shape in SHAPES]


class HashEncoder:
    """A random but fixed vector for each text and each picture; equal ones have equal vectors."""

    width = 16
    hash = "0123456789abcdef"

    def encode_texts(self, texts):
        return unit_rows(np.array([self._vector(text.encode()) for text in texts]).reshape(-1, self.width))

    def encode_images(self, images):
        return unit_rows(np.array([self._vector(image.tobytes()) for image in images]).reshape(-1, self.width))

    def _vector(self, key):
        return np.random.default_rng(list(hashlib.sha256(key).digest())).normal(size=self.width)


def make_retrieval(folder: Path, model_folder: Path) -> Path:
    """Write `rows.jsonl` with pictures, an `encoder` with random weights, and a `memory` of the rows made with it."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(len(CAPTIONS)):
        pixels_HWC = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels_HWC).resize((16, 16), Image.Resampling.NEAREST).save(folder / f"{number}.png")
    rows = [json.dumps({"text": text, "image": f"{number}.png"}) for number, text in enumerate(CAPTIONS)]
    (folder / "rows.jsonl").write_text("\n".join(rows))

    source = open_source(SourceConfig(kind="jsonl", path=str(folder / "rows.jsonl")))
    tokenizer = DocumentTokenizer.load(model_folder)
    torch.manual_seed(0)
    shape = {"width": 32, "image_layers": 1, "text_layers": 1, "num_heads": 2, "embedding_width": 8, "patch_size": 16}
    encoder = ClipEncoder(Clip(ClipConfig(vocabulary_size=tokenizer.text.size, **shape)), tokenizer.text, "fp32")
    _spread(encoder.model.text, lambda: encoder.encode_texts(CAPTIONS))
    _spread(encoder.model.image, lambda: encoder.encode_images([document.segments[1].pixels for document in source]))
    encoder.save(folder / "encoder")
    Memory.build(source, tokenizer, encoder, folder / "memory", encoder_name=str(folder / "encoder"), rows_per_part=10)
    return folder


def _spread(tower, encode):
    """Project the features of a random tower so that the vectors of what `encode` encodes point everywhere."""
    seen = []
    hook = tower.projection.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    encode()
    hook.remove()
    features_ND = torch.cat(seen)
    mean_D = F.normalize(features_ND.mean(0), dim=0)
    _, sizes, directions = torch.linalg.svd(features_ND - (features_ND @ mean_D)[:, None] * mean_D)
    width = tower.projection.out_features
    tower.projection.weight.copy_(directions[:width] / sizes[:width, None])
