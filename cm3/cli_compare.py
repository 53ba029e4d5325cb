"""`cm3 compare`: figures of several evaluations side by side."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the groups."""
    parser.add_argument(
        "--group",
        action="append",
        nargs="+",
        required=True,
        metavar=("NAME", "FOLDER"),
        help="a name and the folders that `cm3 eval` wrote for its runs; once for each column of the table",
    )


def run(args: argparse.Namespace) -> None:
    """Print the table."""
    from cm3.errors import ConfigError
    from cm3.eval.compare import compare

    for name, *folders in args.group:
        if not folders:
            raise ConfigError(f"--group {name} names no folder; write --group {name} FOLDER [FOLDER ...]")
    print(compare({name: folders for name, *folders in args.group}), end="")
