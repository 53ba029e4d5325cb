"""Networks and quantiser of the VQ-GAN."""

import pytest
import torch
from norm_gradients import worst_norm_gradient

from cm3.errors import ConfigError
from cm3.tokenizers.quantizer import VectorQuantizer
from cm3.tokenizers.vqgan import VQGAN, VQGANConfig

TINY = {"image_size": 32, "base_channels": 16, "num_residual_blocks": 1, "num_codes": 32, "code_width": 4}


@pytest.mark.parametrize(
    ("downsampling", "multipliers", "patch_size"),
    [(4, (1, 1, 2), 1), (8, (1, 1, 1, 1), 1), (8, (1, 2), 4), (16, (1, 1, 1), 4), (4, (1,), 4)],
)
def test_shapes_for_every_downsampling(downsampling, multipliers, patch_size):
    config = VQGANConfig(**TINY, downsampling=downsampling, channel_multipliers=multipliers)
    assert config.patch_size == patch_size
    side = 32 // downsampling
    model, image_BCHW = VQGAN(config), torch.rand(2, 3, 32, 32) * 2 - 1
    out = model(image_BCHW)
    assert out.reconstruction_BCHW.shape == image_BCHW.shape
    assert out.codes_BP.shape == (2, side * side) and out.latents_NE.shape == (2 * side * side, 4)
    codes_BP = model.encode(image_BCHW)
    assert codes_BP.dtype == torch.int64 and torch.equal(codes_BP, out.codes_BP)
    decoded_BCHW = model.decode(codes_BP, config.grid)
    torch.testing.assert_close(decoded_BCHW, out.reconstruction_BCHW.clamp(-1, 1))


def test_block_encoder_sees_one_block_only():
    config = VQGANConfig(**TINY, channel_multipliers=(1, 2), block_encoder=True)
    encoder, image_BCHW = VQGAN(config).encoder, torch.rand(1, 3, 32, 32) * 2 - 1
    latents_BEHW = encoder(image_BCHW)
    assert latents_BEHW.shape == (1, 4, 4, 4)
    changed_BCHW = torch.rand(1, 3, 32, 32) * 2 - 1
    changed_BCHW[..., 8:16, 24:32] = image_BCHW[..., 8:16, 24:32]
    same_BHW = (encoder(changed_BCHW) == latents_BEHW).all(dim=1)
    assert same_BHW.nonzero().tolist() == [[0, 1, 3]]
    shifted_BEHW = encoder(image_BCHW.roll((8, 16), dims=(2, 3)))
    torch.testing.assert_close(shifted_BEHW, latents_BEHW.roll((1, 2), dims=(2, 3)))


def test_a_block_encoder_learns_its_norms_exactly_in_bfloat16():
    """From 4,096 blocks, over which a sum in 16 bit would be off by several per cent."""
    encoder = VQGAN(VQGANConfig(**TINY, channel_multipliers=(1, 2), block_encoder=True)).encoder

    def forward():
        with torch.autocast("cpu", torch.bfloat16):
            return encoder(torch.rand(256, 3, 32, 32) * 2 - 1).float().square().mean()

    assert worst_norm_gradient(encoder, forward) < 1e-3


def test_paper_geometry_is_the_default():
    config = VQGANConfig()
    assert (config.grid, config.num_codes, config.code_width) == ((32, 32), 8192, 256)


@pytest.mark.parametrize("normalize", [False, True])
def test_codes_are_nearest(normalize):
    quantizer = VectorQuantizer(16, 4, normalize)
    latents_BEHW = torch.randn(3, 4, 2, 5)
    codes_BP = quantizer(latents_BEHW).codes_BP
    latents_NE = quantizer.project(latents_BEHW.permute(0, 2, 3, 1).reshape(-1, 4))
    expected_N = torch.cdist(latents_NE, quantizer.codebook_QE).argmin(1)
    assert torch.equal(codes_BP.flatten(), expected_N)
    vectors_BEHW = quantizer.lookup(codes_BP, (2, 5))
    torch.testing.assert_close(vectors_BEHW, quantizer(latents_BEHW).vectors_BEHW)


def test_nearest_in_chunks_is_the_same(monkeypatch):
    quantizer, latents_NE = VectorQuantizer(16, 4, False), torch.randn(40, 4)
    whole_N = quantizer.nearest(latents_NE)
    monkeypatch.setattr("cm3.tokenizers.quantizer.CHUNK_ENTRIES", 16 * 7)
    assert torch.equal(quantizer.nearest(latents_NE), whole_N)


def test_gradient_goes_straight_through():
    quantizer = VectorQuantizer(16, 4, False)
    latents_BEHW = torch.randn(1, 4, 2, 2, requires_grad=True)
    quantized = quantizer(latents_BEHW)
    weights_BEHW = torch.randn(1, 4, 2, 2)
    (gradient,) = torch.autograd.grad((quantized.vectors_BEHW * weights_BEHW).sum(), latents_BEHW)
    torch.testing.assert_close(gradient, weights_BEHW)
    (gradient,) = torch.autograd.grad(quantizer(latents_BEHW).commitment_loss, latents_BEHW)
    expected = 2 * (latents_BEHW - quantizer.lookup(quantized.codes_BP, (2, 2))) / latents_BEHW.numel()
    torch.testing.assert_close(gradient, expected.detach())


def test_without_quantisation_the_latents_are_decoded():
    model = VQGAN(VQGANConfig(**TINY, channel_multipliers=(1, 1)))
    image_BCHW = torch.rand(1, 3, 32, 32)
    out = model(image_BCHW, quantize=False)
    expected_BCHW = model.decoder(model.quantizer.project(model.encoder(image_BCHW)))
    torch.testing.assert_close(out.reconstruction_BCHW, expected_BCHW)
    assert out.commitment_loss == 0
    model.quantizer.codebook_QE += 1
    torch.testing.assert_close(model(image_BCHW, quantize=False).reconstruction_BCHW, expected_BCHW)


def test_last_layer_is_the_decoders_output():
    model = VQGAN(VQGANConfig(**TINY, channel_multipliers=(1, 1)))
    assert model.last_layer_weight.shape[0] == 3 * 4 * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"downsampling": 5}, "choose 4, 8 or 16"),
        ({"image_size": 36}, "not a multiple of vqgan.downsampling=8"),
        ({"channel_multipliers": (1, 1, 1, 1, 1)}, "at most 4 multipliers"),
        ({"channel_multipliers": ()}, "at least one"),
        ({"base_channels": 24}, "multiple of 16"),
        ({"num_codes": 70000}, "2 to 65536"),
        ({"code_width": 0}, "at least 1"),
    ],
)
def test_impossible_shapes_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        VQGANConfig(**{**TINY, **change})
