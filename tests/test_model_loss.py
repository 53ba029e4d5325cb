"""The chunked loss against the plain formula: value, parts and gradients."""

import pytest
import torch
import torch.nn.functional as F
from test_model_transformer import CHAMELEON, CONFIG, CONFIGS, build, random_ids

from cm3.model.loss import next_token_loss, shift_targets

IMAGE_RANGE = (20, 50)
DOCUMENTS_BT = torch.tensor([[0] * 7 + [1] * 20 + [2] * 3 + [-1] * 10, [5] * 40])


def naive(model, ids, documents, weights, z_loss_weight):
    """All logits at once, document by document."""
    logits = model.logits(model(ids, document_ids_BT=documents)).float()
    total, weight_sum = 0.0, 0.0
    sums = {"text": 0.0, "image": 0.0, "text_count": 0, "image_count": 0}
    for row in range(ids.shape[0]):
        for column in range(ids.shape[1] - 1):
            document = documents[row, column]
            if document < 0 or document != documents[row, column + 1]:
                continue
            target, weight = int(ids[row, column + 1]), weights[row, column + 1]
            if weight == 0:
                continue
            loss = F.cross_entropy(logits[row, column], torch.tensor(target))
            log_z = logits[row, column].logsumexp(0)
            total = total + weight * (loss + z_loss_weight * log_z**2)
            weight_sum = weight_sum + weight
            kind = "image" if IMAGE_RANGE[0] <= target < IMAGE_RANGE[1] else "text"
            sums[kind] += loss.item()
            sums[f"{kind}_count"] += 1
    return total / weight_sum, weight_sum, sums


@CONFIGS
@pytest.mark.parametrize("z_loss_weight", [0.0, 0.1])
@pytest.mark.parametrize("chunk_size", [7, 1000])
def test_equals_the_plain_formula_with_gradients(config, z_loss_weight, chunk_size):
    ids = random_ids()
    weights = torch.rand(2, 40, generator=torch.Generator().manual_seed(2)) * (ids != 3)
    plain = build(config)
    expected, weight_sum, sums = naive(plain, ids, DOCUMENTS_BT, weights, z_loss_weight)
    (3 * expected).backward()

    model = build(config)
    output = next_token_loss(
        model,
        ids,
        DOCUMENTS_BT,
        image_range=IMAGE_RANGE,
        weights_BT=weights,
        z_loss_weight=z_loss_weight,
        chunk_size=chunk_size,
    )
    (3 * output.loss).backward()
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(output.weight_sum, weight_sum)
    assert output.text_loss_sum.item() == pytest.approx(sums["text"], rel=1e-5)
    assert output.image_loss_sum.item() == pytest.approx(sums["image"], rel=1e-5)
    assert (output.text_count.item(), output.image_count.item()) == (sums["text_count"], sums["image_count"])
    for (name, actual), parameter in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_defaults_count_every_target():
    ids = random_ids()
    output = next_token_loss(build(CONFIG), ids, image_range=IMAGE_RANGE)
    assert output.text_count + output.image_count == 2 * 39 == output.weight_sum
    mean = (output.text_loss_sum + output.image_loss_sum) / (2 * 39)
    torch.testing.assert_close(output.loss, mean)
    assert not output.text_loss_sum.requires_grad and not output.z_loss.requires_grad


def test_targets_stay_inside_their_document():
    ids = torch.arange(10)[None]
    targets, is_target = shift_targets(ids, torch.tensor([[0, 0, 0, 1, 2, 2, 2, -1, -1, -1]]))
    assert is_target.tolist() == [[True, True, False, False, True, True, False, False, False, False]]
    assert targets[is_target].tolist() == [1, 2, 5, 6]


def test_z_loss_is_reported_and_punishes_the_partition_function():
    model, ids = build(CHAMELEON), random_ids()
    plain = next_token_loss(model, ids, image_range=IMAGE_RANGE)
    with_z = next_token_loss(model, ids, image_range=IMAGE_RANGE, z_loss_weight=0.01)
    torch.testing.assert_close(with_z.loss, plain.loss + 0.01 * plain.z_loss)
    log_z = model.logits(model(ids))[:, :-1].logsumexp(-1)
    torch.testing.assert_close(plain.z_loss, log_z.square().mean().detach())


def test_nothing_to_predict_is_zero_and_not_nan():
    model = build(CONFIG)
    output = next_token_loss(model, random_ids(), torch.full((2, 40), -1), image_range=IMAGE_RANGE)
    assert output.loss.item() == 0
    output.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["bfloat16", "autocast"])
def test_low_precision_follows_float32(kind):
    ids = random_ids()
    exact = build(CONFIG)
    expected = next_token_loss(exact, ids, image_range=IMAGE_RANGE)
    expected.loss.backward()
    model = build(CONFIG) if kind == "autocast" else build(CONFIG).to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        output = next_token_loss(model, ids, image_range=IMAGE_RANGE)
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=0.02)
    for actual, parameter in zip(model.parameters(), exact.parameters(), strict=True):
        assert actual.grad.dtype == actual.dtype
        similarity = F.cosine_similarity(actual.grad.float().flatten(), parameter.grad.flatten(), dim=0)
        assert similarity > 0.97


def test_evaluation_keeps_no_gradient():
    with torch.no_grad():
        output = next_token_loss(build(CONFIG), random_ids(), image_range=IMAGE_RANGE)
    assert not output.loss.requires_grad


def test_evaluation_makes_no_gradient_of_the_head(monkeypatch):
    made = []
    zeros_like = torch.zeros_like
    monkeypatch.setattr(torch, "zeros_like", lambda *a, **k: made.append(a) or zeros_like(*a, **k))
    model, ids = build(CONFIG), random_ids()
    with torch.no_grad():
        next_token_loss(model, ids, image_range=IMAGE_RANGE)
    assert not made
    next_token_loss(model, ids, image_range=IMAGE_RANGE)
    assert len(made) == 1


def test_a_frozen_head_still_passes_gradients_on():
    model = build(CHAMELEON)
    model.head.weight.requires_grad_(False)
    next_token_loss(model, random_ids(), image_range=IMAGE_RANGE).loss.backward()
    assert model.head.weight.grad is None
    assert model.embedding.weight.grad.abs().sum() > 0
