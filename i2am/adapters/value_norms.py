"""Norms of values behind the output projection of their head, ``|| W_o v ||``."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

# blocks of diffusers whose output projection takes the attention's features first, the MLP's behind
_JOINED_BLOCKS = {
    "BriaFiboSingleTransformerBlock",
    "BriaSingleTransformerBlock",
    "ChromaSingleTransformerBlock",
    "FluxSingleTransformerBlock",
    "HunyuanImageSingleTransformerBlock",
    "HunyuanVideoSingleTransformerBlock",
    "HunyuanVideoTokenReplaceSingleTransformerBlock",
    "LongCatImageSingleTransformerBlock",
    "MotifVideoSingleTransformerBlock",
    "OvisImageSingleTransformerBlock",
}
# attention modules of diffusers whose own projection does
_JOINED_LAYERS = {"Flux2ParallelSelfAttention"}
# its images are added behind the output projection of the layer
_UNPROJECTED = {"FluxIPAdapterAttnProcessor"}


class ValueNorms:
    """``|| W_o v ||`` of the tokens that layers attend to, ``W_o`` being the columns of the layer's
    output projection that belong to the head.

    ``v^T (W_o^T W_o) v`` needs a matrix ``[head_dim, head_dim]`` of every head, which is made in
    fp32 at a layer's first call and kept for the run.

    Args:
        layers: Every layer, as its denoiser and its path in there.

    Raises:
        NotImplementedError: The output projection of a layer is not known, or is no matrix.
    """

    def __init__(self, layers: Sequence[tuple[nn.Module, str]]) -> None:
        self._layers = layers
        self._grams: dict[int, Tensor] = {}
        for network, path in self._layers:
            output_weight(network, path)

    def begin_run(self) -> None:
        """Weights may have changed."""
        self._grams.clear()

    @torch.no_grad()
    def of(self, layer: int, call_index: int, value: Tensor) -> Tensor:
        """The norms of the tokens of one call.

        Args:
            layer: The how many-th layer.
            call_index: Which of its calls.
            value: ``[batch, heads, seqlen_k, head_dim]``.

        Returns:
            ``[batch, heads, seqlen_k]``, fp32 (fp64 of fp64 values).

        Raises:
            NotImplementedError: The output projection is not of these heads.
        """
        value = value.to(torch.promote_types(value.dtype, torch.float32))
        network, path = self._layers[layer]
        if call_index and _is_a(network.get_submodule(path).processor, _UNPROJECTED):
            return value.norm(dim=-1)
        if layer not in self._grams:
            heads, width = value.shape[1], value.shape[3]
            weight = output_weight(network, path, heads * width)
            weight = weight.to(value.device, value.dtype).unflatten(1, (heads, width))
            by_head = weight.transpose(0, 1)
            self._grams[layer] = by_head.mT @ by_head
        return ((value @ self._grams[layer]) * value).sum(-1).clamp_min(0).sqrt()


def output_weight(network: nn.Module, path: str, width: int | None = None) -> Tensor:
    """The matrix that a layer's heads are projected by, side by side.

    Args:
        network: Where the layer is.
        path: Its path.
        width: Features of all heads together, where they are known.

    Returns:
        ``[out, width]``, the weight itself.

    Raises:
        NotImplementedError: It is not known, or is no matrix of floating-point numbers.
    """
    module: Any = network.get_submodule(path)
    linear: Any = getattr(module, "to_out", None)
    joined = _is_a(module, _JOINED_LAYERS)
    if linear is None:
        block = network.get_submodule(path.rpartition(".")[0])
        if not _is_a(block, _JOINED_BLOCKS):
            raise NotImplementedError(
                f"values='norm' needs an output projection to_out of {path}, which has none, and "
                f"where the projection of a {type(block).__name__} takes its heads is not known"
            )
        linear, joined = block.proj_out, True
    elif isinstance(linear, nn.ModuleList | nn.Sequential):
        linear = linear[0]
    weight = getattr(linear, "weight", None)
    if not _is_plain(linear, weight):
        raise NotImplementedError(
            "values='norm' needs output projections that are one matrix of floating-point numbers "
            "in memory, neither quantised nor offloaded nor with a LoRA that is not fused into "
            f"them, got the {type(linear).__name__} of {path}"
        )
    assert weight is not None
    if width is None:
        return weight.detach()
    if weight.shape[1] < width or (weight.shape[1] > width and not joined):
        raise NotImplementedError(
            f"values='norm' needs an output projection of the {width} features of the heads of "
            f"{path}, got one of {weight.shape[1]}"
        )
    return weight.detach()[:, :width]


def _is_plain(linear: Any, weight: Any) -> bool:
    # a LoRA shows the weight of the layer that it wraps
    if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
        return False
    # quantised tensors are of classes of their own and pass for floating-point ones
    plain = isinstance(weight, Tensor) and type(weight.data) is Tensor and not weight.is_meta
    return plain and weight.ndim == 2 and weight.is_floating_point()


def _is_a(thing: Any, names: set[str]) -> bool:
    return any(kind.__name__ in names for kind in type(thing).__mro__)
