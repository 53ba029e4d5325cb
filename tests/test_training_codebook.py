"""Codes of a learned codebook keep their distance: of two that are too close, the less used one moves."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cm3.data.sources import SourceConfig
from cm3.tokenizers.image import ImageTokenizer
from cm3.tokenizers.quantizer import VectorQuantizer
from cm3.tokenizers.vqgan import VQGANConfig
from cm3.training import image_tokenizer
from cm3.training.codebook import CodebookLearner, too_close
from cm3.training.image_tokenizer_config import ImageTokenizerRun

CORNERS = torch.tensor([[5.0, 5.0], [5.0, -5.0], [-5.0, 5.0], [-5.0, -5.0]])


def learner_of(codebook_QE, *, min_code_distance, decay=0.9, revive_after_steps=0, normalize=False):
    quantizer = VectorQuantizer(*codebook_QE.shape, normalize)
    quantizer.codebook_QE.copy_(quantizer.project(codebook_QE))
    return CodebookLearner(quantizer, decay, revive_after_steps, 0, min_code_distance)


def update(learner, latents_NE):
    """A step of training without the network."""
    latents_NE = learner.quantizer.project(latents_NE)
    learner.update(latents_NE, learner.quantizer.nearest(latents_NE)[None])


def least_distance(codebook_QE):
    """Exact, in double precision."""
    distance_QQ = (codebook_QE[:, None].double() - codebook_QE.double()).norm(dim=2)
    return float((distance_QQ + 1e9 * torch.eye(len(codebook_QE))).min())


def test_of_two_near_codes_the_less_used_one_moves_to_a_free_latent():
    for first, second in ((0.0, 0.01), (0.01, 0.0)):  # either may be the more used one
        codebook_QE = torch.cat([torch.tensor([[first, 0.0], [second, 0.0]]), CORNERS])
        latents_NE = torch.tensor([[0.0, 0.0]] * 8 + [[0.01, 0.0]] * 2 + [[4.0, 3.0]])
        latents_NE = torch.cat([latents_NE, CORNERS])
        plain, apart = (learner_of(codebook_QE, min_code_distance=share) for share in (0.0, 0.05))
        for learner in (plain, apart):
            update(learner, latents_NE)
        moved = int(first == 0.0)
        expected_QE = plain.quantizer.codebook_QE.clone()
        assert (expected_QE[0] - expected_QE[1]).norm() < 0.02
        expected_QE[moved] = torch.tensor([4.0, 3.0])  # the only latent that is far from every code
        assert torch.equal(apart.quantizer.codebook_QE, expected_QE)
        assert apart.report()["separated_codes"] == 1 and plain.report()["separated_codes"] == 0
        update(apart, latents_NE)
        assert apart.report()["separated_codes"] == 0
        assert int(apart.quantizer.nearest(torch.tensor([[4.0, 3.0]]))) == moved


def test_well_separated_codes_are_learned_bit_for_bit_as_without():
    generator = torch.Generator().manual_seed(1)
    codebook_QE = torch.cat([CORNERS, 3 * CORNERS, torch.zeros(1, 2)])
    plain, apart = (learner_of(codebook_QE, min_code_distance=share, revive_after_steps=50) for share in (0.0, 0.05))
    for _ in range(20):
        latents_NE = codebook_QE[torch.randint(9, (64,), generator=generator)]
        latents_NE = latents_NE + torch.randn(64, 2, generator=generator)
        for learner in (plain, apart):
            update(learner, latents_NE)
    assert not torch.equal(plain.quantizer.codebook_QE, codebook_QE)
    assert torch.equal(plain.quantizer.codebook_QE, apart.quantizer.codebook_QE)
    assert all(torch.equal(plain.state_dict()[name], tensor) for name, tensor in apart.state_dict().items())


def test_the_distance_is_a_share_of_the_spread():
    codebook_QE = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 4.0], [0.0, -4.0]])
    learner = learner_of(codebook_QE, min_code_distance=0.5)
    assert learner.spread == pytest.approx(12.5**0.5)
    shifted = learner_of(codebook_QE + 100, min_code_distance=0.5)
    assert shifted.spread == pytest.approx(12.5**0.5)


def test_dead_codes_come_back_far_from_the_others_or_wait():
    """Nine of ten latents are a flat background that has its code: no dead code may join it there."""
    others_NE = 4 * F.one_hot(torch.arange(3), 3).float()
    latents_NE = torch.cat([torch.full((27, 3), 0.0) + 0.001 * torch.randn(27, 3), others_NE])
    codebook_QE = torch.cat([torch.zeros(1, 3), 50 + torch.arange(15.0).reshape(5, 3)])
    plain, apart = (learner_of(codebook_QE, min_code_distance=share, revive_after_steps=1) for share in (0.0, 0.02))
    for learner in (plain, apart):
        update(learner, latents_NE)
    assert least_distance(plain.quantizer.codebook_QE) < 0.01
    new_QE = apart.quantizer.codebook_QE
    assert apart.report()["revived_codes"] == 3 and plain.report()["revived_codes"] == 5
    assert torch.equal(torch.cdist(new_QE, others_NE).argmin(0).sort().values, torch.tensor([1, 2, 3]))
    torch.testing.assert_close(new_QE[4:], codebook_QE[4:])  # they wait where they are
    later_NE = torch.cat([latents_NE, -others_NE[:2]])
    update(apart, later_NE)
    assert apart.report()["revived_codes"] == 2
    codes_N = apart.quantizer.nearest(later_NE)
    assert len(set(codes_N[27:].tolist())) == 5 and least_distance(apart.quantizer.codebook_QE) > 0.1


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.booleans(), st.booleans())
def test_duplicates_part_whatever_the_latents_are(seed, normalize, free_latents):
    generator = torch.Generator().manual_seed(seed)
    places_NE = torch.randn(8, 6, generator=generator)
    codebook_QE = torch.cat([places_NE, places_NE[:4] + 1e-4, places_NE[:2], places_NE[:2]])
    learner = learner_of(codebook_QE, min_code_distance=0.05, decay=1.0, normalize=normalize)  # nothing else moves them
    untouched_QE = learner.quantizer.codebook_QE[4:8].clone()
    latents_NE = torch.randn(200, 6, generator=generator) if free_latents else places_NE
    for _ in range(6):
        update(learner, latents_NE)
    assert learner.interval_separated >= 8
    assert least_distance(learner.quantizer.codebook_QE) >= 0.049 * learner.spread
    torch.testing.assert_close(learner.quantizer.codebook_QE[4:8], untouched_QE)
    if normalize:
        torch.testing.assert_close(learner.quantizer.codebook_QE.norm(dim=1), torch.ones(16))


def test_the_earlier_vector_stays_and_chains_are_not_cleared():
    line_NE = torch.tensor([[0.0], [0.6], [1.2], [1.8], [7.0]])
    assert too_close(line_NE, 1.0).tolist() == [False, True, False, True, False]
    assert too_close(line_NE.flip(0), 1.0).tolist() == [False, False, True, False, True]
    assert too_close(line_NE[:0], 1.0).tolist() == []
    far_NE = torch.randn(300, 4) * 1e-3 + 1e3  # close to each other for fp32 products, far for the distance
    assert not too_close(far_NE, 1e-6).any() and too_close(far_NE, 1.0)[1:].all()


def test_a_search_in_chunks_finds_the_same(monkeypatch):
    vectors_NE = torch.randn(70, 2)
    expected_N = too_close(vectors_NE, 0.4)
    assert 5 < int(expected_N.sum()) < 65
    monkeypatch.setattr("cm3.training.codebook.CHUNK_ENTRIES", 500)
    assert torch.equal(too_close(vectors_NE, 0.4), expected_N)


def flat_latents(step):
    """Half of them one background, the rest anywhere, and of the first step all the background."""
    generator = torch.Generator().manual_seed(step)
    latents_NE = torch.randn(64, 3, generator=generator)
    latents_NE[: 32 if step else 64] *= 0.003
    return latents_NE


def test_a_saved_state_goes_on_exactly():
    start_QE = torch.cat([0.001 * torch.randn(8, 3), torch.randn(8, 3)])

    def fresh():
        return learner_of(start_QE, min_code_distance=0.03, revive_after_steps=3)

    whole, again, half = fresh(), fresh(), fresh()
    for step in range(8):
        update(whole, flat_latents(step))
        update(again, flat_latents(step))
    assert torch.equal(whole.quantizer.codebook_QE, again.quantizer.codebook_QE)
    update(half, flat_latents(0))
    saved, codebook_QE = copy.deepcopy(half.state_dict()), half.quantizer.codebook_QE.clone()
    resumed = learner_of(codebook_QE, min_code_distance=0.03, revive_after_steps=3)
    resumed.load_state_dict(saved)
    for step in range(1, 8):
        update(resumed, flat_latents(step))
    assert saved["interval_separated"] > 0 and whole.interval_revived > saved["interval_revived"]
    assert torch.equal(resumed.quantizer.codebook_QE, whole.quantizer.codebook_QE)
    assert all(torch.equal(resumed.state_dict()[name], tensor) for name, tensor in whole.state_dict().items())
    del saved["interval_separated"]  # a checkpoint of an earlier version
    resumed.load_state_dict(saved)
    assert resumed.report()["separated_codes"] == 0


def test_a_training_on_flat_backgrounds_keeps_its_codes_apart(tmp_path, capsys):
    shares = {}
    for name, share in (("off", 0.0), ("on", 0.02)):
        config = ImageTokenizerRun(
            data=SourceConfig(kind="scenes", limit=24, text_columns=()),
            vqgan=VQGANConfig(
                image_size=64,
                base_channels=16,
                channel_multipliers=(1,),
                num_residual_blocks=1,
                num_codes=64,
                code_width=8,
                block_encoder=True,
            ),
            steps=24,
            batch_size=4,
            warmup_steps=2,
            quantize_from_step=6,
            revive_after_steps=4,
            min_code_distance=share,
            log_interval=24,
            precision="fp32",
            export_precision="fp32",
            output=str(tmp_path / name),
        )
        quantizer = ImageTokenizer.load(image_tokenizer.run(config)).model.quantizer
        spread = CodebookLearner(quantizer, 0.9, 0, 0).spread
        shares[name] = least_distance(quantizer.codebook_QE) / spread
        line = json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1])
        assert line["revived_codes"] > 10
        assert f"separated {line['separated_codes']:.0f} |" in capsys.readouterr().out
    assert shares["off"] < 0.005 and shares["on"] > 0.019, shares
