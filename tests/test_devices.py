"""The device that was asked for, or the best there is, or an error that says what there is."""

from __future__ import annotations

import pytest
import torch

from zoo.devices import find_device
from zoo.errors import DeviceNotFound


def test_nothing_asked_for_is_the_best_there_is():
    assert find_device().type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_name_and_a_device_are_the_same():
    assert find_device("cpu") == find_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize("wanted", ["cuda:99", "no such kind", 1.5])
def test_a_device_that_is_not_here_is_named_with_those_that_are(wanted):
    with pytest.raises(DeviceNotFound, match=f"{wanted}.*it has: cpu"):
        find_device(wanted)
