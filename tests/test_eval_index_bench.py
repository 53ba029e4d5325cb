"""`cm3 bench index` on a few thousand vectors: what is drawn, what is measured, the table."""

import numpy as np
import pytest

from cm3.cli import main
from cm3.errors import ConfigError
from cm3.eval.index_bench import IndexBench, measure_kind, random_queries, random_vectors, recall
from cm3.retrieval import index as cm3_index
from cm3.retrieval.index import exact_search, has_faiss

BENCH = IndexBench(vectors=3000, width=32, queries=70)


def test_vectors_have_unit_length_and_neighbours_and_come_from_the_seed(monkeypatch):
    monkeypatch.setattr("cm3.eval.index_bench._CHUNK_ROWS", 2048)
    chunks = list(random_vectors(BENCH))
    assert [len(chunk_NE) for chunk_NE in chunks] == [2048, 952]
    vectors_ME, queries_NE = np.concatenate(chunks), random_queries(BENCH)
    assert vectors_ME.dtype == np.float32 and queries_NE.shape == (70, 32)
    for rows in (vectors_ME, queries_NE):
        assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert np.array_equal(np.concatenate(list(random_vectors(BENCH))), vectors_ME)
    assert not np.array_equal(next(random_vectors(IndexBench(vectors=3000, width=32, seed=1))), chunks[0])
    similar_N = np.sort(queries_NE @ vectors_ME.T, axis=1)[:, -10]
    assert similar_N.min() > 0.6 > (queries_NE @ vectors_ME.T).mean()


def test_recall_by_hand():
    expected_NK = np.array([[4, 7], [1, 2]])
    assert recall(expected_NK[:, ::-1], expected_NK) == 1
    assert recall(np.array([[7, -1], [0, 3]]), expected_NK) == 0.25


@pytest.mark.parametrize("kind", ["flat", *(["hnsw", "ivf"] if has_faiss() else [])])
def test_each_kind_is_measured(tmp_path, kind):
    vectors_ME = np.concatenate(list(random_vectors(BENCH)))
    vectors_ME.tofile(tmp_path / "vectors.f32")
    _, expected_NK = exact_search(vectors_ME, random_queries(BENCH), 2)
    cost = measure_kind(tmp_path, BENCH, kind, expected_NK)
    assert cost.kind == kind and cost.recall > 0.95
    assert (cost.recall == 1) or kind != "flat"
    assert cost.disk_bytes > vectors_ME.nbytes * (1 if kind == "flat" else 1.4)
    assert min(cost.build_seconds, cost.peak_bytes, cost.alone_milliseconds, cost.batched_milliseconds) > 0
    assert [path.name for path in tmp_path.iterdir()] == ["vectors.f32"]


def test_the_command_prints_a_table(capsys):
    assert main(["bench", "index", "--vectors", "300", "--width", "8", "--queries", "5", "--kinds", "flat"]) == 0
    printed = capsys.readouterr().out
    assert "300 vectors of 8 numbers, 5 queries, seed 0" in printed
    header, _, row = (line.strip("|").split("|") for line in printed.splitlines()[-3:])
    assert len(header) == len(row) == 7 and header[6].strip() == "recall@2"
    assert (row[0].strip(), row[6].strip()) == ("flat", "1.000")


def test_without_faiss_the_exact_scan_is_measured_alone(capsys, monkeypatch):
    monkeypatch.setattr(cm3_index, "has_faiss", lambda: False)
    assert main(["bench", "index", "--vectors", "300", "--width", "8", "--queries", "5"]) == 0
    *_, row, note = capsys.readouterr().out.splitlines()
    assert row.startswith("| flat |") and note.startswith("hnsw, ivf and ivf-pq need FAISS")


def test_impossible_settings_are_refused(capsys):
    with pytest.raises(ConfigError, match="queries=0; choose 1 or more"):
        IndexBench(queries=0)
    assert main(["bench", "index", "--vectors", "1"]) == 2
    assert capsys.readouterr().err == "error: --vectors 1; choose 2 or more\n"
