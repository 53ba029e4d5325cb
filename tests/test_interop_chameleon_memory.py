"""Importing a model that is larger than what is in memory at once."""

import json
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers")

from tiny_chameleon import VOCABULARY_SIZE, save_vqgan, tiny_chameleon, tokenizer_json

WIDTH, INNER, LAYERS, HEADS, PARTS = 1024, 2816, 24, 8, 4
IMPORT = """
import re, sys
from pathlib import Path
from cm3.interop.chameleon_hf import import_chameleon
from cm3.interop.taming import load_vqgan

def peak():  # of this program; what `resource` tells begins with that of the one that started it
    return int(re.search("VmHWM: +([0-9]+)", Path("/proc/self/status").read_text().replace("\\t", " "))[1])

load_vqgan(sys.argv[1] + "/tokenizer/vqgan.ckpt")
before = peak()
import_chameleon(sys.argv[1], sys.argv[2], max_shard_size="128MB")
print(peak() - before)
"""


def part_of_a_model():
    """One of four files of a model of 1.2 GB, all zeros."""
    head, rows, inner = WIDTH // HEADS, WIDTH // PARTS, INNER // PARTS
    shapes = {"tok_embeddings.weight": (VOCABULARY_SIZE, rows), "output.weight": (VOCABULARY_SIZE // PARTS, WIDTH)}
    shapes["norm.weight"] = (WIDTH,)
    for layer in range(LAYERS):
        prefix = f"layers.{layer}."
        shapes |= {f"{prefix}attention.{name}.weight": (rows, WIDTH) for name in ("wq", "wk", "wv")}
        shapes |= {f"{prefix}feed_forward.{name}.weight": (inner, WIDTH) for name in ("w1", "w3")}
        shapes |= {f"{prefix}attention.wo.weight": (WIDTH, rows), f"{prefix}feed_forward.w2.weight": (WIDTH, inner)}
        shapes |= {f"{prefix}{name}.weight": (WIDTH,) for name in ("attention_norm", "ffn_norm")}
        for name in ("q_normalization", "k_normalization"):
            shapes |= {f"{prefix}attention.{name}.{kind}": (head,) for kind in ("weight", "bias")}
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_sharded_model_of_a_gigabyte_is_imported_a_file_at_a_time(tmp_path):
    folder = tmp_path / "theirs" / "models" / "30b"
    folder.mkdir(parents=True)
    for index in range(PARTS):
        torch.save(part_of_a_model(), folder / f"consolidated.{index:02}.pth")
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert size > 1.1e9
    params = {"dim": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "vocab_size": VOCABULARY_SIZE}
    params |= {"norm_eps": 1e-5, "qk_normalization": True, "swin_norm": True}
    (folder / "params.json").write_text(json.dumps({"model": params}))
    (folder / "consolidate_params.json").write_text(json.dumps({"model_parallel_size": PARTS}))
    save_vqgan(tiny_chameleon(), tmp_path / "theirs" / "tokenizer")
    (tmp_path / "theirs" / "tokenizer" / "text_tokenizer.json").write_text(json.dumps(tokenizer_json()))
    command = [sys.executable, "-c", IMPORT, str(tmp_path / "theirs"), str(tmp_path / "ours")]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    written = sum(path.stat().st_size for path in (tmp_path / "ours").glob("model-*.safetensors"))
    assert written > 1.1e9
    kilobytes = int(found.stdout)
    assert 100_000 < kilobytes < 400_000  # a file of 128 MB, and parts of one tensor; the whole would be 1.2 million
