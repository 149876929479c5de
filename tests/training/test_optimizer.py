"""Who decays, and whose optimizer it is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zoo.errors import SettingsError
from zoo.training import Settings
from zoo.training.optimizer import build_optimizer, parameter_groups


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch, self.norm, self.project = nn.Conv2d(3, 8, 2), nn.LayerNorm(8), nn.Linear(8, 4)
        self.class_token, self.logit_scale = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(()))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def test_only_matrices_and_kernels_decay_and_nothing_is_lost():
    model = Tower()
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, free = ({names[id(p)] for p in group["params"]} for group in parameter_groups(model, 0.3))
    assert decayed == {"patch.weight", "project.weight"}
    assert free == {"patch.bias", "norm.weight", "norm.bias", "project.bias", "class_token", "logit_scale"}
    assert [group["weight_decay"] for group in parameter_groups(model, 0.3)] == [0.3, 0.0]


def test_ours_is_adamw_as_the_settings_say():
    settings = Settings(lr=3e-4, betas=(0.8, 0.9), eps=1e-5, weight_decay=0.2)
    optimizer = build_optimizer(Tower(), settings, None)
    assert isinstance(optimizer, torch.optim.AdamW)
    for group, decay in zip(optimizer.param_groups, (0.2, 0.0), strict=True):
        assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (3e-4, (0.8, 0.9), 1e-5, decay)


def test_a_function_may_give_the_groups():
    def groups(model):
        return [{"params": model.patch.parameters(), "lr": 1e-5}, {"params": model.project.parameters()}]

    optimizer = build_optimizer(Tower(), Settings(lr=1e-3), groups)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-5, 1e-3]


def test_a_client_optimizer_is_used_as_it_is_but_only_over_this_model():
    model = Tower()
    client = torch.optim.SGD(model.parameters(), lr=1.0)
    assert build_optimizer(model, Settings(), client) is client
    with pytest.raises(SettingsError, match="are not the model's"):
        build_optimizer(Tower(), Settings(), client)
    with pytest.raises(SettingsError, match="str"):
        build_optimizer(model, Settings(), "adamw")


def test_a_frozen_model_is_refused():
    with pytest.raises(SettingsError, match="unfreeze"):
        build_optimizer(Tower().requires_grad_(False), Settings(), None)


@pytest.mark.parametrize(("said", "expected"), [(None, 5e-4), (2e-4, 2e-4)])
def test_the_trainers_rate_holds_if_it_was_said_else_the_optimizers(toy, tmp_path, caplog, said, expected):
    """FlagAI's CLIP script says 1e-4 to the trainer and 1e-5 to Adam."""
    model = toy.Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-4)
    toy.train(tmp_path, model, lr=said, warm_up=0, lr_decay="constant", call={"optimizer": optimizer})
    assert {line["lr"] for line in toy.lines(tmp_path)} == {expected}
    assert ("lr=0.0005" in caplog.text and "lr=0.0002" in caplog.text) == (said is not None)
