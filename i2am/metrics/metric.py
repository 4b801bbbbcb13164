"""IMACS for training and evaluation loops that use torchmetrics."""

from typing import Any

import torch
from torch import Tensor

from i2am.attribution.direction import Direction
from i2am.attribution.presets import Preset, get_preset
from i2am.data.arrays import ImageInput
from i2am.metrics.functional import Undefined, imacs
from i2am.missing import missing

try:
    from torchmetrics import Metric
# a torchvision that does not fit torch breaks the import with a RuntimeError
except (ImportError, RuntimeError) as error:
    _REFUSAL = missing("i2am.IMACS", "torchmetrics", error)

    class Metric:  # type: ignore[no-redef]
        """Lets the class below be imported and read without torchmetrics, but not be used."""

        def __init__(self, **kwargs: Any) -> None:
            raise ImportError(_REFUSAL)


class IMACS(Metric):
    """Mean :func:`imacs` over all samples seen, in any number of batches and processes.

    States are three sums, so batches, ranks without data and merging order change nothing but the
    rounding of fp64. Use one instance for IMACS_g and one for IMACS_r.

    Args:
        penalty: Weight of the mean outside the mask.
        threshold: Largest normalized value that is dropped.
        preset: ``"paper"``, ``"official"`` or a :class:`~i2am.attribution.Preset`.
        direction: What the maps are; matters to ``"official"`` only.
        invert: As for :func:`imacs`.
        processed, stretch: As for :func:`imacs`.
        undefined: Samples without a score ``"raise"`` or, under ``"nan"``, are left out of the mean
            and counted in the state ``n_undefined``.
        **kwargs: Options of :class:`torchmetrics.Metric`.

    Raises:
        ImportError: If torchmetrics cannot be imported.

    Example:
        >>> metric = IMACS()
        >>> right = torch.tensor([[[0, 1], [0, 1]]])
        >>> metric.update(right.float(), mask=right)
        >>> metric.compute()
        tensor(1., dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_upper_bound = 1.0

    total: Tensor
    n: Tensor
    n_undefined: Tensor

    def __init__(
        self,
        *,
        penalty: float = 3.0,
        threshold: float = 0.4,
        preset: str | Preset = "paper",
        direction: Direction | str = Direction.REFERENCE_TO_GENERATED,
        invert: bool | None = None,
        processed: bool = False,
        stretch: bool = False,
        undefined: Undefined = "raise",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.penalty = penalty
        self.threshold = threshold
        self.preset = get_preset(preset)
        self.direction = Direction(direction)
        self.invert = invert
        self.processed = processed
        self.stretch = stretch
        self.undefined: Undefined = undefined
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("n", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("n_undefined", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @property
    def plot_lower_bound(self) -> float:
        """Smallest value the score can take."""
        return -self.penalty

    def update(self, attribution: Tensor, mask: ImageInput) -> None:
        """Adds a batch.

        Args:
            attribution: Raw maps ``[batch, height, width]``.
            mask: As for :func:`imacs`.

        Raises:
            ValueError: As :func:`imacs` does; the batch is not counted then.
        """
        scores = imacs(
            attribution,
            mask,
            penalty=self.penalty,
            threshold=self.threshold,
            preset=self.preset,
            direction=self.direction,
            invert=self.invert,
            processed=self.processed,
            stretch=self.stretch,
            undefined=self.undefined,
        )
        defined = ~scores.isnan()
        self.total += scores[defined].sum()
        self.n += defined.sum()
        self.n_undefined += (~defined).sum()

    def compute(self) -> Tensor:
        """Mean over the samples that have a score, fp64 scalar; NaN if there is none."""
        return self.total / self.n

    def set_dtype(self, dst_type: str | torch.dtype) -> "IMACS":
        """Does nothing: a mean over a data set stays a sum in fp64, whatever the model's dtype."""
        return self
