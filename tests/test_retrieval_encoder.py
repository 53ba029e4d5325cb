"""Which name opens which encoder, and the vectors of documents."""

import numpy as np
import pytest
from PIL import Image as PILImage
from tiny_retrieval import HashEncoder

from cm3.errors import ModelFilesError, RequestError
from cm3.retrieval.clip import Clip, ClipConfig, ClipEncoder
from cm3.retrieval.encoder import document_vectors, encode_documents, open_encoder
from cm3.tokenizers.document import Document, Image, Text
from cm3.tokenizers.text import TextTokenizer, TextTokenizerConfig

RED, BLUE = (Image(PILImage.new("RGB", (4, 4), color)) for color in ("red", "blue"))


def test_documents_have_the_vectors_of_what_they_hold():
    encoder = HashEncoder()
    documents = [
        Document((Text("a"), RED)),
        Document((Text("a"),)),
        Document((RED,)),
        Document((Text(" "), RED, BLUE, Text("b"))),
        Document((Text(""),)),
    ]
    text_NE, image_NE = encode_documents(encoder, documents)
    a_E, b_E = encoder.encode_texts(["a", "  b"])  # texts of a document are joined by a space
    red_E, blue_E = encoder.encode_images([RED.pixels, BLUE.pixels])
    both_E = (red_E + blue_E) / np.linalg.norm(red_E + blue_E)
    assert np.allclose(text_NE, [a_E, a_E, 0 * a_E, b_E, 0 * a_E])
    assert np.allclose(image_NE, [red_E, 0 * a_E, red_E, both_E, 0 * a_E])
    mean_E = (a_E + red_E) / 2
    assert np.allclose(document_vectors(encoder, documents[:3], renormalize=False), [mean_E, a_E, red_E])
    assert np.allclose(document_vectors(encoder, documents[:1]), [mean_E / np.linalg.norm(mean_E)])


def test_names_lead_to_encoders(tmp_path):
    tokenizer = TextTokenizer.train(["a red circle"], TextTokenizerConfig(vocabulary_size=270))
    shape = {"width": 8, "image_layers": 1, "text_layers": 1, "num_heads": 2, "embedding_width": 4}
    encoder = ClipEncoder(Clip(ClipConfig(vocabulary_size=tokenizer.size, **shape)), tokenizer)
    encoder.save(tmp_path / "ours")
    assert open_encoder(tmp_path / "ours").hash == encoder.hash
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelFilesError, match=r"has no config\.json"):
        open_encoder(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ModelFilesError, match="type 'bert'; encoders are 'open-cm3-clip' or 'clip'"):
        open_encoder(tmp_path / "empty")
    for name in (tmp_path / "missing", "./missing", "missing"):
        with pytest.raises(RequestError, match="is no folder here; give a folder, `demo`"):
            open_encoder(name)
    with pytest.raises(RequestError, match="could not be had from the Hub"):
        open_encoder("owner/missing")
