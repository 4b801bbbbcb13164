"""StableVITON's total variation of attention centres, a loss for the training of cross-attention.

Every query of a layer has a centre of attention on the reference image. Where neighbouring queries
both show the garment, their centres should lie beside each other too: the loss is how far apart
they are (Kim et al., StableVITON, CVPR 2024, section 3.4).
"""

import math
import re
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from i2am.adapters.attention.tap import Tap, attention_layers
from i2am.attribution.grid import Grid, resize
from i2am.layouts.token_layout import (
    CROSS_ATTENTION_LAYERS,
    AttentionCall,
    Frame,
    TokenLayout,
)

# a query that looks less than this at the patches has no centre worth dividing for
_LEAST_MASS = 1e-6


class AttentionTotalVariation:
    """The loss on chosen layers of a UNet, inside a ``with`` block around its training.

    In a forward pass that builds a graph, the chosen layers also yield the mean over heads of their
    attention, from which gradients flow back; the model's own output stays the same to the bit.
    Passes without gradients (validation, `i2am.record`) are neither slowed down nor kept. At the
    end of the block, also after an exception, the layers have their own processors again.

    The upstream code picks its layer by a window of key counts, which at other image sizes selects
    other layers. The default here goes by level: the middle cross-attention of the decoder block
    that works at half the resolution of the latents. That is where StableVITON's warp block 4 sits
    (``up_blocks.2.attentions.1`` of a model of Stable Diffusion's size, 32 x 24 queries at
    512 x 384), and ``up_blocks.1.attentions.1`` (16 x 12) of the pocket model.

    Args:
        unet: A diffusers UNet with cross-attention to ``prefix + rows * columns`` reference tokens.
        layers: Paths of attention modules; None is the default above. Their losses are added up.
        weight: Factor of the loss; StableVITON's is 0.001.
        prefix: Tokens before the reference patches (1 for a class token). They are dropped from the
            mean over heads, and the rest is divided by its sum.
        reference_grid: (rows, columns) of the reference patches.

    Raises:
        ValueError: A layer is no cross-attention of the UNet, there is none to choose, the weight
            is negative or not finite, or the grid is empty.
        NotImplementedError: The UNet is a compiled one.

    Example:
        >>> with AttentionTotalVariation(unet, reference_grid=(16, 12)) as tv:  # doctest: +SKIP
        ...     prediction = unet(noisy, timesteps, encoder_hidden_states=context).sample
        ...     loss = mse_loss(prediction, target) + tv.loss(garment_region, keep=~dropped)
        ...     loss.backward()
    """

    def __init__(
        self,
        unet: nn.Module,
        *,
        layers: Sequence[str] | None = None,
        weight: float = 0.001,
        prefix: int = 1,
        reference_grid: Grid,
    ) -> None:
        if not 0 <= weight < math.inf:
            raise ValueError(f"weight must be a finite number of at least 0, got {weight}")
        if hasattr(unet, "_orig_mod"):
            raise NotImplementedError("unet must not be compiled: its graph would hide attention")
        # refuses an empty grid and a negative prefix, and knows whose tokens are whose
        self._layout = TokenLayout.cross_attention(reference_grid, prefix)
        modules = _cross_attentions(unet)
        names = [default_layer(unet)] if layers is None else list(layers)
        for name in names:
            if name not in modules:
                raise ValueError(
                    f"layers must name cross-attentions of the unet, such as "
                    f"{next(iter(modules), 'none')}, got {name!r}"
                )
        if not names:
            raise ValueError("layers must name at least one cross-attention, got none")
        self.layers = tuple(dict.fromkeys(names))
        self.weight = weight
        self.prefix = prefix
        self.reference_grid = reference_grid
        self._tap = Tap(
            unet,
            layers=self.layers.__contains__,
            listen=self._hear,
            before=self._open,
            after=self._close,
            graph=True,
        )
        self._frame: Frame | None = None
        self._running = False
        self._centres: dict[str, Tensor] = {}

    def __enter__(self) -> Self:
        self._tap.attach()
        return self

    def __exit__(self, *exception: object) -> None:
        self._tap.detach()
        self._frame = None
        self._centres = {}

    def loss(self, garment_region: Tensor, *, keep: Tensor | None = None) -> Tensor:
        """The loss of the UNet's last forward pass that had gradients.

        Args:
            garment_region: ``[batch, height, width]``, 1 where the true image shows the garment;
                the pixel under the centre of a query's cell counts, as inside from 0.5 on.
            keep: bool ``[batch]``, False for samples that saw the unconditional context, whose
                attention says nothing about their garment; None keeps all.

        Returns:
            A scalar with a graph, fp32 (fp64 for an fp64 model); 0, with gradients of 0, where no
            two neighbouring queries are inside.

        Raises:
            RuntimeError: There was no forward pass with gradients inside the block.
            ValueError: A shape does not fit the pass.
        """
        if not self._centres:
            raise RuntimeError(
                "no attention was kept; run the unet with gradients inside the `with` block first"
            )
        losses = []
        for centres in self._centres.values():
            region = garment_region.to(centres.device)
            if region.ndim != 3 or len(region) != len(centres):
                raise ValueError(
                    f"garment_region must be [{len(centres)}, height, width] as the unet's batch, "
                    f"got {list(region.shape)}"
                )
            inside = resize(region, (centres.shape[1], centres.shape[2]), mode="nearest") >= 0.5
            if keep is not None:
                if keep.shape != (len(centres),) or keep.dtype != torch.bool:
                    raise ValueError(
                        f"keep must be bool [{len(centres)}], got {keep.dtype} {list(keep.shape)}"
                    )
                inside = inside & keep.to(inside.device)[:, None, None]
            losses.append(total_variation(centres, inside))
        return self.weight * torch.stack(losses).sum()

    def _open(self, network: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            sample: Tensor = args[0] if args else kwargs["sample"]
            height, width = sample.shape[-2:]
            self._frame = Frame((height, width))
            self._centres = {}
            self._running = True

    def _close(self, network: int) -> None:
        self._running = False

    def _hear(
        self,
        index: int,
        call_index: int,
        query: Tensor,
        key: Tensor,
        bias: Tensor | None,
        scale: float | None,
        *_: Any,
    ) -> None:
        # further calls are those of adapters, which attend to other tokens
        if self._frame is None or call_index or not torch.is_grad_enabled():
            return
        layer = self._tap.layers[index].path
        call = AttentionCall(layer, 0, query.shape[2], key.shape[2])
        spans = self._layout.spans(call, self._frame)
        if spans is None:
            raise ValueError(
                f"layers must work on a level of the unet's grid, {layer} has "
                f"{query.shape[2]} queries for latents of {self._frame.size}"
            )
        attention = mean_attention(query, key, bias=bias, scale=scale)
        centres = attention_centres(attention, self.reference_grid, prefix=self.prefix)
        # gradient checkpointing runs the same operations again in the backward pass
        if self._running:
            self._centres[layer] = centres.unflatten(1, spans.generated.size)


def default_layer(unet: nn.Module) -> str:
    """The middle cross-attention of the decoder block at half the latents' resolution.

    Where that block has none, the finest block below it, and at last the one above, serves.

    Raises:
        ValueError: No decoder block has cross-attention.
    """
    blocks: dict[int, list[str]] = {}
    for name in _cross_attentions(unet):
        if found := re.match(r"up_blocks\.(\d+)\.", name):
            blocks.setdefault(int(found[1]), []).append(name)
    if not blocks:
        raise ValueError(
            f"unet must have cross-attention in its up blocks, {type(unet).__name__} has none"
        )
    last = len(unet.get_submodule("up_blocks")) - 1  # type: ignore[arg-type]
    below = [block for block in blocks if block < last]
    names = blocks[max(below or blocks)]
    return names[len(names) // 2]


def mean_attention(
    query: Tensor, key: Tensor, *, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Softmax over keys, averaged over heads, with a graph.

    Args:
        query: ``[batch, heads, seqlen_q, head_dim]``, any floating dtype.
        key: ``[batch, heads, seqlen_k, head_dim]``.
        bias: Additive or bool mask ``[batch, heads, 1 or seqlen_q, seqlen_k]``.
        scale: Softmax scale, default ``head_dim ** -0.5``.

    Returns:
        ``[batch, seqlen_q, seqlen_k]``, fp32, or fp64 for fp64 queries; also under autocast.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        scores = (query.to(dtype) * scale) @ key.to(dtype).mT
        if bias is not None:
            boolean = bias.dtype == torch.bool
            scores = scores.masked_fill(~bias, -torch.inf) if boolean else scores + bias
        return scores.softmax(-1).mean(1)


def attention_centres(attention: Tensor, reference_grid: Grid, *, prefix: int = 0) -> Tensor:
    """Where on the reference every query looks on average.

    Args:
        attention: ``[batch, seqlen_q, prefix + rows * columns]``, non-negative.
        reference_grid: (rows, columns) of the reference patches, row-major behind the prefix.
        prefix: Tokens without a place; dropped, and what is left is divided by its sum.

    Returns:
        ``[batch, seqlen_q, 2]``: row in [0, rows - 1] and column in [0, columns - 1], not
        normalised, in the attention's dtype.
    """
    rows, columns = (torch.arange(n, device=attention.device) for n in reference_grid)
    places = torch.cartesian_prod(rows, columns).to(attention.dtype)
    patches = attention[..., prefix:]
    return (patches @ places) / patches.sum(-1, keepdim=True).clamp(min=_LEAST_MASS)


def total_variation(centres: Tensor, inside: Tensor) -> Tensor:
    """Mean distance of the centres of neighbours, over vertical plus over horizontal pairs.

    Args:
        centres: ``[batch, height, width, 2]``.
        inside: bool ``[batch, height, width]``; pairs count where both queries are inside.

    Returns:
        A scalar: for each direction the sum of the absolute differences of both coordinates over
        all pairs of the batch, divided by the number of pairs (by 1 where there is none).
    """
    total = centres.new_zeros(())
    for axis in (1, 2):
        n = centres.shape[axis] - 1
        both = inside.narrow(axis, 0, n) & inside.narrow(axis, 1, n)
        steps = (centres.narrow(axis, 1, n) - centres.narrow(axis, 0, n)).abs().sum(-1)
        total = total + (steps * both).sum() / both.sum().clamp(min=1)
    return total


def _cross_attentions(unet: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in attention_layers(unet).items()
        if re.search(CROSS_ATTENTION_LAYERS, name)
    }
