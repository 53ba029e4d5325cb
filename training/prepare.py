"""Turn raw rows into tokenised shards (`stage: prepare`), once, so that training reads codes and never
pixels."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from cm3.checkpoint import write_json, write_text
from cm3.config import dump_config
from cm3.data.shards import (
    INDEX_FILE,
    SHARDS_FOLDER,
    read_shard_metadata,
    shard_path,
    write_index,
    write_shard,
)
from cm3.data.sources import RowReport, Source, SourceConfig, fingerprint, open_source
from cm3.errors import ConfigError
from cm3.tokenizers.document import (
    TEXT_TOKENIZER_FILE,
    DocumentTokenizer,
    ImageCodes,
    TextTokens,
    TokenizedDocument,
)
from cm3.tokenizers.image import ImageTokenizer
from cm3.tokenizers.text import TextTokenizer
from cm3.tokenizers.vocabulary import Vocabulary
from cm3.training.contexts import Contexts, RetrievalConfig

REPORT_FILE = "report.json"

_SETTINGS_KEY, _REPORT_KEY = "settings", "report"


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Which rows to tokenise, with what, and where to."""

    data: SourceConfig
    """The raw rows."""
    text_tokenizer: str
    """Folder that holds `tokenizer.model`."""
    image_tokenizer: str
    """Folder that holds `image_tokenizer.json` and `image_tokenizer.safetensors`."""
    retrieval: RetrievalConfig | None = None
    """Documents to retrieve for each row, which then stand before it; null is none."""
    num_sentinels: int = 512
    """Sentinels of the vocabulary: the most spans that can be masked in one context."""
    rows_per_shard: int = 8192
    """Raw rows of a file; a run that was stopped goes on after the last whole one."""
    batch_size: int = 64
    """Images encoded at a time."""
    num_processes: int = 1
    """Processes that tokenise, each with one thread where there are several."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where images are encoded; auto is a GPU if there is one."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number format of the image tokenizer; bf16 is faster, and some codes differ from fp32's."""
    output: str
    """Folder to write: shards, the tokenizers' files, the vocabulary, `report.json` and `config.yaml`."""

    def __post_init__(self) -> None:
        for name in ("num_sentinels", "rows_per_shard", "batch_size", "num_processes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}; choose 1 or more")


@dataclass
class PrepareReport:
    """What became of the rows."""

    rows: RowReport = field(default_factory=RowReport)
    """Rows read, rows that were bad, and the first of these by name."""
    documents: int = 0
    text_tokens: int = 0
    image_tokens: int = 0
    longest_document: int = 0
    """Ids of the longest document, delimiters included."""

    def add(self, document: TokenizedDocument) -> None:
        """Count a document."""
        texts = [len(part.tokens) for part in document.segments if isinstance(part, TextTokens)]
        images = [part.codes_HW.size for part in document.segments if isinstance(part, ImageCodes)]
        self.documents += 1
        self.text_tokens += sum(texts)
        self.image_tokens += sum(images)
        length = sum(texts) + sum(images) + len(document.segments) + 1
        self.longest_document = max(self.longest_document, length)

    def merge(self, other: PrepareReport) -> None:
        """Add what another report counted."""
        self.rows.merge(other.rows)
        self.documents += other.documents
        self.text_tokens += other.text_tokens
        self.image_tokens += other.image_tokens
        self.longest_document = max(self.longest_document, other.longest_document)

    @classmethod
    def from_json(cls, text: str) -> PrepareReport:
        """The inverse of `json.dumps(asdict(report))`."""
        values = json.loads(text)
        return cls(**{**values, "rows": RowReport(**values["rows"])})


def run(config: PrepareConfig) -> Path:
    """Prepare the rows of a config and return the folder written.

    Shards that an earlier run with the same settings completed are kept.

    Raises:
        DataError: there are no rows, or more bad ones than `data.max_bad_fraction`.
        ModelFilesError: a tokenizer's file is missing or damaged.
    """
    yaml = dump_config(config, stage="prepare")
    print(yaml, flush=True)
    output = Path(config.output)
    preparer = Preparer(config)
    (output / SHARDS_FOLDER / INDEX_FILE).unlink(missing_ok=True)
    preparer.tokenizer.save(output)
    write_text(output / "config.yaml", yaml)

    num_rows = len(preparer.source)
    report = PrepareReport()
    with tqdm(total=num_rows, desc="rows", unit=" rows", disable=None) as progress:
        for part in _reports(config, preparer):
            report.merge(part)
            report.rows.check(num_rows, config.data.max_bad_fraction)
            progress.update(part.rows.read)
    for path in (output / SHARDS_FOLDER).glob("*.arrow"):
        if int(path.stem) >= preparer.num_shards:
            path.unlink()
    write_json(output / REPORT_FILE, asdict(report))
    write_index(output, preparer.num_shards, preparer.tokenizer.hash)
    print(_summary(report), flush=True)
    print(f"wrote {output}", flush=True)
    return output


