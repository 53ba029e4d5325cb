"""Hugging Face and OpenCLIP weights: small random ones in the real formats, against the library and against a plain
network with OpenCLIP's names."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from cm3.checkpoint import save_tensors
from cm3.errors import MissingDependencyError, ModelFilesError, RequestError
from cm3.retrieval import foreign_clip, open_clip_weights
from cm3.retrieval.encoder import open_encoder
from cm3.retrieval.foreign_clip import Preprocessing
from cm3.retrieval.open_clip_weights import Heads, load_open_clip
from cm3.retrieval.vectors import unit_rows

transformers = pytest.importorskip("transformers")

WORDS = ["a", "red", "circle", "blue"]
LENGTH = 10
SIDE = 32
TEXTS = ["a red circle", "blue", "A  RED blue", "a red circle " * 9]


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    pieces = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges = []
    for word in WORDS:
        symbols = [*word[:-1], f"{word[-1]}</w>"]
        while len(symbols) > 1:
            merges.append((symbols[0], symbols[1]))
            symbols = [symbols[0] + symbols[1], *symbols[2:]]
    pieces += [first + second for first, second in dict.fromkeys(merges)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=list(dict.fromkeys(merges)))


@pytest.fixture(scope="module")
def processor():
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": SIDE, "width": SIDE})


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory, tokenizer, processor):
    """A folder as `save_pretrained` writes it, and its model."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": len(tokenizer) - 2, "eos_token_id": len(tokenizer) - 1, "pad_token_id": 1}
    text = shape | special | {"vocab_size": len(tokenizer), "max_position_embeddings": LENGTH}
    vision = shape | {"image_size": SIDE, "patch_size": 16}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    model = transformers.CLIPModel(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("clip")
    for part in (model, tokenizer, processor):
        part.save_pretrained(folder)
    return folder, model


def pictures():
    rng = np.random.default_rng(0)
    sizes = [(40, 40), (61, 47), (33, 90), (200, 43)]
    return [Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in sizes]


def test_vectors_are_the_librarys(hugging_face, tokenizer, processor):
    folder, model = hugging_face
    encoder = open_encoder(folder)
    tokens = tokenizer(TEXTS, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
    assert (tokens.input_ids == len(tokenizer) - 1).any(1).all()  # a text that is cut ends in the end token too
    pixels = processor(pictures(), return_tensors="pt")
    with torch.no_grad():
        out = model(**tokens, **pixels)
    assert np.allclose(encoder.encode_texts(TEXTS), out.text_embeds.numpy(), atol=1e-5)
    assert np.allclose(encoder.encode_images(pictures()), out.image_embeds.numpy(), atol=1e-5)
    assert encoder.width == 12
    assert encoder.encode_texts([]).shape == encoder.encode_images([]).shape == (0, 12)
    encoder.batch_size = 3
    assert np.allclose(encoder.encode_texts(TEXTS), out.text_embeds.numpy(), atol=1e-5)


@pytest.mark.parametrize(("size", "crop"), [(40, 32), (33, 32), (37, 30)])
def test_preprocessing_is_the_librarys(tmp_path, size, crop):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": crop, "width": crop})
    processor.save_pretrained(tmp_path)
    preprocessing = Preprocessing.load(tmp_path)
    for picture in [*pictures(), Image.new("L", (50, 41), 7)]:
        expected_BCHW = processor([picture.convert("RGB")], return_tensors="pt").pixel_values
        assert torch.allclose(preprocessing([picture]), expected_BCHW, atol=1e-6)


def test_the_settings_of_transformers_4_and_5_and_of_old_files_are_read(tmp_path):
    old = {"size": 40, "crop_size": 32, "image_mean": [0.5] * 3, "image_std": [0.25] * 3, "resample": 3}
    expected = Preprocessing(size=40, crop_size=32, mean=(0.5,) * 3, std=(0.25,) * 3)
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": old}))
    assert Preprocessing.load(tmp_path) == expected
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(old | {"size": {"shortest_edge": 40}}))
    assert Preprocessing.load(tmp_path) == expected
    for change, message in [
        ({"do_center_crop": False}, "switches do_center_crop off"),
        ({"resample": 2}, "resample=2"),
        ({"size": 30}, "crops 32 pixels out of 30"),
    ]:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(old | change))
        with pytest.raises(ModelFilesError, match=message):
            Preprocessing.load(tmp_path)


def test_the_hash_follows_the_weights(hugging_face, tmp_path, tokenizer, processor):
    folder, model = hugging_face
    assert open_encoder(folder).hash == open_encoder(folder).hash
    with torch.no_grad():
        model.logit_scale.add_(1)
    for part in (model, tokenizer, processor):
        part.save_pretrained(tmp_path)
    assert open_encoder(tmp_path).hash != open_encoder(folder).hash


def test_incomplete_folders_are_refused(hugging_face, tmp_path, monkeypatch):
    folder, model = hugging_face
    model.config.save_pretrained(tmp_path)
    with pytest.raises(ModelFilesError, match=r"has no preprocessor_config\.json"):
        open_encoder(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(ModelFilesError, match="has no tokenizer"):
        open_encoder(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    with pytest.raises(ModelFilesError, match="cannot read the CLIP"):
        open_encoder(tmp_path)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "visual_projection.weight"}
    save_tensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(ModelFilesError, match=r"lack or differ in visual_projection\.weight"):
        open_encoder(tmp_path)
    monkeypatch.setattr(foreign_clip, "has_transformers", lambda: False)
    with pytest.raises(MissingDependencyError, match=r"needs transformers; run: pip install 'open-cm3\[interop\]'"):
        open_encoder(folder)


class Block(nn.Module):
    """A block of OpenCLIP's transformer, by its names."""

    def __init__(self, width, heads):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 2 * width), "c_proj": nn.Linear(2 * width, width)})

    def forward(self, x_BTD, mask_TT, activation):
        normed = self.ln_1(x_BTD)
        x_BTD = x_BTD + self.attn(normed, normed, normed, attn_mask=mask_TT, need_weights=False)[0]
        return x_BTD + self.mlp["c_proj"](activation(self.mlp["c_fc"](self.ln_2(x_BTD))))


