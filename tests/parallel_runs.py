"""Training runs one after the other in the same processes, for `test_training_distributed.py`.

`python parallel_runs.py A.yaml ...`; afterwards others go on at another stage from the checkpoints of two of them.
"""

import dataclasses
import shutil
import sys
from pathlib import Path

from cm3.config import load_config
from cm3.distributed import barrier, is_main
from cm3.training import train
from cm3.training.config import ModelRun


def go_on(config: ModelRun, stage: int) -> None:
    """Copy step 2 of a run and go on from there at another stage."""
    source = Path(config.output)
    target = source.with_name(f"{config.zero_stage} to {stage}")
    if is_main():
        shutil.copytree(source / "checkpoints" / "step_00000002", target / "checkpoints" / "step_00000002")
        (target / "checkpoints" / "latest").write_text("step_00000002")
    barrier()
    train.run(dataclasses.replace(config, zero_stage=stage, output=str(target)))


if __name__ == "__main__":
    runs = {Path(path).stem: load_config(ModelRun, path) for path in sys.argv[1:]}
    for config in runs.values():
        train.run(config)
    go_on(runs["stage 1"], 3)
    go_on(runs["stage 3"], 0)
