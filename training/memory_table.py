"""The memory of a process by ZeRO stage and number of processes, the table of `cm3 show`."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from cm3.errors import ConfigError
from cm3.training.config import ModelRun
from cm3.training.show import memory, memory_unit

PROCESSES = (1, 8, 64, 512)
Stage = Literal[0, 1, 2, 3]
STAGES: tuple[Stage, ...] = (0, 1, 2, 3)


def memory_table(config: ModelRun, processes: Sequence[int] = PROCESSES) -> str:
    """Return the memory of one process for each ZeRO stage and number of processes, `-` where a stage does not go with
    the other settings or the rows of a step do not split among the processes; a last line then says so. All in one
    unit, of which the least is at least one."""
    heads = (f"{count} GPU{'s' if count > 1 else ''}" for count in processes)
    totals = {stage: [_total(config, stage, count) for count in processes] for stage in STAGES}
    known = [total for row in totals.values() for total in row if total is not None]
    unit, size = memory_unit(min(known, default=0))
    lines = [f"{unit} of a process".ljust(20) + "".join(f"{head:>13}" for head in heads)]
    for stage, row in totals.items():
        cells = ("-" if total is None else f"{total / size:.1f}" for total in row)
        lines.append(f"  ZeRO stage {stage}".ljust(20) + "".join(f"{cell:>13}" for cell in cells))
    if len(known) < len(STAGES) * len(processes):
        lines.append("  -: the stage does not go with other settings, or the rows of a step do not split evenly")
    return "\n".join(lines)


def _total(config: ModelRun, stage: Stage, num_processes: int) -> float | None:
    try:
        config = dataclasses.replace(config, zero_stage=stage)
        config.accumulation_steps(num_processes)
    except ConfigError:
        return None
    return memory(config, num_processes).total
