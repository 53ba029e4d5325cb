"""Packaging of open-cm3: names, the package map, dependencies, and the `cm3` command.

`tokenizers/`, `training/` and `eval/` stand at the top of the repository and are installed inside `cm3`, so
that the package that is installed has the one top-level name `cm3`. Exact versions are in `constraints.txt`.
"""

import re
from pathlib import Path

from setuptools import setup

root = Path(__file__).parent
version = re.search(r'^__version__ = "(.+)"$', (root / "cm3/__init__.py").read_text("utf-8"), re.MULTILINE)[1]

retrieval = ["faiss-cpu>=1.9"]
evaluation = ["scipy>=1.11", "torchmetrics>=1.6"]
serve = ["fastapi>=0.115", "gradio>=6", "uvicorn>=0.30"]
interop = ["transformers>=5"]
tune = ["peft>=0.17"]

setup(
    name="open-cm3",
    version=version,
    description="An open multimodal transformer that writes text and pictures, and reads both (CM3Leon)",
    long_description=(root / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[
        "cm3",
        "cm3.model",
        "cm3.data",
        "cm3.generation",
        "cm3.interop",
        "cm3.retrieval",
        "cm3.tokenizers",
        "cm3.training",
        "cm3.eval",
    ],
    package_dir={
        "cm3": "cm3",
        "cm3.tokenizers": "tokenizers",
        "cm3.training": "training",
        "cm3.eval": "eval",
    },
    package_data={"cm3": ["py.typed", "assets/**/*"], "cm3.model": ["*.cpp"]},
    entry_points={"console_scripts": ["cm3 = cm3.cli:main"]},
    install_requires=[
        "torch>=2.11",
        "numpy>=2.0",
        "einops>=0.8",
        "sentencepiece>=0.2",
        "safetensors>=0.5",
        "datasets>=4.0",
        "pillow>=11",
        "huggingface_hub>=1.0",
        "jsonargparse[signatures]>=4.49",
        "jaxtyping>=0.3",
        "pyyaml>=6",
        "tensorboard>=2.18",
        "tqdm>=4.66",
        'deepspeed>=0.19.8; sys_platform == "linux"',
    ],
    extras_require={
        "flash": ["flash-attn>=2.7"],
        "retrieval": retrieval,
        "eval": evaluation,
        "serve": serve,
        "interop": interop,
        "tune": tune,
        "wandb": ["wandb>=0.19"],
        "dev": [
            "beartype>=0.20",
            "hypothesis>=6.100",
            "mypy>=1.15",
            "pytest>=8",
            "ruff>=0.9",
            "setuptools>=77",
            "types-PyYAML",
            "webdataset>=0.2.100",
            "wheel>=0.45",
            *interop,
            *retrieval,
            *tune,
        ],
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
