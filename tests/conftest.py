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
os.environ["TORCH_EXTENSIONS_DIR"] = os.path.join(
    _scratch, "extensions"
)  # a lock left there stops later builds
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
