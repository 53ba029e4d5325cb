"""LlamaGen's image tokenizers: files in the real format, against their forward pass in plain functions."""

import argparse

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from full_disk import FOUND, full_disk
from hypothesis import given
from hypothesis import strategies as st

from cm3.checkpoint import save_tensors
from cm3.cli import main
from cm3.errors import ConfigError, ModelFilesError, RequestError
from cm3.interop.vqgan import import_vqgan
from cm3.tokenizers.image import ImageTokenizer, pixels_to_model
from cm3.tokenizers.quantizer import VectorQuantizer
from cm3.tokenizers.taming import TamingConfig, TamingVQGAN

SIDE, CODES, CODE_WIDTH, LATENT, BASE = 16, 24, 8, 20, 32
SHAPES = {"three levels": (1, 2, 2), "two levels": (1, 3)}


def tensors_of(multipliers, blocks=2, seed=0):
    """Random weights under LlamaGen's names; the codebook's vectors are of all lengths."""
    generator = torch.Generator().manual_seed(seed)
    made, last = {}, len(multipliers) - 1

    def random(*shape):
        return torch.randn(shape, generator=generator)

    def conv(name, channels_in, channels, side):
        made[f"{name}.weight"] = random(channels, channels_in, side, side) / (channels_in * side**2) ** 0.5
        made[f"{name}.bias"] = 0.2 * random(channels)

    def norm(name, channels):
        made[f"{name}.weight"], made[f"{name}.bias"] = 1 + 0.3 * random(channels), 0.3 * random(channels)

    def residual(name, channels_in, channels):
        norm(f"{name}.norm1", channels_in)
        conv(f"{name}.conv1", channels_in, channels, 3)
        norm(f"{name}.norm2", channels)
        conv(f"{name}.conv2", channels, channels, 3)
        if channels_in != channels:
            conv(f"{name}.nin_shortcut", channels_in, channels, 1)

    def attention(name, channels):
        norm(f"{name}.norm", channels)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", channels, channels, 1)

    def side(name, order, channels, count, change):
        for index, level in enumerate(order):
            for block in range(count):
                residual(f"{name}.conv_blocks.{index}.res.{block}", channels, BASE * multipliers[level])
                channels = BASE * multipliers[level]
                if level == last:
                    attention(f"{name}.conv_blocks.{index}.attn.{block}", channels)
            if index < last:
                conv(f"{name}.conv_blocks.{index}.{change}.conv", channels, channels, 3)
        return channels

    def middle(name, channels):
        residual(f"{name}.mid.0", channels, channels)
        attention(f"{name}.mid.1", channels)
        residual(f"{name}.mid.2", channels, channels)

    top = BASE * multipliers[-1]
    conv("encoder.conv_in", 3, BASE, 3)
    side("encoder", range(last + 1), BASE, blocks, "downsample")
    middle("encoder", top)
    norm("encoder.norm_out", top)
    conv("encoder.conv_out", top, LATENT, 3)
    conv("decoder.conv_in", LATENT, top, 3)
    middle("decoder", top)
    channels = side("decoder", range(last, -1, -1), top, blocks + 1, "upsample")
    norm("decoder.norm_out", channels)
    conv("decoder.conv_out", channels, 3, 3)
    conv("quant_conv", LATENT, CODE_WIDTH, 1)
    conv("post_quant_conv", CODE_WIDTH, LATENT, 1)
    made["quantize.embedding.weight"] = random(CODES, CODE_WIDTH) * (
        0.1 + 5 * torch.rand(CODES, 1, generator=generator)
    )
    made["quantize.codebook_used"] = torch.zeros(64)
    return made


