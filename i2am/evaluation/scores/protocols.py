"""Protocols of image metrics: what "SSIM" or "FID" stands for in a table, down to the resizing.

Four groups publish try-on tables by four conventions, which alone move SSIM by 0.04, so that a
number means little without the name of its protocol. All of them score PNG files of the generated
pictures, as 8-bit pixels and at their own size.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

Resize = Literal["bilinear", "pil-bilinear", "pil-bicubic", "pil-lanczos"]
"""``bilinear`` looks at four pixels whatever the reduction, as OpenCV does; Pillow's filters widen
with it."""


@dataclass(frozen=True)
class Protocol:
    """One convention.

    Attributes:
        name: How tables call it.
        after: Whose evaluation it follows.
        resize: How a real picture gets the size of the generated one, for SSIM and LPIPS.
        ssim_channels: Colours, averaged, or grey values as Pillow makes them.
        ssim_border: ``"inside"`` averages over windows that lie within the picture, ``"mirrored"``
            over one window around every pixel.
        lpips_network: Backbone of LPIPS.
        lpips_size: Height and width that both pictures have for LPIPS; None keeps theirs.
        set_pictures: Real pictures of FID and KID: as they are in the data set, or resized.
        set_resize: How a picture gets Inception's 299 x 299 pixels, rounded to 8 bits; None leaves
            it to torch-fidelity, which does as TensorFlow 1 did.
        set_settings: Where FID and KID are computed.
    """

    name: str
    after: str
    resize: Resize
    ssim_channels: Literal["RGB", "L"]
    ssim_border: Literal["inside", "mirrored"]
    lpips_network: Literal["alex", "squeeze"]
    lpips_size: tuple[int, int] | None
    set_pictures: Literal["original", "resized"]
    set_resize: Resize | None
    set_settings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON values, with what all protocols share."""
        return {
            **asdict(self),
            "file_format": "PNG",
            "pixels": "uint8",
            "ssim": "torchmetrics, gaussian window 11, sigma 1.5, K .01 .03",
            "lpips": "torchmetrics",
            "fid": "Inception of torch-fidelity, 2048 features, fp64 covariances over n - 1",
            "kid": "same features, cubic kernel, raw; kid_x1000 is the same times 1000",
        }


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="i2am",
            after="the authors of I2AM: pytorch_msssim, pytorch-fid",
            resize="bilinear",
            ssim_channels="RGB",
            ssim_border="inside",
            lpips_network="alex",
            lpips_size=None,
            set_pictures="original",
            set_resize="bilinear",
            set_settings=("unpaired",),
        ),
        Protocol(
            name="ladi",
            after="LaDI-VTON and OOTDiffusion: torchmetrics, clean-fid",
            resize="pil-bilinear",
            ssim_channels="RGB",
            ssim_border="mirrored",
            lpips_network="alex",
            lpips_size=None,
            set_pictures="original",
            set_resize="pil-bicubic",
            set_settings=("paired", "unpaired"),
        ),
        Protocol(
            name="hr-viton",
            after="HR-VITON and DCI-VTON: scikit-image, torch-fidelity",
            resize="pil-bilinear",
            ssim_channels="L",
            ssim_border="inside",
            lpips_network="alex",
            lpips_size=(128, 128),
            set_pictures="original",
            set_resize=None,
            set_settings=("unpaired",),
        ),
        Protocol(
            name="catvton",
            after="CatVTON: torchmetrics, clean-fid",
            resize="pil-lanczos",
            ssim_channels="RGB",
            ssim_border="mirrored",
            lpips_network="squeeze",
            lpips_size=None,
            set_pictures="resized",
            set_resize="pil-bicubic",
            set_settings=("paired", "unpaired"),
        ),
    )
}
