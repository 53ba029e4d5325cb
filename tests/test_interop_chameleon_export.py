"""`cm3 export --format chameleon`: a model that came in Meta's format, in the classes of `transformers` and back."""

import numpy as np
import pytest
import torch

from cm3.checkpoint import load_model_weights
from cm3.cli import main

transformers = pytest.importorskip("transformers")

from chameleon_reference import CODES, picture, processor, reading_chameleon, text_tokenizer  # noqa: E402
from tiny_chameleon import foreign_logits, save_meta, share_norms  # noqa: E402


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model of `transformers`, our import of its files in Meta's format, and the export of that."""
    root = tmp_path_factory.mktemp("export")
    foreign = share_norms(reading_chameleon(num_attention_heads=8, num_key_value_heads=4, swin_norm=True), 4)
    save_meta(foreign, root / "meta", 4)
    text = text_tokenizer().to_str().replace("<image>", "<reserved08707>")
    (root / "meta" / "tokenizer" / "text_tokenizer.json").write_text(text)
    assert main(["import", "chameleon", str(root / "meta"), str(root / "ours")]) == 0
    assert main(["export", "--format", "chameleon", str(root / "ours"), "--out", str(root / "theirs")]) == 0
    return foreign, root / "ours", root / "theirs"


def test_the_library_loads_the_model(exported):
    foreign, _, theirs = exported
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(theirs).eval()
    assert type(loaded).__name__ == "ChameleonForConditionalGeneration"
    ids = torch.randint(text_tokenizer().get_vocab_size(), (2, 24))
    assert torch.equal(foreign_logits(loaded, ids), foreign_logits(foreign, ids))
    assert loaded.config.vocabulary_map == foreign.config.vocabulary_map


def test_the_library_loads_tokenizer_and_processor(exported):
    """Meta's release has no files of theirs but the vocabulary; the export makes them."""
    _, _, theirs = exported
    reader, expected = transformers.AutoProcessor.from_pretrained(theirs), processor()
    assert (reader.image_seq_length, reader.tokenizer.padding_side) == (CODES, "left")
    prompts = ["a red <image> circle", "365 green stars"]
    ours = reader.tokenizer(prompts, padding=True)
    assert ours["input_ids"] == expected.tokenizer(prompts, padding=True)["input_ids"]
    inputs = reader(images=[picture(0)], text=prompts[:1], return_tensors="np")
    assert np.array_equal(inputs["input_ids"], expected(images=[picture(0)], text=prompts[:1])["input_ids"])


def test_imported_again_it_is_the_same(exported, tmp_path):
    _, ours, theirs = exported
    vqgan = theirs.parent / "meta" / "tokenizer" / "vqgan.ckpt"
    assert main(["import", "chameleon", str(theirs), str(tmp_path / "again"), "--vqgan", str(vqgan)]) == 0
    before, after = load_model_weights(ours), load_model_weights(tmp_path / "again")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    names = ("config.json", "vocabulary.json", "image_tokenizer.json", "tokenizer.json")
    assert all((ours / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)


def test_what_cannot_be_exported_is_named(exported, model_folder, tmp_path, capsys):
    _, ours, theirs = exported
    out = ["--format", "chameleon", "--out", str(tmp_path / "out")]
    assert main(["export", str(model_folder), *out]) == 2
    assert "Chameleon wants model.norm=rmsnorm" in capsys.readouterr().err
    assert main(["export", str(ours), *out, "--tokenizers", str(ours)]) == 2
    assert "--tokenizers goes with a checkpoint" in capsys.readouterr().err
    assert main(["export", str(theirs), *out]) == 2
    assert "holds a model of type 'chameleon', this code runs 'open-cm3'" in capsys.readouterr().err
    assert main(["export", "--format", "chameleon", str(ours), "--out", str(theirs)]) == 2
    assert "is not empty; choose a folder that does not exist yet" in capsys.readouterr().err
