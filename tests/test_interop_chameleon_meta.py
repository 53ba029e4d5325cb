"""Chameleon in Meta's format, in one file and in four, beside Hugging Face's; Anole and Lumina-mGPT."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from cm3.checkpoint import load_model_weights, read_json, save_tensors, write_json
from cm3.cli import main
from cm3.errors import ModelFilesError, RequestError
from cm3.interop.chameleon_hf import import_chameleon
from cm3.model.pretrained import load_model
from cm3.tokenizers.image import ImageTokenizer
from cm3.tokenizers.vocabulary import Vocabulary

pytest.importorskip("transformers")

from tiny_chameleon import (
    PLACEHOLDER,
    SEPARATOR,
    VOCABULARY_SIZE,
    foreign_logits,
    meta_parts,
    neighbours,
    save_foreign,
    save_meta,
    save_vqgan,
    share_norms,
    tiny_chameleon,
)

SHAPES = {
    1: {"num_attention_heads": 4, "num_key_value_heads": 4},
    4: {"num_attention_heads": 8, "num_key_value_heads": 4, "swin_norm": True},
}


def model_of(shards):
    return share_norms(tiny_chameleon(max_position_embeddings=4096, **SHAPES[shards]), shards)


@pytest.fixture(scope="module", params=SHAPES)
def release(request, tmp_path_factory):
    """A model, its folder in Meta's format, and the number of files of its weights."""
    model = model_of(request.param)
    return model, save_meta(model, tmp_path_factory.mktemp("meta"), request.param), request.param


@pytest.fixture()
def sharded(tmp_path):
    """The folder of a model in four files, to be changed."""
    return save_meta(model_of(4), tmp_path / "theirs", 4) / "models" / "7b"


def test_both_formats_give_the_same_model_with_the_logits_of_the_library(release, tmp_path):
    model, root, shards = release
    config = import_chameleon(root, tmp_path / "meta", max_shard_size="40KB")
    hugging_face = save_foreign(model, tmp_path / "theirs")
    same = import_chameleon(hugging_face, tmp_path / "hf", vqgan=root / "tokenizer" / "vqgan.ckpt")
    assert config == same and config.qk_norm_per_head == (shards > 1)
    first, second = load_model_weights(tmp_path / "meta"), load_model_weights(tmp_path / "hf")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    for name in ("vocabulary.json", "image_tokenizer.json", "tokenizer.json"):
        assert read_json(tmp_path / "meta" / name) == read_json(tmp_path / "hf" / name)
    assert ImageTokenizer.load(tmp_path / "meta").hash == ImageTokenizer.load(tmp_path / "hf").hash
    assert ImageTokenizer.load(tmp_path / "meta").model.decoder is not None

    ids = torch.randint(VOCABULARY_SIZE, (3, 24))
    transformer, _ = load_model(tmp_path / "meta")
    with torch.no_grad():
        logits = transformer.logits(transformer(ids))
    expected = foreign_logits(model, ids)
    assert expected.std() > 0.5
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_parts_keep_their_own_norms(tmp_path):
    """Two heads to a part: both have its norm, which lies in the order of the file."""
    import_chameleon(save_meta(model_of(4), tmp_path / "theirs", 4), tmp_path / "ours")
    norm = load_model_weights(tmp_path / "ours")["blocks.1.attention.q_norm.weight"].view(8, 4)
    for index, part in enumerate(meta_parts(model_of(4), 4)):
        own = part["layers.1.attention.q_normalization.weight"]
        assert torch.equal(norm[2 * index], own) and torch.equal(norm[2 * index + 1], own)
    assert len(torch.unique(norm, dim=0)) == 4


