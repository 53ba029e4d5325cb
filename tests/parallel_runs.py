"""Training runs one after the other in the same processes, for the tests of training in several processes.

`python parallel_runs.py A.yaml ...`; a run called "B after A" goes on from step 2 of A.
"""

import shutil
import sys
from pathlib import Path

from cm3.config import load_config
from cm3.distributed import barrier, is_main
from cm3.training import train
from cm3.training.config import ModelRun
from cm3.training.engine import start_distributed


def go_on(source: Path, target: Path) -> None:
    """Copy step 2 of a run, from which the one in `target` is to go on."""
    if is_main():
        shutil.copytree(source / "checkpoints" / "step_00000002", target / "checkpoints" / "step_00000002")
        (target / "checkpoints" / "latest").write_text("step_00000002")
    barrier()


if __name__ == "__main__":
    runs = {Path(path).stem: load_config(ModelRun, path) for path in sys.argv[1:]}
    start_distributed()
    for name, config in runs.items():
        _, after, source = name.partition(" after ")
        if after:
            go_on(Path(runs[source].output), Path(config.output))
        train.run(config)