class OpenClip(nn.Module):
    """OpenCLIP's network in its own names and layout."""

    def __init__(self, vocabulary_size):
        super().__init__()

        def blocks(width, heads):
            return nn.ModuleDict({"resblocks": nn.ModuleList(Block(width, heads) for _ in range(2))})

        def random(*shape):
            return nn.Parameter(0.3 * torch.randn(shape))

        self.token_embedding = nn.Embedding(vocabulary_size, 16)
        self.positional_embedding, self.text_projection = random(LENGTH, 16), random(16, 12)
        self.transformer, self.ln_final = blocks(16, 2), nn.LayerNorm(16)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.visual = nn.Module()
        self.visual.conv1 = nn.Conv2d(3, 24, 16, 16, bias=False)
        self.visual.class_embedding, self.visual.positional_embedding = random(24), random(5, 24)
        self.visual.ln_pre, self.visual.ln_post = nn.LayerNorm(24), nn.LayerNorm(24)
        self.visual.transformer, self.visual.proj = blocks(24, 3), random(24, 12)

    def encode_text(self, ids_BT, activation):
        length = ids_BT.shape[1]
        x_BTD = self.token_embedding(ids_BT) + self.positional_embedding[:length]
        mask_TT = torch.full((length, length), -torch.inf).triu(1)
        for block in self.transformer["resblocks"]:
            x_BTD = block(x_BTD, mask_TT, activation)
        return self.ln_final(x_BTD)[torch.arange(len(ids_BT)), ids_BT.argmax(1)] @ self.text_projection

    def encode_image(self, image_BCHW, activation):
        x_BPD = self.visual.conv1(image_BCHW).flatten(2).mT
        x_BPD = torch.cat([self.visual.class_embedding.expand(len(x_BPD), 1, -1), x_BPD], 1)
        x_BPD = self.visual.ln_pre(x_BPD + self.visual.positional_embedding)
        for block in self.visual.transformer["resblocks"]:
            x_BPD = block(x_BPD, None, activation)
        return self.visual.ln_post(x_BPD[:, 0]) @ self.visual.proj


@pytest.mark.parametrize("suffix", ["", "-quickgelu"])
@pytest.mark.parametrize("file", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_open_clip_weights_give_open_clips_vectors(tmp_path, tokenizer, monkeypatch, suffix, file):
    monkeypatch.setitem(open_clip_weights.ARCHITECTURES, "ViT-tiny", Heads(image=3, text=2))
    model = OpenClip(len(tokenizer)).eval()
    tokenizer.save_pretrained(tmp_path)
    if file.endswith(".bin"):
        torch.save(model.state_dict(), tmp_path / file)
    else:
        save_tensors(tmp_path / file, model.state_dict())
    encoder = open_encoder(f"open_clip:ViT-tiny{suffix}:{tmp_path / file}")

    activation = (lambda x: x * torch.sigmoid(1.702 * x)) if suffix else F.gelu
    ids_BT = torch.zeros(len(TEXTS), LENGTH, dtype=torch.long)  # OpenCLIP pads with 0
    for row, text in zip(ids_BT, TEXTS):
        ids = tokenizer(text, truncation=True, max_length=LENGTH).input_ids
        row[: len(ids)] = torch.tensor(ids)
    image_BCHW = Preprocessing(size=SIDE, crop_size=SIDE, round_crop=True)(pictures())
    with torch.no_grad():
        text_BE, image_BE = model.encode_text(ids_BT, activation), model.encode_image(image_BCHW, activation)
    assert np.allclose(encoder.encode_texts(TEXTS), unit_rows(text_BE.numpy()), atol=1e-5)
    assert np.allclose(encoder.encode_images(pictures()), unit_rows(image_BE.numpy()), atol=1e-5)


def test_the_crop_of_open_clip_rounds_half_pixels_to_even():
    picture = Image.fromarray(np.arange(11 * 4 * 3, dtype=np.uint8).reshape(4, 11, 3))  # 11 wide: 3.5 pixels to spare
    floor, rounded = (Preprocessing(size=4, crop_size=4, round_crop=flag)([picture])[0, 0, 0] for flag in (False, True))
    whole = np.asarray(picture)[0, :, 0]
    unscaled = [
        np.round((row.numpy() * foreign_clip.CLIP_STD[0] + foreign_clip.CLIP_MEAN[0]) * 255) for row in (floor, rounded)
    ]
    assert np.array_equal(unscaled[0], whole[3:7]) and np.array_equal(unscaled[1], whole[4:8])


def test_wrong_open_clip_files_are_refused(tmp_path, tokenizer):
    for name in ("open_clip:ViT-B-32", "open_clip:RN50:file", "open_clip:"):
        with pytest.raises(RequestError, match="is not open_clip:ARCHITECTURE:FILE with an architecture of ViT-B-32"):
            load_open_clip(name)
    path = tmp_path / "weights.bin"
    path.write_bytes(b"nothing")
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelFilesError, match="cannot read .* as a file of tensors"):
        load_open_clip(f"open_clip:ViT-B-32:{path}")
    torch.save({"state_dict": {"logit_scale": torch.ones(())}}, path)
    with pytest.raises(ModelFilesError, match=r"holds no OpenCLIP ViT-B-32: 'token_embedding\.weight' is missing"):
        load_open_clip(f"open_clip:ViT-B-32:{path}")
