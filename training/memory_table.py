"""The memory of a process by ZeRO stage and number of processes, the table of `cm3 show`."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from cm3.errors import ConfigError
from cm3.training.config import ModelRun
from cm3.training.show import GIB, memory

PROCESSES = (1, 8, 64, 512)
Stage = Literal[0, 1, 2, 3]
STAGES: tuple[Stage, ...] = (0, 1, 2, 3)


def memory_table(config: ModelRun, processes: Sequence[int] = PROCESSES) -> str:
    """Return GiB of one process for each ZeRO stage and number of processes, `-` where a stage does not go with the
    other settings or the rows of a step do not split among the processes; a last line then says so."""
    heads = (f"{count} GPU{'s' if count > 1 else ''}" for count in processes)
    lines = ["GiB of a process".ljust(20) + "".join(f"{head:>13}" for head in heads)]
    missing = False
    for stage in STAGES:
        totals = [_total(config, stage, count) for count in processes]
        lines.append(f"  ZeRO stage {stage}".ljust(20) + "".join(f"{total:>13}" for total in totals))
        missing |= "-" in totals
    if missing:
        lines.append("  -: the stage does not go with other settings, or the rows of a step do not split evenly")
    return "\n".join(lines)


def _total(config: ModelRun, stage: Stage, num_processes: int) -> str:
    try:
        config = dataclasses.replace(config, zero_stage=stage)
        config.accumulation_steps(num_processes)
    except ConfigError:
        return "-"
    return f"{memory(config, num_processes).total / GIB:.1f}"
