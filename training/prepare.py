"""Turn raw rows into tokenised shards (`stage: prepare`), once, so that training reads codes and never
pixels."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch

from cm3.checkpoint import remove_leftovers, write_json, write_text
from cm3.config import dump_config, to_dict
from cm3.data.shard_sums import look_at_shard
from cm3.data.shards import (
    INDEX_FILE,
    SHARD_COLUMNS,
    SHARDS_FOLDER,
    read_shard_metadata,
    shard_path,
    write_index,
    write_shard,
)
from cm3.data.sources import Source, SourceConfig, fingerprint, open_source
from cm3.distributed import is_main, local_rank, rank, world_size
from cm3.errors import ConfigError, DataError
from cm3.tokenizers.document import (
    VOCABULARY_FILE,
    DocumentTokenizer,
    TokenizedDocument,
    load_text_tokenizer,
)
from cm3.tokenizers.image import ImageTokenizer
from cm3.tokenizers.instruct import tokenize_examples
from cm3.tokenizers.json_text import JsonTextTokenizer
from cm3.tokenizers.vocabulary import Vocabulary
from cm3.training.contexts import Contexts, RetrievalConfig
from cm3.training.metrics import duration
from cm3.training.prepare_folder import (
    CONFIG_FILE,
    INPUTS_KEY,
    REPORT_FILE,
    fingerprint_of,
    is_finished,
    refuse_other_settings,
    writing,
)
from cm3.training.prepare_report import PrepareReport, Progress

PATIENCE_SECONDS = 3600.0
"""Rank 0 gives up once for so long no other rank has finished a shard."""

_POLL_SECONDS = 5.0
_READING_THREADS = 4

_SETTINGS_KEY, _REPORT_KEY = "settings", "report"


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Which rows to tokenise, with what, and where to."""

    data: SourceConfig
    """The raw rows."""
    text_tokenizer: str
    """Folder that holds `tokenizer.model`, or an imported model, with `tokenizer.json` and `vocabulary.json`."""
    image_tokenizer: str
    """Folder that holds `image_tokenizer.json` and `image_tokenizer.safetensors`."""
    retrieval: RetrievalConfig | None = None
    """Documents to retrieve for each row, which then stand before it; null is none."""
    num_sentinels: int = 512
    """Sentinels of the vocabulary: the most spans that can be masked in one context. Without effect where
    `text_tokenizer` is an imported model, which has a vocabulary of its own."""
    rows_per_shard: int = 8192
    """Raw rows of a file; a run that was stopped goes on after the last whole one."""
    batch_size: int = 64
    """Images encoded at a time."""
    num_processes: int = 1
    """Processes that tokenise, each with one thread where there are several."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where images are encoded; auto is a GPU if there is one."""
    output: str
    """Folder to write: shards, the tokenizers' files, the vocabulary, `report.json` and `config.yaml`."""

    def __post_init__(self) -> None:
        for name in ("num_sentinels", "rows_per_shard", "batch_size", "num_processes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}; choose 1 or more")


