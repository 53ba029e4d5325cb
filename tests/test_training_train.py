"""A real training run of seconds: it learns, is interrupted, resumes exactly, and leaves a model folder."""

import dataclasses
import json
import math
import os
import shutil
import signal

import pytest
import torch
from process_group import process_group
from tiny_run import TOKENIZER_HASH, VOCABULARY, losses, mark_as_retrieved, prepare, tiny_run

from cm3.checkpoint import load_tensors
from cm3.cli import main
from cm3.config import dump_config
from cm3.data.shards import ShardedDocuments
from cm3.errors import ConfigError, ModelFilesError
from cm3.model.config import ModelConfig
from cm3.model.objective import ObjectiveConfig
from cm3.model.pretrained import TOKENIZER_FILES, load_model
from cm3.model.transformer import Transformer
from cm3.training import engine, train
from cm3.training.nonfinite import DivergedError
from cm3.training.optimizer import OptimizerConfig, learning_rate_at, make_optimizer
from cm3.training.state import newest_checkpoint

pytest.importorskip("deepspeed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with prepared data and a finished run; the process group and its environment end with the module."""
    root = tmp_path_factory.mktemp("training")
    with process_group():
        train.run(tiny_run(prepare(root / "data"), root / "whole"))
        yield root


def run_from(folder, name, **changes):
    config = tiny_run(folder / "data", folder / name, **changes)
    return train.run(config)


def test_the_loss_falls(folder):
    by_step = losses(folder / "whole")
    assert list(by_step) == list(range(1, 13))
    assert by_step[12] < by_step[1] - 0.5
    assert losses(folder / "whole", "validation").keys() == {6, 12}


def test_both_modalities_are_logged(folder):
    text, image = (losses(folder / "whole", "validation", f"{kind}_perplexity")[12] for kind in ("text", "image"))
    assert 1 < text < VOCABULARY.size and 1 < image < VOCABULARY.size


def test_a_stopped_run_resumes_exactly(folder, monkeypatch, capsys):
    def stop_at_five(step, *arguments):
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return learning_rate_at(step, *arguments)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(train, "learning_rate_at", stop_at_five)
    config = tiny_run(folder / "data", folder / "stopped", checkpoint_interval=0)
    (folder / "stopped.yaml").write_text(dump_config(config, stage="model"))
    assert main(["train", str(folder / "stopped.yaml")]) == 0
    stopped_at = max(losses(folder / "stopped"))
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"stopped by SIGTERM after step {stopped_at} of 12, saved in {folder / 'stopped' / 'checkpoints'}; the same "
        "command goes on from there"
    )
    assert stopped_at in (5, 6)
    assert newest_checkpoint(folder / "stopped" / "checkpoints").name == f"step_{stopped_at:08d}"
    assert signal.getsignal(signal.SIGTERM) is before
    assert not (folder / "stopped" / "model").exists()

    monkeypatch.undo()
    with (folder / "stopped" / "metrics.jsonl").open("a") as file:  # as if it had gone on without a checkpoint
        file.write('{"split": "train", "step": 99, "loss": 0.0}\n')
    assert main(["train", str(folder / "stopped.yaml")]) == 0
    assert losses(folder / "stopped") == losses(folder / "whole")
    ours, whole = (load_tensors(folder / name / "model" / "model.safetensors") for name in ("stopped", "whole"))
    assert all(torch.equal(ours[name], whole[name]) for name in whole)


def test_old_checkpoints_are_removed_and_unfinished_ones_ignored(folder):
    checkpoints = folder / "whole" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step_00000008", "step_00000012"]
    (checkpoints / "step_00000099").mkdir()
    assert newest_checkpoint(checkpoints).name == "step_00000012"
    (checkpoints / "step_00000099").rmdir()


