"""Settings of the whole suite: shape checks, seeds, threads, and nothing written outside the checkout.

Shapes in the signatures of the packages below are checked by beartype at every call while the tests run.
The environment is set before torch is imported, and child processes inherit it.
"""

import atexit
import os
import random
import shutil
import tempfile

_scratch = tempfile.mkdtemp(prefix="cm3-tests-")
atexit.register(shutil.rmtree, _scratch, ignore_errors=True)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors here are tiny: more threads are slower
os.environ["HF_HOME"] = os.path.join(_scratch, "huggingface")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # values are compared bit for bit; set it to test on a GPU
# an own folder: the lock of a build that was killed would stop every later one
os.environ["TORCH_EXTENSIONS_DIR"] = os.path.join(_scratch, "extensions")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import jaxtyping  # noqa: E402

jaxtyping.install_import_hook(["cm3.model", "cm3.generation", "cm3.tokenizers"], "beartype.beartype")

import hypothesis  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
hypothesis.settings.register_profile("cm3", deadline=None, derandomize=True, max_examples=50, database=None)
hypothesis.settings.load_profile("cm3")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory):
    """A model folder with small random weights: 16x16 pictures of 4x4 codes, a tokenizer of scenes."""
    from cm3.data.scenes import example
    from cm3.generation.settings import SamplingSettings
    from cm3.model.config import ModelConfig
    from cm3.model.transformer import Transformer
    from cm3.pipeline import CM3
    from cm3.tokenizers.document import DocumentTokenizer
    from cm3.tokenizers.image import ImageTokenizer
    from cm3.tokenizers.text import TextTokenizer, TextTokenizerConfig
    from cm3.tokenizers.vocabulary import Vocabulary
    from cm3.tokenizers.vqgan import VQGAN, VQGANConfig

    torch.manual_seed(1)
    captions = [example(0, "train", index).caption for index in range(200)]
    text = TextTokenizer.train(captions, TextTokenizerConfig(vocabulary_size=320))
    shape = {"base_channels": 16, "channel_multipliers": (1, 1), "num_residual_blocks": 1}
    vqgan = VQGAN(VQGANConfig(image_size=16, downsampling=4, num_codes=32, code_width=8, **shape))
    vocabulary = Vocabulary.build(text.size, 32, num_sentinels=16)
    tokenizer = DocumentTokenizer(text, ImageTokenizer(vqgan), vocabulary)
    config = ModelConfig(
        vocabulary_size=vocabulary.size,
        width=32,
        num_layers=2,
        num_heads=4,
        max_positions=128,
        init_std=0.3,
        zero_init_outputs=False,
    )
    folder = tmp_path_factory.mktemp("models") / "random"
    defaults = SamplingSettings(guidance_scale=2.0, top_p=0.95)
    CM3(Transformer(config).eval(), tokenizer, defaults, card="A random model.\n").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def retrieval_folder(model_folder, tmp_path_factory: pytest.TempPathFactory):
    """Rows, an encoder and a memory for the model of `model_folder`, see `tiny_retrieval.make_retrieval`."""
    from tiny_retrieval import make_retrieval

    return make_retrieval(tmp_path_factory.mktemp("retrieval") / "shapes", model_folder)
