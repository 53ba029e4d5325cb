"""Dual encoders behind one interface: texts and pictures to unit vectors of one space (CM3Leon, section 2.1).

N rows   E embedding width
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import Float
from PIL import Image as PILImage

from cm3.checkpoint import read_json
from cm3.errors import ModelFilesError, RequestError
from cm3.pretrained import CONFIG_FILE, DEMO, demo_folder
from cm3.retrieval.clip import MODEL_TYPE, ClipEncoder
from cm3.retrieval.foreign_clip import ForeignClipEncoder, download_clip
from cm3.retrieval.open_clip_weights import OPEN_CLIP_PREFIX, load_open_clip
from cm3.retrieval.vectors import mixed_vectors, unit_rows
from cm3.tokenizers.document import Document, Image, Text

DEMO_RETRIEVER_FOLDER = "retriever"
"""Where the encoder `demo` lies inside the demo model's folder."""


class Encoder(Protocol):
    """Texts and pictures to vectors of one space, whose inner product says how well they fit."""

    width: int
    """Length of a vector."""

    @property
    def hash(self) -> str:
        """SHA-256 (hex): equal hash, equal vectors. A memory carries the hash of its encoder."""

    def encode_texts(self, texts: Sequence[str]) -> Float[np.ndarray, "N E"]:
        """Unit vectors of texts, float32; texts that are too long are cut at the end."""

    def encode_images(self, images: Sequence[PILImage.Image]) -> Float[np.ndarray, "N E"]:
        """Unit vectors of pictures of any size, float32."""


def open_encoder(name: str | Path, device: str | None = None) -> Encoder:
    """Open an encoder by name.

    Args:
        name: `demo` (inside this package), the folder of a retriever that `cm3 train` wrote, a folder or Hub
            name of Hugging Face CLIP weights, or `open_clip:ARCHITECTURE:FILE` (see `load_open_clip`).
        device: Torch device; None is a GPU if there is one.

    Raises:
        ModelFilesError: the files are missing, damaged or of another kind of model.
        RequestError: the name leads nowhere.
        MissingDependencyError: foreign weights without transformers.
    """
    if str(name).startswith(OPEN_CLIP_PREFIX):
        return load_open_clip(str(name), device)
    if str(name) == DEMO:
        return ClipEncoder.load(demo_folder() / DEMO_RETRIEVER_FOLDER, device)
    folder = Path(name)
    if not folder.is_dir():
        if folder.is_absolute() or str(name).startswith(".") or str(name).count("/") != 1:
            raise RequestError(
                f"encoder {str(name)!r} is no folder here; give a folder, `demo`, owner/name on the Hub, or "
                f"{OPEN_CLIP_PREFIX}ARCHITECTURE:FILE"
            )
        folder = download_clip(str(name))
    if not (folder / CONFIG_FILE).is_file():
        raise ModelFilesError(f"{folder} has no {CONFIG_FILE}, so it is no encoder; train one with `cm3 train`")
    found = read_json(folder / CONFIG_FILE).get("model_type")
    if found == MODEL_TYPE:
        return ClipEncoder.load(folder, device)
    if found == "clip":
        return ForeignClipEncoder.load(folder, device)
    raise ModelFilesError(f"{folder} holds a model of type {found!r}; encoders are {MODEL_TYPE!r} or 'clip'")


def encode_documents(
    encoder: Encoder, documents: Sequence[Document]
) -> tuple[Float[np.ndarray, "N E"], Float[np.ndarray, "N E"]]:
    """The text vectors and the image vectors of documents, unit length; zeros where there is no text or picture.

    Several texts of a document are joined by spaces; of several pictures the vectors are averaged.
    """
    texts = [" ".join(part.text for part in document.segments if isinstance(part, Text)) for document in documents]
    with_text = [row for row, text in enumerate(texts) if text.strip()]
    text_NE = np.zeros((len(documents), encoder.width), dtype=np.float32)
    if with_text:
        text_NE[with_text] = encoder.encode_texts([texts[row] for row in with_text])

    owners, images = [], []
    for row, document in enumerate(documents):
        for part in document.segments:
            if isinstance(part, Image):
                owners.append(row)
                images.append(part.pixels)
    image_NE = np.zeros_like(text_NE)
    if images:
        np.add.at(image_NE, owners, encoder.encode_images(images))
    return text_NE, unit_rows(image_NE)


def document_vectors(
    encoder: Encoder, documents: Sequence[Document], renormalize: bool = True
) -> Float[np.ndarray, "N E"]:
    """The vector of each document, see `cm3.retrieval.vectors.mixed_vectors`."""
    return mixed_vectors(*encode_documents(encoder, documents), renormalize)
