"""Sample sheets: what the weights of a step draw and write, without any trace in the training."""

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from process_group import process_group
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import losses
from tiny_scenes import prepare_scenes, scenes_run

from cm3.checkpoint import load_tensors
from cm3.data.scenes import example
from cm3.data.shards import ShardedDocuments
from cm3.errors import ModelFilesError
from cm3.gallery import contact_sheet
from cm3.model.lora import LoRAConfig
from cm3.pipeline import CM3
from cm3.training import samples, train
from cm3.training.config import DataConfig
from cm3.training.export import export_checkpoint
from cm3.training.samples import HELD_OUT, PICTURES_PER_PROMPT

pytest.importorskip("deepspeed")

PROMPTS = ("a red circle", "two stars")


@pytest.fixture(scope="module")
def folder(model_folder, tmp_path_factory):
    """Prepared scenes; the process group ends with the module."""
    root = tmp_path_factory.mktemp("samples")
    prepare_scenes(root / "data", model_folder)
    with process_group():
        yield root


def settings(folder, name, **changes):
    return scenes_run(folder / "data", folder / name, **changes)


@pytest.fixture(scope="module")
def state_without(folder):
    """The random state after a run without sheets, which stands in the folder `without`."""
    train.run(settings(folder, "without"))
    return torch.random.get_rng_state()


def pixels(path):
    with PILImage.open(path) as image:
        return np.asarray(image.convert("RGB"))


def expected_sheet(run, prompts):
    """The sheet of a run's last step, from its model folder through the public interface."""
    model = CM3.from_pretrained(run / "model")
    rows = []
    for prompt in prompts:
        images = model.generate(prompt, num_images=PICTURES_PER_PROMPT)
        rows.append((f"drawn: {prompt}", images, model.caption(images)))
    documents = ShardedDocuments(run.parent / "data")
    pictures = [documents[number].segments[1].codes_HW.ravel() for number in (0, 3, 4, 5)]  # a caption comes once
    held_out = model.tokenizer.image.decode(np.stack(pictures))
    rows.append(("held out, and described", held_out, model.caption(held_out)))
    return np.asarray(contact_sheet(rows))


def test_sheets_show_what_the_exported_model_makes_and_leave_the_training_alone(folder, state_without):
    train.run(settings(folder, "with", sample_interval=1, sample_prompts=PROMPTS))
    assert torch.equal(torch.random.get_rng_state(), state_without)

    assert losses(folder / "with") == losses(folder / "without")
    for name in ("weights", "exp_avg", "exp_avg_sq", "average"):
        path = f"checkpoints/step_00000002/{name}.safetensors"
        ours, plain = (load_tensors(folder / run / path) for run in ("with", "without"))
        assert ours.keys() == plain.keys() and all(torch.equal(ours[key], plain[key]) for key in plain)

    assert not (folder / "without" / "samples").exists()
    sheets = sorted((folder / "with" / "samples").iterdir())
    assert [path.name for path in sheets] == ["step_00000001.png", "step_00000002.png"]
    assert np.array_equal(pixels(sheets[1]), expected_sheet(folder / "with", PROMPTS))

    board = EventAccumulator(str(folder / "with" / "tensorboard")).Reload()
    assert [event.step for event in board.Images("samples")] == [1, 2]
    assert board.Images("samples")[0].width == pixels(sheets[0]).shape[1]
    lines = board.Tensors("captions/text_summary")[0].tensor_proto.string_val[0].decode().splitlines()
    assert len(lines) == len(PROMPTS) * PICTURES_PER_PROMPT + HELD_OUT
    assert lines[0].startswith("drawn: a red circle: ") and lines[-1].startswith("held out, and described: ")


@pytest.mark.parametrize("stage", [2, 3])
def test_sheets_at_other_stages_draw_the_captions_of_the_validation_data(folder, stage):
    name = f"stage {stage}"
    train.run(settings(folder, name, zero_stage=stage, ema_decay=0.0, sample_interval=5))
    (sheet,) = (folder / name / "samples").iterdir()
    captions = [example(0, "train", index).caption for index in range(HELD_OUT)]
    assert sheet.name == "step_00000002.png"
    assert np.array_equal(pixels(sheet), expected_sheet(folder / name, captions))


def test_sheets_of_adapters_are_drawn_by_the_model_they_are_merged_into(folder, state_without):
    pytest.importorskip("peft")
    changes = {"initialize_from": str(folder / "without" / "model"), "lora": LoRAConfig(rank=2)}
    train.run(settings(folder, "adapted", sample_interval=2, sample_prompts=PROMPTS, **changes))
    export_checkpoint(folder / "adapted", folder / "adapted" / "model")
    sheet = pixels(folder / "adapted" / "samples" / "step_00000002.png")
    assert np.array_equal(sheet, expected_sheet(folder / "adapted", PROMPTS))


def test_a_sheet_that_cannot_be_written_does_not_end_the_run(folder, monkeypatch, capsys):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(samples, "save_image", full)
    assert train.run(settings(folder, "full", sample_interval=5, sample_prompts=PROMPTS)) is not None
    assert "warning: no samples of step 2: [Errno 28] No space left on device" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_prompts": ("a circle", " ")}, "sample_prompts has an empty text"),
        ({"sample_prompts": ("short", "far too long " * 60)}, "cannot be served: request 1 has .* 96 positions"),
        ({"data": None}, "finds nothing to draw: data.validation=None has no caption .* give sample_prompts"),
    ],
)
def test_what_cannot_be_drawn_is_named_before_the_training(folder, changes, message):
    if "data" in changes:
        changes = {"data": DataConfig(train=str(folder / "data"), sequence_length=96)}
    with pytest.raises(ModelFilesError, match=message):
        train.run(settings(folder, "refused", sample_interval=1, **changes))
