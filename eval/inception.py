"""Inception-v3 as FID and KID use it: the network of December 2015, pool3 features, and how pictures reach it.

The network is that of arXiv 1512.00567 with TensorFlow's habits (average pooling does not count the padding, and the
last block pools by maximum). The weights are not part of this package. A file of them is what makes a Fréchet
distance an FID; published figures still differ by how pictures are brought to 299x299, so that the
convention belongs into the name of every figure:

- torch-fidelity: bilinear as TensorFlow 1 did it, corners at 0 and without smoothing; also clean-fid's
  `legacy_tensorflow`.
- clean-fid: Pillow's bicubic, smoothed, in floating point, clipped; its mode `clean`.
- pytorch-fid: torch's bilinear without smoothing; also clean-fid's `legacy_pytorch`. CM3Leon's figures.

B batch   C channels   H W height, width   N pictures   F 2048 features
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image as PILImage
from torch import Tensor, nn

from cm3.checkpoint import load_strict
from cm3.errors import ModelFilesError
from cm3.retrieval.foreign_clip import hash_files
from cm3.retrieval.vectors import in_batches
from cm3.tokenizers.image import load_image

FidConvention = Literal["torch-fidelity", "clean-fid", "pytorch-fid"]

INPUT_SIDE = 299
NUM_FEATURES = 2048
WEIGHTS_HASH = "6726825d"
"""First digits of the SHA-256 of the weights, which their authors put into the name of the file."""

WEIGHTS_HELP = (
    "FID and KID need the weights of Inception-v3: fetch pt_inception-2015-12-05-6726825d.pth (91 MB) from the release "
    "fid_weights of github.com/mseitzer/pytorch-fid, or the same file as weights-inception-2015-12-05-6726825d.pth "
    "from the release v0.2.0 of github.com/toshas/torch-fidelity, and give its path as inception.weights; without it "
    "the Fréchet distance on our own encoder (inception: null) compares models too, but is no FID"
)

_Kernel = int | tuple[int, int]
_Step = tuple[str, int, _Kernel]
"""Name, output channels and kernel of a convolution."""


class Convolution(nn.Module):
    """Convolution, batch normalisation by stored statistics, ReLU. Steps of 1 keep the size, unless `valid`."""

    def __init__(self, inputs: int, outputs: int, kernel: _Kernel, stride: int = 1, valid: bool = False) -> None:
        super().__init__()
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (0, 0) if valid or stride > 1 else (sides[0] // 2, sides[1] // 2)
        self.conv = nn.Conv2d(inputs, outputs, sides, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x_BCHW)))


class Mixed(nn.Module):
    """Branches of convolutions over the same input, side by side; names are those of the files of weights.

    Args:
        inputs: Channels that come in.
        branches: Each a chain of steps. A chain may end in a pair of steps, both of which read what came before it.
        pooled: Channels of the branch behind the pooling; None takes the pooling as it is.
        pool: Average or maximum over 3x3.
        halve: Halve the sides, in the last step of each branch and in the pooling.
    """

    def __init__(
        self,
        inputs: int,
        branches: Sequence[Sequence[_Step | tuple[_Step, _Step]]],
        pooled: int | None,
        pool: Literal["average", "maximum"] = "average",
        halve: bool = False,
    ) -> None:
        super().__init__()
        self.pool, self.stride = pool, 2 if halve else 1
        self.chains: list[list[list[str]]] = []
        for branch in branches:
            width, chain = inputs, []
            for place, step in enumerate(branch):
                forks: tuple[_Step, ...] = step if isinstance(step[0], tuple) else (step,)
                stride = self.stride if place == len(branch) - 1 else 1
                for name, outputs, kernel in forks:
                    self.add_module(name, Convolution(width, outputs, kernel, stride))
                width = sum(outputs for _, outputs, _ in forks)
                chain.append([name for name, _, _ in forks])
            self.chains.append(chain)
        self.branch_pool = None if pooled is None else Convolution(inputs, pooled, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        outputs = []
        for chain in self.chains:
            y_BCHW = x_BCHW
            for names in chain:
                y_BCHW = torch.cat([self.get_submodule(name)(y_BCHW) for name in names], dim=1)
            outputs.append(y_BCHW)
        padding = 1 if self.stride == 1 else 0
        if self.pool == "average":
            pooled_BCHW = F.avg_pool2d(x_BCHW, 3, self.stride, padding, count_include_pad=False)
        else:
            pooled_BCHW = F.max_pool2d(x_BCHW, 3, self.stride, padding)
        outputs.append(pooled_BCHW if self.branch_pool is None else self.branch_pool(pooled_BCHW))
        return torch.cat(outputs, dim=1)


def _small(inputs: int, pooled: int) -> Mixed:
    """35x35: figure 5 of arXiv 1512.00567, with one 5x5."""
    double: list[_Step] = [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)]
    return Mixed(inputs, [[("branch1x1", 64, 1)], [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)], double], pooled)


def _first_halving() -> Mixed:
    double: list[_Step] = [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)]
    return Mixed(288, [[("branch3x3", 384, 3)], double], None, "maximum", halve=True)


def _middle(width: int) -> Mixed:
    """17x17: figure 6, 7x7 split into rows and columns."""
    row, column = (1, 7), (7, 1)
    single: list[_Step] = [("branch7x7_1", width, 1), ("branch7x7_2", width, row), ("branch7x7_3", 192, column)]
    double: list[_Step] = [("branch7x7dbl_1", width, 1)]
    for number, (outputs, kernel) in enumerate([(width, column), (width, row), (width, column), (192, row)], 2):
        double.append((f"branch7x7dbl_{number}", outputs, kernel))
    return Mixed(768, [[("branch1x1", 192, 1)], single, double], 192)


def _second_halving() -> Mixed:
    single: list[_Step] = [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3)]
    double: list[_Step] = [("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7)), ("branch7x7x3_3", 192, (7, 1))]
    return Mixed(768, [single, [*double, ("branch7x7x3_4", 192, 3)]], None, "maximum", halve=True)


def _large(inputs: int, pool: Literal["average", "maximum"]) -> Mixed:
    """8x8: figure 7, with forks into rows and columns."""

    def fork(name: str) -> tuple[_Step, _Step]:
        return (f"{name}a", 384, (1, 3)), (f"{name}b", 384, (3, 1))

    single: list[_Step | tuple[_Step, _Step]] = [("branch3x3_1", 384, 1), fork("branch3x3_2")]
    double: list[_Step | tuple[_Step, _Step]] = [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3)]
    return Mixed(inputs, [[("branch1x1", 320, 1)], single, [*double, fork("branch3x3dbl_3")]], 192, pool)


class Inception(nn.Module):
    """Pictures of 299x299 in [-1, 1] to 2048 features, without the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3, valid=True)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3, valid=True)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _small(192, 32), _small(256, 64), _small(288, 64)
        self.Mixed_6a = _first_halving()
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = map(_middle, (128, 160, 160, 192))
        self.Mixed_7a = _second_halving()
        self.Mixed_7b, self.Mixed_7c = _large(1280, "average"), _large(2048, "maximum")

    def forward(self, image_BCHW: Tensor) -> Tensor:
        x_BCHW = F.max_pool2d(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(image_BCHW))), 3, 2)
        x_BCHW = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x_BCHW)), 3, 2)
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                x_BCHW = block(x_BCHW)
        return x_BCHW.mean((2, 3))


