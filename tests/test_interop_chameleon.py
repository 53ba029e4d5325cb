"""Chameleon in Hugging Face's format: small random models of `transformers`, imported, compared and exported."""

import shutil

import numpy as np
import pytest
import torch
from full_disk import FOUND, full_disk

from cm3.checkpoint import INDEX_FILE, load_model_weights, load_tensors, read_json, save_tensors, write_json
from cm3.cli import main
from cm3.errors import ConfigError, ModelFilesError, RequestError
from cm3.interop.chameleon_export import export_chameleon
from cm3.interop.chameleon_hf import import_chameleon
from cm3.interop.chameleon_layout import Part, join_parts, split_parts
from cm3.model.cache import KeyValueCache
from cm3.model.pretrained import load_model
from cm3.tokenizers.image import ImageTokenizer, pixels_to_model
from cm3.tokenizers.vocabulary import Vocabulary

transformers = pytest.importorskip("transformers")

from tiny_chameleon import (  # noqa: E402
    BREAK,
    EOSS,
    FIRST_CODE,
    FIRST_TEXT,
    NUM_CODES,
    SIDE,
    VOCABULARY_SIZE,
    foreign_logits,
    names,
    save_foreign,
    share_norms,
    tiny_chameleon,
)

VARIATIONS = {
    "7b": lambda: share_norms(tiny_chameleon(num_key_value_heads=4, rope_parameters=rope(10_000.0)), 1),
    "34b": lambda: tiny_chameleon(swin_norm=True, rope_parameters=rope(5_000.0)),
}


def rope(theta):
    return {"rope_type": "default", "rope_theta": theta}


