"""What a step reports besides its loss, against values computed from the logits."""

import copy
import dataclasses

import pytest
import torch
from tiny_run import VOCABULARY, prepare, tiny_run

from cm3.data.shards import ShardedDocuments
from cm3.model.loss import shift_targets
from cm3.model.transformer import Transformer
from cm3.training.loss import SUMS, LossModule
from cm3.training.train import make_loader


@pytest.mark.parametrize("changes", [{}, {"norm": "rmsnorm", "norm_order": "swin", "qk_norm": True}])
def test_sums_are_those_of_the_logits(tmp_path, changes):
    config = tiny_run(prepare(tmp_path / "data"), tmp_path)
    model_config = dataclasses.replace(config.model, dropout=0.0, zero_init_outputs=False, init_std=0.3, **changes)
    config = dataclasses.replace(config, model=model_config)
    batch = next(iter(make_loader(config, ShardedDocuments(tmp_path / "data"), evaluation=False)))
    weights_BT = batch["weights_BT"] * torch.rand(batch["weights_BT"].shape)
    model = Transformer(model_config)
    _, sums = LossModule(model, VOCABULARY, config)(batch["ids_BT"], batch["document_ids_BT"], weights_BT)
    sums = dict(zip(SUMS, sums.tolist(), strict=True))

    with torch.no_grad():
        log_z_BT = model.logits(model(batch["ids_BT"], document_ids_BT=batch["document_ids_BT"])).logsumexp(-1)
        bare = copy.deepcopy(model)
        bare.final_norm = torch.nn.Identity()
        hidden_BTD = bare(batch["ids_BT"], document_ids_BT=batch["document_ids_BT"])
    _, is_target_BT = shift_targets(batch["ids_BT"], batch["document_ids_BT"])
    target_weights_BT = weights_BT.roll(-1, dims=1) * is_target_BT
    is_token_BT = batch["document_ids_BT"] >= 0
    assert 0 < is_token_BT.sum() < is_token_BT.numel()  # there is padding, which does not count
    assert sums["tokens"] == is_token_BT.sum()
    assert sums["output_norm"] == pytest.approx(float(hidden_BTD.norm(dim=-1)[is_token_BT].sum()), rel=1e-5)
    assert sums["weight"] == pytest.approx(float(target_weights_BT.sum()), rel=1e-5)
    assert sums["z_loss"] == pytest.approx(float((target_weights_BT * log_z_BT.square()).sum()), rel=1e-5)
