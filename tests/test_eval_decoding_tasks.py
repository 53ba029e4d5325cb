"""The decoding studies: every way at every number of samples, and who judges what was chosen by whom."""

import json
from collections import Counter

import pytest
from tiny_model import scene_sized_model

from cm3.data.scenes import example
from cm3.data.sources import SourceConfig
from cm3.errors import ConfigError
from cm3.eval import decoding_tasks
from cm3.eval.decoding_tasks import ARMS, JUDGES, DecodingStudy, PairDecodingStudy
from cm3.eval.scene_tasks import SceneSet
from cm3.pipeline import CM3
from cm3.tokenizers.image import to_square

COUNT = 4
FOUND, NEARER = "own picture found", "nearer to its original than to another"
DISTANCE = "encoder Fréchet distance (not FID)"


@pytest.fixture(scope="module")
def model():
    return scene_sized_model(max_positions=96)


@pytest.fixture(scope="module")
def scenes():
    return [example(0, "test", number) for number in range(COUNT)]


@pytest.fixture(scope="module")
def source(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    rows = []
    for number, scene in enumerate(scenes):
        scene.image.save(folder / f"{number}.png")
        rows.append(json.dumps({"text": scene.caption, "image": f"{number}.png", "half": number % 2}))
    (folder / "rows.jsonl").write_text("\n".join(rows))
    return SourceConfig(kind="jsonl", path=str(folder / "rows.jsonl"))


def test_scenes_are_drawn_every_way_at_every_number_of_samples(model):
    result = DecodingStudy(scenes=SceneSet(size=2), samples=(1, 2)).run(model)
    expected = [
        f"shape, colour and count right, {arm}, best of {n} by {ranker}"
        for arm in ARMS
        for ranker in JUDGES
        for n in (1, 2)
    ]
    assert list(result.metrics) == expected
    assert set(result.protocol["details"]["seconds a picture"]) == set(ARMS)


def test_pairs_are_drawn_every_way_at_every_number_of_samples(model, source):
    task = PairDecodingStudy(source=source, samples=(1, 2), num_rivals=1, within="half", batch_size=3)
    result = task.run(model)
    assert list(result.metrics) == [
        f"{name}, {arm}, best of {n} by {ranker}"
        for arm in ARMS
        for ranker in JUDGES
        for n in (1, 2)
        for name in (FOUND, NEARER, DISTANCE)
    ]
    again = task.run(model)
    assert {name: str(value) for name, value in result.metrics.items()} == {
        name: str(value) for name, value in again.metrics.items()
    }
    record = result.protocol
    assert record["re_ranking"] == "best of the first n by caption and by clip"
    assert record["metrics"]["own picture found"].startswith("by whoever did not choose, ")
    assert json.dumps(record)


def test_originals_are_chosen_among_pictures_of_others(model, source, scenes, monkeypatch):
    """The second candidate is the original, the first that of another caption: the demo's encoder knows them apart."""

    def originals(self, captions, *, num_images, seed, **sampling):
        places = [[scene.caption for scene in scenes].index(caption) for caption in captions]
        pictures = [to_square(scene.image, 64) for scene in scenes]
        return [[pictures[(place + 1) % COUNT], pictures[place]] for place in places]

    monkeypatch.setattr(CM3, "generate", originals)
    metrics = PairDecodingStudy(source=source, samples=(1, 2), num_rivals=3).run(model).metrics
    for arm in ARMS:
        assert metrics[f"{NEARER}, {arm}, best of 2 by clip"].value == 1
        assert metrics[f"{NEARER}, {arm}, best of 1 by clip"].value < 1
        assert metrics[f"{DISTANCE}, {arm}, best of 2 by clip"].value == pytest.approx(0, abs=1e-5)

    # with the originals alone and the encoder as judge, each is found among all; the other way round none is
    def shown(own):
        pictures = [to_square(scene.image, 64) for scene in scenes]
        places = {scene.caption: number for number, scene in enumerate(scenes)}
        shift = 0 if own else 1
        return lambda self, captions, **options: [[pictures[(places[text] + shift) % COUNT]] for text in captions]

    found = []
    for own in (True, False):
        monkeypatch.setattr(CM3, "generate", shown(own))
        task = PairDecodingStudy(source=source, samples=(1,), num_rivals=3)
        found.append(task.run(model).metrics[f"{FOUND}, top-p, best of 1 by caption"].value)
    assert found == [1, 0]


def test_only_guided_ways_are_guided(model, source, monkeypatch):
    calls = Counter()
    draw = CM3.generate

    def counted(self, captions, **options):
        calls[options["sampler"], options["guidance_scale"], options["num_images"]] += len(captions)
        return draw(self, captions, **options)

    monkeypatch.setattr(CM3, "generate", counted)
    PairDecodingStudy(source=source, samples=(1, 2), num_rivals=1, guidance_scale=3.0).run(model)
    assert calls == {("top-p", 1.0, 2): 4, ("top-p", 3.0, 2): 4, ("cd-k", 1.0, 2): 8, ("mixed", 3.0, 2): 4}


def test_too_few_rivals_are_refused(model, source):
    with pytest.raises(ConfigError, match="9 rivals are asked for"):
        PairDecodingStudy(source=source).run(model)
    with pytest.raises(ConfigError, match="choose 1 or more of each"):
        PairDecodingStudy(source=source, samples=())


def test_nobody_judges_himself():
    assert all(ranker != judge for ranker, judge in decoding_tasks.JUDGES.items())
