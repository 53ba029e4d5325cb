"""Training of the image tokenizer: codebook, losses, data, and tiny runs."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cm3.config import load_config
from cm3.data.sources import SourceConfig
from cm3.errors import ConfigError, DataError, ModelFilesError
from cm3.tokenizers.image import ImageTokenizer
from cm3.tokenizers.quantizer import VectorQuantizer
from cm3.tokenizers.vqgan import VQGANConfig
from cm3.training import image_tokenizer
from cm3.training.codebook import CodebookLearner, CodebookUsage
from cm3.training.discriminator import (
    AdversarialConfig,
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)
from cm3.training.image_tokenizer_config import ImageTokenizerRun
from cm3.training.perceptual import LPIPS
from cm3.training.pixels import ArrayPixels, open_pixels, training_pixels

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*/image_tokenizer.yaml"))


def tiny_run(output, **changes):
    settings = {
        "data": SourceConfig(kind="scenes", limit=24, text_columns=()),
        "validation": SourceConfig(kind="scenes", split="validation", limit=6, text_columns=()),
        "vqgan": VQGANConfig(
            image_size=32,
            base_channels=16,
            channel_multipliers=(1, 2),
            num_residual_blocks=1,
            num_codes=32,
            code_width=4,
        ),
        "steps": 12,
        "batch_size": 4,
        "warmup_steps": 2,
        "quantize_from_step": 3,
        "revive_after_steps": 4,
        "log_interval": 4,
        "evaluation_interval": 6,
        "checkpoint_interval": 0,
        "precision": "fp32",
        "export_precision": "fp32",
        "output": str(output),
    }
    return ImageTokenizerRun(**{**settings, **changes})


def read_metrics(output):
    return [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]


def test_run_writes_a_tokenizer_that_learned(tmp_path, capsys):
    config = tiny_run(tmp_path, steps=32, evaluation_interval=16)
    folder = image_tokenizer.run(config)
    printed = capsys.readouterr().out
    assert "without the perceptual loss" in printed and "eta" in printed and "validation psnr" in printed
    metrics = read_metrics(tmp_path)
    train = [row for row in metrics if row["split"] == "train"]
    assert [row["step"] for row in train] == list(range(4, 33, 4))
    assert train[-1]["l1"] < 0.9 * train[0]["l1"]
    assert 0 < train[-1]["used_codes"] <= 32 and 1 <= train[-1]["perplexity"] <= 32
    psnr = [row["psnr"] for row in metrics if row["split"] == "validation"]
    assert len(psnr) == 2 and psnr[1] > psnr[0]
    grid = Image.open(tmp_path / "samples" / "step_0000032.png")
    assert grid.size == (6 * 32, 2 * 32)
    tokenizer = ImageTokenizer.load(folder)
    assert tokenizer.grid == (4, 4) and tokenizer.encode([Image.new("RGB", (64, 64))]).shape == (1, 16)
    assert load_config(ImageTokenizerRun, tmp_path / "config.yaml") == config


def test_stopped_and_resumed_equals_uninterrupted(tmp_path, monkeypatch, capsys):
    adversarial = AdversarialConfig(start_step=5, base_channels=8, num_layers=1)
    whole = tiny_run(tmp_path / "whole", adversarial=adversarial)
    expected = ImageTokenizer.load(image_tokenizer.run(whole)).hash

    train_step = image_tokenizer.train_step

    def stop_in_seventh(state, *rest):
        if state.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(state, *rest)

    part = replace(whole, output=str(tmp_path / "part"))
    monkeypatch.setattr(image_tokenizer, "train_step", stop_in_seventh)
    assert image_tokenizer.run(part) is None
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"stopped by SIGTERM after step 7 of 12, saved in {tmp_path / 'part' / 'checkpoint.safetensors'}; the same "
        "command goes on from there"
    )
    monkeypatch.setattr(image_tokenizer, "train_step", train_step)
    assert ImageTokenizer.load(image_tokenizer.run(part)).hash == expected
    assert not (tmp_path / "part" / "tokenizer" / "checkpoint.safetensors").exists()


def test_frozen_codes_stay_while_the_decoder_learns(tmp_path):
    config = tiny_run(tmp_path, steps=6, validation=None)
    before = ImageTokenizer.load(image_tokenizer.run(config))
    more = replace(config, steps=12, freeze_codes_from_step=6)
    after = ImageTokenizer.load(image_tokenizer.run(more))
    old, new = before.model.state_dict(), after.model.state_dict()
    changed = {name.partition(".")[0] for name in old if not torch.equal(old[name], new[name])}
    assert changed == {"decoder"}


def test_checkpoint_of_another_network_is_refused(tmp_path):
    config = tiny_run(tmp_path, steps=4, validation=None)
    image_tokenizer.run(config)
    with pytest.raises(ModelFilesError, match="wrongly shaped"):
        image_tokenizer.run(replace(config, vqgan=replace(config.vqgan, code_width=8)))


def test_bf16_and_perceptual_loss_run(tmp_path, capsys):
    torch.save(lpips_state(), tmp_path / "lpips_vgg.pth")
    config = tiny_run(
        tmp_path / "run",
        steps=2,
        batch_size=1,
        quantize_from_step=1,
        precision="bf16",
        export_precision="bf16",
        validation=None,
        log_interval=1,
        perceptual_weights=str(tmp_path / "lpips_vgg.pth"),
    )
    image_tokenizer.run(config)
    assert "perceptual loss (LPIPS) with the weights" in capsys.readouterr().out
    assert read_metrics(tmp_path / "run")[-1]["perceptual"] > 0


def test_learning_rate_warms_up_and_decays_to_zero(tmp_path):
    config = tiny_run(tmp_path, steps=100, warmup_steps=10, learning_rate=1.0)
    rates = [image_tokenizer.learning_rate_at(step, config) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[9] and rates[100] == pytest.approx(0)


def test_k_means_finds_clusters():
    centres_QE = torch.tensor([[4.0, 0.0], [-4.0, 0.0], [0.0, 4.0]])
    latents_NE = (centres_QE[:, None] + 0.1 * torch.randn(3, 50, 2)).flatten(0, 1)
    learner = CodebookLearner(VectorQuantizer(12, 2, False), decay=0.9, revive_after_steps=0, seed=0)
    learner.initialize(latents_NE)
    distances = torch.cdist(learner.quantizer.codebook_QE, centres_QE)
    assert distances.min(0).values.max() < 0.2 and distances.min(1).values.max() < 0.4


def test_codes_follow_the_mean_of_their_latents():
    quantizer = VectorQuantizer(4, 2, False)
    learner = CodebookLearner(quantizer, decay=0.5, revive_after_steps=0, seed=0)
    before_QE = quantizer.codebook_QE.clone()
    target_NE = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    for _ in range(40):
        learner.update(target_NE, torch.tensor([[2, 2]]))
    torch.testing.assert_close(quantizer.codebook_QE[2], target_NE.mean(0))
    torch.testing.assert_close(quantizer.codebook_QE[0], before_QE[0])  # unused: stays where it was


def test_dead_codes_are_revived():
    quantizer = VectorQuantizer(8, 2, False)
    learner = CodebookLearner(quantizer, decay=0.9, revive_after_steps=3, seed=0)
    latents_NE = torch.randn(32, 2) + 50
    codes_BP = torch.zeros(1, 32, dtype=torch.int64)
    for _ in range(2):
        learner.update(latents_NE, codes_BP)
    assert learner.interval_revived == 0
    learner.update(latents_NE, codes_BP)
    report = learner.report()
    assert report["revived_codes"] == 7 and report["used_codes"] == 1 and report["perplexity"] == pytest.approx(1)
    revived_QE = quantizer.codebook_QE[1:]
    assert (torch.cdist(revived_QE, latents_NE).min(1).values < 1e-4).all()
    assert learner.report()["revived_codes"] == 0


def test_usage_counts_codes_and_their_entropy():
    usage = CodebookUsage.of_counts(torch.tensor([5, 5, 0, 0]))
    assert usage.used_codes == 2 and usage.perplexity == pytest.approx(2)
    assert CodebookUsage.of_counts(torch.zeros(4, dtype=torch.int64)).used_codes == 0


def test_hinge_losses():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert float(discriminator_loss(real, fake)) == pytest.approx(0.5 * (0.25 + 0.5))
    assert float(generator_loss(fake)) == pytest.approx(1.5)


def test_adaptive_weight_balances_the_gradients():
    weight = torch.nn.Parameter(torch.randn(4))
    ratio = adaptive_weight((3 * weight).sum(), (-0.5 * weight).sum(), weight)
    assert float(ratio) == pytest.approx(6, rel=1e-4) and not ratio.requires_grad
    assert float(adaptive_weight(weight.sum(), 0 * weight.sum(), weight)) == 1e4


@pytest.mark.parametrize(("num_layers", "patch"), [(1, 16), (2, 34), (3, 70)])
def test_discriminator_sees_patches(num_layers, patch):
    discriminator = PatchDiscriminator(8, num_layers)
    for module in discriminator.modules():  # normalisation would mix the whole picture
        if isinstance(module, torch.nn.GroupNorm):
            module.forward = lambda x: x
    image_BCHW = torch.randn(1, 3, 96, 96, requires_grad=True)
    logits = discriminator(image_BCHW)
    middle = logits.shape[-1] // 2
    (gradient,) = torch.autograd.grad(logits[0, 0, middle, middle], image_BCHW)
    rows = gradient[0].abs().sum((0, 2)).nonzero()
    assert int(rows.max() - rows.min()) + 1 == patch


def lpips_state():
    """A random state with the names of the `lpips` package."""
    state = {"scaling_layer.shift": torch.zeros(1, 3, 1, 1)}
    indices = iter([(1, 0), (1, 2), (2, 5), (2, 7), (3, 10), (3, 12), (3, 14), (4, 17), (4, 19), (4, 21)])
    indices = [*indices, (5, 24), (5, 26), (5, 28)]
    widths = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    for (level, index), width_in, width in zip(indices, widths, widths[1:]):
        state[f"net.slice{level}.{index}.weight"] = torch.full((width, width_in, 3, 3), 0.1 / width_in)
        state[f"net.slice{level}.{index}.bias"] = 0.1 * torch.rand(width)
    for level, width in enumerate([64, 128, 256, 512, 512]):
        state[f"lin{level}.model.1.weight"] = torch.rand(1, width, 1, 1)
    return state


def test_lpips_reads_the_package_and_measures(tmp_path):
    state = lpips_state()
    torch.save(state, tmp_path / "lpips.pth")
    lpips = LPIPS.load(tmp_path / "lpips.pth")
    first_BCHW, second_BCHW = torch.rand(2, 1, 3, 32, 32).unbind()
    assert float(lpips(first_BCHW, first_BCHW)) == 0 and float(lpips(first_BCHW, second_BCHW)) > 0
    del state["net.slice3.12.bias"]
    torch.save(state, tmp_path / "lpips.pth")
    with pytest.raises(ModelFilesError, match=r"missing: slices\.2\.12\.bias"):
        LPIPS.load(tmp_path / "lpips.pth")
    (tmp_path / "lpips.pth").write_bytes(b"nothing")
    with pytest.raises(ModelFilesError, match="not a file of tensors"):
        LPIPS.load(tmp_path / "lpips.pth")
    with pytest.raises(ModelFilesError, match="cannot read"):
        LPIPS.load(tmp_path / "missing.pth")


def picture_folder(folder, count):
    for index in range(count):
        Image.new("RGB", (12, 8), (10 * index, 0, 0)).save(folder / f"{index}.png")
    return SourceConfig(kind="folder", path=str(folder), text_columns=(), max_bad_fraction=0.5)


def test_pictures_in_memory_and_read_as_needed_agree(tmp_path, capsys):
    source = picture_folder(tmp_path, 6)
    (tmp_path / "2.png").write_bytes(b"broken")
    held, read = open_pixels([source], 8, max_in_memory=6), open_pixels([source], 8, max_in_memory=5)
    printed = capsys.readouterr().out
    assert "skipped 1 rows" in printed and "read as needed" in printed
    assert (len(held), len(read)) == (5, 6)
    assert read.pixels(np.array([0, 2, 5]))[:, 0, 0, 0].tolist() == [0, 30, 50]  # the broken one gave way
    assert held.pixels(np.array([0, 2, 4]))[:, 0, 0, 0].tolist() == [0, 30, 50]


def test_too_many_broken_pictures_stop_the_run(tmp_path):
    source = replace(picture_folder(tmp_path, 3), max_bad_fraction=0.0)
    (tmp_path / "1.png").write_bytes(b"broken")
    with pytest.raises(DataError, match="max_bad_fraction"):
        open_pixels([source], 8, max_in_memory=10)


@pytest.mark.parametrize("max_in_memory", [6, 5])
def test_several_sources_are_one(max_in_memory, tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    first, second = picture_folder(tmp_path / "first", 2), picture_folder(tmp_path / "second", 4)
    joined = open_pixels([first, second], 8, max_in_memory)
    assert len(joined) == 6
    assert joined.pixels(np.arange(6))[:, 0, 0, 0].tolist() == [0, 10, 0, 10, 20, 30]


def test_batches_depend_on_seed_and_step_only():
    source = ArrayPixels(np.arange(50 * 4 * 4 * 3, dtype=np.uint16).astype(np.uint8).reshape(50, 4, 4, 3))
    first = training_pixels(source, 8, seed=1, step=3, flip=False)
    assert np.array_equal(first, training_pixels(source, 8, seed=1, step=3, flip=False))
    assert not np.array_equal(first, training_pixels(source, 8, seed=1, step=4, flip=False))
    flipped = training_pixels(source, 8, seed=1, step=3, flip=True)
    mirrored = [not np.array_equal(a, b) for a, b in zip(first, flipped)]
    assert 0 < sum(mirrored) < 8
    assert all(np.array_equal(a[:, ::-1] if m else a, b) for a, b, m in zip(first, flipped, mirrored))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"seed": -1}, "seed=-1; choose 0 to"),
        ({"quantize_from_step": 12}, "not before the end"),
        ({"revive_after_steps": -1}, "revive_after_steps=-1"),
        ({"freeze_codes_from_step": 3}, "must come after"),
        ({"min_code_distance": -0.1}, r"min_code_distance=-0.1; choose 0 \(off\) to below 1"),
        ({"min_code_distance": 1.0}, "min_code_distance=1.0"),
    ],
)
def test_impossible_settings_are_refused(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        tiny_run(tmp_path, **change)
    with pytest.raises(ConfigError, match="start_step=-1"):
        AdversarialConfig(start_step=-1)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.parent.name)
def test_shipped_configs_load(path):
    overrides = [] if path.parent.name == "demo" else ["--data.path", "x", "--validation.path", "x"]
    config = load_config(ImageTokenizerRun, path, overrides)
    assert config.vqgan.image_size == (128 if path.parent.name == "nlvr" else 64)
