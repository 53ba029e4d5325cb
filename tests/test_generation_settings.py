"""Sampling settings: what is refused, the samplers of a prompt's samples, and the steps of an interval."""

import json
from dataclasses import asdict

import pytest

from cm3.errors import RequestError
from cm3.generation.settings import SamplingSettings


def unchecked(**values):
    """Settings whose types the suite does not check before they do so themselves."""
    chosen = object.__new__(SamplingSettings)
    for name, value in {**asdict(SamplingSettings()), **values}.items():
        object.__setattr__(chosen, name, value)
    chosen.__post_init__()


@pytest.mark.parametrize(
    ("setting", "need"),
    [
        ({"sampler": "nucleus"}, "top-p or temperature or cd-k or mixed"),
        ({"contrast_alpha": 0.0}, "more than 0 and at most 1"),
        ({"contrast_alpha": 1.1}, "more than 0 and at most 1"),
        ({"contrast_k": 0}, "1 or more"),
        ({"amateur_temperature": 0.0}, "more than 0"),
        ({"image_guidance_scale": -1.0}, "0 or more"),
        ({"guidance_interval": (0.5, 0.5)}, "0 <= start < stop <= 1"),
        ({"guidance_interval": (-0.1, 0.5)}, "0 <= start < stop <= 1"),
        ({"guidance_interval": (0.0, 1.1)}, "0 <= start < stop <= 1"),
        ({"guidance_interval": (0.5,)}, "0 <= start < stop <= 1"),
        ({"guidance_interval": ("0", "1")}, "0 <= start < stop <= 1"),
    ],
)
def test_values_that_cannot_be_used_are_refused(setting, need):
    (name,) = setting
    with pytest.raises(RequestError, match=f"{name}=.* cannot be used; choose a value of .*{need}"):
        unchecked(**setting)


@pytest.mark.parametrize("setting", [{"sampler": 1}, {"contrast_k": 2.5}, {"guidance_interval": 0.5}, {"top_p": True}])
def test_values_of_a_wrong_type_are_refused(setting):
    (name,) = setting
    with pytest.raises(RequestError, match=f"{name}=.* has a type that does not fit"):
        unchecked(**setting)


def test_settings_survive_json():
    chosen = SamplingSettings(sampler="mixed", guidance_interval=(0.25, 1.0))
    again = SamplingSettings(**json.loads(json.dumps(asdict(chosen))))
    assert again == chosen and hash(again) == hash(chosen)


def test_mixed_alternates_over_the_samples_of_a_prompt():
    mixed = SamplingSettings(sampler="mixed", top_p=0.9)
    assert [mixed.of_sample(index).sampler for index in range(4)] == ["top-p", "cd-k", "top-p", "cd-k"]
    assert mixed.of_sample(1).top_p == 0.9
    single = SamplingSettings(sampler="temperature")
    assert single.of_sample(1) is single


def test_an_interval_is_a_share_of_the_new_ids():
    def steps(start, stop, num_new):
        return SamplingSettings(guidance_interval=(start, stop)).compared_steps(num_new)

    assert steps(0.0, 1.0, 16) == range(16)
    assert steps(0.25, 0.75, 16) == range(4, 12)
    assert steps(0.0, 0.2, 9) == range(2)
    assert not steps(0.1, 0.2, 2)
