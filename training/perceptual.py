"""LPIPS, a perceptual distance (Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features", eq. 1).

The weights are not ours to ship. A user who has the `lpips` package makes the file with
`torch.save(lpips.LPIPS(net="vgg").state_dict(), "lpips_vgg.pth")`.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cm3.checkpoint import load_strict, load_tensors
from cm3.errors import ModelFilesError

# VGG-16 (Simonyan and Zisserman 2015): channels of the convolutions between poolings, and the index of each
# convolution in torchvision's `features`, which names the weights.
_VGG_WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
_VGG_INDICES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)


class LPIPS(nn.Module):
    """Weighted distance of VGG-16 features of pictures in [-1, 1]; 0 for equal pictures."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.slices = nn.ModuleDict()
        self.weights = nn.ParameterDict()
        channels = 3
        for level, (widths, indices) in enumerate(zip(_VGG_WIDTHS, _VGG_INDICES, strict=True)):
            convolutions = nn.ModuleDict()
            for width, index in zip(widths, indices, strict=True):
                convolutions[str(index)] = nn.Conv2d(channels, width, 3, padding=1)
                channels = width
            self.slices[str(level)] = convolutions
            self.weights[str(level)] = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.register_buffer("shift", torch.tensor(_SHIFT)[None, :, None, None])
        self.register_buffer("scale", torch.tensor(_SCALE)[None, :, None, None])
        self.requires_grad_(False)

    @classmethod
    def load(cls, path: str | Path) -> "LPIPS":
        """Read the state of the `lpips` package's VGG variant (.safetensors or .pth).

        Raises:
            ModelFilesError: the file is missing, damaged or of something else.
        """
        given = _read(Path(path))
        named: dict[str, Any] = {"shift": torch.tensor(_SHIFT)[None, :, None, None]}
        named["scale"] = torch.tensor(_SCALE)[None, :, None, None]
        for level, indices in enumerate(_VGG_INDICES):
            names = {f"lin{level}.model.1.weight": f"weights.{level}"}
            for index in indices:
                for part in ("weight", "bias"):
                    names[f"net.slice{level + 1}.{index}.{part}"] = f"slices.{level}.{index}.{part}"
            named |= {ours: given[theirs] for theirs, ours in names.items() if theirs in given}
        model = cls()
        load_strict(model, named, str(path))
        return model.eval()

    def forward(self, first_BCHW: Float[Tensor, "B 3 H W"], second_BCHW: Float[Tensor, "B 3 H W"]) -> Tensor:
        """Mean distance over the batch."""
        features_BCHW = (torch.cat([first_BCHW, second_BCHW]) - self.shift) / self.scale
        distance = first_BCHW.new_zeros(())
        for level, convolutions in self.slices.items():
            assert isinstance(convolutions, nn.ModuleDict)
            if level != "0":
                features_BCHW = F.max_pool2d(features_BCHW, 2)
            for convolution in convolutions.values():
                features_BCHW = F.relu(convolution(features_BCHW))
            unit_BCHW = features_BCHW.float() / (features_BCHW.float().norm(dim=1, keepdim=True) + 1e-10)
            difference_BCHW = torch.sub(*unit_BCHW.chunk(2)).square()
            distance = distance + (self.weights[level] * difference_BCHW).sum(1).mean()
        return distance


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_tensors(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ModelFilesError(f"cannot read the LPIPS weights {path}: {error.strerror}; check the path") from error
    except Exception as error:  # torch's reader raises UnpicklingError, RuntimeError, EOFError and more
        raise ModelFilesError(f"{path} is not a file of tensors ({error}); make it again") from error