class Reference:
    """LlamaGen's forward pass in inference, on tensors by name."""

    def __init__(self, tensors):
        self.tensors = tensors
        codebook = tensors["quantize.embedding.weight"]
        self.codebook = codebook / codebook.norm(dim=1, keepdim=True)

    def conv(self, name, x, **options):
        return F.conv2d(x, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"], **options)

    def norm(self, name, x):
        return F.group_norm(x, 32, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"], eps=1e-6)

    def block(self, name, x):
        """A residual block, or attention, as the names say."""
        if f"{name}.q.weight" in self.tensors:
            normal = self.norm(f"{name}.norm", x)
            q, k, v = (self.conv(f"{name}.{part}", normal).flatten(2) for part in "qkv")
            weights = torch.softmax(q.mT @ k / x.shape[1] ** 0.5, dim=-1)
            return x + self.conv(f"{name}.proj_out", (v @ weights.mT).view_as(x))
        hidden = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)), padding=1)
        hidden = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", hidden)), padding=1)
        return hidden + (self.conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in self.tensors else x)

    def has(self, prefix):
        return any(name.startswith(f"{prefix}.") for name in self.tensors)

    def side(self, name, x):
        """All levels of the encoder or the decoder."""
        level = 0
        while self.has(prefix := f"{name}.conv_blocks.{level}"):
            index = 0
            while self.has(f"{prefix}.res.{index}"):
                x = self.block(f"{prefix}.res.{index}", x)
                if self.has(f"{prefix}.attn.{index}"):
                    x = self.block(f"{prefix}.attn.{index}", x)
                index += 1
            if self.has(f"{prefix}.downsample"):
                x = self.conv(f"{prefix}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
            if self.has(f"{prefix}.upsample"):
                x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
                x = self.conv(f"{prefix}.upsample.conv", x, padding=1)
            level += 1
        return x

    def middle(self, name, x):
        for index in range(3):
            x = self.block(f"{name}.mid.{index}", x)
        return x

    def out(self, name, x):
        return self.conv(f"{name}.conv_out", F.silu(self.norm(f"{name}.norm_out", x)), padding=1)

    def encode(self, image):
        x = self.middle("encoder", self.side("encoder", self.conv("encoder.conv_in", image, padding=1)))
        latents = self.conv("quant_conv", self.out("encoder", x)).flatten(2).mT
        latents = latents / latents.norm(dim=-1, keepdim=True)
        return (latents[:, :, None] - self.codebook).square().sum(-1).argmin(-1)

    def decode(self, codes, grid):
        vectors = self.codebook[codes].mT.unflatten(2, grid)
        x = self.conv("decoder.conv_in", self.conv("post_quant_conv", vectors), padding=1)
        return self.out("decoder", self.side("decoder", self.middle("decoder", x)))


def save(tensors, path, entry="model"):
    """A checkpoint as its trainer writes it, with the command line and the state of the optimiser."""
    args = argparse.Namespace(vq_model="VQ-16", codebook_size=CODES)
    torch.save({entry: tensors, "optimizer": {"state": {}, "param_groups": []}, "steps": 3, "args": args}, path)
    return path


def some_pixels():
    return np.random.default_rng(0).integers(0, 256, (4, SIDE, SIDE, 3), dtype=np.uint8)


@torch.no_grad()
@pytest.mark.parametrize("multipliers", SHAPES.values(), ids=SHAPES)
def test_codes_and_pictures_are_those_of_the_forward_pass(multipliers, tmp_path):
    tensors = tensors_of(multipliers)
    reference = Reference(tensors)
    config = import_vqgan(save(tensors, tmp_path / "vq.pt"), tmp_path / "ours", image_size=SIDE)
    assert config == TamingConfig(
        image_size=SIDE,
        base_channels=BASE,
        channel_multipliers=multipliers,
        num_residual_blocks=2,
        attention_levels=(len(multipliers) - 1,),
        latent_width=LATENT,
        num_codes=CODES,
        code_width=CODE_WIDTH,
    )
    tokenizer = ImageTokenizer.load(tmp_path / "ours")
    codes = tokenizer.encode(some_pixels()).astype(np.int64)
    assert codes.tolist() == reference.encode(pixels_to_model(torch.from_numpy(some_pixels()))).tolist()
    assert len(np.unique(codes)) > CODES / 3
    decoded = reference.decode(torch.from_numpy(codes), config.grid)
    assert decoded.std() > 0.2
    ours = tokenizer.model.decode(torch.from_numpy(codes), config.grid)
    torch.testing.assert_close(ours, decoded.clamp(-1, 1), atol=1e-5, rtol=0)


@given(st.integers(0, 2**31 - 1), st.floats(1e-3, 1e3))
def test_the_nearest_of_codes_of_one_length_is_that_of_the_largest_cosine(seed, length):
    generator = torch.Generator().manual_seed(seed)
    quantizer = VectorQuantizer(64, 8, normalize=False)
    quantizer.codebook_QE = F.normalize(torch.randn(64, 8, generator=generator), dim=-1)
    latents = length * torch.randn(32, 8, generator=generator)
    cosines = F.normalize(latents, dim=-1) @ quantizer.codebook_QE.T
    found = cosines.gather(1, quantizer.nearest(latents)[:, None])[:, 0]
    torch.testing.assert_close(found, cosines.max(dim=1).values, atol=2e-4, rtol=0)  # short latents: near-ties


def test_the_average_of_the_weights_is_preferred_and_safetensors_are_read(tmp_path):
    tensors, others = tensors_of((1, 2)), tensors_of((1, 2), seed=1)
    torch.save({"model": others, "ema": tensors}, tmp_path / "both.pt")
    save_tensors(tmp_path / "model.safetensors", tensors)
    for name in ("both.pt", "model.safetensors"):
        import_vqgan(tmp_path / name, tmp_path / name.split(".")[0], image_size=SIDE)
    first, second = ImageTokenizer.load(tmp_path / "both"), ImageTokenizer.load(tmp_path / "model")
    assert first.hash == second.hash
    torch.testing.assert_close(first.model.quantizer.codebook_QE.norm(dim=1), torch.ones(CODES))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("decoder.mid.1.q.bias"), r"missing: decoder.mid.attn_1.q.bias\."),
        (lambda t: t.update(extra=torch.zeros(1)), r"unexpected: extra\."),
        (lambda t: t.pop("decoder.conv_blocks.0.attn.2.k.weight"), "missing: decoder.up.1.attn.2.k.weight"),
        (
            lambda t: t.update({"decoder.conv_out.bias": torch.zeros(4)}),
            r"wrongly shaped: decoder.conv_out.bias \(4,\) instead of \(3,\)",
        ),
        (lambda t: t.pop("quant_conv.weight"), "names of LlamaGen's image tokenizers but no quant_conv.weight"),
    ],
)
def test_every_tensor_is_accounted_for(tmp_path, change, message):
    tensors = tensors_of((1, 2))
    change(tensors)
    with pytest.raises(ModelFilesError, match=message):
        import_vqgan(save(tensors, tmp_path / "vq.pt"), tmp_path / "ours", image_size=SIDE)
    assert not (tmp_path / "ours").exists()


