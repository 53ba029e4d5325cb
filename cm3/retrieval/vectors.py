"""Unit vectors, encoding in batches, and the vector of a document as the mean of its text's and its picture's
(arXiv 2309.02591, section 2.1).

N rows   E embedding width
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor


def unit_rows(vectors_NE: Float[np.ndarray, "N E"]) -> Float[np.ndarray, "N E"]:
    """Rows scaled to unit length, float32; rows of zeros stay zeros."""
    vectors_NE = vectors_NE.astype(np.float32)
    length_N1 = np.linalg.norm(vectors_NE, axis=1, keepdims=True)
    scaled_NE: np.ndarray = vectors_NE / np.where(length_N1 > 0, length_N1, 1)
    return scaled_NE


def is_present(vectors_NE: Float[np.ndarray, "N E"]) -> Bool[np.ndarray, " N"]:
    """Which rows are vectors; a modality that a document lacks is a row of zeros."""
    return np.asarray(vectors_NE.any(axis=1))


def mixed_vectors(
    text_NE: Float[np.ndarray, "N E"], image_NE: Float[np.ndarray, "N E"], renormalize: bool = True
) -> Float[np.ndarray, "N E"]:
    """The mean of unit text and image vectors (CM3Leon, section 2.1), float32.

    Args:
        text_NE: Unit vectors, or zeros where a document has no text; then the image alone counts.
        image_NE: The same for pictures.
        renormalize: Scale the mean to unit length, as RA-CM3 does; CM3Leon does not say.
    """
    count_N = is_present(text_NE).astype(np.float32) + is_present(image_NE)
    mean_NE = (text_NE.astype(np.float32) + image_NE) / np.maximum(count_N, 1)[:, None]
    return unit_rows(mean_NE) if renormalize else mean_NE


@torch.inference_mode()
def in_batches(
    encode: Callable[[Sequence], Tensor], items: Sequence, batch_size: int, width: int
) -> Float[np.ndarray, "N E"]:
    """`encode` over parts of `items`, as one array."""
    parts = [np.empty((0, width), dtype=np.float32)]
    for start in range(0, len(items), batch_size):
        parts.append(encode(items[start : start + batch_size]).float().cpu().numpy())
    return np.concatenate(parts)