class InceptionFeatures:
    """The network with one way of bringing pictures to it.

    Args:
        network: With the weights.
        convention: See the head of this file.
        weights_hash: SHA-256 (hex) of the file they came from.
        device: Torch device; None is a GPU if there is one.
    """

    batch_size = 32
    """Pictures at a time."""

    def __init__(
        self,
        network: Inception,
        convention: FidConvention,
        weights_hash: str,
        device: str | torch.device | None = None,
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.network = network.eval().requires_grad_(False).to(self.device)
        self.convention, self.weights_hash = convention, weights_hash

    def encode_images(self, images: Sequence[PILImage.Image]) -> Float[np.ndarray, "N F"]:
        """Features of pictures of any size, float32."""

        def encode(part: Sequence[PILImage.Image]) -> Tensor:
            input_BCHW = torch.stack([network_input(image, self.convention) for image in part])
            features_BF: Tensor = self.network(input_BCHW.to(self.device))
            return features_BF

        return in_batches(encode, images, self.batch_size, NUM_FEATURES)


def network_input(image: PILImage.Image, convention: FidConvention) -> Float[Tensor, "C H W"]:
    """A picture of any size as the network takes it: 3 x 299 x 299."""
    pixels_HWC = np.asarray(load_image(image), dtype=np.float32)
    if convention == "clean-fid":
        channels = [PILImage.fromarray(np.ascontiguousarray(pixels_HWC[..., c])) for c in range(3)]
        size = (INPUT_SIDE, INPUT_SIDE)
        resized = [np.asarray(channel.resize(size, PILImage.Resampling.BICUBIC)) for channel in channels]
        return (torch.from_numpy(np.stack(resized).clip(0, 255)) - 128) / 128
    pixels_CHW = torch.from_numpy(pixels_HWC.transpose(2, 0, 1).copy())
    if convention == "torch-fidelity":
        rows, columns = (_tensorflow_bilinear(side) for side in pixels_CHW.shape[1:])
        return (rows @ pixels_CHW @ columns.T - 128) / 128
    resized_1CHW = F.interpolate(pixels_CHW[None] / 255, (INPUT_SIDE, INPUT_SIDE), mode="bilinear", align_corners=False)
    return 2 * resized_1CHW[0] - 1


def _tensorflow_bilinear(side: int) -> Tensor:
    """Weights [299, side] of TensorFlow 1's `resize_bilinear`: place i reads at i * side / 299."""
    place = torch.arange(INPUT_SIDE, dtype=torch.float32) * (side / INPUT_SIDE)
    low = place.long()
    share = place - low
    weights = torch.zeros(INPUT_SIDE, side)
    weights[torch.arange(INPUT_SIDE), low] = 1 - share
    weights[torch.arange(INPUT_SIDE), (low + 1).clamp(max=side - 1)] += share
    return weights


def open_inception(
    weights: str | Path, convention: FidConvention, device: str | torch.device | None = None
) -> InceptionFeatures:
    """Read a file of weights.

    Raises:
        ModelFilesError: there is no file, it is damaged, or it is not the one that FID is defined by.
    """
    path = Path(weights)
    if not path.is_file():
        raise ModelFilesError(f"no weights at {path}. {WEIGHTS_HELP}")
    found = hash_files([path])
    if not found.startswith(WEIGHTS_HASH):
        raise ModelFilesError(
            f"the SHA-256 of {path} starts with {found[:8]}, that of the weights with {WEIGHTS_HASH}: features of "
            f"other weights give no FID. {WEIGHTS_HELP}"
        )
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises almost anything on damaged files
        raise ModelFilesError(f"cannot read {path} ({type(error).__name__}); fetch it again") from error
    network = Inception()
    counters = {name: tensor for name, tensor in network.state_dict().items() if name.endswith("num_batches_tracked")}
    wanted = {name: tensor for name, tensor in tensors.items() if not name.startswith("fc.")}
    load_strict(network, counters | wanted, str(path))
    return InceptionFeatures(network, convention, found, device)
