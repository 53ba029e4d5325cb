"""A model with random weights that draws pictures of the size of scenes."""

import torch

from cm3.data.scenes import example
from cm3.model.config import ModelConfig
from cm3.model.transformer import Transformer
from cm3.pipeline import CM3
from cm3.tokenizers.document import DocumentTokenizer
from cm3.tokenizers.image import ImageTokenizer
from cm3.tokenizers.text import TextTokenizer, TextTokenizerConfig
from cm3.tokenizers.vocabulary import Vocabulary
from cm3.tokenizers.vqgan import VQGAN, VQGANConfig


def scene_sized_model(max_positions: int) -> CM3:
    """Return a model of 64x64 pictures, 4x4 codes each."""
    torch.manual_seed(1)
    captions = [example(0, "train", index).caption for index in range(100)]
    text = TextTokenizer.train(captions, TextTokenizerConfig(vocabulary_size=320))
    shape = {"base_channels": 16, "channel_multipliers": (1, 1), "num_residual_blocks": 1}
    image = ImageTokenizer(VQGAN(VQGANConfig(image_size=64, downsampling=16, num_codes=32, code_width=8, **shape)))
    vocabulary = Vocabulary.build(text.size, 32, num_sentinels=16)
    config = ModelConfig(
        vocabulary_size=vocabulary.size,
        width=32,
        num_layers=1,
        num_heads=4,
        max_positions=max_positions,
        init_std=0.3,
        zero_init_outputs=False,
    )
    return CM3(Transformer(config).eval(), DocumentTokenizer(text, image, vocabulary))
