"""An encoder of fixed random vectors, for the tests of retrieval."""

import hashlib

import numpy as np

from cm3.retrieval.vectors import unit_rows


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
