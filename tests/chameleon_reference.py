"""A Chameleon that reads text: a tokenizer with the names and the structure of the public one, its processor, a model.

The public tokenizer is a BPE of bytes whose table begins with the specials, the image codes, the marks and ids that
were left over. Here there are 16 codes instead of 8192, 8 such ids instead of 512, and 40 learnt pieces.
"""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage
from tiny_chameleon import NUM_CODES, SIDE, image_name, save_foreign, save_vqgan, tiny_chameleon

from cm3.interop.chameleon_hf import import_chameleon

FIRST_CODE = 4
EOSS, BREAK = FIRST_CODE + NUM_CODES, FIRST_CODE + NUM_CODES + 1
FIRST_UNUSED, NUM_UNUSED = BREAK + 1, 8
SEPARATOR = FIRST_UNUSED + NUM_UNUSED
PLACEHOLDER, FIRST_TEXT = SEPARATOR + 1, SEPARATOR + 2
VOCABULARY_SIZE = FIRST_TEXT + 256 + 40
CODES = (SIDE // 2) ** 2
TEXTS = [
    "What do you see in this picture?",
    "a red circle left of a blue square, and 365 green stars",
    "The quick brown fox: naïve café, 漢字, \U0001f600!",
    "  two  spaces\n\tand tabs ",
]


def marks() -> list[str]:
    """The names of the first ids, in their order."""
    left_over = [f"<reserved{id - 4:05d}>" for id in range(FIRST_UNUSED, SEPARATOR)]
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    codes = [image_name(code) for code in range(NUM_CODES)]
    return [*specials, *codes, "<eoss>", "<racm3:break>", *left_over, "<reserved08706>", "<image>"]


def text_tokenizer() -> Any:
    """The tokenizer, of Hugging Face's library."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("IMGIMG[A-J]+Z"), behavior="isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=marks(),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    assert tokenizer.get_vocab_size() == VOCABULARY_SIZE
    return tokenizer


def processor() -> Any:
    """`ChameleonProcessor`, with the scaling of pixels that Chameleon was trained with; its own is 0.0078."""
    from transformers import ChameleonProcessor, PreTrainedTokenizerFast
    from transformers.models.chameleon.image_processing_pil_chameleon import ChameleonImageProcessorPil

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=text_tokenizer(),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        sep_token="<reserved08706>",
        padding_side="left",
    )
    side = {"height": SIDE, "width": SIDE}
    images = ChameleonImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=side, rescale_factor=1 / 127.5)
    return ChameleonProcessor(images, tokenizer, image_seq_length=CODES)


def reading_chameleon(**changes: Any) -> Any:
    """A model of `transformers` with these ids."""
    names = text_tokenizer().get_vocab()
    shape = {"vocab_size": VOCABULARY_SIZE, "vocabulary_map": names, "max_position_embeddings": 320}
    return tiny_chameleon(**shape, **changes)


def import_reading(foreign: Any, folder: Path, *, decoder: bool = True) -> Path:
    """Save a model with its tokenizer as its own library does, and import it."""
    source = save_foreign(foreign, folder / "theirs")
    (source / "tokenizer.json").write_text(text_tokenizer().to_str())
    vqgan = save_vqgan(foreign, folder / "tokenizer") if decoder else None
    import_chameleon(source, folder / "ours", vqgan=vqgan)
    return folder / "ours"


def picture(seed: int) -> PILImage.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    return PILImage.fromarray(pixels)
