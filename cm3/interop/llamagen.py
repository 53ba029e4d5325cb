"""LlamaGen's image tokenizers (arXiv:2406.06525, section 2.1), such as `vq_ds16_c2i.pt`, as networks of ours.

They are VQ-GANs of taming-transformers with attention at the lowest resolution, other names, and codes of unit length:
a code is the one of largest cosine. Among vectors of one length that is also the nearest, whatever the length of the
latent, so that `TamingVQGAN` with the codebook brought to unit length gives the same codes and the same pictures.
"""

import re
from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from cm3.errors import ConfigError, ModelFilesError
from cm3.interop.taming import THEIR_CODEBOOK, vqgan_of_tensors
from cm3.tokenizers.taming import TamingConfig, TamingVQGAN

_USAGE = "quantize.codebook_used"
"""A record of its training."""
_MIDDLE = ("block_1", "attn_1", "block_2")
_PARTS = {"res": "block", "attn": "attn", "downsample": "downsample", "upsample": "upsample"}
_BLOCK = re.compile(r"(encoder|decoder)\.conv_blocks\.(\d+)\.(res|attn|downsample|upsample)\.(.+)")
_MID = re.compile(r"(encoder|decoder)\.mid\.([012])\.(.+)")


def is_llamagen(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the names are LlamaGen's."""
    return any(name.startswith("encoder.conv_blocks.") for name in tensors)


def llamagen_vqgan(tensors: Mapping[str, Tensor], image_size: int, source: str) -> TamingVQGAN:
    """The network of a file of LlamaGen, whose shape its tensors tell.

    Args:
        tensors: Under LlamaGen's names.
        image_size: Side of the pictures, which nothing in the file tells: it was trained on 256, used up to 512.
        source: The file, for errors.

    Raises:
        ModelFilesError: lists missing, unexpected and wrongly shaped names.
        ConfigError: the pictures have no size that the network can shrink.
    """
    config = _config(tensors, image_size, source)
    last = len(config.channel_multipliers) - 1
    renamed = {_our_name(name, last): tensor for name, tensor in tensors.items() if name != _USAGE}
    renamed[THEIR_CODEBOOK] = F.normalize(tensors[THEIR_CODEBOOK].float(), dim=-1)
    return vqgan_of_tensors(config, renamed, source)


def _config(tensors: Mapping[str, Tensor], image_size: int, source: str) -> TamingConfig:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    matches = [match for name in shapes if (match := _BLOCK.fullmatch(name)) and match[1] == "encoder"]
    levels = 1 + max((int(match[2]) for match in matches), default=-1)
    first = re.compile(r"encoder\.conv_blocks\.0\.res\.\d+\.conv1\.weight")
    try:
        base_channels = shapes["encoder.conv_in.weight"][0]
        widths = [shapes[f"encoder.conv_blocks.{level}.res.0.conv1.weight"][0] for level in range(levels)]
        code_width, latent_width = shapes["quant_conv.weight"][:2]
        return TamingConfig(
            image_size=image_size,
            base_channels=base_channels,
            channel_multipliers=tuple(width // base_channels for width in widths),
            num_residual_blocks=sum(1 for name in shapes if first.fullmatch(name)),
            attention_levels=(levels - 1,),
            latent_width=latent_width,
            num_codes=shapes[THEIR_CODEBOOK][0],
            code_width=code_width,
        )
    except KeyError as error:
        raise ModelFilesError(
            f"{source} has the names of LlamaGen's image tokenizers but no {error.args[0]}; download it again"
        ) from error
    except (ConfigError, ValueError, IndexError) as error:
        raise ConfigError(f"{source} cannot be an image tokenizer of {image_size} pixels: {error}") from error


def _our_name(name: str, last: int) -> str:
    """The name in taming-transformers, whose decoder counts levels from the highest resolution."""
    if match := _BLOCK.fullmatch(name):
        side, level, part, rest = match.groups()
        if side == "encoder":
            return f"encoder.down.{level}.{_PARTS[part]}.{rest}"
        return f"decoder.up.{last - int(level)}.{_PARTS[part]}.{rest}"
    if match := _MID.fullmatch(name):
        return f"{match[1]}.mid.{_MIDDLE[int(match[2])]}.{match[3]}"
    return name
