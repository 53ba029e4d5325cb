"""Nearest vectors by inner product: an exact scan, or FAISS (arXiv 2401.08281) where there are many.

An index folder holds the vectors as they came (`vectors.f32`), so that every score that is returned is exact:
FAISS proposes rows, and their inner products are computed anew.

M rows of the index   N queries   E embedding width   K results of a query
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float, Int

from cm3.checkpoint import atomic_path, read_json, write_json
from cm3.errors import ConfigError, DataError, MissingDependencyError

IndexKind = Literal["auto", "flat", "hnsw", "ivf", "ivf-pq"]
"""flat: exact scan, without FAISS; hnsw: graph; ivf: clusters of half-precision vectors; ivf-pq: clusters of codes of
one byte for eight numbers; auto: by the number of vectors."""

LARGEST = {"flat": 50_000, "hnsw": 250_000, "ivf": 20_000_000}
"""Most vectors for which `auto` chooses a kind; above the last it is ivf-pq."""

PROBED_CLUSTERS = 64
"""Clusters that a search reads (ivf and ivf-pq)."""
SEARCH_WIDTH = 128
"""Candidates that a search through the graph keeps (hnsw)."""
RESCORED = {"hnsw": 2, "ivf": 2, "ivf-pq": 16}
"""How many times K rows FAISS proposes; coarser vectors need more."""

_FORMAT_VERSION = 1
_VECTORS_FILE, _FAISS_FILE, _INDEX_FILE = "vectors.f32", "index.faiss", "index.json"
_CHUNK_ROWS = 65_536
_TRAINING_ROWS_PER_CLUSTER = 64
_LEAST_TRAINING_ROWS = 65_536
"""What ivf-pq learns its codes from: 256 vectors for each of 256 values."""


@cache
def has_faiss() -> bool:
    """Whether FAISS is installed; does not import it."""
    return importlib.util.find_spec("faiss") is not None


class VectorIndex:
    """An index on disk, memory-mapped: `build` once, then `open` and `search`."""

    def __init__(
        self, folder: Path, kind: str, fingerprint: str, vectors_ME: np.ndarray, accelerator: Any | None
    ) -> None:
        self.folder = folder
        self.kind = kind
        self.fingerprint = fingerprint
        self.width: int = vectors_ME.shape[1]
        self._vectors_ME = vectors_ME
        self._accelerator = accelerator

    def __len__(self) -> int:
        return len(self._vectors_ME)

    @property
    def is_exact(self) -> bool:
        """Whether a search reads every vector."""
        return self._accelerator is None

    @classmethod
    def build(
        cls,
        folder: str | Path,
        chunks: Iterable[Float[np.ndarray, "N E"]],
        width: int,
        kind: IndexKind = "auto",
        fingerprint: str = "",
    ) -> VectorIndex:
        """Write the index of vectors that come in parts, whole or not at all, and open it.

        Args:
            folder: Written; an index that is there is replaced.
            chunks: The vectors, in the order of their rows.
            width: Length of a vector.
            kind: How they are searched.
            fingerprint: Kept with the index: says of what it is made.

        Raises:
            ConfigError: an unknown kind, or one that cannot hold vectors of this width.
            MissingDependencyError: a kind other than flat and auto without FAISS.
        """
        if kind not in get_args(IndexKind):
            raise ConfigError(f"index kind {kind!r} is unknown; choose {', '.join(get_args(IndexKind))}")
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            count = 0
            with (temporary / _VECTORS_FILE).open("wb") as file:
                for chunk_NE in chunks:
                    assert chunk_NE.shape[1] == width, f"vectors of {chunk_NE.shape[1]} numbers, not {width}"
                    file.write(np.ascontiguousarray(chunk_NE, dtype=np.float32).tobytes())
                    count += len(chunk_NE)
            resolved = _resolve(kind, count)
            if resolved != "flat":
                vectors_ME = _map_vectors(temporary / _VECTORS_FILE, count, width)
                _write_faiss(temporary / _FAISS_FILE, resolved, vectors_ME)
            values = {"format_version": _FORMAT_VERSION, "kind": resolved, "count": count, "width": width}
            write_json(temporary / _INDEX_FILE, values | {"fingerprint": fingerprint})
        return cls.open(folder)

    @classmethod
    def open(cls, folder: str | Path) -> VectorIndex:
        """Open an index; without FAISS every kind is searched exactly, and slower.

        Raises:
            ModelFilesError: there is no index.
            DataError: another version wrote it, or a file of it is damaged.
        """
        folder = Path(folder)
        values = read_json(folder / _INDEX_FILE)
        if values["format_version"] != _FORMAT_VERSION:
            raise DataError(
                f"{folder} has format {values['format_version']}, this version reads {_FORMAT_VERSION}; build it again"
            )
        kind, count, width = values["kind"], values["count"], values["width"]
        path = folder / _VECTORS_FILE
        if not path.is_file() or path.stat().st_size != 4 * count * width:
            raise DataError(f"{path} does not hold {count} vectors of {width} numbers; build the index again")
        accelerator = None
        if kind != "flat" and has_faiss():
            accelerator = _read_faiss(folder / _FAISS_FILE, kind)
        elif kind != "flat":
            print(f"{_missing(kind)} Searching all {count} vectors of {folder} exactly instead.", flush=True)
        return cls(folder, kind, values["fingerprint"], _map_vectors(path, count, width), accelerator)

    def search(
        self, queries_NE: Float[np.ndarray, "N E"], k: int
    ) -> tuple[Float[np.ndarray, "N K"], Int[np.ndarray, "N K"]]:
        """The rows with the largest inner products, best first; of equal ones the lower row comes first.

        Returns:
            Exact scores (float32), and rows (int64). Where an index has, or FAISS finds, fewer than k rows, the
            rest is -inf and -1.
        """
        if k < 1:
            raise ConfigError(f"k={k} results were asked for; ask for 1 or more")
        if queries_NE.shape[1] != self.width:
            raise DataError(
                f"queries have {queries_NE.shape[1]} numbers, the index {self.folder} has {self.width}; use the "
                "encoder it was built with"
            )
        queries_NE = np.ascontiguousarray(queries_NE, dtype=np.float32)
        if self._accelerator is None:
            return exact_search(self._vectors_ME, queries_NE, k)
        proposed = min(len(self), k * RESCORED[self.kind])
        _, rows_NM = self._accelerator.search(queries_NE, proposed)
        scores_NM = np.empty(rows_NM.shape, dtype=np.float32)
        for scores_M, rows_M, query_E in zip(scores_NM, rows_NM, queries_NE):  # one by one: these vectors can be many
            scores_M[:] = self._vectors_ME[np.maximum(rows_M, 0)] @ query_E
        return _best(np.where(rows_NM >= 0, scores_NM, -np.inf), rows_NM, k)


def exact_search(
    vectors_ME: Float[np.ndarray, "M E"], queries_NE: Float[np.ndarray, "N E"], k: int, chunk_rows: int = _CHUNK_ROWS
) -> tuple[Float[np.ndarray, "N K"], Int[np.ndarray, "N K"]]:
    """`VectorIndex.search` by reading all vectors, `chunk_rows` of them at a time.

    P scores that may be among the best   C columns: the best so far, then those of the chunk
    """
    assert k >= 1, f"k={k}"
    scores_NK = np.full((len(queries_NE), k), -np.inf, dtype=np.float32)
    rows_NK = np.full((len(queries_NE), k), -1, dtype=np.int64)
    for start, chunk_ME in _chunks(vectors_ME, chunk_rows):
        scores_NM = queries_NE @ chunk_ME.T
        least_N1 = scores_NK[:, -1:]
        if start == 0 and len(chunk_ME) > k:
            least_N1 = np.partition(scores_NM, -k, axis=1)[:, -k, None]
        queries_P, rows_P = np.nonzero(scores_NM >= least_N1)  # all that equal the k-th: ties must not depend on chunks
        counts_N = np.bincount(queries_P, minlength=len(queries_NE))
        columns_P = k + np.arange(len(rows_P)) - np.repeat(counts_N.cumsum() - counts_N, counts_N)
        padding = ((0, 0), (0, int(counts_N.max(initial=0))))
        scores_NC = np.pad(scores_NK, padding, constant_values=-np.inf)
        rows_NC = np.pad(rows_NK, padding, constant_values=-1)
        scores_NC[queries_P, columns_P] = scores_NM[queries_P, rows_P]
        rows_NC[queries_P, columns_P] = start + rows_P
        scores_NK, rows_NK = _best(scores_NC, rows_NC, k)
    return scores_NK, rows_NK


def _best(scores_NM: np.ndarray, rows_NM: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best of each row by (score, lower row), filled up where there are fewer."""
    order_NK = np.lexsort((rows_NM, -scores_NM), axis=1)[:, :k]
    scores_NK, rows_NK = (np.take_along_axis(values, order_NK, axis=1) for values in (scores_NM, rows_NM))
    if (short := k - scores_NK.shape[1]) > 0:
        scores_NK = np.pad(scores_NK, ((0, 0), (0, short)), constant_values=-np.inf)
        rows_NK = np.pad(rows_NK, ((0, 0), (0, short)), constant_values=-1)
    return scores_NK.astype(np.float32, copy=False), rows_NK.astype(np.int64, copy=False)


