"""What is computed from the picture files of a run, sample by sample."""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, TypeVar

from torch import Tensor

from i2am.missing import missing

Result = TypeVar("Result")


class NotComputable(Exception):
    """A library or a file is missing, so that a metric cannot be computed; one sentence."""


class Pictures(NamedTuple):
    """A generated picture and the real one of the same person, uint8 ``[3, height, width]``."""

    generated: Tensor
    original: Tensor
    """The real picture as it is in the data set."""
    resized: Tensor
    """The same at the size of the generated one."""


class Measure(Protocol):
    """Numbers of one sample. Equal keys and equal pictures must give equal numbers.

    Attributes:
        name: Folder of the numbers that are kept.
        key: Everything beside the pictures that decides them, as JSON values.
    """

    @property
    def name(self) -> str: ...

    @property
    def key(self) -> dict[str, Any]: ...

    def __call__(self, pictures: Pictures) -> dict[str, Tensor]:
        """Tensors by name, of the same dtypes and shapes for all samples.

        Raises:
            ValueError: If the pictures do not allow it; one sentence.
        """
        ...


@contextmanager
def needs(what: str, package: str) -> Any:
    """Says in one sentence that a library is missing or broken.

    Args:
        what: What needs it.
        package: Name of the library.

    Raises:
        NotComputable: Whatever the block raises.
    """
    try:
        yield
    # a torchvision that does not fit torch fails with a RuntimeError, others as they like
    except Exception as error:
        raise NotComputable(missing(what, package, error)) from error


def attempt(make: Callable[[], Result]) -> Result | str:
    """What `make` gives, or why it cannot."""
    try:
        return make()
    except NotComputable as error:
        return str(error)
