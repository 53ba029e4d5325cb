"""CM3 as a user meets it: a folder in, pictures and words out, and clear refusals."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from cm3.errors import CM3Error, ModelFilesError, RequestError
from cm3.model.lora import (
    LoRAConfig,
    adapter_parameters,
    add_adapter,
    merge_adapter,
    save_adapter,
    weights_hash,
)
from cm3.pipeline import CM3
from cm3.tokenizers.document import Document, Text
from cm3.tokenizers.document import Image as ImageSegment

PROMPTS = ["a large red circle", "a small green star above a large yellow triangle on a navy background"]


@pytest.fixture(scope="module")
def model(model_folder):
    return CM3.from_pretrained(model_folder)


@pytest.fixture(scope="module")
def photo():
    """A picture that is not square and not of the model's size."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))


def pixels(image):
    return np.asarray(image).tolist()


def test_a_picture_depends_on_its_prompt_and_seed_only(model):
    together = model.generate(PROMPTS, num_images=3, seed=5)
    assert [len(samples) for samples in together] == [3, 3]
    assert together[0][0].size == (16, 16)
    alone = model.generate(PROMPTS[1], seed=7)
    assert pixels(alone[0]) == pixels(together[1][2])
    assert pixels(together[0][0]) != pixels(together[0][1])


def test_no_prompts_give_no_pictures(model):
    assert model.generate([]) == []


def test_defaults_of_the_folder_are_used(model):
    assert model.settings() == model.settings(guidance_scale=2.0, top_p=0.95)
    given = model.generate(PROMPTS[0], guidance_scale=2.0, top_p=0.95)
    assert pixels(given[0]) == pixels(model.generate(PROMPTS[0])[0])


def test_captions_come_in_the_order_of_the_pictures(model, photo, tmp_path):
    photo.save(tmp_path / "photo.png")
    pictures = [photo, photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT), tmp_path / "photo.png"]
    captions = model.caption(pictures)
    assert len(captions) == 3 and captions[0] == captions[2]
    assert [model.caption(picture) for picture in pictures] == captions
    assert model.caption([]) == []


@pytest.mark.parametrize("prompt", ["", "a green star"])
def test_infilling_leaves_the_outside_as_it_is(model, photo, prompt):
    left, top, right, bottom = box = (20, 10, 35, 30)
    filled = model.infill(photo, box=box, prompt=prompt, seed=3)
    before, after = np.array(photo), np.array(filled)
    assert filled.size == photo.size
    assert (before[top:bottom, left:right] != after[top:bottom, left:right]).any()
    before[top:bottom, left:right] = after[top:bottom, left:right] = 0
    assert (before == after).all()


def test_completion_begins_with_the_beginning(model, photo):
    document = model.complete("a large red", max_new_tokens=40, seed=1)
    assert document.segments[0].text.startswith("a large red")
    mixed = model.complete(Document((ImageSegment(photo), Text("a"))), max_new_tokens=30)
    assert isinstance(mixed.segments[0], ImageSegment)


def test_save_and_load_give_the_same_model(model, tmp_path):
    model.save_pretrained(tmp_path / "copy")
    copy = CM3.from_pretrained(tmp_path / "copy")
    assert copy.hash == model.hash and copy.card == model.card and copy.settings() == model.settings()
    assert pixels(copy.generate(PROMPTS[0], seed=2)[0]) == pixels(model.generate(PROMPTS[0], seed=2)[0])


def test_foreign_tokenizer_files_are_refused(model, tmp_path):
    model.save_pretrained(tmp_path / "mixed")
    config = json.loads((tmp_path / "mixed" / "config.json").read_text())
    config["tokenizer_hash"] = "0" * 64
    (tmp_path / "mixed" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelFilesError, match="tokenizer"):
        CM3.from_pretrained(tmp_path / "mixed")


def test_half_precision_works(model_folder):
    model = CM3.from_pretrained(model_folder, dtype=torch.bfloat16)
    assert model.generate(PROMPTS[0])[0].size == (16, 16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, p: m.generate(""), "prompt is empty"),
        (lambda m, p: m.generate("  \n"), "prompt is empty"),
        (lambda m, p: m.generate("a star", num_images=0), "num_images=0"),
        (lambda m, p: m.generate("a star " * 100), "128 positions"),
        (lambda m, p: m.generate("a star", top_p=1.5), "top_p=1.5"),
        (lambda m, p: m.generate("a star", topp=0.5), "'topp' is unknown"),
        (lambda m, p: m.caption("nowhere.png"), "nowhere.png"),
        (lambda m, p: m.caption(b"no picture"), "picture"),
        (lambda m, p: m.infill(p, box=(0, 0, 10, 10)), "central square"),
        (lambda m, p: m.infill(p, box=(30, 20, 30, 30)), "central square"),
        (lambda m, p: m.complete("a star " * 100), "shorten"),
        (lambda m, p: m.complete("a star", max_new_tokens=0), "max_new_tokens"),
        (lambda m, p: CM3.from_pretrained("no/such/folder"), "no/such/folder"),
        (lambda m, p: CM3.from_pretrained("nobody/nothing"), "nobody/nothing"),
        (lambda m, p: CM3.from_pretrained("demo", device="abacus"), "abacus"),
    ],
)
def test_refusals_say_what_was_found(model, photo, call, message):
    with pytest.raises(CM3Error, match=message) as raised:
        call(model, photo)
    assert "\n" not in str(raised.value)


def test_request_errors_are_value_errors():
    assert issubclass(RequestError, ValueError)


def test_an_adapter_is_merged_into_the_model_it_belongs_to(model_folder, tmp_path):
    lora, base, by_hand = LoRAConfig(rank=2), CM3.from_pretrained(model_folder), CM3.from_pretrained(model_folder)
    adapted = CM3.from_pretrained(model_folder).transformer
    add_adapter(adapted, lora)
    rng = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(each.shape, generator=rng) for name, each in adapter_parameters(adapted)}
    hashes = {"base_hash": weights_hash(base.transformer), "tokenizer_hash": base.tokenizer.hash}
    save_adapter(tmp_path / "adapter", tensors, base.transformer.config, lora, base="base", card="", **hashes)
    loaded = CM3.from_pretrained(model_folder, adapter=tmp_path / "adapter")
    merge_adapter(by_hand.transformer, lora, tensors)
    assert loaded.hash == by_hand.hash != base.hash
    with pytest.raises(ModelFilesError, match="belongs to the weights .* of base, found .*; load it into that model"):
        CM3.from_pretrained("demo", adapter=tmp_path / "adapter")