def _chunks(vectors_ME: np.ndarray, rows: int) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(vectors_ME), rows):
        yield start, vectors_ME[start : start + rows]


def _map_vectors(path: Path, count: int, width: int) -> np.ndarray:
    if count == 0:  # nothing cannot be mapped
        return np.empty((0, width), dtype=np.float32)
    return np.memmap(path, dtype=np.float32, mode="r", shape=(count, width))


def _resolve(kind: IndexKind, count: int) -> str:
    """The kind that is built for `count` vectors."""
    if count == 0:
        return "flat"
    if kind == "auto":
        if not has_faiss():
            return "flat"
        return next((name for name, largest in LARGEST.items() if count <= largest), "ivf-pq")
    if kind != "flat" and not has_faiss():
        raise MissingDependencyError(_missing(kind))
    return kind


def _missing(kind: str) -> str:
    return f"an index of kind {kind} needs FAISS, which is not installed; run: pip install 'open-cm3[retrieval]'."


def num_clusters(count: int) -> int:
    """Clusters of an index: about four times the root of its size, and enough vectors in each to find its centre."""
    return max(1, min(int(4 * count**0.5), count // _TRAINING_ROWS_PER_CLUSTER))


def _write_faiss(path: Path, kind: str, vectors_ME: np.ndarray) -> None:
    """Train and fill a FAISS index, and write it."""
    import faiss

    count, width = vectors_ME.shape
    clusters = num_clusters(count)
    if kind == "ivf-pq" and (width % 8 or count < 256):
        raise ConfigError(
            f"an ivf-pq index needs vectors of a multiple of 8 numbers and 256 of them, found {count} of {width}; "
            "choose another kind"
        )
    description = {
        "hnsw": "HNSW32,Flat",
        "ivf": f"IVF{clusters},SQfp16",
        "ivf-pq": f"IVF{clusters},PQ{width // 8}x8",
    }[kind]
    index: Any = faiss.index_factory(width, description, faiss.METRIC_INNER_PRODUCT)
    if kind == "ivf-pq":
        index.do_polysemous_training = False  # seconds for every 8 numbers, for a search that is not used here
    if not index.is_trained:
        rows = min(count, max(_TRAINING_ROWS_PER_CLUSTER * clusters, _LEAST_TRAINING_ROWS))
        sample = np.sort(np.random.default_rng(0).choice(count, size=rows, replace=False))
        index.train(np.ascontiguousarray(vectors_ME[sample]))
    for _, chunk_ME in _chunks(vectors_ME, _CHUNK_ROWS):
        index.add(np.ascontiguousarray(chunk_ME))
    faiss.write_index(index, str(path))


def _read_faiss(path: Path, kind: str) -> Any:
    """Open a FAISS index, clusters memory-mapped, and set how hard it searches."""
    import faiss

    try:
        index: Any = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
    except RuntimeError as error:
        raise DataError(f"{path} is missing or damaged ({str(error).strip()}); build the index again") from error
    if kind == "hnsw":
        index.hnsw.efSearch = SEARCH_WIDTH
    else:
        index.nprobe = min(PROBED_CLUSTERS, index.nlist)
        # by default every search starts 32 threads that read mapped lists ahead, ten times the work of the search
        lists: Any = faiss.downcast_InvertedLists(index.invlists)
        lists.prefetch_nthread = 0
    return index
