"""What is recorded of the families, and what should be, found once for all tests."""

import functools
from collections.abc import Callable
from typing import Any

import family_oracle as oracle
import torch
from family_cases import BATCHES, FAMILIES, Model
from family_words import PROMPTED
from torch import Tensor

import i2am


def recorded(model: Model, **options: Any) -> tuple[Any, Tensor]:
    """What a run leaves, and its image."""
    with i2am.record(model.pipe, **model.options | options) as recorder:
        image = model.run()
    return recorder.maps(), image


def spied(model: Model) -> list[oracle.Call]:
    with oracle.spied(model.networks, model.scheduler) as calls:
        model.run()
    return calls


class Known:
    """A family, what its attention really is, and what was recorded of it.

    Its image with a recorder is its image without, to the bit.
    """

    def __init__(self, make: Callable[[], Model]) -> None:
        self.model = make()
        plain = self.model.run()
        self.wanted = oracle.expected(spied(self.model), self.model.of, self.model.groups)
        self.maps, image = recorded(self.model, sums="native")
        assert torch.equal(image, plain)


@functools.cache
def known(table: str, name: str) -> Known:
    """A family of a table, made and recorded once."""
    return Known({"families": FAMILIES, "batches": BATCHES, "prompted": PROMPTED}[table][name])
