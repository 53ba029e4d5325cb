"""The VQ-GAN of taming-transformers, for weights that were trained with it: its VQGANs, and Chameleon's tokenizer.

Esser et al. 2021 (arXiv:2012.09841, section 3.1 and table 7). `cm3.tokenizers.vqgan` is the same idea with cheaper
parts, for training; here every part and every name is theirs, so that their files fit as they are. Only what lies in
their `quantize` has other names: the codebook is our `quantizer.codebook_QE`, the scores of codes are `scores`.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from cm3.errors import ConfigError
from cm3.tokenizers.quantizer import CHUNK_ENTRIES, VectorQuantizer

NUM_GROUPS = 32
"""Groups of every group normalisation."""


@dataclass(frozen=True, kw_only=True)
class TamingConfig:
    """Shape of a VQ-GAN of taming-transformers. The defaults are Chameleon's: 512x512 pixels to 32x32 codes of 8192."""

    image_size: int = 512
    """Side of the square pictures, in pixels."""
    base_channels: int = 128
    """Channels at the highest resolution; a multiple of 32."""
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Channels of each resolution in units of `base_channels`, highest first; all but the first halve the picture."""
    num_residual_blocks: int = 2
    """Residual blocks per level of the encoder; the decoder has one more."""
    attention_levels: tuple[int, ...] = ()
    """Levels (0 is the highest resolution) with self-attention after each residual block; the middle always has it."""
    latent_width: int = 256
    """Channels of the encoder's output and the decoder's input."""
    num_codes: int = 8192
    """Codebook entries, at most 65536."""
    code_width: int = 256
    """Width of a codebook vector."""
    gumbel: bool = False
    """A code is the one of the highest learned score (as trained with Gumbel noise, which is left out here) instead of
    the nearest vector."""
    decoder: bool = True
    """Off: pictures to codes only; Hugging Face's Chameleon comes without the decoder."""

    def __post_init__(self) -> None:
        if not self.channel_multipliers or min(self.channel_multipliers) < 1:
            raise ConfigError(f"taming.channel_multipliers={self.channel_multipliers} must be positive, at least one")
        if self.base_channels < 1 or self.base_channels % NUM_GROUPS:
            raise ConfigError(f"taming.base_channels={self.base_channels} is not a positive multiple of {NUM_GROUPS}")
        if self.image_size < self.downsampling or self.image_size % self.downsampling:
            raise ConfigError(
                f"taming.image_size={self.image_size} is not a multiple of {self.downsampling}, by which "
                f"{len(self.channel_multipliers)} levels shrink it"
            )
        if unknown := [level for level in self.attention_levels if not 0 <= level < len(self.channel_multipliers)]:
            raise ConfigError(f"taming.attention_levels={unknown} are not below {len(self.channel_multipliers)}")
        if not 2 <= self.num_codes <= 65536:
            raise ConfigError(f"taming.num_codes={self.num_codes} is outside 2 to 65536 (codes are stored as uint16)")
        for name in ("num_residual_blocks", "latent_width", "code_width"):
            if getattr(self, name) < 1:
                raise ConfigError(f"taming.{name}={getattr(self, name)} must be at least 1")

    @property
    def downsampling(self) -> int:
        """Pixels per code along one side."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of a picture in codes."""
        side = self.image_size // self.downsampling
        return side, side

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, highest resolution first."""
        return tuple(self.base_channels * multiplier for multiplier in self.channel_multipliers)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(NUM_GROUPS, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """Two normalised 3x3 convolutions around a skip."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.norm1 = _norm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.norm2 = _norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.nin_shortcut = nn.Identity() if channels_in == channels else nn.Conv2d(channels_in, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        hidden_BCHW = self.conv1(F.silu(self.norm1(x_BCHW)))
        return self.nin_shortcut(x_BCHW) + self.conv2(F.silu(self.norm2(hidden_BCHW)))


class SpatialAttention(nn.Module):
    """One head of self-attention over all positions of a feature map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        normal_BCHW = self.norm(x_BCHW)
        heads = [conv(normal_BCHW).flatten(2).mT.unsqueeze(1) for conv in (self.q, self.k, self.v)]
        mixed_BPC = F.scaled_dot_product_attention(*heads).squeeze(1)
        return x_BCHW + self.proj_out(mixed_BPC.mT.unflatten(2, x_BCHW.shape[2:]))


class Middle(nn.Module):
    """Attention between two residual blocks, at the lowest resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels)
        self.attn_1 = SpatialAttention(channels)
        self.block_2 = ResidualBlock(channels, channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x_BCHW)))


