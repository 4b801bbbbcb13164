"""How close a generated picture comes to the true one inside a mask: L1 and SSIM per sample."""

from torch import Tensor

from i2am.missing import missing


def masked_l1(images: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute difference over the pixels of a mask and the channels.

    Args:
        images: ``[batch, 3, height, width]`` in [0, 1], any floating dtype.
        target: The true pictures, likewise.
        mask: ``[batch, height, width]`` in [0, 1], the weight of every pixel; bool or any real
            dtype.

    Returns:
        fp64 ``[batch]`` in [0, 1], 0 for equal pictures.

    Raises:
        ValueError: If a shape is wrong, a value lies outside [0, 1], or a mask is empty.
    """
    _check(images, target, mask)
    return _over_mask((images.double() - target.double()).abs(), mask)


def masked_ssim(images: Tensor, target: Tensor, mask: Tensor, window: int = 7) -> Tensor:
    """Structural similarity over the pixels of a mask, averaged over the channels.

    The similarity of a pixel is that of the two square windows around it, all of whose pixels count
    alike (``K1 = .01``, ``K2 = .03``, population variances), so that it looks `window` // 2 pixels
    beyond the mask; at the frame the pictures are mirrored. Needs torchmetrics.

    Args:
        images: ``[batch, 3, height, width]`` in [0, 1], any floating dtype.
        target: The true pictures, likewise.
        mask: ``[batch, height, width]`` in [0, 1], the weight of every pixel; bool or any real
            dtype.
        window: Side of the window in pixels, odd, at least 3 and no longer than a picture's side.

    Returns:
        fp64 ``[batch]`` in [-1, 1], 1 for equal pictures; exact to 1e-5, as its moments are fp32.

    Raises:
        ValueError: If a shape is wrong, a value lies outside [0, 1], a mask is empty, or the window
            has an impossible side.
        ImportError: If torchmetrics cannot be imported.
    """
    _check(images, target, mask)
    if window < 3 or window % 2 == 0 or window > min(images.shape[-2:]):
        raise ValueError(
            f"window must be odd, at least 3 and at most {min(images.shape[-2:])}, got {window}"
        )
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    # a torchvision that does not fit torch breaks the import with a RuntimeError
    except (ImportError, RuntimeError) as error:
        raise ImportError(missing("i2am.metrics.masked_ssim", "torchmetrics", error)) from error
    _, similarity = structural_similarity_index_measure(
        images.float(),
        target.float(),
        gaussian_kernel=False,
        kernel_size=window,
        data_range=1.0,
        reduction="none",
        return_full_image=True,
    )
    return _over_mask(similarity, mask)


def _check(images: Tensor, target: Tensor, mask: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise ValueError(f"images must be [batch, 3, height, width], got {list(images.shape)}")
    if target.shape != images.shape:
        raise ValueError(
            f"target must have the shape of images, {list(images.shape)}, got {list(target.shape)}"
        )
    batch, _, height, width = images.shape
    if tuple(mask.shape) != (batch, height, width):
        raise ValueError(f"mask must be {[batch, height, width]}, got {list(mask.shape)}")
    for name, values in (("images", images), ("target", target), ("mask", mask)):
        # written so that NaN fails too
        if not bool(((values >= 0) & (values <= 1)).all()):
            raise ValueError(f"{name} must hold values in [0, 1], got values outside")
    if bool((empty := mask.flatten(1).sum(1) == 0).any()):
        raise ValueError(
            f"mask must cover something, but that of sample {int(empty.nonzero()[0])} is empty"
        )


def _over_mask(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of ``[batch, channels, height, width]`` over channels and, weighted, over pixels."""
    weights = mask.double().flatten(1)
    return (values.double().mean(1).flatten(1) * weights).sum(1) / weights.sum(1)
