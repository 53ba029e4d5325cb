"""VQ-GANs of taming-transformers: files in the real format, against networks of `transformers` of the same kind."""

import json
import re
import sys
import types
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from cm3.cli import main
from cm3.errors import ConfigError, ModelFilesError, RequestError
from cm3.interop.chameleon_hf import import_chameleon
from cm3.interop.pickled import read_tensors
from cm3.interop.vqgan import import_vqgan
from cm3.tokenizers.image import ImageTokenizer, pixels_to_model
from cm3.tokenizers.taming import TamingConfig, TamingVQGAN

transformers = pytest.importorskip("transformers")

from tiny_chameleon import NUM_CODES, SIDE, randomise, save_foreign, tiny_chameleon  # noqa: E402

YAML = """
model:
  base_learning_rate: 4.5e-06
  target: taming.models.vqgan.VQModel
  params:
    embed_dim: 8
    n_embed: 16
    ddconfig:
      double_z: False
      z_channels: 24
      resolution: 16
      in_channels: 3
      out_ch: 3
      ch: 32
      ch_mult: [1, 2]
      num_res_blocks: 1
      attn_resolutions: [8]
      dropout: 0.0
    lossconfig:
      target: taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator
"""
SHAPE = {
    "image_size": SIDE,
    "base_channels": 32,
    "channel_multipliers": (1, 2),
    "num_residual_blocks": 1,
    "latent_width": 24,
    "num_codes": NUM_CODES,
    "code_width": 8,
}


@pytest.fixture(scope="module")
def reference():
    """Janus's tokenizer: the network of taming-transformers with attention at the lowest resolution."""
    from transformers.models.janus.configuration_janus import JanusVQVAEConfig
    from transformers.models.janus.modeling_janus import JanusVQVAE

    config = JanusVQVAEConfig(
        embed_dim=8,
        num_embeddings=NUM_CODES,
        latent_channels=24,
        base_channels=32,
        channel_multiplier=[1, 2],
        num_res_blocks=1,
        num_patches=8,
    )
    model = JanusVQVAE(config).eval()
    randomise(model)
    return model


def state_dict_of(reference) -> dict[str, torch.Tensor]:
    """Its tensors as taming-transformers names them: levels of the decoder count from the highest resolution."""
    return {
        re.sub(r"decoder\.up\.(\d)", lambda match: f"decoder.up.{1 - int(match[1])}", name): tensor
        for name, tensor in reference.state_dict().items()
    }


@pytest.fixture()
def checkpoint(reference, tmp_path, monkeypatch) -> Path:
    """A checkpoint as its trainer writes it: losses beside the weights, classes of the trainer as keys."""
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    names = ("pytorch_lightning", module.__name__)
    for name in names:
        monkeypatch.setitem(sys.modules, name, module)
    tensors = {**state_dict_of(reference), "loss.perceptual_loss.lin0.model.1.weight": torch.zeros(1, 64, 1, 1)}
    values = {"epoch": 3, "callbacks": {module.ModelCheckpoint: {"best": torch.tensor(1.0)}}, "state_dict": tensors}
    torch.save(values, tmp_path / "last.ckpt")
    for name in names:  # nobody who imports it has the trainer
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "model.yaml").write_text(YAML)
    return tmp_path / "last.ckpt"


def some_pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (4, SIDE, SIDE, 3), dtype=np.uint8)


@torch.no_grad()
def test_codes_and_pictures_are_those_of_the_reference(reference, checkpoint, tmp_path):
    config = import_vqgan(checkpoint, tmp_path / "ours")
    assert config == TamingConfig(**SHAPE, attention_levels=(1,))
    tokenizer = ImageTokenizer.load(tmp_path / "ours")
    image_BCHW = pixels_to_model(torch.from_numpy(some_pixels()))
    codes = tokenizer.encode(some_pixels())
    assert codes.ravel().tolist() == reference.encode(image_BCHW).image_tokens.tolist()
    assert len(np.unique(codes)) > NUM_CODES / 2

    vectors = reference.quantize.embedding.weight[torch.from_numpy(codes.astype(np.int64))]
    decoded = reference.decoder(reference.post_quant_conv(vectors.unflatten(1, (8, 8)).permute(0, 3, 1, 2)))
    assert decoded.std() > 0.3
    ours = tokenizer.model.decode(torch.from_numpy(codes.astype(np.int64)), (8, 8))
    torch.testing.assert_close(ours, decoded.clamp(-1, 1), atol=1e-5, rtol=0)
    assert [image.size for image in tokenizer.decode(codes)] == [(SIDE, SIDE)] * 4


