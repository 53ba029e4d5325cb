"""The adversarial part of VQ-GAN training (Esser et al. 2021, section 3.1, equations 5 to 7)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cm3.errors import ConfigError

MAX_ADAPTIVE_WEIGHT = 1e4


@dataclass(frozen=True, kw_only=True)
class AdversarialConfig:
    """PatchGAN with hinge loss, and its weight."""

    start_step: int | None = None
    """First step with the discriminator; null is never."""
    weight: float = 0.8
    """Weight of the adversarial loss, on top of the adaptive one that balances its gradient."""
    base_channels: int = 64
    """Channels of the discriminator's first convolution."""
    num_layers: int = 3
    """Convolutions of stride 2: 3 judges patches of 70x70 pixels, 2 of 34x34, 1 of 16x16."""
    learning_rate: float = 2e-4
    """Learning rate of the discriminator."""

    def __post_init__(self) -> None:
        if self.start_step is not None and self.start_step < 0:
            raise ConfigError(f"adversarial.start_step={self.start_step}; give 0 or more, or null for never")
        if self.num_layers < 1 or self.base_channels < 1:
            raise ConfigError("adversarial.num_layers and adversarial.base_channels must be at least 1")


class PatchDiscriminator(nn.Module):
    """PatchGAN: one logit for each overlapping patch of a picture (Isola et al. 2017, section 3.2.2).

    Args:
        base_channels: channels after the first convolution; they double with each of the further ones.
        num_layers: convolutions of stride 2; a logit sees 70x70 pixels with 3, 34x34 with 2, 16x16 with 1.
    """

    def __init__(self, base_channels: int = 64, num_layers: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, base_channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        channels = base_channels
        for layer in range(1, num_layers + 1):
            width = base_channels * min(2**layer, 8)
            stride = 2 if layer < num_layers else 1
            layers.append(nn.Conv2d(channels, width, 4, stride=stride, padding=1, bias=False))
            layers += [nn.GroupNorm(max(1, width // 16), width), nn.LeakyReLU(0.2)]
            channels = width
        layers.append(nn.Conv2d(channels, 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, image_BCHW: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 1 h w"]:
        """Logits; above 0 means real."""
        return self.layers(image_BCHW)


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Hinge loss of the discriminator (Lim and Ye 2017)."""
    return 0.5 * (F.relu(1 - real_logits.float()).mean() + F.relu(1 + fake_logits.float()).mean())


def generator_loss(fake_logits: Tensor) -> Tensor:
    """What the decoder minimises to pass for real."""
    return -fake_logits.float().mean()


def adaptive_weight(reconstruction_loss: Tensor, adversarial_loss: Tensor, last_layer_weight: Tensor) -> Tensor:
    """Ratio of the two losses' gradients at the decoder's last layer (equation 7), detached."""
    (reconstruction_gradient,) = torch.autograd.grad(reconstruction_loss, last_layer_weight, retain_graph=True)
    (adversarial_gradient,) = torch.autograd.grad(adversarial_loss, last_layer_weight, retain_graph=True)
    ratio = reconstruction_gradient.norm() / (adversarial_gradient.norm() + 1e-6)
    return ratio.clamp(max=MAX_ADAPTIVE_WEIGHT).detach()