class Preparer:
    """The opened source and tokenizers of a config; makes any one of its shards."""

    def __init__(self, config: PrepareConfig) -> None:
        self.config = config
        self.source: Source = open_source(config.data)
        text = TextTokenizer.load(Path(config.text_tokenizer) / TEXT_TOKENIZER_FILE)
        image = ImageTokenizer.load(config.image_tokenizer)
        vocabulary = Vocabulary.build(text.size, image.num_codes, config.num_sentinels)
        automatic = "cuda" if torch.cuda.is_available() else "cpu"
        if config.device == "cuda" and automatic == "cpu":
            raise ConfigError("device=cuda, but torch finds no GPU here; choose auto or cpu")
        image.batch_size = config.batch_size
        image.compute_dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        image.to(automatic if config.device == "auto" else config.device)
        self.tokenizer = DocumentTokenizer(text, image, vocabulary)
        self._tokenizer_hash = self.tokenizer.hash
        device = str(image.device)
        self._contexts = Contexts(config.retrieval, self._tokenizer_hash, device) if config.retrieval else None

    @property
    def num_shards(self) -> int:
        """Number of shards of all rows."""
        return -(-len(self.source) // self.config.rows_per_shard)

    def make(self, number: int) -> PrepareReport:
        """Write a shard, unless it is there already, and report on its rows."""
        rows = range(len(self.source))[number * self.config.rows_per_shard :][: self.config.rows_per_shard]
        path, settings = shard_path(self.config.output, number), self._settings(rows)
        found = read_shard_metadata(path)
        if found is not None and found.get(_SETTINGS_KEY) == settings:
            return PrepareReport.from_json(found[_REPORT_KEY])
        self.source.report = RowReport()
        report, documents = PrepareReport(rows=self.source.report), []
        for document in self._tokenized(rows):
            report.add(document)
            documents.append(document)
        write_shard(path, documents, {_SETTINGS_KEY: settings, _REPORT_KEY: json.dumps(asdict(report))})
        return report

    def _tokenized(self, rows: range) -> Iterator[TokenizedDocument]:
        raw = self.source.rows(rows.start, rows.stop)
        while batch := list(islice(raw, self.config.batch_size)):
            tokenized = self.tokenizer.tokenize(batch)
            yield from self._contexts.extended(batch, tokenized) if self._contexts else tokenized

    def _settings(self, rows: range) -> str:
        """A hash of all that decides the content of a shard."""
        data = {
            key: value for key, value in asdict(self.config.data).items() if key not in ("limit", "max_bad_fraction")
        }
        content: dict[str, Any] = {
            "data": data,
            "tokenizer": self._tokenizer_hash,
            "precision": self.config.precision,
            "rows": [rows.start, rows.stop],
            "files": fingerprint(self.config.data.path),
        }
        if self._contexts:
            content["retrieval"] = self._contexts.content
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _reports(config: PrepareConfig, preparer: Preparer) -> Iterator[PrepareReport]:
    """Make every shard, here or in several processes, and yield their reports."""
    if config.num_processes == 1:
        yield from map(preparer.make, range(preparer.num_shards))
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process that holds threads can hang
    with ProcessPoolExecutor(config.num_processes, context, _start_worker, (config,)) as pool:
        yield from pool.map(_make_in_worker, range(preparer.num_shards))


_worker: Preparer | None = None


def _start_worker(config: PrepareConfig) -> None:
    global _worker
    torch.set_num_threads(1)
    _worker = Preparer(config)


def _make_in_worker(number: int) -> PrepareReport:
    assert _worker is not None, "the pool did not start this worker"
    return _worker.make(number)


def _summary(report: PrepareReport) -> str:
    lines = [
        f"{report.rows.read} rows read, {report.documents} kept, {report.rows.bad} skipped",
        *(f"  skipped {reason}" for reason in report.rows.bad_rows),
        f"{report.text_tokens} text and {report.image_tokens} image tokens; the longest document has "
        f"{report.longest_document} ids",
    ]
    return "\n".join(lines)
