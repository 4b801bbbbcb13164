"""The exponential moving average against its closed form."""

from contextlib import suppress

import pytest
import torch
from torch import nn

from i2am.training.averaging import AveragedWeights


def test_closed_form() -> None:
    weight = nn.Parameter(torch.tensor([0.0], dtype=torch.float64))
    average = AveragedWeights({"weight": weight}, (0.2, 0.6), steps=4)
    expected = 0.0
    for step, value in enumerate([1.0, -2.0, 5.0, 3.0]):
        weight.data.fill_(value)
        average.update(step)
        decay = min(0.2 + 0.4 * step / 4, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    assert average.averages["weight"].dtype == torch.float32
    torch.testing.assert_close(average.averages["weight"], torch.tensor([expected]))


def test_the_end_of_a_long_training_reaches_the_last_decay() -> None:
    weight = nn.Parameter(torch.zeros(1))
    average = AveragedWeights({"weight": weight}, (0.9, 0.99), steps=1_000_000)
    weight.data.fill_(1.0)
    average.update(999_999)
    assert float(average.averages["weight"]) == pytest.approx(0.01, rel=1e-3)


def test_lending_restores_the_weights_after_an_exception() -> None:
    weight = nn.Parameter(torch.ones(2))
    average = AveragedWeights({"weight": weight}, (0.0, 0.0), steps=1)
    average.load({"weight": torch.full((2,), 7.0)})
    with suppress(RuntimeError), average.applied():
        assert weight.tolist() == [7.0, 7.0]
        raise RuntimeError
    assert weight.tolist() == [1.0, 1.0]
    average.keep()
    assert weight.tolist() == [7.0, 7.0]
