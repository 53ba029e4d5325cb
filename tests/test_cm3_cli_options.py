"""Options of sampling beside one another: those that change nothing are refused, all others are taken."""

import pytest

from cm3.cli import main
from cm3.cli_options import check_effect
from cm3.generation.settings import SamplingSettings
from cm3.pipeline import CM3

CD_K = {"sampler": "cd-k", "contrast_k": 3}
FIRST_HALF = {"guidance_interval": (0.0, 0.5)}


@pytest.fixture(scope="module")
def model(model_folder):
    """Its own settings are top-p of 0.95 and a guidance scale of 2."""
    return CM3.from_pretrained(model_folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            CD_K | {"guidance_scale": 3.0},
            "--guidance-scale 3.0 has no effect with --sampler cd-k, which takes its place",
        ),
        (CD_K | FIRST_HALF | {"guidance_scale": 3.0}, "--guidance-scale 3.0 has no effect with --sampler cd-k, which"),
        (CD_K | {"top_p": 0.3}, "--top-p 0.3 has no effect with --sampler cd-k; choose top-p"),
        ({"sampler": "temperature", "top_k": 2}, "--top-k 2 has no effect with --sampler temperature; choose top-p"),
        ({"sampler": "temperature", "contrast_alpha": 0.9}, "--contrast-alpha 0.9 has no effect with --sampler temp"),
        ({"contrast_k": 1}, "--contrast-k 1 has no effect with --sampler top-p; choose cd-k"),
        (
            FIRST_HALF | {"guidance_scale": 1},
            "--guidance-interval 0.0,0.5 has no effect where nothing is guided; raise",
        ),
        (
            {"temperature": 0, "top_p": 0.5},
            "--top-p 0.5 has no effect at --temperature 0, which takes the likeliest;",
        ),
        (
            {"sampler": "mixed"},
            "--sampler mixed draws a prompt's pictures by top-p and cd-k in turn, and a single one by",
        ),
    ],
)
def test_what_changes_nothing_is_refused(model_folder, tmp_path, capsys, options, message):
    words = ["generate", "a red star", "--out", str(tmp_path / "out"), "--model", str(model_folder)]
    for name, value in options.items():
        typed = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        words += [f"--{name.replace('_', '-')}", typed]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "idle"),
    [
        (CD_K, {"guidance_scale": 3.0, "top_p": 0.3, "top_k": 2}),
        ({"sampler": "temperature"}, {"top_p": 0.3, "top_k": 2, "contrast_alpha": 0.9, "contrast_k": 4}),
        ({"guidance_scale": 1.0}, FIRST_HALF | {"contrast_k": 4}),
        ({"temperature": 0.0}, {"top_p": 0.3, "top_k": 2}),
        ({}, {"sampler": "mixed"}),
    ],
)
def test_what_is_refused_does_change_nothing(model, options, idle):
    settings = model.sampling(options | idle)
    for name, value in idle.items():
        with pytest.raises(ValueError, match=name):
            check_effect({name: value}, settings)
    plain, beside = (model.generate("a red star", seed=2, **each)[0] for each in (options, options | idle))
    assert plain.tobytes() == beside.tobytes()


@pytest.mark.parametrize(
    ("options", "telling", "num_samples"),
    [
        (CD_K | FIRST_HALF, {"top_k": 1}, 1),  # outside the interval ids are drawn by top-p
        (CD_K, FIRST_HALF, 1),
        ({"guidance_scale": 4.0}, FIRST_HALF, 1),
        ({}, FIRST_HALF, 1),  # guided by the model's own settings
        ({"sampler": "mixed"}, {"contrast_k": 4, "guidance_scale": 4.0, "top_k": 1}, 2),
    ],
)
def test_what_changes_something_is_taken(model, options, telling, num_samples):
    given = options | telling
    check_effect(given, model.sampling(given), num_samples=num_samples)
    pictures = [
        [picture.tobytes() for picture in model.generate("a red star", seed=2, num_images=num_samples, **each)]
        for each in (options, given)
    ]
    assert pictures[0] != pictures[1]


def test_what_turns_something_off_is_taken_beside_anything():
    off = {
        "guidance_scale": 1.0,
        "image_guidance_scale": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "guidance_interval": (0.0, 1.0),
    }
    for options in ({"sampler": "cd-k"}, {"sampler": "temperature"}, {"temperature": 0.0}, {}):
        check_effect(off | options, SamplingSettings(**off, **options))
    mixed = SamplingSettings(sampler="mixed", guidance_scale=2.0)  # a model's own: one picture is drawn by its top-p
    check_effect({"top_p": 0.5}, mixed)
    check_effect({}, mixed, num_samples=0)
