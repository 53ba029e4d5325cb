"""Image tokenizers of others as files of ours: `cm3 import vqgan`."""

from pathlib import Path

from cm3.checkpoint import new_folder, require_empty
from cm3.errors import RequestError
from cm3.interop.llamagen import is_llamagen, llamagen_vqgan
from cm3.interop.pickled import read_tensors
from cm3.interop.taming import load_vqgan
from cm3.tokenizers.image import ImageTokenizer
from cm3.tokenizers.taming import TamingConfig

LLAMAGEN_SIZE = 256
"""Side of the pictures that LlamaGen's were trained on."""


def import_vqgan(
    source: str | Path,
    destination: str | Path,
    settings: str | Path | None = None,
    *,
    image_size: int | None = None,
) -> TamingConfig:
    """Write the image tokenizer of a checkpoint into a folder, for `ImageTokenizer.load`.

    Args:
        source: A checkpoint of taming-transformers, such as `last.ckpt` or Chameleon's `vqgan.ckpt`, or of LlamaGen,
            such as `vq_ds16_c2i.pt`; which one, its names tell.
        destination: The folder to write; must not exist, or be empty.
        settings: The YAML file of the training, of taming-transformers only; None looks for one beside it.
        image_size: Side of the pictures, of LlamaGen only, whose files do not tell; None is `LLAMAGEN_SIZE`.

    Raises:
        RequestError: the destination holds something, there is not exactly one YAML file beside the checkpoint, or
            what is given is for the other kind.
        ModelFilesError: a file is missing or damaged, of another kind of network, the two do not fit, or the folder
            cannot be written.
        ConfigError: pictures of that size cannot be.
    """
    require_empty(destination)
    tensors = read_tensors(source, "ema", "model", "state_dict")
    if is_llamagen(tensors):
        if settings is not None:
            raise RequestError(f"{source} is LlamaGen's, whose shape its tensors tell; leave out --config")
        model = llamagen_vqgan(tensors, LLAMAGEN_SIZE if image_size is None else image_size, str(source))
    elif image_size is not None:
        raise RequestError(f"{source} is not LlamaGen's; its YAML file tells the size, so leave out --image-size")
    else:
        model = load_vqgan(source, settings)
    with new_folder(destination) as folder:
        ImageTokenizer(model).save(folder)
    return model.config
