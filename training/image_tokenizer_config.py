"""Settings of a training of the image tokenizer (`stage: image_tokenizer`)."""

from dataclasses import dataclass, field
from typing import Literal

from cm3.config import check_seed
from cm3.data.sources import SourceConfig
from cm3.errors import ConfigError
from cm3.tokenizers.vqgan import VQGANConfig
from cm3.training.discriminator import AdversarialConfig


@dataclass(frozen=True, kw_only=True)
class ImageTokenizerRun:
    """Everything that decides the outcome of training an image tokenizer."""

    data: SourceConfig
    """Pictures to learn from; captions are not used (`text_columns: []` does not ask for them)."""
    more_data: dict[str, SourceConfig] = field(default_factory=dict)
    """Further sources, each under a name; every picture of all of them is equally likely (of more than
    `max_images_in_memory` rows, every row, by its first picture)."""
    validation: SourceConfig | None = None
    """Held-out pictures for PSNR and codebook usage; null is none."""
    vqgan: VQGANConfig = field(default_factory=VQGANConfig)
    """The network."""
    steps: int
    """Optimiser steps."""
    batch_size: int = 16
    """Pictures of a step."""
    learning_rate: float = 1e-3
    """Peak learning rate; a cosine takes it to 0 at the last step."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay rates of Adam's moments."""
    gradient_clip: float = 1.0
    """Largest global norm of the gradient; 0 is off."""
    squared_error_weight: float = 1.0
    """Weight of the squared error beside the absolute error's 1; 0 is off. It speeds up the start greatly."""
    commitment_weight: float = 0.25
    """Weight of the distance of the latents to their codes."""
    perceptual_weights: str | None = None
    """File with the weights of LPIPS (see `cm3.training.perceptual`); null trains without."""
    perceptual_weight: float = 1.0
    """Weight of LPIPS, if there is a file."""
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    """The discriminator; off by default."""
    quantize_from_step: int = 250
    """Until this step the network learns without the quantiser; then k-means sets the codebook."""
    freeze_codes_from_step: int | None = None
    """From this step on only the decoder learns, so that the codes of a picture no longer change; null is never."""
    codebook_decay: float = 0.99
    """Decay of the moving averages of the codebook."""
    revive_after_steps: int = 100
    """A code that was not used for so many steps is replaced by a latent; 0 is off."""
    min_code_distance: float = 0.02
    """Least distance of two codes, as a share of the codebook's spread (root mean square distance of the codes to their
    mean): of two that are closer the less used one is moved to a latent, as a dead code is; 0 is off. Encoding in bf16
    instead of fp32 moved latents by up to 0.004 of the spread, and what moves a latent by less than half the
    distance of two codes does not carry it from one to the other."""
    horizontal_flip: bool = False
    """Mirror half of the pictures; wrong for pictures with writing or with a left and right."""
    max_images_in_memory: int = 50_000
    """Data sets up to this size are held as one array; larger ones are read as needed."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Number format of activations; weights and optimiser are fp32."""
    export_precision: Literal["fp32", "bf16"] = "bf16"
    """Number format of the weights in the final files."""
    log_interval: int = 50
    """Steps between console lines."""
    evaluation_interval: int = 1000
    """Steps between evaluations and picture grids; one more follows the last step. 0 leaves only that one."""
    evaluation_images: int = 512
    """Most pictures of an evaluation."""
    checkpoint_interval: int = 500
    """Steps between checkpoints; one more follows the last step, or SIGTERM. 0 leaves only that one."""
    seed: int = 0
    """Seed of the weights, the data order and the codebook."""
    output: str
    """Run folder; the result is in `tokenizer/`. A run that finds its checkpoint there goes on from it."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_interval", "evaluation_images", "max_images_in_memory"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}; choose 1 or more")
        for name in ("warmup_steps", "quantize_from_step", "revive_after_steps", "evaluation_interval"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)}; choose 0 or more")
        check_seed(self.seed)
        if not 0 <= self.min_code_distance < 1:
            raise ConfigError(f"min_code_distance={self.min_code_distance}; choose 0 (off) to below 1")
        if self.learning_rate <= 0:
            raise ConfigError(f"learning_rate={self.learning_rate}; choose a value above 0")
        if self.freeze_codes_from_step is not None and self.freeze_codes_from_step <= self.quantize_from_step:
            raise ConfigError(
                f"freeze_codes_from_step={self.freeze_codes_from_step} must come after "
                f"quantize_from_step={self.quantize_from_step}, when there are codes"
            )
        if self.quantize_from_step >= self.steps:
            raise ConfigError(f"quantize_from_step={self.quantize_from_step} is not before the end, steps={self.steps}")
