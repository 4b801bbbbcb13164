"""Perceptual distance (LPIPS) of a generated picture and the real one, by torchmetrics.

torchmetrics brings the heads, torchvision the backbone's layers and a local file its weights:
nothing is downloaded.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from i2am.evaluation.scores.measure import Pictures, needs
from i2am.evaluation.scores.pictures import resize
from i2am.evaluation.scores.protocols import Protocol
from i2am.evaluation.scores.weights import Weights

PUBLISHED = {"alex": "alexnet-owt-7be5be79.pth", "squeeze": "squeezenet1_1-b8a52dc0.pth"}
"""Weight files of the backbones, as torchvision publishes them."""


class LPIPS:
    """LPIPS by a protocol.

    Args:
        protocol: Which backbone, and at which size.
        weights: The backbone's weights, one of :data:`PUBLISHED`; None if there are none.

    Raises:
        NotComputable: If they are missing or not these, or torchmetrics or torchvision cannot be
            imported.
    """

    def __init__(self, protocol: Protocol, weights: str | Path | None) -> None:
        network = protocol.lpips_network
        backbone = Weights("LPIPS", weights, option="--lpips", published=PUBLISHED[network])
        with needs("LPIPS", "torchvision"):
            import torchvision
        with needs("LPIPS", "torchmetrics"):
            import torchmetrics

            # the public class downloads a backbone; this one takes it as it is
            from torchmetrics.functional.image.lpips import _NoTrainLpips
        self._network = _NoTrainLpips(net=network, pnet_rand=True)
        backbone.load_into(
            self._network.net,
            {
                name: re.sub(r"^slices?\.?\d+\.", "features.", name)
                for name in self._network.net.state_dict()
            },
            ignored=r"classifier\.",
        )
        self._size = protocol.lpips_size
        self.name = f"lpips-{network}-{protocol.name}"
        self.key: dict[str, Any] = {
            "protocol": protocol.as_dict(),
            "weights": backbone.as_dict(),
            "torch": torch.__version__,
            "torchmetrics": torchmetrics.__version__,
            "torchvision": torchvision.__version__,
        }

    @torch.no_grad()
    def __call__(self, pictures: Pictures) -> dict[str, Tensor]:
        """``lpips``, fp64, at least 0.

        Raises:
            ValueError: If the pictures are too small for the backbone.
        """
        generated, real = map(self._prepared, (pictures.generated, pictures.resized))
        try:
            distance = self._network(generated, real)
        except RuntimeError as error:
            raise ValueError(
                f"LPIPS cannot be computed at {list(generated.shape[-2:])} pixels: {error}"
            ) from error
        return {"lpips": distance.double().squeeze()}

    def _prepared(self, pixels: Tensor) -> Tensor:
        if self._size is not None:
            pixels = resize(pixels, self._size, "pil-bilinear")
        return pixels[None].float() / 127.5 - 1
