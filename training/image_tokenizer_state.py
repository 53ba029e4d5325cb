"""What a training of the image tokenizer changes from step to step, and its checkpoint."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn

from cm3.checkpoint import load_strict, load_tensors, save_tensors
from cm3.errors import ModelFilesError
from cm3.tokenizers.vqgan import VQGAN
from cm3.training.codebook import CodebookLearner
from cm3.training.discriminator import PatchDiscriminator
from cm3.training.image_tokenizer_config import ImageTokenizerRun


class ImageTokenizerState:
    """Network, codebook, discriminator (None if it is off), their optimisers, and the finished steps."""

    def __init__(self, config: ImageTokenizerRun, device: torch.device) -> None:
        self.device = device
        self.step = 0
        self._precision = config.precision
        self.model: VQGAN = VQGAN(config.vqgan).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.codebook = CodebookLearner(
            self.model.quantizer,
            config.codebook_decay,
            config.revive_after_steps,
            config.seed,
            config.min_code_distance,
        )
        self._optimizer = torch.optim.Adam(self.model.parameters(), lr=config.learning_rate, betas=config.betas)
        self.discriminator: PatchDiscriminator | None = None
        self._discriminator_optimizer: torch.optim.Adam | None = None
        if config.adversarial.start_step is not None:
            discriminator = PatchDiscriminator(config.adversarial.base_channels, config.adversarial.num_layers)
            self.discriminator = discriminator.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
            self._discriminator_optimizer = torch.optim.Adam(
                discriminator.parameters(), lr=config.adversarial.learning_rate, betas=(0.5, 0.9)
            )

    @property
    def num_parameters(self) -> int:
        """Parameters of the network, codebook included."""
        return sum(tensor.numel() for tensor in self.model.state_dict().values())

    def autocast(self) -> AbstractContextManager[None]:
        """The number format of the activations."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._precision == "bf16")

    def update_model(self, loss: Tensor, learning_rate: float, gradient_clip: float) -> Tensor:
        """One step of the network; returns the norm of the gradient."""
        self._optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), gradient_clip or float("inf"))
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        return norm

    def update_discriminator(self, loss: Tensor) -> None:
        """One step of the discriminator."""
        assert self._discriminator_optimizer is not None
        self._discriminator_optimizer.zero_grad()
        loss.backward()
        self._discriminator_optimizer.step()

    def save(self, path: Path) -> None:
        """Write everything as one safetensors file."""
        tensors = {"step": torch.tensor(self.step)}
        tensors |= _prefixed("model", self.model.state_dict())
        tensors |= _prefixed("codebook", self.codebook.state_dict())
        tensors |= _prefixed("optimizer", _optimizer_tensors(self._optimizer))
        if self.discriminator and self._discriminator_optimizer:
            tensors |= _prefixed("discriminator", self.discriminator.state_dict())
            tensors |= _prefixed("discriminator_optimizer", _optimizer_tensors(self._discriminator_optimizer))
        save_tensors(path, tensors)

    def load(self, path: Path) -> None:
        """Restore `save`.

        Raises:
            ModelFilesError: the file is damaged, or of a run with another network.
        """
        tensors = load_tensors(path)
        load_strict(self.model, _part("model", tensors), str(path))
        try:
            self.codebook.load_state_dict(_part("codebook", tensors))
            _load_optimizer(self._optimizer, _part("optimizer", tensors))
            self.step = int(tensors["step"])
        except (KeyError, RuntimeError) as error:
            raise ModelFilesError(f"{path} does not fit this run ({error}); use another output folder") from error
        if self.discriminator and self._discriminator_optimizer:
            load_strict(self.discriminator, _part("discriminator", tensors), str(path))
            _load_optimizer(self._discriminator_optimizer, _part("discriminator_optimizer", tensors))


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def _part(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    start = f"{prefix}/"
    return {name[len(start) :]: tensor for name, tensor in tensors.items() if name.startswith(start)}


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Adam's moments and step counts as `parameter index/name`."""
    state = optimizer.state_dict()["state"]
    return {f"{index}/{name}": tensor for index, values in state.items() for name, tensor in values.items()}


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, name = key.split("/")
        state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
