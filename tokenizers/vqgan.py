"""VQ-GAN: pictures to grids of codes and back (Esser et al. 2021, "Taming Transformers", section 3.1).

The adversarial and perceptual parts belong to training (`cm3.training.image_tokenizer`).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from cm3.errors import ConfigError
from cm3.tokenizers.layer_norm import LayerNorm
from cm3.tokenizers.quantizer import VectorQuantizer

NORM_GROUP_WIDTH = 16
"""Channels that one group normalisation averages over."""


@dataclass(frozen=True, kw_only=True)
class VQGANConfig:
    """Shape of a VQ-GAN. The defaults are CM3Leon's: 256x256 pixels to 32x32 codes out of 8192."""

    image_size: int = 256
    """Side of the square pictures, in pixels."""
    downsampling: int = 8
    """Pixels per code along one side: 4, 8 or 16."""
    base_channels: int = 128
    """Channels at the highest resolution; a multiple of 16."""
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 4)
    """Channels of each resolution, in units of `base_channels`, highest resolution first. Each level after
    the first halves the picture; the part of `downsampling` that they leave is done by folding square blocks
    of pixels into channels before the first convolution and unfolding them after the last (much cheaper)."""
    num_residual_blocks: int = 2
    """Residual blocks per level of the encoder; the decoder has one more."""
    attention: bool = True
    """Self-attention over the lowest resolution."""
    block_encoder: bool = False
    """Encode every block of `downsampling` x `downsampling` pixels by itself, without normalisation,
    convolution or attention across blocks. Equal blocks then always have equal codes, which makes codes far
    easier for a transformer to learn; the decoder still sees the whole picture."""
    num_codes: int = 8192
    """Codebook entries, at most 65536."""
    code_width: int = 256
    """Width of a codebook vector."""
    normalize_codes: bool = False
    """Quantise on the unit sphere; made for narrow codes (8 to 32), which keep the whole codebook in use."""

    def __post_init__(self) -> None:
        if self.downsampling not in (4, 8, 16):
            raise ConfigError(f"vqgan.downsampling={self.downsampling} is not supported; choose 4, 8 or 16")
        if self.image_size < self.downsampling or self.image_size % self.downsampling:
            raise ConfigError(
                f"vqgan.image_size={self.image_size} is not a multiple of vqgan.downsampling={self.downsampling}"
            )
        if not self.channel_multipliers or min(self.channel_multipliers) < 1:
            raise ConfigError(f"vqgan.channel_multipliers={self.channel_multipliers} must be positive, at least one")
        if 2 ** (len(self.channel_multipliers) - 1) > self.downsampling:
            most = self.downsampling.bit_length()
            raise ConfigError(
                f"vqgan.channel_multipliers={self.channel_multipliers} halve the picture further than "
                f"vqgan.downsampling={self.downsampling}; give at most {most} multipliers"
            )
        if self.base_channels < 1 or self.base_channels % NORM_GROUP_WIDTH:
            raise ConfigError(
                f"vqgan.base_channels={self.base_channels} is not a positive multiple of {NORM_GROUP_WIDTH}"
            )
        if not 2 <= self.num_codes <= 65536:
            raise ConfigError(f"vqgan.num_codes={self.num_codes} is outside 2 to 65536 (codes are stored as uint16)")
        if self.code_width < 1 or self.num_residual_blocks < 1:
            raise ConfigError(
                f"vqgan.code_width={self.code_width} and "
                f"vqgan.num_residual_blocks={self.num_residual_blocks} must be at least 1"
            )

    @property
    def patch_size(self) -> int:
        """Side of the pixel blocks that are folded into channels; 1 = none."""
        return self.downsampling // 2 ** (len(self.channel_multipliers) - 1)

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of a picture in codes."""
        side = self.image_size // self.downsampling
        return side, side

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, highest resolution first."""
        return tuple(self.base_channels * multiplier for multiplier in self.channel_multipliers)


