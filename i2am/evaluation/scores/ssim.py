"""Structural similarity of a generated picture and the real one, by torchmetrics."""

from typing import Any

import torch
from torch import Tensor

from i2am.evaluation.scores.measure import Pictures, needs
from i2am.evaluation.scores.pictures import grey
from i2am.evaluation.scores.protocols import Protocol

_REACH = 5  # of the window, in pixels


class SSIM:
    """SSIM by a protocol, with the gaussian window that all of them use.

    Args:
        protocol: Which channels and windows count, and how the real picture was resized.

    Raises:
        NotComputable: If torchmetrics cannot be imported.
    """

    def __init__(self, protocol: Protocol) -> None:
        with needs("SSIM", "torchmetrics"):
            import torchmetrics
            from torchmetrics.functional.image import structural_similarity_index_measure
        self._similarity = structural_similarity_index_measure
        self._channels, self._border = protocol.ssim_channels, protocol.ssim_border
        self.name = f"ssim-{protocol.name}"
        self.key: dict[str, Any] = {
            "protocol": protocol.as_dict(),
            "torch": torch.__version__,
            "torchmetrics": torchmetrics.__version__,
        }

    def __call__(self, pictures: Pictures) -> dict[str, Tensor]:
        """``ssim``, fp64 of fp32 moments, in [-1, 1].

        Raises:
            ValueError: If the picture is smaller than the window.
        """
        sides = (pictures.generated, pictures.resized)
        if min(sides[0].shape[-2:]) <= 2 * _REACH:
            raise ValueError(
                f"a picture needs more than {2 * _REACH} pixels on each side for SSIM, "
                f"got {list(sides[0].shape[-2:])}"
            )
        if self._channels == "L":
            sides = (grey(sides[0]), grey(sides[1]))
        generated, real = (side[None].float() / 255 for side in sides)
        _, similarity = self._similarity(
            generated, real, data_range=1.0, reduction="none", return_full_image=True
        )
        if self._border == "inside":
            similarity = similarity[..., _REACH:-_REACH, _REACH:-_REACH]
        return {"ssim": similarity.double().mean()}
