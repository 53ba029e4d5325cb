"""VQ-GANs of taming-transformers (arXiv:2012.09841) and Chameleon's image tokenizer, which is one: their files to ours.

A checkpoint is a pickled file of tensors and a YAML file of settings beside it. The network is
`cm3.tokenizers.taming.TamingVQGAN`; all names but those of the codebook are theirs.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from cm3.checkpoint import load_strict
from cm3.config import read_yaml
from cm3.errors import CM3Error, ModelFilesError, RequestError
from cm3.interop.pickled import read_tensors
from cm3.tokenizers.taming import TamingConfig, TamingVQGAN

THEIR_CODEBOOK = "quantize.embedding.weight"
OUR_CODEBOOK = "quantizer.codebook_QE"
_RENAMED = {
    THEIR_CODEBOOK: OUR_CODEBOOK,
    "quantize.embed.weight": OUR_CODEBOOK,  # GumbelVQ's
    "quantize.proj.weight": "scores.weight",
    "quantize.proj.bias": "scores.bias",
}
_TRAINING_ONLY = "loss."
"""Prefix of the discriminator and the perceptual loss."""


def load_vqgan(source: str | Path, settings: str | Path | None = None) -> TamingVQGAN:
    """Read a checkpoint of taming-transformers.

    Args:
        source: The checkpoint, such as `last.ckpt` or Chameleon's `vqgan.ckpt`.
        settings: The YAML file of its training; None looks for one beside it.

    Raises:
        RequestError: there is not exactly one YAML file beside the checkpoint.
        ModelFilesError: a file is missing or damaged, of another kind of network, or the two do not fit.
    """
    source = Path(source)
    tensors = read_tensors(source, "state_dict")
    if settings is None:
        beside = [path for pattern in ("*.yaml", "*.yml") for path in sorted(source.parent.glob(pattern))]
        if len(beside) != 1:
            found = ", ".join(path.name for path in beside) or "none"
            raise RequestError(f"{source} needs the YAML file of its settings, found beside it: {found}; give --config")
        settings = beside[0]
    return vqgan_of_tensors(config_of_yaml(settings), tensors, str(source))


def vqgan_of_tensors(config: TamingConfig, tensors: Mapping[str, Tensor], source: str) -> TamingVQGAN:
    """The network with weights under their names; what only training needs is left out.

    Raises:
        ModelFilesError: lists missing, unexpected and wrongly shaped names.
    """
    model = TamingVQGAN(config)
    renamed = {
        _RENAMED.get(name, name): tensor for name, tensor in tensors.items() if not name.startswith(_TRAINING_ONLY)
    }
    load_strict(model, renamed, source)
    return model


def config_of_yaml(path: str | Path) -> TamingConfig:
    """The shape of the network in the settings of a training.

    Raises:
        ModelFilesError: there is no such file, or it is of a network that `TamingVQGAN` is not.
    """
    values: Any = read_yaml(path)
    try:
        model = values.get("model", values)
        params = model["params"]
        network = params["ddconfig"]
        return taming_config(
            image_size=network["resolution"],
            attention_sizes=network["attn_resolutions"] or (),
            base_channels=network["ch"],
            channel_multipliers=tuple(network["ch_mult"]),
            num_residual_blocks=network["num_res_blocks"],
            latent_width=network["z_channels"],
            num_codes=params["n_embed"],
            code_width=params["embed_dim"],
            gumbel=str(model.get("target", "")).endswith("GumbelVQ"),
            fixed={
                "remap": (params.get("remap"), None),
                "double_z": (network.get("double_z", False), False),
                "in_channels": (network.get("in_channels", 3), 3),
                "out_ch": (network.get("out_ch", 3), 3),
                "attn_type": (network.get("attn_type", "vanilla"), "vanilla"),
            },
        )
    except (KeyError, TypeError, AttributeError, CM3Error) as error:
        raise ModelFilesError(f"{path} has no settings of a VQ-GAN that this code knows: {error}") from error


def taming_config(
    *, image_size: int, attention_sizes: Iterable[int], fixed: Mapping[str, tuple[Any, Any]], **shape: Any
) -> TamingConfig:
    """Our settings of theirs.

    Args:
        image_size: Side of the pictures.
        attention_sizes: Sides of the feature maps that have attention.
        fixed: What cannot be set here: name to the value found and the one that is known.
        shape: Fields of `TamingConfig`.

    Raises:
        ModelFilesError: a fixed value is another one.
        ConfigError: the shape is impossible.
    """
    if other := [f"{name}={found!r}" for name, (found, known) in fixed.items() if found != known]:
        raise ModelFilesError(f"{', '.join(other)} makes another network than TamingVQGAN")
    wanted = set(attention_sizes)
    levels = tuple(level for level in range(len(shape["channel_multipliers"])) if image_size // 2**level in wanted)
    return TamingConfig(image_size=image_size, attention_levels=levels, **shape)