class Halving(nn.Module):
    """A convolution of stride 2; the border that it lacks is added right and below only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(F.pad(x_BCHW, (0, 1, 0, 1)))


class Doubling(nn.Module):
    """Every pixel becomes four; then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """All residual blocks of one resolution, attention behind each if any, and the way to the next resolution."""

    def __init__(
        self,
        channels_in: int,
        channels: int,
        num_blocks: int,
        attention: bool,
        halve: bool = False,
        double: bool = False,
    ) -> None:
        super().__init__()
        widths = [channels_in] + [channels] * num_blocks
        self.block = nn.ModuleList(ResidualBlock(a, b) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(SpatialAttention(channels) for _ in range(num_blocks if attention else 0))
        self.downsample = Halving(channels) if halve else nn.Identity()
        self.upsample = Doubling(channels) if double else nn.Identity()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            x_BCHW = block(x_BCHW)
            if len(self.attn):
                x_BCHW = self.attn[index](x_BCHW)
        return self.upsample(self.downsample(x_BCHW))


class Encoder(nn.Module):
    """Picture to latents, 1/downsampling of the side."""

    def __init__(self, config: TamingConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = nn.Conv2d(3, config.base_channels, 3, padding=1)
        self.down = nn.ModuleList()
        channels = config.base_channels
        for index, width in enumerate(widths):
            attention, is_last = index in config.attention_levels, index == len(widths) - 1
            self.down.append(Level(channels, width, config.num_residual_blocks, attention, halve=not is_last))
            channels = width
        self.mid = Middle(channels)
        self.norm_out = _norm(channels)
        self.conv_out = nn.Conv2d(channels, config.latent_width, 3, padding=1)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        x_BCHW = self.conv_in(image_BCHW)
        for level in self.down:
            x_BCHW = level(x_BCHW)
        return self.conv_out(F.silu(self.norm_out(self.mid(x_BCHW))))


class Decoder(nn.Module):
    """Latents to picture. Levels have the encoder's numbers and are passed from the last to the first."""

    def __init__(self, config: TamingConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = nn.Conv2d(config.latent_width, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList()
        for index, width in enumerate(widths):
            channels = widths[min(index + 1, len(widths) - 1)]
            attention = index in config.attention_levels
            self.up.append(Level(channels, width, config.num_residual_blocks + 1, attention, double=index > 0))
        self.norm_out = _norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, latents_BCHW: Tensor) -> Tensor:
        x_BCHW = self.mid(self.conv_in(latents_BCHW))
        for level in reversed(self.up):
            x_BCHW = level(x_BCHW)
        return self.conv_out(F.silu(self.norm_out(x_BCHW)))


class TamingVQGAN(nn.Module):
    """Encoder, codebook and (if there is one) decoder. Pictures are RGB in [-1, 1]. Not trained here."""

    def __init__(self, config: TamingConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(config.latent_width, config.code_width, 1)
        self.quantizer = VectorQuantizer(config.num_codes, config.code_width, normalize=False)
        self.scores = nn.Conv2d(config.code_width, config.num_codes, 1) if config.gumbel else None
        self.post_quant_conv = nn.Conv2d(config.code_width, config.latent_width, 1)
        self.decoder = Decoder(config) if config.decoder else None

    @torch.no_grad()
    def encode(self, image_BCHW: Float[Tensor, "B 3 H W"]) -> Int[Tensor, "B P"]:
        """Codes of pictures in [-1, 1], in raster order."""
        latents_BEHW = self.quant_conv(self.encoder(image_BCHW)).float()
        if self.scores is None:
            return self.quantizer(latents_BEHW).codes_BP
        height, width = latents_BEHW.shape[2:]
        pictures = max(1, CHUNK_ENTRIES // (self.config.num_codes * height * width))
        return torch.cat([self.scores(part).argmax(1).flatten(1) for part in latents_BEHW.split(pictures)])

    @torch.no_grad()
    def decode(self, codes_BP: Int[Tensor, "B P"], grid: tuple[int, int]) -> Float[Tensor, "B 3 H W"]:
        """Pictures in [-1, 1] (clamped) of codes that form a `grid` of height x width."""
        assert self.decoder is not None, "see ImageTokenizer.require_decoder"
        vectors_BEHW = self.quantizer.lookup(codes_BP, grid).to(self.post_quant_conv.weight.dtype)
        return self.decoder(self.post_quant_conv(vectors_BEHW)).float().clamp(-1, 1)
