"""Our small CLIP: unit vectors, padding, the loss by hand, files and messages."""

import json
import math

import numpy as np
import pytest
import torch
from norm_gradients import worst_norm_gradient
from PIL import Image

from cm3.data.scenes import example
from cm3.errors import ConfigError, ModelFilesError
from cm3.retrieval.clip import Clip, ClipConfig, ClipEncoder, info_nce, text_batch
from cm3.tokenizers.text import TextTokenizer, TextTokenizerConfig

SCENES = [example(0, "train", index) for index in range(40)]
SHAPE = {"width": 16, "image_layers": 1, "text_layers": 1, "num_heads": 2, "embedding_width": 8, "patch_size": 16}


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer.train([scene.caption for scene in SCENES], TextTokenizerConfig(vocabulary_size=320))


@pytest.fixture
def encoder(tokenizer):
    return ClipEncoder(Clip(ClipConfig(vocabulary_size=tokenizer.size, max_text_tokens=12, **SHAPE)), tokenizer)


def test_vectors_have_unit_length_and_do_not_depend_on_neighbours(encoder):
    texts = ["a red circle", "a", "", "a much longer caption of a big blue square " * 4]
    vectors_NE = encoder.encode_texts(texts)
    assert vectors_NE.shape == (4, 8) and vectors_NE.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors_NE, axis=1), 1)
    alone = np.concatenate([encoder.encode_texts([text]) for text in texts])
    assert np.allclose(vectors_NE, alone, atol=1e-5)
    images = [scene.image for scene in SCENES[:3]]
    image_NE = encoder.encode_images(images)
    assert np.allclose(np.linalg.norm(image_NE, axis=1), 1)
    encoder.batch_size = 2
    assert np.allclose(encoder.encode_images(images), image_NE, atol=1e-5)
    assert encoder.encode_texts([]).shape == encoder.encode_images([]).shape == (0, 8)


def test_pictures_of_any_kind_are_read(encoder):
    gray = Image.new("L", (100, 60), 128)
    assert np.allclose(
        encoder.encode_images([gray]), encoder.encode_images([gray.convert("RGB").crop((20, 0, 80, 60))])
    )


def test_texts_are_cut_and_start_with_a_token(tokenizer):
    tokens_BT, mask_BT = text_batch(["red " * 30, "a"], tokenizer, 6)
    assert tokens_BT.shape == (2, 6) and mask_BT.sum(1).tolist() == [6, 1 + len(tokenizer.encode("a"))]
    assert tokens_BT[:, 0].tolist() == [0, 0] and tokens_BT[0, 1:].tolist() == tokenizer.encode("red " * 30)[:5]
    assert (tokens_BT[~mask_BT] == 1).all()


def test_norms_learn_exactly_in_bfloat16(encoder):
    """Positions in float32 keep the sums of the blocks in float32, where torch's norms make no error."""
    model = encoder.model.requires_grad_().train()
    image_BCHW, tokens_BT = torch.rand(256, 3, 64, 64), torch.randint(300, (256, 12))

    def forward():
        with torch.autocast("cpu", torch.bfloat16):
            image_BE = model.encode_images(image_BCHW)
            text_BE = model.encode_texts(tokens_BT, torch.ones_like(tokens_BT, dtype=torch.bool))
        return info_nce(text_BE, image_BE, model.log_scale).loss

    assert worst_norm_gradient(model, forward) < 1e-3


def test_info_nce_by_hand():
    text_BE = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    image_BE = torch.tensor([[0.6, 0.8], [0.0, 1.0]])
    contrast = info_nce(text_BE, image_BE, torch.tensor(math.log(2.0)))
    # twice the cosines: [[1.2, 0], [1.6, 2]]
    rows = -math.log(math.exp(1.2) / (math.exp(1.2) + 1)) - math.log(math.exp(2) / (math.exp(1.6) + math.exp(2)))
    columns = -math.log(math.exp(1.2) / (math.exp(1.2) + math.exp(1.6))) - math.log(math.exp(2) / (1 + math.exp(2)))
    assert float(contrast.loss) == pytest.approx((rows + columns) / 4)
    assert (float(contrast.text_to_image), float(contrast.image_to_text)) == (1.0, 0.5)
    capped = info_nce(text_BE, image_BE, torch.tensor(9.0))
    assert torch.equal(capped.loss, info_nce(text_BE, image_BE, torch.tensor(math.log(100.0))).loss)


def test_files_give_the_same_encoder_back(encoder, tmp_path):
    encoder.save(tmp_path)
    loaded = ClipEncoder.load(tmp_path)
    assert loaded.hash == encoder.hash and loaded.width == 8
    assert np.array_equal(loaded.encode_texts(["a red circle"]), encoder.encode_texts(["a red circle"]))
    torch.manual_seed(1)
    assert ClipEncoder(Clip(encoder.config), encoder.tokenizer).hash != encoder.hash


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "clip"}, "type 'clip', not 'open-cm3-clip'"),
        ({"format_version": 9}, "format 9"),
        ({"depth": 3}, "no configuration of an encoder"),
        ({"embedding_width": 4}, "projection.weight"),
    ],
)
def test_wrong_files_are_refused(encoder, tmp_path, change, message):
    encoder.save(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelFilesError, match=message):
        ClipEncoder.load(tmp_path)


def test_impossible_shapes_are_refused(tokenizer):
    for change, message in [
        ({"patch_size": 7}, "patch_size=7 does not divide"),
        ({"num_heads": 3}, "num_heads=3 does not divide"),
        ({"max_text_tokens": 1}, "no room for text"),
        ({"text_layers": 0}, "text_layers=0"),
    ]:
        with pytest.raises(ConfigError, match=message):
            ClipConfig(vocabulary_size=10, **change)
    with pytest.raises(ModelFilesError, match="the encoder embeds 10"):
        ClipEncoder(Clip(ClipConfig(vocabulary_size=10, **SHAPE)), tokenizer)
