"""Trackers: the numbers and sheets that TensorBoard and Weights & Biases are given."""

import json
import math
import sys

import numpy as np
import pytest
from PIL import Image as PILImage
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import tiny_run

from cm3.errors import MissingDependencyError
from cm3.training import train
from cm3.training.metrics import MetricsWriter
from cm3.training.trackers import open_trackers

EVALUATION = {"loss": 2.0, "bits": 2.9, "text_loss": 1.0, "text_perplexity": 2.7, "image_loss": math.nan} | {
    "image_perplexity": math.nan
}
SHEET = PILImage.new("RGB", (6, 4), (200, 10, 30))


class Recorder:
    """What is called of the module wandb and of its run."""

    def __init__(self):
        self.settings, self.lines, self.finished = [], [], 0

    def init(self, **settings):
        self.settings.append(settings)
        return self

    def Image(self, image, caption):
        return image.size, caption

    def define_metric(self, name, step_metric):
        self.metric = name, step_metric

    def log(self, values):
        self.lines.append(values)

    def finish(self):
        self.finished += 1


def report(folder, trackers):
    writer = MetricsWriter(folder, 10, 0, trackers)
    writer.validation(3, EVALUATION)
    writer.samples(3, SHEET, ["a: b", "c: d"])
    writer.close()


def test_tensorboard_gets_numbers_and_sheets(tmp_path):
    report(tmp_path, open_trackers(tmp_path, None, {}))
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("validation/loss")] == [(3, 2.0)]
    assert math.isnan(board.Scalars("validation/image_loss")[0].value)
    (image,) = board.Images("samples")
    assert (image.step, image.width, image.height) == (3, 6, 4)
    assert board.Tensors("captions/text_summary")[0].tensor_proto.string_val[0] == b"a: b  \nc: d"


def test_weights_and_biases_gets_the_same_and_knows_the_run_again(tmp_path, monkeypatch):
    wandb = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run = tmp_path / "my run"
    for _ in range(2):
        report(run, open_trackers(run, "pictures", {"steps": 10}))
    first, second = wandb.settings
    assert first == second and len(first.pop("id")) == 8
    assert first == {
        "project": "pictures",
        "name": "my run",
        "resume": "allow",
        "dir": str(run),
        "config": {"steps": 10},
    }
    assert wandb.metric == ("*", "step") and wandb.finished == 2
    numbers, sheet = wandb.lines[:2]
    assert numbers["step"] == 3 and numbers["validation/loss"] == 2.0 and np.isnan(numbers["validation/image_loss"])
    assert sheet == {"step": 3, "samples": ((6, 4), "a: b\nc: d")}
    (line,) = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    assert line["loss"] == 2.0 and line["image_loss"] is None


def test_without_wandb_a_run_that_asks_for_it_ends_before_it_begins(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(train, "start_distributed", lambda: None)
    with pytest.raises(
        MissingDependencyError, match=r"wandb_project needs wandb, .* `pip install 'open-cm3\[wandb\]'`"
    ):
        train.run(tiny_run(tmp_path / "data", tmp_path / "run", wandb_project="pictures"))
    assert not (tmp_path / "run").exists()


def test_without_tensorboard_a_run_says_where_its_numbers_are(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert open_trackers(tmp_path, None, {}) == []
    assert f"metrics go to the console and {tmp_path / 'metrics.jsonl'} only" in capsys.readouterr().out
