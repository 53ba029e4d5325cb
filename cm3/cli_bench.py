"""`cm3 bench`: measure what the parts cost on this machine."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence

from cm3.cli_options import seed
from cm3.cli_parser import add_sub_parser

_SIZES = ("demo", "350m", "760m", "7b")
_GENERATE_SIZES = ("small", "100m", "350m", "760m", "7b")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what can be measured."""
    parts = parser.add_subparsers(dest="part", required=True, metavar="PART", title="parts")
    index = add_sub_parser(
        parts,
        "index",
        "time, memory and recall of each kind of index, on random vectors in temporary files",
        "cm3 bench index --vectors 20000",
    )
    index.add_argument("--vectors", type=int, default=1_000_000, metavar="N", help="(default: 1000000)")
    index.add_argument("--width", type=int, default=512, metavar="N", help="numbers of a vector (default: 512)")
    kinds = ["flat", "hnsw", "ivf", "ivf-pq"]
    index.add_argument("--kinds", nargs="+", choices=kinds, metavar="KIND", help=_some_of(kinds))
    index.add_argument("--queries", type=int, default=512, metavar="N", help="(default: 512)")

    train = add_sub_parser(
        parts,
        "train",
        "a training step part by part, beside that of Chameleon in transformers where it is installed",
        "cm3 bench train --steps 20",
    )
    _add_batch(train)
    train.add_argument("--steps", type=int, default=20, metavar="N", help="steps that are timed (default: 20)")
    train.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="(default: bf16)")
    train.add_argument("--compile", action="store_true", help="compile every block with torch.compile")
    models = ["ours", "ours-chameleon", "transformers"]
    train.add_argument("--models", nargs="+", choices=models, default=models, metavar="NAME", help=_some_of(models))

    loader = add_sub_parser(
        parts,
        "loader",
        "tokens a second of the data loader alone, beside those of training",
        "cm3 bench loader --data runs/demo/train",
    )
    _add_batch(loader)
    loader.add_argument("--data", metavar="FOLDER", help="what cm3 prepare wrote (default: random documents)")
    loader.add_argument("--batches", type=int, default=200, metavar="N", help="(default: 200)")
    loader.add_argument("--steps", type=int, default=10, metavar="N", help="training steps; 0: none (default: 10)")

    loss = add_sub_parser(
        parts,
        "loss",
        "peak memory of the chunked cross-entropy, beside that of the plain one",
        "cm3 bench loss --tokens 4096",
    )
    loss.add_argument("--tokens", type=int, default=4096, metavar="N", help="of the row (default: 4096)")
    loss.add_argument("--vocabulary", type=int, default=65_536, metavar="N", help="ids (default: 65536)")
    loss.add_argument("--width", type=int, default=1024, metavar="N", help="of the model (default: 1024)")
    loss.add_argument("--chunks", nargs="+", type=int, default=[2048, 512], metavar="N", help="(default: 2048 512)")
    loss.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="(default: bf16)")

    generate = add_sub_parser(
        parts,
        "generate",
        "tokens a second of generation, beside that of transformers where it is installed",
        "cm3 bench generate --size 100m --batches 1 8",
    )
    generate.add_argument("--size", choices=_GENERATE_SIZES, default="100m", help="of the model (default: 100m)")
    generate.add_argument("--batches", nargs="+", type=int, default=[1, 8], metavar="N", help="(default: 1 8)")
    generate.add_argument(
        "--prompt-length", type=int, default=128, metavar="N", help="ids of the longest prompt (default: 128)"
    )
    generate.add_argument("--new-tokens", type=int, default=128, metavar="N", help="(default: 128)")
    generate.add_argument(
        "--guidance", nargs="+", type=float, default=[1.0, 3.0], metavar="SCALE", help="1 is off (default: 1 3)"
    )
    generate.add_argument(
        "--precisions",
        nargs="+",
        choices=("fp32", "bf16", "int8"),
        default=["fp32", "bf16"],
        metavar="NAME",
        help="any of fp32, bf16, int8; int8 is ours alone (default: fp32 bf16)",
    )
    generate.add_argument("--repeats", type=int, default=3, metavar="N", help="of the median (default: 3)")
    generate.add_argument("--compile", action="store_true", help="compile the steps of both sides")

    speculative = add_sub_parser(
        parts,
        "speculative",
        "forward passes and time of pictures drawn by --speculative-window, on a trained model",
        "cm3 bench speculative --windows 8 16 --pictures 4",
    )
    speculative.add_argument("--model", default="demo", metavar="NAME", help="folder or Hub name (default: demo)")
    windows = [4, 8, 16]
    speculative.add_argument("--windows", nargs="+", type=int, default=windows, metavar="N", help="(default: 4 8 16)")
    speculative.add_argument(
        "--guidance", nargs="+", type=float, default=[1.0, 1.75], metavar="SCALE", help="1 is off (default: 1 1.75)"
    )
    speculative.add_argument(
        "--temperatures", nargs="+", type=float, default=[0.3, 1.0], metavar="T", help="(default: 0.3 1)"
    )
    speculative.add_argument("--pictures", type=int, default=8, metavar="N", help="of scenes (default: 8)")
    speculative.add_argument("--batch", type=int, default=1, metavar="N", help="drawn together (default: 1)")
    for part in (index, train, loader, loss, generate, speculative):
        part.add_argument("--seed", type=seed, default=0, metavar="N", help="(default: 0)")


