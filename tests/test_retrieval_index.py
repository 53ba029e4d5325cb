"""The index: exact search against sorting, files, the fallback without FAISS, and FAISS where it is installed."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from cm3.errors import ConfigError, DataError, MissingDependencyError, ModelFilesError
from cm3.retrieval import index as index_module
from cm3.retrieval.index import LARGEST, VectorIndex, exact_search, has_faiss, num_clusters
from cm3.retrieval.vectors import mixed_vectors, unit_rows

needs_faiss = pytest.mark.skipif(not has_faiss(), reason="faiss is not installed")


def vectors(count, width, seed=0):
    return unit_rows(np.random.default_rng(seed).normal(size=(count, width)))


def sorted_search(vectors_ME, queries_NE, k):
    """The definition: sort all rows by (score, row)."""
    scores_NM = queries_NE @ vectors_ME.T
    rows_NK = np.array([sorted(range(len(row)), key=lambda m: (-row[m], m))[:k] for row in scores_NM])
    return np.take_along_axis(scores_NM, rows_NK, axis=1), rows_NK


@given(st.integers(0, 1000), st.integers(1, 40), st.integers(1, 12), st.integers(1, 50))
def test_exact_search_is_sorting_whatever_the_chunks(seed, count, k, chunk_rows):
    rng = np.random.default_rng(seed)
    vectors_ME = rng.integers(-2, 3, (count, 2)).astype(np.float32)  # many equal scores
    queries_NE = rng.integers(-2, 3, (3, 2)).astype(np.float32)
    scores_NK, rows_NK = exact_search(vectors_ME, queries_NE, k, chunk_rows)
    expected_scores, expected_rows = sorted_search(vectors_ME, queries_NE, k)
    found = min(k, count)
    assert np.array_equal(rows_NK[:, :found], expected_rows) and np.array_equal(scores_NK[:, :found], expected_scores)
    assert (rows_NK[:, found:] == -1).all() and np.isneginf(scores_NK[:, found:]).all()
    assert scores_NK.shape == rows_NK.shape == (3, k)
    assert scores_NK.dtype == np.float32 and rows_NK.dtype == np.int64


def test_an_index_is_built_from_parts_and_read_from_disk(tmp_path):
    vectors_ME = vectors(30, 4)
    built = VectorIndex.build(tmp_path / "index", iter([vectors_ME[:20], vectors_ME[20:]]), 4, "flat", "what it is")
    opened = VectorIndex.open(tmp_path / "index")
    assert len(built) == len(opened) == 30 and opened.width == 4 and opened.is_exact
    assert (opened.kind, opened.fingerprint) == ("flat", "what it is")
    assert isinstance(opened._vectors_ME, np.memmap)
    _, rows_NK = opened.search(vectors_ME[[7, 25]], 3)
    assert rows_NK[:, 0].tolist() == [7, 25]
    VectorIndex.build(tmp_path / "index", [vectors_ME[:5]], 4)
    assert len(VectorIndex.open(tmp_path / "index")) == 5 and not list(tmp_path.glob(".*"))


def test_an_empty_index_finds_nothing(tmp_path):
    scores_NK, rows_NK = VectorIndex.build(tmp_path / "index", [], 4).search(vectors(2, 4), 3)
    assert (rows_NK == -1).all() and np.isneginf(scores_NK).all()


def test_without_faiss_an_index_is_exact_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(index_module, "has_faiss", lambda: False)
    monkeypatch.setitem(LARGEST, "flat", 10)
    index = VectorIndex.build(tmp_path / "index", [vectors(20, 4)], 4)
    assert index.kind == "flat"
    with pytest.raises(MissingDependencyError, match=r"kind hnsw needs FAISS.*open-cm3\[retrieval\]"):
        VectorIndex.build(tmp_path / "index", [vectors(20, 4)], 4, "hnsw")
    assert len(VectorIndex.open(tmp_path / "index")) == 20  # the failed build left the old one
    settings = tmp_path / "index" / "index.json"
    settings.write_text(settings.read_text().replace('"flat"', '"ivf"'))
    capsys.readouterr()
    opened = VectorIndex.open(tmp_path / "index")
    assert "Searching all 20 vectors" in capsys.readouterr().out and opened.is_exact
    assert opened.search(vectors(20, 4)[[3]], 1)[1].tolist() == [[3]]


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ModelFilesError, match=r"cannot read .*index\.json"):
        VectorIndex.open(tmp_path / "none")
    with pytest.raises(ConfigError, match="index kind 'tree' is unknown; choose auto, flat"):
        VectorIndex.build(tmp_path / "index", [], 4, "tree")
    index = VectorIndex.build(tmp_path / "index", [vectors(6, 4)], 4)
    with pytest.raises(DataError, match="queries have 3 numbers, .* has 4"):
        index.search(vectors(1, 3), 1)
    with pytest.raises(ConfigError, match="k=0"):
        index.search(vectors(1, 4), 0)
    path = tmp_path / "index" / "vectors.f32"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="does not hold 6 vectors of 4"):
        VectorIndex.open(tmp_path / "index")


@needs_faiss
@pytest.mark.parametrize("kind", ["hnsw", "ivf", "ivf-pq"])
def test_faiss_finds_what_the_exact_search_finds(tmp_path, kind):
    rng = np.random.default_rng(1)
    centres_ME = rng.normal(size=(64, 16))
    vectors_ME = unit_rows(centres_ME[rng.integers(64, size=3000)] + 0.4 * rng.normal(size=(3000, 16)))
    queries_NE = unit_rows(vectors_ME[:100] + 0.1 * rng.normal(size=(100, 16)))
    index = VectorIndex.build(tmp_path / "index", [vectors_ME[:1000], vectors_ME[1000:]], 16, kind)
    assert not index.is_exact
    scores_NK, rows_NK = index.search(queries_NE, 2)
    expected_scores, expected_rows = exact_search(vectors_ME, queries_NE, 2)
    assert (rows_NK == expected_rows).mean() > 0.95
    same = rows_NK == expected_rows
    assert np.allclose(scores_NK[same], expected_scores[same], atol=1e-6)  # scores are exact, whatever proposed them
    (tmp_path / "index" / "index.faiss").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"index\.faiss is missing or damaged"):
        VectorIndex.open(tmp_path / "index")


@needs_faiss
def test_the_kind_goes_by_the_size(tmp_path, monkeypatch):
    for kind, largest in zip(("flat", "hnsw", "ivf"), (10, 20, 300)):
        monkeypatch.setitem(LARGEST, kind, largest)
    kinds = [VectorIndex.build(tmp_path / str(count), [vectors(count, 8)], 8).kind for count in (10, 11, 21, 301)]
    assert kinds == ["flat", "hnsw", "ivf", "ivf-pq"]
    with pytest.raises(ConfigError, match="multiple of 8"):
        VectorIndex.build(tmp_path / "odd", [vectors(300, 6)], 6, "ivf-pq")


def test_the_number_of_clusters_leaves_vectors_for_each():
    assert [num_clusters(count) for count in (1, 1000, 1_000_000)] == [1, 15, 4000]


def test_mixed_vectors():
    text_NE = np.array([[1, 0], [1, 0], [0, 0], [0, 0]], dtype=np.float32)
    image_NE = np.array([[0, 1], [0, 0], [0, 1], [0, 0]], dtype=np.float16)
    plain = mixed_vectors(text_NE, image_NE, renormalize=False)
    assert plain.tolist() == [[0.5, 0.5], [1, 0], [0, 1], [0, 0]]
    unit = mixed_vectors(text_NE, image_NE)
    assert np.allclose(np.linalg.norm(unit, axis=1), [1, 1, 1, 0]) and unit.dtype == np.float32