@torch.no_grad()
def test_scores_of_codes_instead_of_distances(reference, tmp_path):
    """GumbelVQ of taming-transformers, as its vqgan_gumbel_f8: without noise the code of the highest score."""
    tensors = state_dict_of(reference)
    codebook = tensors.pop("quantize.embedding.weight")
    weight, bias = torch.randn(NUM_CODES, 8), torch.randn(NUM_CODES)
    tensors |= {"quantize.embed.weight": codebook, "quantize.proj.weight": weight[..., None, None]}
    torch.save({"state_dict": tensors | {"quantize.proj.bias": bias}}, tmp_path / "last.ckpt")
    (tmp_path / "model.yaml").write_text(YAML.replace("VQModel", "GumbelVQ"))
    import_vqgan(tmp_path / "last.ckpt", tmp_path / "ours")
    tokenizer = ImageTokenizer.load(tmp_path / "ours")
    image_BCHW = pixels_to_model(torch.from_numpy(some_pixels()))
    latents_BPE = reference.quant_conv(reference.encoder(image_BCHW)).flatten(2).mT
    codes = tokenizer.encode(some_pixels())
    assert codes.tolist() == (latents_BPE @ weight.T + bias).argmax(-1).tolist()
    assert len(np.unique(codes)) > NUM_CODES / 2
    assert torch.equal(tokenizer.model.quantizer.codebook_QE, codebook)


def test_saved_again_it_is_the_same(checkpoint, tmp_path):
    import_vqgan(checkpoint, tmp_path / "ours", tmp_path / "model.yaml")
    tokenizer = ImageTokenizer.load(tmp_path / "ours")
    tokenizer.save(tmp_path / "again")
    assert ImageTokenizer.load(tmp_path / "again").hash == tokenizer.hash
    path = tmp_path / "again" / "image_tokenizer.json"
    settings = json.loads(path.read_text())
    assert settings["taming"] == json.loads(json.dumps(asdict(tokenizer.config)))
    path.write_text(json.dumps({**settings, "taming": {**settings["taming"], "colour": 1}}))
    with pytest.raises(ModelFilesError, match="no valid VQ-GAN configuration"):
        ImageTokenizer.load(tmp_path / "again")


def test_chameleon_gets_its_decoder_from_its_own_checkpoint(tmp_path):
    foreign = tiny_chameleon()
    source = save_foreign(foreign, tmp_path / "theirs")
    whole = TamingVQGAN(TamingConfig(**SHAPE))
    own = {name: tensor for name, tensor in whole.state_dict().items() if name.startswith("decoder.")}
    (tmp_path / "tokenizer").mkdir()
    vqgan = tmp_path / "tokenizer" / "vqgan.ckpt"
    torch.save({"state_dict": {**foreign.model.vqmodel.state_dict(), **own}}, vqgan)
    (tmp_path / "tokenizer" / "vqgan.yaml").write_text(YAML.replace("[8]", "[ ]"))
    import_chameleon(source, tmp_path / "ours", vqgan=vqgan)
    tokenizer = ImageTokenizer.load(tmp_path / "ours")
    codes = tokenizer.encode(some_pixels())
    expected = foreign.model.vqmodel.encode(pixels_to_model(torch.from_numpy(some_pixels()))).image_tokens
    assert codes.ravel().tolist() == expected.tolist()
    assert len(tokenizer.decode(codes)) == 4

    (tmp_path / "tokenizer" / "vqgan.yaml").write_text(YAML)
    with pytest.raises(ModelFilesError, match="missing: encoder.down.1.attn.0"):
        import_chameleon(source, tmp_path / "other", vqgan=vqgan)
    (tmp_path / "tokenizer" / "vqgan.yaml").write_text(YAML.replace("[8]", "[]"))
    torch.save({"state_dict": {name: tensor + 1 for name, tensor in torch.load(vqgan)["state_dict"].items()}}, vqgan)
    with pytest.raises(ModelFilesError, match="have different codebooks"):
        import_chameleon(source, tmp_path / "other", vqgan=vqgan)
    assert not (tmp_path / "other").exists()