def test_neighbours_by_hand():
    assert neighbours(torch.arange(8), 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_norms_that_every_part_has_a_copy_of_are_averaged(sharded, tmp_path):
    for index in range(4):
        part = torch.load(sharded / f"consolidated.{index:02}.pth", weights_only=True)
        part["norm.weight"] = torch.full((32,), float(index))
        torch.save(part, sharded / f"consolidated.{index:02}.pth")
    import_chameleon(sharded, tmp_path / "ours")
    assert load_model_weights(tmp_path / "ours")["final_norm.weight"].tolist() == [1.5] * 32


def test_the_placeholder_of_images_has_the_id_that_was_left_over(release, tmp_path):
    _, root, _ = release
    import_chameleon(root, tmp_path / "ours")
    special = Vocabulary.load(tmp_path / "ours" / "vocabulary.json").special_ids
    assert (special["<reserved08706>"], special["<image>"]) == (SEPARATOR, PLACEHOLDER)
    text = (tmp_path / "ours" / "tokenizer.json").read_text()
    assert '"<image>"' in text and "<reserved08707>" not in text


def test_half_precision_and_one_file_by_its_number(tmp_path):
    root = save_meta(model_of(1).bfloat16(), tmp_path / "theirs", 1)
    folder = root / "models" / "7b"
    (folder / "consolidated.pth").rename(folder / "consolidated.00.pth")
    import_chameleon(root, tmp_path / "ours")
    weights = load_model_weights(tmp_path / "ours")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert torch.equal(weights["head.weight"], model_of(1).bfloat16().lm_head.weight)


def drop(part):
    del part["layers.1.attention.k_normalization.bias"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, r"consolidated.02.pth do not fit Chameleon; missing: layers.1.attention.k_normalization.bias\."),
        (lambda part: part.update(extra=torch.zeros(1)), r"consolidated.02.pth do not fit .* unexpected: extra\."),
        (
            lambda part: part.update({"layers.0.attention.wo.weight": torch.zeros(8, 32)}),
            r"wrongly shaped: layers.0.attention.wo.weight \(8, 32\) instead of \(32, 8\)",
        ),
        (lambda part: part.update({"norm.weight": "text"}), "consolidated.02.pth holds no tensors by name"),
    ],
)
def test_every_tensor_of_every_file_is_accounted_for(sharded, tmp_path, change, message):
    part = torch.load(sharded / "consolidated.02.pth", weights_only=True)
    change(part)
    torch.save(part, sharded / "consolidated.02.pth")
    with pytest.raises(ModelFilesError, match=message):
        import_chameleon(sharded, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_a_pickled_program_is_not_run(sharded, tmp_path):
    class Harmful:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "harmed",))

    torch.save({"norm.weight": torch.zeros(32), "extra": Harmful()}, sharded / "consolidated.01.pth")
    with pytest.raises(ModelFilesError, match="consolidated.01.pth cannot be read as a file of tensors"):
        import_chameleon(sharded, tmp_path / "ours")
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qk_normalization": False}, "params.json has no qk_normalization"),
        ({"norm_eps": 1e-6}, "params.json has rms_norm_eps=1e-06"),
        ({"dim": None}, "params.json cannot be used"),
        ({"n_heads": 5}, "params.json cannot be used .*num_heads=5 does not divide"),
        ({"ffn_dim_multiplier": 1.0}, r"w1.weight \(12, 32\) instead of \(24, 32\)"),
    ],
)
def test_settings_of_other_networks_are_refused(sharded, tmp_path, change, message):
    params = read_json(sharded / "params.json")
    write_json(sharded / "params.json", {**params, "model": {**params["model"], **change}})
    with pytest.raises(ModelFilesError, match=message):
        import_chameleon(sharded, tmp_path / "ours")


def test_missing_files_are_named(sharded, tmp_path):
    (sharded / "consolidated.03.pth").unlink()
    with pytest.raises(ModelFilesError, match="lacks consolidated.03.pth of 4 file"):
        import_chameleon(sharded, tmp_path / "ours")
    write_json(sharded / "consolidate_params.json", {"model_parallel_size": 0})
    with pytest.raises(ModelFilesError, match="model_parallel_size=0"):
        import_chameleon(sharded, tmp_path / "ours")
    shutil.copytree(sharded, sharded.parent / "30b")
    with pytest.raises(RequestError, match=r"holds several models \(30b, 7b\); give the folder of one"):
        import_chameleon(sharded.parent.parent, tmp_path / "ours")
    with pytest.raises(ModelFilesError, match=r"has neither config.json, .* nor params.json or models/7b/params.json"):
        import_chameleon(sharded.parent, tmp_path / "ours")


def test_anole_as_it_is_released_and_as_its_tools_write_it(tmp_path, capsys):
    """Chameleon with other rows of image ids in the head; its tools leave None for a tensor that is not used."""
    chameleon = model_of(1)
    root = save_meta(chameleon, tmp_path / "chameleon", 1)
    import_chameleon(root, tmp_path / "before")
    path = root / "models" / "7b" / "consolidated.pth"
    weights = torch.load(path, weights_only=True)
    weights["output.weight"][4:20] += 1
    torch.save({**weights, "rope.freqs": None}, path)
    (root / "models" / "7b" / "config.json").write_text("{}")  # its release has one there
    assert main(["import", "chameleon", str(root), str(tmp_path / "after")]) == 0
    assert "2 layers of width 32, 96 ids" in capsys.readouterr().out
    before, after = load_model_weights(tmp_path / "before"), load_model_weights(tmp_path / "after")
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["head.weight"]
    rows = (before["head.weight"] != after["head.weight"]).any(dim=1).nonzero().flatten()
    assert rows.tolist() == list(range(4, 20))


