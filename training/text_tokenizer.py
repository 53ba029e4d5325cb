"""Training of the text tokenizer (`stage: text_tokenizer`)."""

from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

from tqdm import tqdm

from cm3.checkpoint import write_text
from cm3.config import dump_config
from cm3.data.sources import SourceConfig, open_source
from cm3.tokenizers.document import TEXT_TOKENIZER_FILE
from cm3.tokenizers.text import TextTokenizer, TextTokenizerConfig

_REPORT_TEXTS = 1000


@dataclass(frozen=True, kw_only=True)
class TextTokenizerRun:
    """Everything that decides the outcome of training a text tokenizer; equal runs give equal files."""

    data: SourceConfig
    """The texts, from every text column."""
    more_data: dict[str, SourceConfig] = field(default_factory=dict)
    """Further sources, each under a name."""
    tokenizer: TextTokenizerConfig = field(default_factory=TextTokenizerConfig)
    """How many pieces, and which characters."""
    output: str
    """Folder of the run; `tokenizer.model` and `config.yaml` are written there."""


def run(config: TextTokenizerRun) -> Path:
    """Train a text tokenizer and return the path of `tokenizer.model`.

    Raises:
        DataError: there are no texts, or too many rows without one.
        ConfigError: the texts have more characters than the vocabulary can hold.
    """
    yaml = dump_config(config, stage="text_tokenizer")
    sources = [open_source(data) for data in (config.data, *config.more_data.values())]
    print(yaml, flush=True)
    joined = chain.from_iterable(source.texts() for source in sources)
    texts = iter(tqdm(joined, desc="reading", unit=" texts", disable=None))
    tokenizer = TextTokenizer.train(texts, config.tokenizer)
    path = Path(config.output) / TEXT_TOKENIZER_FILE
    write_text(path.with_name("config.yaml"), yaml)
    tokenizer.save(path)
    print(_summary(tokenizer, config), flush=True)
    for source in sources:
        if source.report.bad:
            print(f"skipped {source.report.bad} rows: {'; '.join(source.report.bad_rows)}", flush=True)
    print(f"wrote {path}", flush=True)
    return path


def _summary(tokenizer: TextTokenizer, config: TextTokenizerRun) -> str:
    texts = list(islice(open_source(config.data).texts(), _REPORT_TEXTS))
    num_pieces = sum(len(tokenizer.encode(text)) for text in texts)
    return (
        f"{tokenizer.size} pieces | {sum(map(len, texts)) / num_pieces:.2f} characters a piece, "
        f"{num_pieces / len(texts):.1f} pieces a text in the first {len(texts)} texts"
    )
