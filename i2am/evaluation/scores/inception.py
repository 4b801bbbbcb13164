"""Features of pictures for FID and KID: Inception of torch-fidelity, or any other network."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from i2am.evaluation.scores.measure import Pictures, needs
from i2am.evaluation.scores.pictures import resize
from i2am.evaluation.scores.protocols import Protocol
from i2am.evaluation.scores.weights import Weights

PUBLISHED = "weights-inception-2015-12-05-6726825d.pth"
"""The weights that FID was defined with, as torch-fidelity publishes them."""

_SIDE = 299

Extractor = Callable[[Tensor], Tensor]
"""uint8 ``[pictures, 3, height, width]`` to ``[pictures, features]``."""


class Features:
    """Features of both pictures by a protocol.

    Args:
        protocol: How pictures are resized for the network, and which real ones it gets.
        extractor: The network.
        identity: What tells it from others, as JSON values; `name` names its files.

    Example:
        >>> Features(PROTOCOLS["i2am"], lambda pictures: pictures.float().mean((2, 3)),
        ...          identity={"name": "mean-colour"})
    """

    def __init__(
        self, protocol: Protocol, extractor: Extractor, *, identity: dict[str, Any]
    ) -> None:
        self._extractor = extractor
        self._resize, self._pictures = protocol.set_resize, protocol.set_pictures
        self.name = f"{identity['name']}-{protocol.name}"
        self.key = {"protocol": protocol.as_dict(), "torch": torch.__version__, **identity}

    @torch.no_grad()
    def __call__(self, pictures: Pictures) -> dict[str, Tensor]:
        """``generated`` and ``real``, fp32 ``[features]``."""
        real = pictures.original if self._pictures == "original" else pictures.resized
        sides = {"generated": pictures.generated, "real": real}
        return {name: self._features(side) for name, side in sides.items()}

    def _features(self, pixels: Tensor) -> Tensor:
        if self._resize is not None:
            pixels = resize(pixels, (_SIDE, _SIDE), self._resize)
        return self._extractor(pixels[None])[0].float().cpu()


def inception(protocol: Protocol, weights: str | Path | None) -> Features:
    """2048 features of the Inception network of FID.

    Args:
        protocol: As for :class:`Features`.
        weights: :data:`PUBLISHED`, a local file; None if there is none.

    Raises:
        NotComputable: If they are missing or not these, or torch-fidelity cannot be imported.
    """
    checked = Weights(
        "Inception for FID and KID", weights, option="--inception", published=PUBLISHED
    )
    with needs("Inception for FID and KID", "torch-fidelity"):
        import torch_fidelity
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    # torch-fidelity unpickles whatever it finds under a path; this holds the tensors checked above
    harmless = io.BytesIO()
    torch.save(checked.tensors, harmless)
    harmless.seek(0)
    with checked.fitting():
        network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=harmless
        )
    identity = {
        "name": "inception",
        "weights": checked.as_dict(),
        "torch_fidelity": torch_fidelity.__version__,
    }
    return Features(protocol, lambda pictures: network(pictures)[0], identity=identity)