@pytest.fixture(scope="module", params=VARIATIONS)
def pair(request, tmp_path_factory):
    """A foreign model, its folder and the folder of its import."""
    foreign = VARIATIONS[request.param]()
    root = tmp_path_factory.mktemp(request.param)
    source = save_foreign(foreign, root / "theirs")
    import_chameleon(source, root / "ours", max_shard_size="40KB")
    return foreign, source, root / "ours"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The folder of a foreign model, to be changed in copies."""
    return save_foreign(tiny_chameleon(), tmp_path_factory.mktemp("one") / "theirs", max_shard_size="1GB")


def interleaved_ids():
    """Rows of text and image ids: text alone, an image between texts, images alone."""
    generator = np.random.default_rng(0)
    text = generator.integers(FIRST_TEXT, VOCABULARY_SIZE, (3, 24))
    codes = generator.integers(FIRST_CODE, FIRST_CODE + NUM_CODES, (3, 24))
    ids = text.copy()
    ids[:, 0] = 0
    ids[1, 8:18] = [BREAK, *codes[1, :8], EOSS]
    ids[2, 1:] = [BREAK, *codes[2, :9], EOSS, BREAK, *codes[2, 9:20]]
    return torch.tensor(ids)


def test_logits_of_text_and_images_are_those_of_the_library(pair):
    foreign, _, folder = pair
    model, _ = load_model(folder)
    ids = interleaved_ids()
    with torch.no_grad():
        logits = model.logits(model(ids))
        masked = foreign(input_ids=ids).logits
    expected = foreign_logits(foreign, ids)
    assert expected.std() > 0.5  # of a size at which 1e-4 says something
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    image = slice(FIRST_CODE, FIRST_CODE + NUM_CODES)
    assert (masked[..., image] < -1e30).all()  # what the library does to them
    text = [id for id in range(VOCABULARY_SIZE) if id not in range(FIRST_CODE, FIRST_CODE + NUM_CODES)]
    torch.testing.assert_close(logits[..., text], masked[..., text], atol=1e-4, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_have_the_logits_of_the_library(pair, side):
    foreign, _, folder = pair
    model, _ = load_model(folder)
    lengths, ids = [24, 15, 7], interleaved_ids()
    real = torch.zeros_like(ids, dtype=torch.bool)
    rows = torch.ones_like(ids)  # <pad>
    for row, length in enumerate(lengths):
        places = slice(24 - length, 24) if side == "left" else slice(0, length)
        rows[row, places], real[row, places] = ids[row, :length], True
    expected = foreign_logits(foreign, rows, real.long())
    with torch.no_grad():
        packed = model.logits(model(rows, document_ids_BT=torch.where(real, 0, -1)))
        torch.testing.assert_close(packed[real], expected[real], atol=1e-4, rtol=0)
        for row, length in enumerate(lengths):
            alone = model.logits(model(ids[row : row + 1, :length]))[0]
            torch.testing.assert_close(alone, expected[row][real[row]], atol=1e-4, rtol=0)


def test_cached_decoding_has_the_logits_of_the_library(pair):
    foreign, _, folder = pair
    model, config = load_model(folder)
    ids, cache = interleaved_ids(), KeyValueCache.create(config, 3, 24)
    with torch.no_grad():
        steps = [model.logits(model(ids[:, :10], cache=cache))]
        steps += [model.logits(model(ids[:, place : place + 1], cache=cache)) for place in range(10, 24)]
    torch.testing.assert_close(torch.cat(steps, dim=1), foreign_logits(foreign, ids), atol=1e-4, rtol=0)


def test_settings_and_norms_say_which_chameleon_it_is(pair):
    foreign, source, folder = pair
    _, config = load_model(folder)
    swin = foreign.config.swin_norm
    assert config.norm_order == ("swin" if swin else "pre")
    assert config.qk_norm_per_head == swin  # only there the heads differ
    assert (config.key_value_heads, config.rope_theta) == ((2, 5_000.0) if swin else (4, 10_000.0))
    assert (config.ffn_width, config.max_positions, config.vocabulary_size) == (48, 64, VOCABULARY_SIZE)
    assert len(list(source.glob("*.safetensors"))) > 2 and (folder / INDEX_FILE).is_file()


def test_codes_of_pictures_are_those_of_the_library(pair):
    foreign, _, folder = pair
    pixels = np.random.default_rng(1).integers(0, 256, (4, SIDE, SIDE, 3), dtype=np.uint8)
    codes = ImageTokenizer.load(folder).encode(pixels)
    expected = foreign.model.vqmodel.encode(pixels_to_model(torch.from_numpy(pixels))).image_tokens
    assert len(np.unique(codes)) > NUM_CODES / 2
    assert codes.ravel().tolist() == expected.tolist()
    bpe = foreign.get_image_tokens(pixels_to_model(torch.from_numpy(pixels)))
    assert Vocabulary.load(folder / "vocabulary.json").codes_to_ids(codes).tolist() == bpe.tolist()
    with pytest.raises(RequestError, match="has no decoder"):
        ImageTokenizer.load(folder).decode(codes)


def test_export_gives_back_every_tensor_and_the_library_reads_it(pair, tmp_path):
    foreign, source, folder = pair
    export_chameleon(folder, tmp_path / "theirs", max_shard_size="50KB")
    before, after = load_model_weights(source), load_model_weights(tmp_path / "theirs")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    loaded = transformers.ChameleonForConditionalGeneration.from_pretrained(tmp_path / "theirs").eval()
    ids = interleaved_ids()
    assert torch.equal(foreign_logits(loaded, ids), foreign_logits(foreign, ids))
    assert loaded.config.vocabulary_map == foreign.config.vocabulary_map
    assert (loaded.config.bos_token_id, loaded.config.pad_token_id, loaded.config.eos_token_id) == (0, 1, 2)
    assert (tmp_path / "theirs" / "tokenizer.json").read_text() == (source / "tokenizer.json").read_text()

    import_chameleon(tmp_path / "theirs", tmp_path / "again")
    ours, again = load_model_weights(folder), load_model_weights(tmp_path / "again")
    assert ours.keys() == again.keys() and all(torch.equal(ours[name], again[name]) for name in ours)
    for name in ("config.json", "vocabulary.json", "image_tokenizer.json"):
        assert (folder / name).read_text() == (tmp_path / "again" / name).read_text()


def test_half_precision_is_kept(tmp_path):
    source = save_foreign(tiny_chameleon().bfloat16(), tmp_path / "theirs")
    import_chameleon(source, tmp_path / "ours")
    assert {tensor.dtype for tensor in load_model_weights(tmp_path / "ours").values()} == {torch.bfloat16}
    export_chameleon(tmp_path / "ours", tmp_path / "back")
    before, after = load_model_weights(source), load_model_weights(tmp_path / "back")
    assert all(torch.equal(before[name], after[name]) and after[name].dtype == torch.bfloat16 for name in before)


def test_rows_of_rotated_heads_by_hand():
    """Two heads of width 4: theirs holds elements 0 and 2 of the pairs, then 1 and 3."""
    parts = (Part("q", (8, 1), 2), Part("v", (4, 1)))
    theirs = {
        "q": torch.tensor([0, 2, 1, 3, 10, 12, 11, 13.0])[:, None],
        "v": torch.tensor([20, 21, 22, 23.0])[:, None],
    }
    joined = join_parts(parts, theirs.__getitem__, torch.Size([12, 1]))
    assert joined.flatten().tolist() == [0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23]
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in split_parts(joined, parts))

    norm = (Part("norm", (2, 4), 2),)
    shared = torch.tensor([[0, 2, 1, 3.0], [0, 2, 1, 3]])
    assert join_parts(norm, lambda _: shared, torch.Size([4])).tolist() == [0, 1, 2, 3]
    assert torch.equal(dict(split_parts(torch.arange(4.0), norm))["norm"], shared)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.layers.1.self_attn.k_norm.bias"), r"missing: model.layers.1.self_attn.k_norm.bias\."),
        (lambda w: w.update(extra=torch.zeros(1)), r"unexpected: extra\."),
        (
            lambda w: w.update({"lm_head.weight": torch.zeros(95, 32)}),
            r"lm_head.weight \(95, 32\) instead of \(96, 32\)",
        ),
        (lambda w: w.pop("model.vqmodel.quant_conv.bias"), "missing: model.vqmodel.quant_conv.bias"),
        (
            lambda w: w.update({"model.norm.weight": torch.zeros(32, dtype=torch.int8)}),
            "norm.weight in I8, known are F32",
        ),
    ],
)
def test_every_tensor_is_accounted_for(source, tmp_path, change, message):
    folder = tmp_path / "theirs"
    shutil.copytree(source, folder)
    weights = load_tensors(folder / "model.safetensors")
    change(weights)
    save_tensors(folder / "model.safetensors", weights)
    with pytest.raises(ModelFilesError, match=message):
        import_chameleon(folder, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "a model of type 'llama', `chameleon` reads 'chameleon'"),
        ({"attention_bias": True}, r"attention_bias=True \(not False\)"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps=1e-06"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_type='linear'"),
        ({"hidden_size": None}, "config.json cannot be used"),
        ({"vq_config": {"double_latent": True}}, "double_latent=True"),
        ({"vocabulary_map": {**names(), "word50": 51}}, "has word50 at id 50, the vocabulary_map of config.json at 51"),
    ],
)
def test_settings_of_other_networks_are_refused(source, tmp_path, change, message):
    folder = tmp_path / "theirs"
    shutil.copytree(source, folder)
    write_json(folder / "config.json", {**read_json(folder / "config.json"), **change})
    with pytest.raises(ModelFilesError, match=message):
        import_chameleon(folder, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_old_settings_name_theta_at_the_top(source, tmp_path):
    folder = tmp_path / "theirs"
    shutil.copytree(source, folder)
    settings = {**read_json(folder / "config.json"), "rope_theta": 123.0, "rope_scaling": None}
    del settings["rope_parameters"]
    write_json(folder / "config.json", settings)
    assert import_chameleon(folder, tmp_path / "ours").rope_theta == 123.0


def test_a_folder_that_holds_something_is_left_alone(source, tmp_path):
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(RequestError, match="is not empty; choose a folder that does not exist yet"):
        import_chameleon(source, tmp_path)
    with pytest.raises(RequestError, match="is not empty"):
        export_chameleon(source, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def test_a_full_disk_leaves_nothing_behind(source, tmp_path, capsys):
    assert main(["import", "chameleon", str(source), str(tmp_path / "ours")]) == 0
    capsys.readouterr()
    commands = (
        ["import", "chameleon", str(source), str(tmp_path / "half")],
        ["export", "--format", "chameleon", str(tmp_path / "ours"), "--out", str(tmp_path / "half")],
    )
    for command in commands:
        with full_disk(10_000):
            assert main(command) == 2
        error = capsys.readouterr().err
        assert f"cannot write the folder {tmp_path / 'half'} ({FOUND}); make room" in error and error.count("\n") == 1
        assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_only_a_chameleon_is_exported(model_folder, tmp_path):
    with pytest.raises(ConfigError, match="Chameleon wants model.norm=rmsnorm"):
        export_chameleon(model_folder, tmp_path / "theirs")


def test_command_line(source, tmp_path, capsys):
    assert main(["import", "chameleon", str(source), str(tmp_path / "ours")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'ours'}: 0 million parameters, 2 layers of width 32, 96 ids\n"
    assert main(["import", "chameleon", str(source), str(tmp_path / "ours")]) == 2
    assert "is not empty" in capsys.readouterr().err