def test_a_pickled_file_runs_nothing(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "harmed",))

    torch.save({"state_dict": {"weight": torch.zeros(1)}, "extra": Harmful()}, tmp_path / "bad.ckpt")
    with pytest.raises(ModelFilesError, match=r"bad.ckpt cannot be read as a file of tensors"):
        read_tensors(tmp_path / "bad.ckpt")
    assert not (tmp_path / "harmed").exists()
    (tmp_path / "noise.ckpt").write_bytes(b"no checkpoint")
    with pytest.raises(ModelFilesError, match="cannot be read as a file of tensors"):
        read_tensors(tmp_path / "noise.ckpt")
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(ModelFilesError, match="holds no tensors by name"):
        read_tensors(tmp_path / "list.ckpt")
    with pytest.raises(ModelFilesError, match="no such file"):
        read_tensors(tmp_path / "none.ckpt")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("ch: 32", "ch: 64", r"wrongly shaped: encoder.conv_in.weight \(32, 3, 3, 3\) instead of \(64, 3, 3, 3\)"),
        ("num_res_blocks: 1", "num_res_blocks: 2", "missing: encoder.down.0.block.1.norm1.weight"),
        ("attn_resolutions: [8]", "attn_resolutions: []", "unexpected: encoder.down.1.attn.0.norm.weight"),
        ("double_z: False", "double_z: True", "double_z=True makes another network"),
        ("n_embed: 16", "", "no settings of a VQ-GAN that this code knows: 'n_embed'"),
        ("ch: 32", "ch: 48", "base_channels=48 is not a positive multiple of 32"),
    ],
)
def test_settings_that_do_not_fit_are_named(checkpoint, tmp_path, old, new, message):
    (tmp_path / "model.yaml").write_text(YAML.replace(old, new))
    with pytest.raises(ModelFilesError, match=message):
        import_vqgan(checkpoint, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_command_line(checkpoint, tmp_path, capsys):
    assert main(["import", "vqgan", str(checkpoint), str(tmp_path / "ours")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'ours'}: pictures of 16x16 pixels, 8x8 codes of 16\n"
    (tmp_path / "second.yaml").write_text(YAML)
    with pytest.raises(RequestError, match="found beside it: model.yaml, second.yaml; give --config"):
        import_vqgan(checkpoint, tmp_path / "other")
    words = ["import", "vqgan", str(checkpoint), str(tmp_path / "ours"), "--config", str(tmp_path / "second.yaml")]
    assert main(words) == 2
    assert "is not empty; choose a folder that does not exist yet" in capsys.readouterr().err
    words[3] = str(tmp_path / "other")
    assert main(words) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channel_multipliers": ()}, "channel_multipliers=.. must be positive"),
        ({"image_size": 17}, "image_size=17 is not a multiple of 2"),
        ({"attention_levels": (2,)}, r"attention_levels=\[2\] are not below 2"),
        ({"num_codes": 70_000}, "num_codes=70000 is outside"),
        ({"latent_width": 0}, "latent_width=0 must be at least 1"),
    ],
)
def test_impossible_shapes_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        TamingConfig(**{**SHAPE, **changes})


def test_the_published_shapes_have_the_published_sizes():
    """Chameleon's encoder and decoder, and the 16x16 grid of VQGAN ImageNet f16 with attention at 16x16."""
    with torch.device("meta"):
        chameleon = TamingVQGAN(TamingConfig())
        imagenet = TamingVQGAN(TamingConfig(image_size=256, attention_levels=(4,), num_codes=16384))
    assert chameleon.config.grid == (32, 32) and imagenet.config.grid == (16, 16)
    assert len(imagenet.encoder.down[4].attn) == 2 and len(imagenet.decoder.up[4].attn) == 3
    assert imagenet.decoder.up[4].block[0].conv1.weight.shape == (512, 512, 3, 3)
