"""Adapters: they start as nothing, count as told, go to PEFT's files and back, and merge to the same logits."""

import copy
import shutil
import sys

import pytest
import torch
from tiny_transformer import KINDS, logits, transformer_of

from cm3.checkpoint import load_tensors, read_json, save_tensors, write_json
from cm3.errors import ConfigError, MissingDependencyError, ModelFilesError
from cm3.model.lora import (
    LoRAConfig,
    adapter_parameter_count,
    adapter_parameters,
    add_adapter,
    load_adapter,
    merge_adapter,
    save_adapter,
    weights_hash,
)

peft = pytest.importorskip("peft")

LORAS = {
    "all targets": LoRAConfig(rank=3, alpha=6.0),
    "embeddings": LoRAConfig(rank=2, targets=("attention.qkv", "feed_forward.out"), train_embeddings=True),
}
EVERY_KIND = pytest.mark.parametrize(("kind", "lora"), [(k, n) for k in KINDS for n in LORAS])


def trained(kind, lora):
    """A transformer whose adapters hold anything but nothing, and their parameters."""
    transformer = transformer_of(kind)
    add_adapter(transformer, LORAS[lora])
    with torch.no_grad():
        for _, parameter in adapter_parameters(transformer):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return transformer, dict(adapter_parameters(transformer))


def save(folder, kind, lora, tensors, base="a model"):
    plain = transformer_of(kind)
    settings = {"base": base, "base_hash": weights_hash(plain), "tokenizer_hash": "0" * 64, "card": "An adapter."}
    save_adapter(folder, tensors, plain.config, LORAS[lora], **settings)
    return folder


@EVERY_KIND
def test_a_new_adapter_changes_nothing_and_only_it_is_trained(kind, lora):
    transformer = transformer_of(kind)
    before, weights = logits(transformer), copy.deepcopy(transformer.state_dict())
    add_adapter(transformer, LORAS[lora])
    assert torch.equal(logits(transformer), before)
    trainable = {name: p for name, p in transformer.named_parameters() if p.requires_grad}
    assert trainable.keys() == dict(adapter_parameters(transformer)).keys()
    count = adapter_parameter_count(transformer.config, LORAS[lora])
    assert count == sum(parameter.numel() for parameter in trainable.values())
    transformer.logits(transformer(torch.arange(20)[None])).square().sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in transformer.parameters())
    frozen = [p for p in transformer.parameters() if not p.requires_grad]
    assert sum(p.numel() for p in frozen) == sum(tensor.numel() for tensor in weights.values())


@EVERY_KIND
def test_merged_and_unmerged_logits_are_equal(kind, lora, tmp_path):
    adapted, tensors = trained(kind, lora)
    expected, plain = logits(adapted), transformer_of(kind)
    assert (expected - logits(plain)).abs().max() > 0.1
    merged, names = transformer_of(kind), list(plain.state_dict())
    merge_adapter(merged, LORAS[lora], tensors)
    loaded = transformer_of(kind)
    load_adapter(loaded, save(tmp_path / "adapter", kind, lora, tensors))
    for model in (merged, loaded):
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
        assert list(model.state_dict()) == names and all(p.requires_grad for p in model.parameters())
        assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]


@EVERY_KIND
def test_peft_reads_the_folder_by_itself(kind, lora, tmp_path):
    adapted, tensors = trained(kind, lora)
    folder = save(tmp_path / "adapter", kind, lora, tensors)
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "base.json",
        "README.md",
    }
    assert read_json(folder / "adapter_config.json")["base_model_name_or_path"] == "a model"
    plain = transformer_of(kind)
    peft.PeftModel.from_pretrained(plain, str(folder))
    assert torch.equal(logits(plain.eval()), logits(adapted))


def test_an_adapter_fits_its_model_in_any_format_and_no_other(tmp_path):
    adapted, tensors = trained("cm3leon", "all targets")
    rounded = transformer_of("cm3leon").bfloat16()
    assert weights_hash(rounded) == weights_hash(transformer_of("cm3leon"))
    folder = save(tmp_path / "adapter", "cm3leon", "all targets", tensors)
    load_adapter(rounded, folder)
    assert next(rounded.parameters()).dtype == torch.bfloat16
    assert (logits(rounded).float() - logits(adapted)).abs().mean() < 0.05 * logits(adapted).abs().mean()
    other = transformer_of("cm3leon")
    with torch.no_grad():
        other.blocks[1].attention.out.weight[0, 0] += 1
    with pytest.raises(ModelFilesError, match=r"belongs to the weights \w{12} of a model, found \w{12}; load it into"):
        load_adapter(other, folder)
    with pytest.raises(ModelFilesError, match="belongs to the weights"):  # it is merged already
        load_adapter(rounded, folder)


def test_a_folder_that_is_no_whole_adapter_is_refused_and_the_model_left_as_it_was(tmp_path):
    _, tensors = trained("cm3leon", "all targets")
    folder = save(tmp_path / "adapter", "cm3leon", "all targets", tensors)
    plain = transformer_of("cm3leon")
    before, names = logits(plain), list(plain.state_dict())
    with pytest.raises(ModelFilesError, match="so it is no adapter; give the folder `adapter` of a run"):
        load_adapter(plain, tmp_path)
    saved = load_tensors(folder / "adapter_model.safetensors")
    name = "base_model.model.blocks.0.attention.qkv.lora_A.weight"
    for wrong in (
        {key: tensor for key, tensor in saved.items() if key != name},
        saved | {name: torch.zeros(5, 32)},
        saved | {"base_model.model.blocks.9.attention.qkv.lora_A.weight": saved[name].clone()},
    ):
        broken = shutil.copytree(folder, tmp_path / f"broken {len(list(tmp_path.iterdir()))}")
        save_tensors(broken / "adapter_model.safetensors", wrong)
        with pytest.raises(
            ModelFilesError, match=r"does not fit the model: blocks\.\d\.attention\.qkv\.lora_A\.weight"
        ):
            load_adapter(plain, broken)
    write_json(folder / "adapter_config.json", {"peft_type": "NOTHING"})
    with pytest.raises(ModelFilesError, match="adapter_config.json cannot be used"):
        load_adapter(plain, folder)
    assert torch.equal(logits(plain), before) and list(plain.state_dict()) == names


def test_without_peft_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingDependencyError, match=r"adapters need peft.*pip install open-cm3\[tune\]"):
        add_adapter(transformer_of("cm3leon"), LoRAConfig(rank=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": -1}, r"lora.rank=-1; choose 0 \(off\)"),
        ({"alpha": 0.0}, "lora.alpha=0.0; choose a value above 0"),
        ({"dropout": 1.0}, "lora.dropout=1.0"),
        ({"targets": ("qkv",)}, "lora.targets has qkv; choose from attention.qkv"),
        ({"targets": ()}, "lora.targets is empty"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        LoRAConfig(**changes)


def test_no_rank_is_no_adapter():
    assert adapter_parameter_count(transformer_of("cm3leon").config, LoRAConfig(train_embeddings=True)) == 0
