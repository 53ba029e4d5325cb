"""`cm3 bench speculative` on a tiny model: what is counted and printed."""

import pytest
import torch

from cm3.cli import main
from cm3.errors import ConfigError
from cm3.eval.speculative_bench import SpeculativeBench, measure
from cm3.pipeline import CM3


def test_passes_are_counted_and_pictures_stay_the_same(model_folder, tmp_path):
    """Codes that do not depend on each other: what is drawn behind a wrong guess is right in the next pass."""
    model = CM3.from_pretrained(model_folder, device="cpu")
    with torch.no_grad():
        model.transformer.embedding.weight.zero_()  # the head, too: all logits are 0
    model.save_pretrained(tmp_path)
    config = SpeculativeBench(
        model=str(tmp_path), windows=(2, 32), guidance=(1.0,), temperatures=(1.0,), pictures=2, seed=3
    )
    (costs,) = measure(config)
    assert [cost.settings.speculative_window for cost in costs] == [0, 2, 32]
    assert [cost.same for cost in costs] == [2, 2, 2] and min(cost.seconds for cost in costs) > 0
    # the prompt, then 16 codes: one by one; 1, 2, 1, 2, ... of them; the first and the others
    assert [cost.passes for cost in costs] == [1 + 16, 1 + 11, 1 + 2]


def test_the_command_prints_a_table(model_folder, capsys):
    options = "--windows 4 --guidance 1 --temperatures 1 --pictures 1".split()
    assert main(["bench", "speculative", "--model", str(model_folder), *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{model_folder}: 1 pictures in batches of 1")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[4:]]
    assert [row[:3] for row in rows] == [["1", "1", "off"], ["1", "1", "4"]]
    assert rows[0][4] == rows[0][6] == "100" and [row[-1] for row in rows] == ["1 of 1"] * 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pictures": 0}, "pictures=0, batch=1; choose 1 or more of each"),
        ({"batch": 0}, "pictures=8, batch=0; choose 1 or more of each"),
        ({"windows": (0, 4)}, "windows=.0, 4.; choose one or more, each of 2 or more"),
        ({"windows": ()}, "windows=..; choose one or more"),
    ],
)
def test_cases_that_cannot_be_measured_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        SpeculativeBench(**values)
