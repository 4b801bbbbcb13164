"""Exponential moving average of the weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class AveragedWeights:
    """An average of named parameters, kept in fp32 beside them.

    The decay moves linearly from `decay[0]` to `decay[1]` over the training; in the first steps
    it is at most ``(1 + step) / (10 + step)``, so that the first weights are soon forgotten.

    Args:
        parameters: What to average, by name.
        decay: Decay per step at the beginning and at the end.
        steps: Length of the training.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], decay: tuple[float, float], steps: int
    ) -> None:
        self.parameters, self.decay, self.steps = dict(parameters), decay, steps
        self.averages = {
            name: values.detach().float().clone() for name, values in self.parameters.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after step number `step`, counted from 0."""
        first, last = self.decay
        decay = first + (last - first) * step / self.steps
        decay = min(decay, (1 + step) / (10 + step))
        current = [values.detach().float() for values in self.parameters.values()]
        torch._foreach_lerp_(list(self.averages.values()), current, 1 - decay)

    def load(self, averages: Mapping[str, Tensor]) -> None:
        """Goes on from averages that were saved."""
        for name, values in self.averages.items():
            values.copy_(averages[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Lends the averages to the parameters; afterwards they are what they were."""
        originals = {name: values.detach().clone() for name, values in self.parameters.items()}
        self._put(self.averages)
        try:
            yield
        finally:
            self._put(originals)

    def keep(self) -> None:
        """Puts the averages into the parameters for good."""
        self._put(self.averages)

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])