def run(config: PrepareConfig) -> Path:
    """Prepare the rows of a config and return the folder written.

    Shards that an earlier run with the same settings completed, or with a smaller `data.limit`, are kept where their
    checksums say that they are as they were written. Where a launcher sets RANK and WORLD_SIZE, each rank makes its
    share of the shards in the one folder, which all of them see, and rank 0 waits for the others before it declares
    the folder complete.

    Raises:
        ConfigError: the folder holds shards of other settings.
        DataError: there are no rows, or more bad ones than `data.max_bad_fraction`, or the other ranks do not
            deliver, or the folder cannot be written.
        ModelFilesError: a tokenizer's file is missing or damaged.
    """
    yaml = dump_config(config, stage="prepare")
    output = Path(config.output)
    preparer = Preparer(config)
    changes = refuse_other_settings(output, to_dict(config), preparer.fits, preparer.inputs)
    finished = is_main() and is_finished(output, to_dict(config), preparer.num_shards)
    if is_main():
        if not finished:
            _begin(preparer, yaml)
        print(yaml, flush=True)
        if changes:
            print(f"going on with what {output} holds ({'; '.join(changes)})", flush=True)

    num_rows, mine = len(preparer.source), range(rank(), preparer.num_shards, world_size())
    progress = Progress(sum(len(preparer.rows(number)) for number in mine))
    reports: dict[int, PrepareReport] = {}
    total = PrepareReport()
    with ThreadPoolExecutor(_READING_THREADS) as pool:
        for number, found in zip(mine, pool.map(preparer.find, mine), strict=True):
            if found is not None:
                reports[number] = found
                total.merge(found)
                progress.update(found.rows.read, made=False)
    total.rows.check(num_rows, config.data.max_bad_fraction)
    missing = [number for number in mine if number not in reports]
    if finished and missing:
        finished = False
        _begin(preparer, yaml)
    for number, report in zip(missing, _reports(config, preparer, missing), strict=True):
        reports[number] = report
        total.merge(report)
        total.rows.check(num_rows, config.data.max_bad_fraction)
        progress.update(report.rows.read, made=True)
    if not is_main():
        print(f"rank {rank()} of {world_size()}: its {len(mine)} shards are written", flush=True)
        return output

    reports |= _reports_of_others(preparer, [n for n in range(preparer.num_shards) if n not in mine])
    total = PrepareReport()
    for number in range(preparer.num_shards):
        total.merge(reports[number])
    total.rows.check(num_rows, config.data.max_bad_fraction)
    total.count_duplicates([shard_path(output, number) for number in range(preparer.num_shards)])
    if not finished:
        with writing(output):
            write_json(output / REPORT_FILE, asdict(total))
            write_index(output, preparer.num_shards, preparer.tokenizer.hash)
    print(total, flush=True)
    print(f"{output} was finished before: nothing was left to do" if finished else f"wrote {output}", flush=True)
    return output


def _begin(preparer: Preparer, yaml: str) -> None:
    """Write what stands beside the shards; until they are all there, the folder is not complete."""
    output = Path(preparer.config.output)
    with writing(output):
        if world_size() == 1:  # other ranks may be writing
            remove_leftovers(output)
            remove_leftovers(output / SHARDS_FOLDER)
        (output / SHARDS_FOLDER).mkdir(parents=True, exist_ok=True)
        (output / SHARDS_FOLDER / INDEX_FILE).unlink(missing_ok=True)
        preparer.tokenizer.save(output)
        write_text(output / CONFIG_FILE, yaml)


