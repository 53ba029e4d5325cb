"""The retrieval study on random weights: what they compare, what only the pair's own ids count."""

import math

import pytest
import torch

from cm3.data.sources import SourceConfig, open_source
from cm3.errors import ConfigError
from cm3.eval import retrieval_tasks
from cm3.eval.document_tasks import PairSet
from cm3.eval.likelihood import Likelihood
from cm3.eval.retrieval_tasks import RetrievedLikelihood, RetrievedSceneGeneration
from cm3.eval.scene_tasks import SceneSet
from cm3.generation.context import ContextFinder
from cm3.model.config import ModelConfig
from cm3.model.transformer import Transformer
from cm3.pipeline import CM3
from cm3.pretrained import demo_folder
from cm3.retrieval.encoder import open_encoder
from cm3.retrieval.memory import Memory
from cm3.tokenizers.document import DocumentTokenizer

SCENES = SourceConfig(kind="scenes", split="validation", limit=2)


@pytest.fixture(scope="module")
def model():
    """A random transformer behind the embedded tokenizers."""
    torch.manual_seed(0)
    tokenizer = DocumentTokenizer.load(demo_folder())
    config = ModelConfig(
        vocabulary_size=tokenizer.vocabulary.size,
        width=32,
        num_layers=1,
        num_heads=4,
        max_positions=512,
        position="rope",
        init_std=0.3,
        zero_init_outputs=False,
    )
    return CM3(Transformer(config).eval(), tokenizer)


@pytest.fixture(scope="module")
def memory(tmp_path_factory, model):
    folder = tmp_path_factory.mktemp("memory")
    source = open_source(SourceConfig(kind="scenes", split="train", limit=12))
    Memory.build(source, model.tokenizer, open_encoder("demo"), folder, encoder_name="demo")
    return str(folder)


def test_likelihood_without_documents_is_the_plain_one(model, memory):
    pairs = PairSet(source=SCENES)
    result = RetrievedLikelihood(pairs=pairs, memory=memory, documents=(0, 2), max_similarity=1.0).run(model)
    plain = Likelihood(pairs=pairs).run(model).metrics["bits per image code, all"]
    without, behind = (result.metrics[f"bits per image code, {n} documents, all"] for n in (0, 2))
    assert without.value == pytest.approx(plain.value, rel=1e-5)
    assert without.count == behind.count == 2
    assert behind.value != pytest.approx(without.value, rel=1e-5)  # the context is read
    assert result.protocol["memory"] == memory and -1 <= result.protocol["details"]["mean score"] <= 1


def test_likelihood_counts_only_the_pair_itself(model, memory):
    pairs = PairSet(source=SCENES)
    result = RetrievedLikelihood(pairs=pairs, memory=memory, documents=(1,), max_similarity=1.0).run(model)
    for kind in ("bits per image code", "bits per text id"):
        estimate = result.metrics[f"{kind}, 1 documents, all"]
        assert 0 < estimate.value < 4 * math.log2(model.tokenizer.vocabulary.size)


def test_the_control_reads_what_another_pair_retrieved(model, memory, monkeypatch):
    found = [[items] for items in "ab"]
    read = []

    def own_bits(model, context, document):
        read.append("".join(context))
        return 1.0, 1, 1.0, 1

    monkeypatch.setattr(retrieval_tasks, "_own_bits", own_bits)
    monkeypatch.setattr(retrieval_tasks, "mean_score", lambda memory, found: 0.0)
    monkeypatch.setattr(retrieval_tasks.ContextFinder, "find", lambda self, requests, count: found)
    settings = {"pairs": PairSet(source=SCENES), "memory": memory}
    metrics = RetrievedLikelihood(**settings, documents=(0, 1)).run(model).metrics
    assert read == ["", "", "a", "b", "b", "a"]
    assert "bits per text id, 1 documents of the next pair, all" in metrics
    assert not [name for name in RetrievedLikelihood(**settings, documents=(0,)).run(model).metrics if "next" in name]


def test_likelihood_refuses_a_memory_without_anything_admissible(model, memory):
    task = RetrievedLikelihood(pairs=PairSet(source=SCENES), memory=memory, max_similarity=-1.0)
    with pytest.raises(ConfigError, match="holds no document for any of the captions; raise max_similarity"):
        task.run(model)


def test_a_row_of_the_memory_is_not_found_for_itself(model, memory, monkeypatch):
    """Its own text has similarity 1 and would come first, were it not known by its row."""
    seen = []
    find = ContextFinder.find

    def recorded(self, requests, count):
        seen.extend(zip(requests, find(self, requests, count), strict=True))
        return [items for _, items in seen]

    monkeypatch.setattr(ContextFinder, "find", recorded)
    source = SourceConfig(kind="scenes", split="train", limit=3)
    RetrievedLikelihood(pairs=PairSet(source=source), memory=memory, documents=(1,), max_similarity=1.01).run(model)
    assert len(seen) == 3
    for request, items in seen:
        assert items and items[0].document.metadata["row"] != request.metadata["row"]


def test_generation_behind_fewer_documents_than_named_is_refused(model, memory):
    task = RetrievedSceneGeneration(
        scenes=SceneSet(split="novel", size=2), memory=memory, documents=(12,), max_similarity=1.0
    )
    with pytest.raises(ConfigError, match="documents=12 do not fit the model's context behind every caption"):
        task.run(model)


def test_generation_is_graded_for_each_number_of_documents(model, memory):
    task = RetrievedSceneGeneration(scenes=SceneSet(split="novel", size=2), memory=memory, documents=(0, 1))
    result = task.run(model)
    assert len(result.metrics) == 4
    for count in (0, 1):
        assert 0 <= result.metrics[f"stated objects found by shape and colour, {count} documents"].value <= 1
    assert result.protocol["references"]["split"] == "novel" and result.protocol["retrieve"] == 1
