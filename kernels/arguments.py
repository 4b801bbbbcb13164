"""What the public functions do to their arguments first: checks, defaults, one form of mask."""

import torch
from torch import Tensor

from i2am.kernels.types import Impl

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def runs_fused(device: torch.device) -> bool:
    """Whether ``device`` is a GPU that runs the fused kernels.

    Before compute capability 8.0 there are no matrix instructions for bf16, and shared memory is
    too small for the tiles of fp16.
    """
    if device.type != "cuda":
        return False
    return torch.version.hip is not None or torch.cuda.get_device_properties(device).major >= 8


def implementation(impl: Impl | str | None, device: torch.device) -> Impl:
    """The implementation a request means on ``device``.

    ``None`` is fused on a GPU that runs it, else streaming.

    Raises:
        ValueError: The name is unknown.
    """
    if impl is None:
        return Impl.FUSED if runs_fused(device) else Impl.STREAMING
    try:
        return Impl(impl)
    except ValueError:
        names = ", ".join(repr(str(known)) for known in Impl)
        raise ValueError(f"impl must be one of {names} or None, got {impl!r}") from None


def prepare(
    query: Tensor,
    key: Tensor,
    impl: Impl | str | None,
    value: Tensor | None = None,
    *,
    others: tuple[Tensor | None, ...],
) -> Impl:
    """Which implementation runs, once the tensors are known to fit each other.

    Args:
        query: ``[batch, heads, seqlen_q, head_dim]``.
        key: ``[batch, heads, seqlen_k, head_dim]``.
        impl: What was asked for.
        value: Of the shape of ``key``, if there is one.
        others: Tensors that must not ask for a gradient either.

    Raises:
        ValueError: A shape, dtype or device does not fit, or ``impl`` is unknown.
        NotImplementedError: A gradient is asked for.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor is None:
            continue
        if tensor.ndim != 4 or 0 in tensor.shape:
            raise ValueError(
                f"{name} must be [batch, heads, seqlen, head_dim] and not empty, "
                f"got {tuple(tensor.shape)}"
            )
        if tensor.dtype not in _FLOATING:
            raise ValueError(f"{name} must be fp16, bf16, fp32 or fp64, got {tensor.dtype}")
        if (tensor.dtype, tensor.device) != (query.dtype, query.device):
            raise ValueError(
                f"{name} must have the dtype and device of query, {query.dtype} on {query.device}, "
                f"got {tensor.dtype} on {tensor.device}"
            )
    for axis, what in ((0, "batch"), (1, "heads"), (3, "head_dim")):
        if query.shape[axis] != key.shape[axis]:
            raise ValueError(
                f"query and key must have the same {what}, "
                f"got {query.shape[axis]} and {key.shape[axis]}"
            )
    if value is not None and value.shape != key.shape:
        raise ValueError(
            f"value must have the shape of key, {tuple(key.shape)}, got {tuple(value.shape)}"
        )
    tensors = [tensor for tensor in (query, key, value, *others) if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise NotImplementedError(
            "attention statistics are inference-only; call them under torch.no_grad()"
        )
    return implementation(impl, query.device)


def statistics_dtype(query: Tensor) -> torch.dtype:
    """fp32, fp64 with fp64 inputs."""
    return torch.promote_types(query.dtype, torch.float32)


def given_scale(scale: float | None, query: Tensor) -> float:
    """The softmax scale, by default ``head_dim ** -0.5``."""
    return query.shape[-1] ** -0.5 if scale is None else float(scale)


def expanded_bias(bias: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """A mask as an additive one, expanded to ``[batch, heads, seqlen_q, seqlen_k]``.

    Raises:
        ValueError: Its device, dtype or shape does not fit.
    """
    if bias is None:
        return None
    shape = (*query.shape[:3], key.shape[2])
    if bias.device != query.device:
        raise ValueError(f"bias must be on the device of query, {query.device}, got {bias.device}")
    if bias.dtype == torch.bool:
        bias = torch.where(bias, 0.0, float("-inf")).float()
    elif bias.dtype.is_floating_point:
        # the lowest number of a dtype means masked too; kept finite, fp32 would lose the scores
        bias = bias.masked_fill(bias <= torch.finfo(bias.dtype).min / 2, float("-inf"))
    else:
        raise ValueError(f"bias must be bool or floating point, got {bias.dtype}")
    try:
        return bias.expand(shape)
    except RuntimeError:
        raise ValueError(f"bias must broadcast to {shape}, got {tuple(bias.shape)}") from None


def check_sums(name: str, sums: Tensor | None, shape: tuple[int, ...], query: Tensor) -> None:
    """Checks an accumulator, if there is one.

    Raises:
        ValueError: Its shape, dtype or device does not fit, or two of its elements share memory.
    """
    check_statistics(name, sums, shape, query)
    if sums is not None and _overlaps_itself(sums):
        raise ValueError(
            f"{name} must not overlap itself, for every element is added to, got strides "
            f"{sums.stride()} for {tuple(sums.shape)}"
        )


def check_statistics(name: str, sums: Tensor | None, shape: tuple[int, ...], query: Tensor) -> None:
    """Checks a tensor of statistics that is read or added to, if there is one.

    Raises:
        ValueError: Its shape, dtype or device does not fit.
    """
    statistics = statistics_dtype(query)
    if sums is None:
        return
    if tuple(sums.shape) != shape or sums.dtype != statistics or sums.device != query.device:
        raise ValueError(
            f"{name} must be {shape} in {statistics} on {query.device}, "
            f"got {tuple(sums.shape)} in {sums.dtype} on {sums.device}"
        )


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements may share an address.

    None do where each axis steps over all that the axes with smaller steps reach, which is so for
    every view by slices, transposes and reshapes of a tensor that does not overlap itself.
    """
    reach = 0
    for step, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if step <= reach:
                return True
            reach += step * (size - 1)
    return False