def test_anole_in_hugging_faces_format_has_its_decoder(tmp_path):
    model = model_of(1)
    vqgan = save_vqgan(model, tmp_path / "tokenizer")
    folder = save_foreign(model, tmp_path / "theirs", max_shard_size="1GB")
    weights = load_model_weights(folder)
    tensors = {f"model.vqmodel.{name}": tensor for name, tensor in torch.load(vqgan)["state_dict"].items()}
    save_tensors(folder / "model.safetensors", {**weights, **tensors})
    import_chameleon(folder, tmp_path / "own")
    import_chameleon(folder, tmp_path / "given", vqgan=vqgan)
    own, given = ImageTokenizer.load(tmp_path / "own"), ImageTokenizer.load(tmp_path / "given")
    assert own.hash == given.hash and own.config.decoder
    del tensors["model.vqmodel.decoder.conv_out.bias"]
    save_tensors(folder / "model.safetensors", {**weights, **tensors})
    with pytest.raises(ModelFilesError, match=r"missing: model.vqmodel.decoder.conv_out.bias\."):
        import_chameleon(folder, tmp_path / "other")


def lumina(model, folder, rows):
    """The model as Lumina-mGPT's code saves it: one norm for the heads of a part, no image tokenizer, named sizes."""
    save_foreign(model, folder, max_shard_size="1GB")
    weights = {
        name: tensor[:: len(tensor) // rows].clone() if "q_norm" in name or "k_norm" in name else tensor
        for name, tensor in load_model_weights(folder).items()
        if "vqmodel" not in name
    }
    save_tensors(folder / "model.safetensors", weights)
    settings = read_json(folder / "config.json")
    changes = {"architectures": ["ChameleonXLLMXForConditionalGeneration"], "mask_image_logits": False}
    changes |= {"z_loss_weight": 1e-5, "dropout": 0.05, "model_parallel_size": rows, "max_position_embeddings": 10240}
    text = json.dumps({**settings, **changes}).replace('"word90"', '"<reserved08799>"')
    (folder / "config.json").write_text(re.sub(r'"word9([1-5])"', r'"<reserved0880\1>"', text))
    text = (folder / "tokenizer.json").read_text().replace('"word90"', '"<reserved08799>"')
    (folder / "tokenizer.json").write_text(re.sub(r'"word9([1-5])"', r'"<reserved0880\1>"', text))
    return folder


@pytest.mark.parametrize("rows", SHAPES)
def test_lumina_mgpt_shares_norms_and_names_sizes(rows, tmp_path):
    model = model_of(rows)
    folder, vqgan = lumina(model, tmp_path / "theirs", rows), save_vqgan(model, tmp_path / "tokenizer")
    with pytest.raises(RequestError, match="holds no image tokenizer; give Chameleon's vqgan.ckpt, with --vqgan"):
        import_chameleon(folder, tmp_path / "ours")
    config = import_chameleon(folder, tmp_path / "ours", vqgan=vqgan)
    assert (config.max_positions, config.dropout, config.qk_norm_per_head) == (10240, 0.0, rows > 1)
    import_chameleon(save_foreign(model, tmp_path / "chameleon"), tmp_path / "same")
    ours, same = load_model_weights(tmp_path / "ours"), load_model_weights(tmp_path / "same")
    assert all(torch.equal(ours[name], same[name]) for name in ours.keys() | same.keys())
    vocabulary = Vocabulary.load(tmp_path / "ours" / "vocabulary.json")
    assert vocabulary.special_ids["<image_row_end>"] == 90
    assert [vocabulary.special_ids[f"<image_size:{size}>"] for size in range(1, 6)] == [91, 92, 93, 94, 95]
    assert "<image_row_end>" not in Vocabulary.load(tmp_path / "same" / "vocabulary.json").special_ids
    assert "a Lumina-mGPT in Hugging Face's format" in (tmp_path / "ours" / "README.md").read_text()


def test_one_norm_in_another_order_is_refused(tmp_path):
    """Anole's own copy of transformers has a norm of one dimension and rows in Meta's order."""
    folder = save_foreign(model_of(1), tmp_path / "theirs", max_shard_size="1GB")
    weights = load_model_weights(folder)
    norms = {name: tensor[0].clone() for name, tensor in weights.items() if "q_norm" in name or "k_norm" in name}
    save_tensors(folder / "model.safetensors", {**weights, **norms})
    with pytest.raises(ModelFilesError, match=r"one q_norm of 8 for all heads, .* training/bin_to_pth.py"):
        import_chameleon(folder, tmp_path / "ours")
