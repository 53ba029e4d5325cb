"""`cm3 bench index`: what each kind of index costs, and what it finds, on clustered random vectors.

Vectors are unit vectors around random centres, so that every vector has neighbours; queries are new members of the
same clusters. They are written once, chunk by chunk. Every kind is then built and searched in a process of its own,
whose peak of memory is its own.

M vectors   N queries or vectors of a chunk   E width   K results of a query
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from jaxtyping import Float, Int

from cm3.errors import ConfigError
from cm3.retrieval.index import IndexKind, VectorIndex, exact_search
from cm3.retrieval.vectors import unit_rows

RESULTS = 2
"""Results of a query, K: the documents of a context."""
BATCH = 64
"""Queries of the larger of the two batches that are timed."""
TIMING_SECONDS = 20.0
"""After this long no further queries are timed."""

_CLUSTER_SIZE = 50
_CHUNK_ROWS = 65_536
_NOISE = 0.6
"""Length of the noise around a centre of length 1: two vectors of a cluster have a cosine of about 0.74."""


@dataclass(frozen=True, kw_only=True)
class IndexBench:
    """Vectors, queries, and the kinds of index that are compared."""

    vectors: int = 1_000_000
    """Vectors in an index."""
    width: int = 512
    """Numbers of a vector."""
    kinds: tuple[IndexKind, ...] = ("flat", "hnsw", "ivf", "ivf-pq")
    """Kinds of index, see `cm3.retrieval.index.IndexKind`."""
    queries: int = 512
    """Queries."""
    seed: int = 0
    """Draws the vectors and the queries."""

    def __post_init__(self) -> None:
        for name, least in (("vectors", RESULTS), ("width", 1), ("queries", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)}; choose {least} or more")


@dataclass(frozen=True, kw_only=True)
class IndexCost:
    """One kind of index."""

    kind: str
    build_seconds: float
    disk_bytes: int
    """All files of the index, the vectors included."""
    peak_bytes: float
    """Most memory that its process had at a time, mapped files included; nan where the system is not Linux."""
    alone_milliseconds: float
    """Of a query that comes by itself."""
    batched_milliseconds: float
    """Of a query among `BATCH`."""
    recall: float
    """Share of the exact K results that it finds."""


def measure(config: IndexBench) -> Iterator[IndexCost]:
    """Build and search every kind; the files lie in the folder for temporary files, and are removed."""
    with TemporaryDirectory(prefix="cm3-bench-") as name:
        folder = Path(name)
        with (folder / "vectors.f32").open("wb") as file:
            for chunk_NE in random_vectors(config):
                file.write(chunk_NE.tobytes())
        _, expected_NK = exact_search(_mapped(folder, config), random_queries(config), RESULTS)
        for kind in config.kinds:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                yield process.submit(measure_kind, folder, config, kind, expected_NK).result()


def measure_kind(folder: Path, config: IndexBench, kind: IndexKind, expected_NK: Int[np.ndarray, "N K"]) -> IndexCost:
    """Build and search one kind of index of the vectors in a folder.

    Args:
        folder: Where the vectors lie.
        config: What was drawn.
        kind: What to build.
        expected_NK: The rows that an exact search finds for the queries.
    """
    vectors_ME, queries_NE = _mapped(folder, config), random_queries(config)
    chunks = (vectors_ME[start : start + _CHUNK_ROWS] for start in range(0, config.vectors, _CHUNK_ROWS))
    with TemporaryDirectory(dir=folder) as name:
        start = time.perf_counter()
        index = VectorIndex.build(Path(name, "index"), chunks, config.width, kind)
        build_seconds = time.perf_counter() - start
        _, rows_NK = index.search(queries_NE, RESULTS)  # this reads all that is mapped for the first time
        return IndexCost(
            kind=index.kind if kind == index.kind else f"{kind} ({index.kind})",
            build_seconds=build_seconds,
            disk_bytes=sum(path.stat().st_size for path in index.folder.iterdir()),
            peak_bytes=_peak_bytes(),
            alone_milliseconds=_milliseconds(lambda part_NE: index.search(part_NE, RESULTS), queries_NE, 1),
            batched_milliseconds=_milliseconds(lambda part_NE: index.search(part_NE, RESULTS), queries_NE, BATCH),
            recall=recall(rows_NK, expected_NK),
        )


def recall(found_NK: Int[np.ndarray, "N K"], expected_NK: Int[np.ndarray, "N K"]) -> float:
    """Share of the expected rows of all queries that were found, in whatever order."""
    return float((expected_NK[:, :, None] == found_NK[:, None, :]).any(axis=2).mean())


def random_vectors(config: IndexBench) -> Iterator[Float[np.ndarray, "N E"]]:
    """The vectors in chunks, float32; about 50 share a centre."""
    centres_NE = _centres(config)
    for number, start in enumerate(range(0, config.vectors, _CHUNK_ROWS)):
        count = min(_CHUNK_ROWS, config.vectors - start)
        yield _members(centres_NE, count, np.random.default_rng((config.seed, 1, number)))


def random_queries(config: IndexBench) -> Float[np.ndarray, "N E"]:
    """New members of the same clusters."""
    return _members(_centres(config), config.queries, np.random.default_rng((config.seed, 2)))


def table(config: IndexBench, costs: Iterable[IndexCost]) -> Iterator[str]:
    """The lines of a table in Markdown, each as soon as its index is measured."""
    yield f"{config.vectors} vectors of {config.width} numbers, {config.queries} queries, seed {config.seed}"
    yield ""
    yield f"| index | build s | disk GB | peak memory GB | ms a query | ms a query of {BATCH} | recall@{RESULTS} |"
    yield "|---|---|---|---|---|---|---|"
    for cost in costs:
        yield (
            f"| {cost.kind} | {cost.build_seconds:.1f} | {cost.disk_bytes / 1e9:.3f} | {cost.peak_bytes / 1e9:.3f} "
            f"| {cost.alone_milliseconds:.2f} | {cost.batched_milliseconds:.2f} | {cost.recall:.3f} |"
        )


def _centres(config: IndexBench) -> np.ndarray:
    count = max(1, config.vectors // _CLUSTER_SIZE)
    rng = np.random.default_rng((config.seed, 0))
    return unit_rows(rng.standard_normal((count, config.width), dtype=np.float32))


def _members(centres_NE: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Vectors around centres that are drawn for each."""
    width = centres_NE.shape[1]
    noise_NE = rng.standard_normal((count, width), dtype=np.float32) * (_NOISE / width**0.5)
    return unit_rows(centres_NE[rng.integers(len(centres_NE), size=count)] + noise_NE)


def _mapped(folder: Path, config: IndexBench) -> np.ndarray:
    return np.memmap(folder / "vectors.f32", dtype=np.float32, mode="r", shape=(config.vectors, config.width))


def _milliseconds(search: Callable[[np.ndarray], object], queries_NE: np.ndarray, batch: int) -> float:
    """Mean time of a query, over all of them or as many as `TIMING_SECONDS` allow."""
    start = time.perf_counter()
    done = 0
    while done < len(queries_NE):
        part_NE = queries_NE[done : done + batch]
        search(part_NE)
        done += len(part_NE)
        if time.perf_counter() - start > TIMING_SECONDS:
            break
    return 1e3 * (time.perf_counter() - start) / done


def _peak_bytes() -> float:
    """Most memory of this process so far, as Linux counts it; nan elsewhere.

    `resource.getrusage` would count the parent's memory too: a process keeps the peak of what it was forked from.
    """
    status = Path("/proc/self/status")
    if not status.is_file():
        return float("nan")
    (kilobytes,) = (line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return 1024.0 * int(kilobytes)