class Preparer:
    """The opened source and tokenizers of a config; makes any one of its shards."""

    def __init__(self, config: PrepareConfig) -> None:
        self.config = config
        image, folder = ImageTokenizer.load(config.image_tokenizer), Path(config.text_tokenizer)
        text = load_text_tokenizer(folder)
        if isinstance(text, JsonTextTokenizer):
            vocabulary = Vocabulary.load(folder / VOCABULARY_FILE)
        else:
            vocabulary = Vocabulary.build(text.size, image.num_codes, config.num_sentinels)
        has_turns = vocabulary.layout.turn_end is not None
        self.source: Source = open_source(replace(config.data, layout="turns") if has_turns else config.data)
        automatic = f"cuda:{local_rank()}" if torch.cuda.is_available() else "cpu"
        if config.device == "cuda" and automatic == "cpu":
            raise ConfigError("device=cuda, but torch finds no GPU here; choose auto or cpu")
        image.batch_size = config.batch_size
        image.to("cpu" if config.device == "cpu" else automatic)
        self.tokenizer = DocumentTokenizer(text, image, vocabulary)
        self._tokenizer_hash = self.tokenizer.hash
        device = str(image.device)
        self._files: list[Any] = fingerprint(config.data.path) or list(self.source.streamed_files)
        self._contexts = Contexts(config.retrieval, self._tokenizer_hash, device) if config.retrieval else None

    @property
    def num_shards(self) -> int:
        """Number of shards of all rows."""
        return -(-len(self.source) // self.config.rows_per_shard)

    def rows(self, number: int) -> range:
        """The rows of a shard."""
        return range(len(self.source))[number * self.config.rows_per_shard :][: self.config.rows_per_shard]

    @property
    def inputs(self) -> dict[str, str]:
        """Fingerprints of what shards are made of, to say which of it has changed."""
        inputs = {"tokenizers": self._tokenizer_hash[:16], "raw files": fingerprint_of(self._files)}
        if self._contexts:
            inputs["memory"] = fingerprint_of(self._contexts.content[0])
        return inputs

    def fits(self, number: int, metadata: Mapping[str, str]) -> bool:
        """Whether the metadata of a shard are those of one made with these settings, or with a smaller limit."""
        rows, found = self.rows(number), metadata.get(_SETTINGS_KEY)
        if not rows or found == self._settings(rows):
            return bool(rows)
        try:
            read = PrepareReport.from_json(metadata[_REPORT_KEY]).rows.read
        except (ValueError, KeyError, TypeError):  # no shard of ours, or a damaged one
            return False
        return read < len(rows) and found == self._settings(rows[:read])

    def find(self, number: int) -> PrepareReport | None:
        """The report of a shard that is as it was written and was made with these settings, or None."""
        path = shard_path(self.config.output, number)
        found = read_shard_metadata(path)
        if found is None or found.get(_SETTINGS_KEY) != self._settings(self.rows(number)):
            return None
        if look_at_shard(path).fault:  # last, for it reads all of it
            return None
        return PrepareReport.from_json(found[_REPORT_KEY])

    def make(self, number: int) -> PrepareReport:
        """Write a shard and report on its rows."""
        rows = self.rows(number)
        report, documents = PrepareReport(), []
        self.source.report = report.rows
        for document in self._tokenized(rows):
            report.add(document)
            documents.append(document)
        metadata = {
            _SETTINGS_KEY: self._settings(rows),
            _REPORT_KEY: report.to_json(),
            INPUTS_KEY: json.dumps(self.inputs),
        }
        layout = self.tokenizer.vocabulary.layout
        with writing(Path(self.config.output)):
            write_shard(shard_path(self.config.output, number), documents, metadata, layout)
        return report

    def _tokenized(self, rows: range) -> Iterator[TokenizedDocument]:
        raw = self.source.rows(rows.start, rows.stop)
        while batch := list(islice(raw, self.config.batch_size)):
            tokenized = tokenize_examples(self.tokenizer, batch)
            yield from self._contexts.extended(batch, tokenized) if self._contexts else tokenized

    def _settings(self, rows: range) -> str:
        """A hash of all that decides the content of a shard."""
        without_effect = ("limit", "max_bad_fraction", "stream")
        data = {key: value for key, value in asdict(self.config.data).items() if key not in without_effect}
        content: dict[str, Any] = {
            "data": data,
            "tokenizer": self._tokenizer_hash,
            "rows": [rows.start, rows.stop],
            "files": self._files,
            "columns": SHARD_COLUMNS,
        }
        if self._contexts:
            content["retrieval"] = self._contexts.content
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _reports(config: PrepareConfig, preparer: Preparer, numbers: Sequence[int]) -> Iterator[PrepareReport]:
    """Make shards, here or in several processes, and yield what `Preparer.make` returns for each."""
    if config.num_processes == 1 or not numbers:
        yield from map(preparer.make, numbers)
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process that holds threads can hang
    with ProcessPoolExecutor(config.num_processes, context, _start_worker, (config,)) as pool:
        yield from pool.map(_make_in_worker, numbers)


def _reports_of_others(preparer: Preparer, missing: list[int]) -> dict[int, PrepareReport]:
    """Wait for the shards that other ranks make, and return their reports.

    The folder is all that the ranks share: they need no network between them and may run one after the other.
    """
    reports: dict[int, PrepareReport] = {}
    news = time.monotonic()
    while True:
        found = {number: report for number in missing if (report := preparer.find(number)) is not None}
        reports |= found
        missing = [number for number in missing if number not in found]
        if not missing:
            return reports
        if found:
            news = time.monotonic()
        elif time.monotonic() - news > PATIENCE_SECONDS:
            raise DataError(
                f"of the shards of other ranks {len(missing)} are missing, the first is number {missing[0]}, and for "
                f"{duration(PATIENCE_SECONDS)} none has come; see what those ranks printed, and run the same command "
                "again: what is there is kept"
            )
        time.sleep(_POLL_SECONDS)


_worker: Preparer | None = None


def _start_worker(config: PrepareConfig) -> None:
    global _worker
    torch.set_num_threads(1)
    _worker = Preparer(config)


def _make_in_worker(number: int) -> PrepareReport:
    assert _worker is not None, "the pool did not start this worker"
    return _worker.make(number)
