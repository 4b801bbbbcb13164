"""Weight files of metrics: local, checked before anything uses them, named where missing."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from i2am.evaluation.scores.measure import NotComputable
from i2am.files import sha256_of_file


class Weights:
    """The tensors of a weight file, read without executing anything in it.

    Args:
        metric: What needs it.
        file: Where it is; None if it was not given.
        option: Which option names it.
        published: Name of the published file, which ends in the first digits of its SHA-256.

    Attributes:
        tensors: On the CPU, by name.
        sha256: Of the file.
        published: Whether that is the published file's.

    Raises:
        NotComputable: If it is missing, damaged, not a file of plain tensors, or holds values that
            are NaN or infinite.
    """

    def __init__(
        self, metric: str, file: str | Path | None, *, option: str, published: str
    ) -> None:
        from i2am.models.weights import read_weight_file

        digits = Path(published).stem.rpartition("-")[2]
        wanted = f"{published} (its SHA-256 begins with {digits})"
        if file is None:
            raise NotComputable(
                f"{metric} needs the weights {wanted}, which i2am does not download: name the "
                f"file with {option}"
            )
        self._metric, self._path = metric, Path(file)
        try:
            self.tensors, _ = read_weight_file(self._path)
            self.sha256 = sha256_of_file(self._path)
        except (OSError, ValueError) as error:
            raise NotComputable(f"{metric} needs the weights {wanted}: {option}: {error}") from None
        self.published = self.sha256.startswith(digits)

    def as_dict(self) -> dict[str, Any]:
        """JSON values that tell these weights from others."""
        return {"sha256": self.sha256, "published": self.published}

    def load_into(self, module: nn.Module, names: Mapping[str, str], *, ignored: str) -> None:
        """Copy them into a module, all of its tensors and from all of the file's.

        Args:
            module: What needs them.
            names: For each tensor of the module, its name in the file.
            ignored: Regular expression for the beginning of names that the module has no use for.

        Raises:
            NotComputable: If tensors are missing, left over or misshapen.
        """
        from i2am.models.weights import load_strictly

        back = {name: key for key, name in names.items()}
        state = {
            back.get(name, name): tensor
            for name, tensor in self.tensors.items()
            if not re.match(ignored, name)
        }
        with self.fitting():
            load_strictly(module, state, what="backbone")

    @contextmanager
    def fitting(self) -> Iterator[None]:
        """Turns what a module raises over weights that are not its own into one sentence.

        Raises:
            NotComputable: In place of a RuntimeError or ValueError.
        """
        try:
            yield
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise NotComputable(
                f"{self._metric} cannot be computed with {self._path}: {reason}"
            ) from error