def test_sizes_and_settings(tmp_path, capsys):
    path = save(tensors_of((1, 2)), tmp_path / "vq.pt")
    assert main(["import", "vqgan", str(path), str(tmp_path / "ours")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'ours'}: pictures of 256x256 pixels, 128x128 codes of 24\n"
    assert main(["import", "vqgan", str(path), str(tmp_path / "ours"), "--image-size", "64"]) == 2
    assert "is not empty; choose a folder that does not exist yet" in capsys.readouterr().err
    assert main(["import", "vqgan", str(path), str(tmp_path / "small"), "--image-size", "64"]) == 0
    assert "pictures of 64x64 pixels, 32x32 codes" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"cannot be an image tokenizer of 17 pixels: .* not a multiple of 2"):
        import_vqgan(path, tmp_path / "other", image_size=17)
    with pytest.raises(RequestError, match="whose shape its tensors tell; leave out --config"):
        import_vqgan(path, tmp_path / "other", tmp_path / "model.yaml")
    torch.save({"state_dict": {"encoder.conv_in.weight": torch.zeros(1)}}, tmp_path / "taming.ckpt")
    with pytest.raises(RequestError, match="is not LlamaGen's; its YAML file tells the size, so leave out"):
        import_vqgan(tmp_path / "taming.ckpt", tmp_path / "other", image_size=64)
    with full_disk(20_000):
        assert main(["import", "vqgan", str(path), str(tmp_path / "other")]) == 2
    assert f"cannot write the folder {tmp_path / 'other'} ({FOUND})" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(("multipliers", "millions"), [((1, 1, 2, 2, 4), 72), ((1, 2, 2, 4), 70)])
def test_the_published_shapes_have_the_published_sizes(multipliers, millions):
    """vq_ds16_c2i and vq_ds8_c2i of its README."""
    last = len(multipliers) - 1
    shape = {"image_size": 256, "channel_multipliers": multipliers, "num_codes": 16384, "code_width": 8}
    with torch.device("meta"):
        model = TamingVQGAN(TamingConfig(**shape, attention_levels=(last,)))
    assert round(sum(tensor.numel() for tensor in model.state_dict().values()) / 1e6) == millions