def test_the_model_folder_is_complete(folder):
    model_folder = folder / "whole" / "model"
    names = {"config.json", "model.safetensors", "generation_config.json", "README.md", *TOKENIZER_FILES}
    assert {path.name for path in model_folder.iterdir()} == names
    assert json.loads((model_folder / "generation_config.json").read_text())["guidance_scale"] == 2.0
    model, config = load_model(model_folder, tokenizer_hash=TOKENIZER_HASH)
    assert config == tiny_run(folder / "data", folder / "whole").model
    assert next(model.parameters()).dtype == torch.bfloat16 and not model.training
    average = load_tensors(folder / "whole" / "checkpoints" / "step_00000012" / "average.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, average[f"model.{name}"].bfloat16())
    card = (model_folder / "README.md").read_text(encoding="utf-8")
    assert "| Validation loss |" in card and "stage: model" in card and "| Steps | 12 of 4 rows" in card


def test_a_model_that_cannot_be_written_costs_only_the_writing(folder, capsys):
    changes = {"steps": 2, "evaluation_interval": 0}
    model = folder / "unwritten" / "model"
    model.parent.mkdir()
    model.write_text("in the way")
    with pytest.raises(ModelFilesError, match=r"cannot write the folder .*model \(Not a directory\); make room"):
        run_from(folder, "unwritten", **changes)
    assert model.read_text() == "in the way"
    model.unlink()
    before = {path: path.read_bytes() for path in (folder / "unwritten" / "checkpoints").rglob("*.safetensors")}
    capsys.readouterr()
    run_from(folder, "unwritten", **changes)
    assert "resumed from" in capsys.readouterr().out and load_model(model)
    assert all(path.read_bytes() == content for path, content in before.items())
    run_from(folder, "unwritten", **changes | {"steps": 3})
    assert "| Steps | 3 of 4 rows" in (model / "README.md").read_text()


def test_other_tokenizers_are_refused(folder):
    with pytest.raises(ModelFilesError, match="was trained with the tokenizers 0123456789ab, found ffff"):
        load_model(folder / "whole" / "model", tokenizer_hash="f" * 64)


def test_another_model_is_not_resumed(folder):
    model = dataclasses.replace(tiny_run(folder, folder).model, num_layers=3)
    with pytest.raises(ModelFilesError, match=r"another model: missing .*blocks\.2"):
        run_from(folder, "whole", model=model)


def test_a_model_of_another_width_is_not_resumed(folder):
    model = dataclasses.replace(tiny_run(folder, folder).model, width=64)
    with pytest.raises(ModelFilesError, match=r"another model: .* instead of \("):
        run_from(folder, "whole", model=model)


def test_long_documents_are_named_and_a_run_that_was_set_back_goes_on(folder, capsys):
    data = dataclasses.replace(tiny_run(folder / "data", folder).data, sequence_length=10)
    changes = {"data": data, "steps": 6, "checkpoint_interval": 2, "evaluation_interval": 0}
    run_from(folder, "back", **changes)
    too_long = int((ShardedDocuments(folder / "data").lengths > 10).sum())
    out = capsys.readouterr().out
    assert too_long and f"left out {too_long} of 48 documents" in out
    assert "memory: about " in out and "memory: at most " in out
    checkpoints = folder / "back" / "checkpoints"
    (checkpoints / "latest").write_text("step_00000004")
    for later in ("step_00000008", "step_00000010"):
        (checkpoints / later).mkdir()
    run_from(folder, "back", **changes)
    assert newest_checkpoint(checkpoints).name == "step_00000006"


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(folder, capsys):
    shutil.copytree(folder / "whole", folder / "damaged")
    (folder / "damaged" / "checkpoints" / "step_00000012" / "exp_avg.safetensors").write_bytes(b"half")
    run_from(folder, "damaged")
    out = capsys.readouterr().out
    assert "warning: step_00000012 cannot be used: exp_avg.safetensors is not what was written" in out
    assert f"resumed from {folder / 'damaged' / 'checkpoints' / 'step_00000008'}\n" in out
    for key in ("loss", "samples"):
        assert losses(folder / "damaged", key=key) == losses(folder / "whole", key=key)
    assert losses(folder / "damaged", "validation") == losses(folder / "whole", "validation")


def test_an_early_checkpoint_is_resumed_and_called_unverified(folder, capsys):
    shutil.copytree(folder / "whole", folder / "early")
    newest = folder / "early" / "checkpoints" / "step_00000012"
    (newest / "SHA256SUMS").unlink()
    run_from(folder, "early")
    assert f"resumed from {newest} (unverified: it has no checksums)" in capsys.readouterr().out


def test_early_warnings_are_logged(folder):
    lines = [json.loads(line) for line in (folder / "whole" / "metrics.jsonl").read_text().splitlines()]
    for line in (line for line in lines if line["split"] == "train"):
        assert line["z_loss"] > 0 and line["output_norm"] > 0 and line["loss_spike"] == 0 and line["skipped"] == 0
    first = next(line for line in lines if line["split"] == "train")
    assert first["z_loss"] == pytest.approx(math.log(VOCABULARY.size) ** 2, rel=0.1)


@pytest.fixture(scope="module")
def skipping(folder):
    """A run on data with one document of infinite weight, number 7."""
    config = tiny_run(
        mark_as_retrieved(folder / "data", folder / "bad data", 7),
        folder / "skipping",
        objective=ObjectiveConfig(retrieved_loss_weight=math.inf),
    )
    train.run(config)
    return folder / "skipping"


def test_a_bad_document_is_skipped_and_named(skipping):
    lines = [json.loads(line) for line in (skipping / "skipped.jsonl").read_text().splitlines()]
    assert 1 <= len(lines) < 6
    skipped = losses(skipping, key="skipped")
    assert [line["step"] for line in lines] == [s for s in skipped if skipped[s] > skipped.get(s - 1, 0)]
    for line in lines:
        bad, good = [], []
        for micro_batch in line["micro_batches"]:
            (good if isinstance(micro_batch["loss"], float) else bad).append(micro_batch)
        assert len(bad) == 1 and bad[0]["loss"] in ("nan", "inf") and len(good) == 1
        assert {"number": 7, "row": "7"} in bad[0]["documents"]
        assert all(document["number"] != 7 for document in good[0]["documents"])
        assert losses(skipping)[line["step"]] is None
        assert losses(skipping, key="gradient_norm")[line["step"]] is None
    rates = losses(skipping, key="learning_rate")
    assert rates == {
        step: learning_rate_at(step, 12, OptimizerConfig(learning_rate=1e-2, warmup_steps=3)) for step in rates
    }
    updates = [value for step, value in losses(skipping).items() if value is not None]
    assert updates[-1] < updates[0] - 0.5


def test_skipped_steps_survive_an_interruption(folder, skipping):
    resumed = folder / "skipping resumed"
    shutil.copytree(skipping, resumed)
    (resumed / "checkpoints" / "latest").write_text("step_00000008")
    config = tiny_run(folder / "bad data", resumed, objective=ObjectiveConfig(retrieved_loss_weight=math.inf))
    train.run(config)
    for key in ("loss", "skipped", "samples"):
        assert losses(resumed, key=key) == losses(skipping, key=key)
    assert (resumed / "skipped.jsonl").read_text() == (skipping / "skipped.jsonl").read_text()
    ours, whole = (load_tensors(each / "model" / "model.safetensors") for each in (resumed, skipping))
    assert all(torch.equal(ours[name], whole[name]) for name in whole)


def test_too_many_bad_steps_in_a_row_stop_the_run(folder):
    objective = ObjectiveConfig(sentinel_loss_weight=math.inf, min_spans=1)
    with pytest.raises(DivergedError, match=r"the last 3 steps, up to step 3, .*skipped\.jsonl names their documents"):
        run_from(folder, "diverged", objective=objective, max_nonfinite_steps=3, checkpoint_interval=1)
    assert [path.name for path in sorted((folder / "diverged" / "checkpoints").glob("step*"))] == [
        "step_00000001",
        "step_00000002",
    ]
    initial = load_tensors(folder / "diverged" / "checkpoints" / "step_00000001" / "weights.safetensors")
    later = load_tensors(folder / "diverged" / "checkpoints" / "step_00000002" / "weights.safetensors")
    assert all(torch.equal(initial[name], later[name]) for name in initial)
    assert len((folder / "diverged" / "skipped.jsonl").read_text().splitlines()) == 3


def test_accumulation_equals_one_large_batch(folder):
    plain = {"precision": "fp32", "ema_decay": 0.0, "steps": 4, "checkpoint_interval": 0, "evaluation_interval": 0}
    model = dataclasses.replace(tiny_run(folder, folder).model, dropout=0.0)
    run_from(folder, "one", model=model, micro_batch_rows=4, **plain)
    run_from(folder, "four", model=model, micro_batch_rows=1, **plain)
    for key in ("loss", "gradient_norm"):
        one, four = (losses(folder / name, key=key) for name in ("one", "four"))
        assert one == pytest.approx(four, rel=1e-4)


def test_wrong_vocabulary_and_uneven_batches_are_named(folder):
    model = dataclasses.replace(tiny_run(folder, folder).model, vocabulary_size=7)
    with pytest.raises(ConfigError, match=f"set model.vocabulary_size={VOCABULARY.size}"):
        run_from(folder, "wrong", model=model)
    with pytest.raises(ConfigError, match="batch_rows=4 is no multiple of micro_batch_rows=3"):
        run_from(folder, "wrong", micro_batch_rows=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zero_stage": 0}, "DeepSpeed trains bf16 wrongly at stage 0"),
        ({"zero_stage": 4}, "zero_stage=4; choose 0, 1, 2 or 3"),
        ({"zero_stage": 0, "precision": "fp32", "offload_optimizer": True}, "choose zero_stage 1, 2 or 3"),
        ({"keep_every_steps": -1}, "keep_every_steps=-1; choose 0"),
        ({"max_nonfinite_steps": 0}, "max_nonfinite_steps=0; choose 1 or more"),
        ({"ema_decay": 0.9, "zero_stage": 3}, "ema_decay needs whole weights"),
        ({"ema_decay": 1.0}, "ema_decay=1.0"),
        ({"steps": 0}, "steps=0; choose 1 or more"),
        ({"seed": -1}, "seed=-1; choose 0 to 2147483647"),
        ({"seed": 1 << 31}, "seed=2147483648; choose 0 to 2147483647"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny_run(tmp_path, tmp_path, **changes)


def test_learning_rate_warms_up_and_decays():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=10, final_fraction=0.1)
    rates = [learning_rate_at(step, 110, config) for step in (1, 5, 10, 60, 110)]
    assert rates == pytest.approx([0.1, 0.5, 1.0, 0.55, 0.1])
    assert learning_rate_at(1, 10, OptimizerConfig(warmup_steps=0)) < OptimizerConfig().learning_rate


def test_gains_and_biases_do_not_decay():
    config = ModelConfig(vocabulary_size=8, width=8, num_layers=1, num_heads=2, norm="rmsnorm", qk_norm=True)
    decayed, free = make_optimizer(Transformer(config), OptimizerConfig()).param_groups
    assert decayed["weight_decay"] == 0.1 and all(p.ndim == 2 for p in decayed["params"])
    assert free["weight_decay"] == 0.0 and all(p.ndim == 1 for p in free["params"]) and free["params"]


def test_without_deepspeed_the_error_names_it(monkeypatch):
    monkeypatch.setitem(engine.sys.modules, "deepspeed", None)
    with pytest.raises(engine.MissingDependencyError, match="training needs deepspeed"):
        engine.start_distributed()
