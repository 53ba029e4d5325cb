"""`cm3 bench`: measure what the parts cost on this machine."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what can be measured."""
    parts = parser.add_subparsers(dest="part", required=True, metavar="PART", title="parts")
    index = parts.add_parser(
        "index", help="time, memory and recall of each kind of index, on random vectors in temporary files"
    )
    index.add_argument("--vectors", type=int, default=1_000_000, metavar="N", help="(default: 1000000)")
    index.add_argument("--width", type=int, default=512, metavar="N", help="numbers of a vector (default: 512)")
    kinds = ("flat", "hnsw", "ivf", "ivf-pq")
    index.add_argument("--kinds", nargs="+", choices=kinds, default=kinds, help="(default: all of them)")
    index.add_argument("--queries", type=int, default=512, metavar="N", help="(default: 512)")
    index.add_argument("--seed", type=int, default=0, help="(default: 0)")


def run(args: argparse.Namespace) -> None:
    """Measure, and print a table."""
    from cm3.eval.index_bench import IndexBench, measure, table

    names = ("vectors", "width", "queries", "seed")
    config = IndexBench(kinds=tuple(args.kinds), **{name: getattr(args, name) for name in names})
    for line in table(config, measure(config)):
        print(line, flush=True)
