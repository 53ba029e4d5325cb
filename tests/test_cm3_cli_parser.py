"""What the shell is told of words that `cm3` cannot use, and the help that it points to."""

import argparse
import shlex

import pytest

from cm3.cli import build_parser, main
from cm3.cli_parser import in_shell_words


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("cm3", "cm3: nothing was given for VERB; see cm3 --help"),
        ("cm3 generat star", "cm3: VERB cannot be 'generat'; did you mean generate? See cm3 --help"),
        ("cm3 zzz", "cm3: VERB cannot be 'zzz'; see cm3 --help"),
        ("cm3 generate", "cm3 generate: nothing was given for prompt; see cm3 generate --help"),
        (
            "cm3 generate star --num_images 4",
            "cm3 generate: there is no option --num_images; did you mean --num-images? See cm3 generate --help",
        ),
        ("cm3 generate star --zzz=4", "cm3 generate: there is no option --zzz; see cm3 generate --help"),
        (
            "cm3 generate star --num-images four",
            "cm3 generate: --num-images takes a whole number, not 'four'; see cm3 generate --help",
        ),
        (
            "cm3 generate star --temperature warm",
            "cm3 generate: --temperature takes a number, not 'warm'; see cm3 generate --help",
        ),
        ("cm3 generate star --seed", "cm3 generate: --seed needs a value; see cm3 generate --help"),
        (
            "cm3 generate star --unconditional-context kep",
            "cm3 generate: --unconditional-context cannot be 'kep'; did you mean keep? See cm3 generate --help",
        ),
        (
            "cm3 answer a.png why is this",
            "cm3 answer: unexpected is this; a text of several words goes in quotes; see cm3 answer --help",
        ),
        (
            "cm3 answer a.png why -5 '- or this'",
            "cm3 answer: unexpected -5 '- or this'; a text of several words goes in quotes; see cm3 answer --help",
        ),
        (
            "cm3 answer a.png why -5 -jsn",
            "cm3 answer: there is no option -jsn; did you mean --json? See cm3 answer --help",
        ),
        ("cm3 answer", "cm3 answer: nothing was given for image, question; see cm3 answer --help"),
        ("cm3 train", "cm3 train: nothing was given for config; see cm3 train --help"),
        (
            f"cm3 generate star --seed {1 << 63}",
            "cm3 generate: --seed: '9223372036854775808' is no seed; choose a whole number from 0 to 2**63 - 1; "
            "see cm3 generate --help",
        ),
        (
            "cm3 infill a.png --box 1,2",
            "cm3 infill: --box: '1,2' is not a box; write LEFT,TOP,RIGHT,BOTTOM in pixels, such as 16,16,48,48; "
            "see cm3 infill --help",
        ),
        (
            "cm3 index search memory --txt star",
            "cm3 index search: there is no option --txt; did you mean --text? See cm3 index search --help",
        ),
        (
            "cm3 bench loss --precision half",
            "cm3 bench loss: --precision cannot be 'half'; choose one of bf16, fp32; see cm3 bench loss --help",
        ),
        (
            "cm3 train --steps 3 configs/demo/model.yaml",
            "cm3 train: there is no option --steps before the config; its settings come after it; see cm3 train --help",
        ),
    ],
)
def test_a_wrong_word_is_answered_by_one_line(command, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(shlex.split(command)[1:])
    assert stopped.value.code == 2
    assert capsys.readouterr() == ("", said + "\n")


def test_names_of_python_are_those_of_the_shell():
    names = ["num_images", "seed", "guidance_scale", "guidance_interval", "negative", "rank", "image_guidance_scale"]
    arguments = dict.fromkeys(names) | {"guidance_interval": (0.5, 0.25), "windows": [4, 1], "kinds": ["a b", "c"]}
    for message, said in (
        ("num_images=0; ask for at least 1", "--num-images 0; ask for at least 1"),
        ('negative="it\'s" has no effect', "--negative 'it'\"'\"'s' has no effect"),
        ("rank='clip' is unknown", "--rank clip is unknown"),
        ("seed=top-p cannot be used; choose", "--seed top-p cannot be used; choose"),
        ("guidance_interval=(0.5, 0.25) cannot", "--guidance-interval 0.5,0.25 cannot"),
        ("windows=(4, 1), kinds=('a b', 'c'); choose", "--windows 4 1, --kinds 'a b' c; choose"),
        ("a row (seed=0) is bad, see seed=1.", "a row (--seed 0) is bad, see --seed 1."),
        ("set guidance_scale=1 and image_guidance_scale=1", "set --guidance-scale 1 and --image-guidance-scale 1"),
        ("raise guidance_scale, or leave it", "raise --guidance-scale, or leave it"),
        # what is no name of an option stays as it is
        ("runs/guidance_scale/a.png is no file", "runs/guidance_scale/a.png is no file"),
        ("generation.guidance_scale=2 and the seed of a rank", "generation.guidance_scale=2 and the seed of a rank"),
        ("--guidance-scale 3, top_k=4", "--guidance-scale 3, top_k=4"),
    ):
        assert in_shell_words(message, arguments) == said
    assert in_shell_words("steps=0; choose 1 or more", {}) == "steps=0; choose 1 or more"


@pytest.mark.parametrize(
    "path", ["runs/lr=0.1,seed=0/model", "seed=0/model", "seed=0,lr=0.1/a.png", "runs/x,num_images/a", "num_images,b/a"]
)
def test_a_path_stays_as_it_is(path):
    message = f"{path} has no config.json; choose another"
    assert in_shell_words(message, {"seed": 0, "num_images": 4}) == message


def parsers(parser):
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                yield from parsers(each)


def test_help_fits_a_terminal_and_its_examples_parse(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    root = build_parser()
    found = list(parsers(root))
    assert len(found) > 25
    for parser in found:
        text = parser.format_help()
        assert max(map(len, text.splitlines())) <= 80, parser.prog
        command = text.splitlines()[-1]
        assert command.startswith("  cm3 "), parser.prog
        if parser is not root:
            assert command.split()[: len(parser.prog.split())] == parser.prog.split()
        root.parse_args(shlex.split(command)[1:])
