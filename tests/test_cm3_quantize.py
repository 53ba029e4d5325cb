"""`quantize="int8"` as a user meets it: the demo model loses next to nothing, files say so, and clear refusals."""

import json

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image

from cm3.cli import main
from cm3.data.sources import SourceConfig
from cm3.errors import RequestError
from cm3.eval.document_tasks import PairSet
from cm3.eval.likelihood import Likelihood
from cm3.model.lora import LoRAConfig, adapter_parameters, add_adapter, save_adapter, weights_hash
from cm3.model.quantized import quantize_blocks
from cm3.pipeline import CM3


@pytest.fixture(scope="module")
def demo():
    return CM3.from_pretrained("demo", quantize="int8")


def test_the_demo_model_predicts_as_well_as_before_in_both_modalities(demo):
    """Within half a percent in bits per image code and per text id: 0.1% was measured on 200 scenes."""
    task = Likelihood(pairs=PairSet(source=SourceConfig(kind="scenes", split="validation", limit=24)))
    before, after = task.run(CM3.from_pretrained("demo", dtype=torch.bfloat16)), task.run(demo)
    assert before.protocol["precision"] == "bfloat16" and after.protocol["precision"] == "int8 blocks, bfloat16"
    for name in ("bits per image code, all", "bits per text id, all"):
        assert after.metrics[name].value == pytest.approx(before.metrics[name].value, rel=5e-3)
        assert after.metrics[name].value != before.metrics[name].value


def test_it_takes_half_the_memory(demo):
    def size(model):
        return sum(tensor.numel() * tensor.element_size() for tensor in model.transformer.state_dict().values())

    # a ninth of the demo's weights are embeddings, which stay in bf16
    assert 0.5 < size(demo) / size(CM3.from_pretrained("demo", dtype=torch.bfloat16)) < 0.57


def test_types_and_hashes(model_folder):
    plain = CM3.from_pretrained(model_folder)
    model = CM3.from_pretrained(model_folder, quantize="int8")
    assert (plain.precision, model.precision) == ("float32", "int8 blocks, bfloat16")
    assert model.hash != plain.hash
    exact = CM3.from_pretrained(model_folder, quantize="int8", dtype=torch.float32)
    assert exact.precision == "int8 blocks, float32"
    images = [CM3.from_pretrained(model_folder, quantize="int8").generate("a red star", seed=3)[0] for _ in range(2)]
    assert np.array_equal(*map(np.asarray, images)) and images[0].size == (16, 16)


def test_weights_are_rounded_once(model_folder):
    """From the numbers of the file, not from those of bf16."""
    by_hand = CM3.from_pretrained(model_folder, dtype=torch.float32).transformer
    quantize_blocks(by_hand)
    loaded = CM3.from_pretrained(model_folder, quantize="int8").transformer
    assert torch.equal(loaded.blocks[1].attention.qkv.weight, by_hand.blocks[1].attention.qkv.weight)


def test_an_adapter_is_merged_before_the_rounding(model_folder, tmp_path):
    lora, base = LoRAConfig(rank=2), CM3.from_pretrained(model_folder)
    adapted = CM3.from_pretrained(model_folder).transformer
    add_adapter(adapted, lora)
    tensors = {name: torch.randn_like(each) for name, each in adapter_parameters(adapted)}
    hashes = {"base_hash": weights_hash(base.transformer), "tokenizer_hash": base.tokenizer.hash}
    save_adapter(tmp_path / "adapter", tensors, base.transformer.config, lora, base="base", card="", **hashes)
    merged = CM3.from_pretrained(model_folder, adapter=tmp_path / "adapter").transformer
    quantize_blocks(merged)
    loaded = CM3.from_pretrained(model_folder, adapter=tmp_path / "adapter", quantize="int8").transformer
    assert torch.equal(loaded.blocks[0].feed_forward.up.weight, merged.blocks[0].feed_forward.up.weight)


def test_saving_and_unknown_names_are_refused(model_folder, tmp_path, monkeypatch):
    model, made = CM3.from_pretrained(model_folder, quantize="int8"), []
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *args, **options: made.append(args))
    for save in (lambda: model.save_pretrained(tmp_path / "copy"), lambda: model.push_to_hub("nobody/nothing")):
        with pytest.raises(RequestError, match="a model with int8 weights cannot be saved: .*; load it without quant"):
            save()
    assert not (tmp_path / "copy").exists() and not made
    with pytest.raises(RequestError, match="quantize='int4' is unknown; choose int8, or leave it out"):
        CM3.from_pretrained(model_folder, quantize="int4")


def test_generate_and_infill_say_how_they_rounded(tmp_path, capsys):
    words = ["generate", "a small green star", "--quantize", "int8", "--seed", "1", "--out", str(tmp_path)]
    assert main(words) == 0
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert (settings["model"], settings["quantize"]) == ("demo", "int8")
    picture, filled = tmp_path / "000.png", tmp_path / "filled.png"
    assert Image.open(picture).size == (64, 64)
    assert main(["infill", str(picture), "--box", "8,8,24,24", "--out", str(filled)]) == 0
    assert json.loads((tmp_path / "filled.settings.json").read_text())["quantize"] is None
    assert main(["caption", str(picture), "--quantize", "int8"]) == 0
    assert "green star" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--quantize", "int4"])
    assert stopped.value.code == 2 and "int4" in capsys.readouterr().err


def test_eval_takes_it_on_the_command_line_and_has_it_on_record(tmp_path, capsys):
    config = tmp_path / "eval.yaml"
    config.write_text(
        f"output: {tmp_path / 'out'}\n"
        "likelihood: {pairs: {source: {kind: scenes, split: validation, limit: 2}}}\n"
    )
    assert main(["eval", str(config), "--quantize", "int8"]) == 0
    printed = capsys.readouterr().out
    assert "bits per text id, all" in printed and "bits per image code, all" in printed
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    assert report["config"]["quantize"] == "int8"
    assert report["results"][0]["protocol"]["precision"] == "int8 blocks, bfloat16"
    assert main(["eval", str(config), "--quantize", "int4"]) == 2
    assert "int4" in capsys.readouterr().err