class VQGANOutput(NamedTuple):
    """A training forward pass."""

    reconstruction_BCHW: Tensor
    """Decoded pictures, not clamped."""
    codes_BP: Tensor
    """Chosen codes in raster order, int64."""
    latents_NE: Tensor
    """The vectors that were quantised, as the codebook sees them; detached."""
    commitment_loss: Tensor
    """Mean squared difference of the latents and their codes; 0 without quantisation."""


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(channels // NORM_GROUP_WIDTH, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """Two normalised 3x3 convolutions around a skip."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.norm1 = _norm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.norm2 = _norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.skip = nn.Identity() if channels_in == channels else nn.Conv2d(channels_in, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        hidden_BCHW = self.conv1(F.silu(self.norm1(x_BCHW)))
        return self.skip(x_BCHW) + self.conv2(F.silu(self.norm2(hidden_BCHW)))


class SpatialAttention(nn.Module):
    """One head of self-attention over all positions of a feature map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        qkv_BPC = self.qkv(self.norm(x_BCHW)).permute(0, 2, 3, 1).flatten(1, 2)
        q_B1PC, k_B1PC, v_B1PC = qkv_BPC.unsqueeze(1).chunk(3, dim=-1)
        mixed_BPC = F.scaled_dot_product_attention(q_B1PC, k_B1PC, v_B1PC).squeeze(1)
        mixed_BCHW = mixed_BPC.unflatten(1, x_BCHW.shape[2:]).permute(0, 3, 1, 2)  # keeps a channels_last layout
        return x_BCHW + self.out(mixed_BCHW)


class BlockEncoder(nn.Module):
    """A residual MLP over the pixels of each block: (B, 3, H, W) to (B, E, H/downsampling, W/downsampling)."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.downsampling = config.downsampling
        width = 2 * config.widths[-1]
        self.fold = nn.Linear(3 * config.downsampling**2, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(LayerNorm(width), nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
            for _ in range(config.num_residual_blocks)
        )
        self.out = nn.Sequential(LayerNorm(width), nn.Linear(width, config.code_width))

    def forward(self, image_BCHW: Tensor) -> Tensor:
        side = self.downsampling
        x_BHWC = self.fold(rearrange(image_BCHW, "b c (h i) (w j) -> b h w (c i j)", i=side, j=side))
        for block in self.blocks:
            x_BHWC = x_BHWC + block(x_BHWC)
        return self.out(x_BHWC).movedim(-1, 1)


def _middle(channels: int, attention: bool) -> nn.Sequential:
    blocks: list[nn.Module] = [ResidualBlock(channels, channels), ResidualBlock(channels, channels)]
    if attention:
        blocks.insert(1, SpatialAttention(channels))
    return nn.Sequential(*blocks)


def _build_encoder(config: VQGANConfig) -> nn.Sequential:
    """Picture to latents: (B, 3, H, W) to (B, E, H/downsampling, W/downsampling)."""
    widths = config.widths
    layers: list[nn.Module] = []
    if config.patch_size > 1:
        layers.append(nn.PixelUnshuffle(config.patch_size))
    layers.append(nn.Conv2d(3 * config.patch_size**2, widths[0], 3, padding=1))
    channels = widths[0]
    for level, width in enumerate(widths):
        if level:
            layers.append(nn.Conv2d(channels, channels, 3, stride=2, padding=1))
        for _ in range(config.num_residual_blocks):
            layers.append(ResidualBlock(channels, width))
            channels = width
    layers += [_middle(channels, config.attention), _norm(channels), nn.SiLU()]
    layers.append(nn.Conv2d(channels, config.code_width, 1))
    return nn.Sequential(*layers)


def _build_decoder(config: VQGANConfig) -> nn.Sequential:
    """Code vectors to picture, the mirror of the encoder."""
    widths = config.widths[::-1]
    channels = widths[0]
    layers: list[nn.Module] = [nn.Conv2d(config.code_width, channels, 3, padding=1)]
    layers.append(_middle(channels, config.attention))
    for level, width in enumerate(widths):
        if level:
            layers += [
                nn.Upsample(scale_factor=2, mode="nearest"),
                nn.Conv2d(channels, channels, 3, padding=1),
            ]
        for _ in range(config.num_residual_blocks + 1):
            layers.append(ResidualBlock(channels, width))
            channels = width
    layers += [_norm(channels), nn.SiLU(), nn.Conv2d(channels, 3 * config.patch_size**2, 3, padding=1)]
    if config.patch_size > 1:
        layers.append(nn.PixelShuffle(config.patch_size))
    return nn.Sequential(*layers)


class VQGAN(nn.Module):
    """Encoder, quantiser and decoder. Pictures are RGB in [-1, 1]."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = BlockEncoder(config) if config.block_encoder else _build_encoder(config)
        self.quantizer = VectorQuantizer(config.num_codes, config.code_width, config.normalize_codes)
        self.decoder = _build_decoder(config)

    @property
    def last_layer_weight(self) -> Tensor:
        """Weight of the decoder's last convolution, at which the adversarial weight is balanced."""
        return [layer for layer in self.decoder if isinstance(layer, nn.Conv2d)][-1].weight

    @torch.no_grad()
    def encode(self, image_BCHW: Float[Tensor, "B 3 H W"]) -> Int[Tensor, "B P"]:
        """Codes of pictures in [-1, 1], in raster order."""
        return self.quantizer(self.encoder(image_BCHW)).codes_BP

    @torch.no_grad()
    def decode(self, codes_BP: Int[Tensor, "B P"], grid: tuple[int, int]) -> Float[Tensor, "B 3 H W"]:
        """Pictures in [-1, 1] (clamped) of codes that form a `grid` of height x width."""
        vectors_BEHW = self.quantizer.lookup(codes_BP, grid)
        return self.decoder(vectors_BEHW.to(self.last_layer_weight.dtype)).float().clamp(-1, 1)

    def forward(self, image_BCHW: Float[Tensor, "B 3 H W"], quantize: bool = True) -> VQGANOutput:
        """Reconstruct pictures; with `quantize=False` (the start of training) from the latents themselves."""
        latents_BEHW = self.encoder(image_BCHW).float()
        quantized = self.quantizer(latents_BEHW)
        if quantize:
            decoder_input_BEHW, commitment_loss = quantized.vectors_BEHW, quantized.commitment_loss
        else:
            decoder_input_BEHW = self.quantizer.project(latents_BEHW.movedim(1, -1)).movedim(-1, 1)
            commitment_loss = latents_BEHW.new_zeros(())
        reconstruction_BCHW = self.decoder(decoder_input_BEHW).float()
        return VQGANOutput(reconstruction_BCHW, quantized.codes_BP, quantized.latents_NE, commitment_loss)