def _some_of(names: Sequence[str]) -> str:
    return f"any of {', '.join(names)} (default: all of them)"


def _add_batch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=_SIZES, default="demo", help="of the model (default: demo)")
    parser.add_argument("--rows", type=int, metavar="N", help="rows of a step (default: what fits the size)")
    parser.add_argument("--sequence-length", type=int, metavar="N", help="positions of a row (default: the size's)")


def run(args: argparse.Namespace) -> None:
    """Measure, and print a table."""
    settings = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(args).items()
        if name not in ("verb", "part", "local_rank")
    }
    for line in _PARTS[args.part](settings):
        print(line, flush=True)


def _index(settings: dict) -> Iterator[str]:
    from cm3.eval.index_bench import IndexBench, measure, table
    from cm3.retrieval.index import has_faiss

    is_limited = settings["kinds"] is None and not has_faiss()
    if settings["kinds"] is None:
        settings = {**settings, "kinds": ("flat",) if is_limited else IndexBench.kinds}
    config = IndexBench(**settings)
    yield from table(config, measure(config))
    if is_limited:
        yield "hnsw, ivf and ivf-pq need FAISS, which is not installed; run: pip install 'open-cm3[retrieval]'"


def _train(settings: dict) -> Iterator[str]:
    from cm3.eval.train_bench import TrainBench, measure, table

    config = TrainBench(**settings)
    return table(config, measure(config))


def _loader(settings: dict) -> Iterator[str]:
    from cm3.eval.loader_bench import LoaderBench, report

    return report(LoaderBench(**settings))


def _loss(settings: dict) -> Iterator[str]:
    from cm3.eval.loss_bench import LossBench, measure, table

    config = LossBench(**settings)
    return table(config, measure(config))


def _generate(settings: dict) -> Iterator[str]:
    from cm3.eval.generate_bench import GenerateBench, measure, table

    config = GenerateBench(**settings)
    return table(config, measure(config))


def _speculative(settings: dict) -> Iterator[str]:
    from cm3.eval.speculative_bench import SpeculativeBench, measure, table

    config = SpeculativeBench(**settings)
    return table(config, measure(config))


_PARTS: dict[str, Callable[[dict], Iterator[str]]] = {
    "index": _index,
    "train": _train,
    "loader": _loader,
    "loss": _loss,
    "generate": _generate,
    "speculative": _speculative,
}
