"""What layers multiply their branch by before they add it to the image's: scales and masks."""

from collections.abc import Iterator
from typing import Any

import torch
from diffusers.image_processor import IPAdapterMaskProcessor
from torch import Tensor

from i2am.attribution.sums import AttentionSite

AdapterCall = tuple[int, Tensor | None]
"""Index of an attention call, and its multiplier ``[1 or queries]``, ``None`` for 1."""


def adapter_calls(processor: Any, given: dict[str, Any], queries: int) -> Iterator[AdapterCall]:
    """The attention calls of an IP-Adapter processor, with the indices they have as if none were
    left out.

    They attend to the text, then to each adapter's images, all at once or, with masks, one by one;
    they leave out adapters whose scale is 0.

    Args:
        processor: One of diffusers', for UNets or for transformers.
        given: Its arguments by name.
        queries: How many queries each call has.
    """
    yield 0, None
    context, following = given.get("encoder_hidden_states"), 1
    if not isinstance(context, tuple):  # transformers: calls of scale 0 are made
        scales = processor.scale if isinstance(processor.scale, list) else [processor.scale]
        for index, scale in enumerate(scales, start=1):
            yield index, _multiplier(scale)
        return
    masks = given.get("ip_adapter_masks")
    if isinstance(masks, Tensor):  # an older form
        masks = list(masks.unsqueeze(1))
    for adapter, (images, scale) in enumerate(zip(context[1], processor.scale, strict=False)):
        mask = None if masks is None else masks[adapter]
        calls = range(following, following + (1 if mask is None else images.shape[1]))
        following = calls.stop
        if not (any(scale) if isinstance(scale, list) else scale):
            continue
        for image, index in enumerate(calls):
            own = scale[image] if isinstance(scale, list) else scale
            if mask is None:
                yield index, _multiplier(own)
            else:
                yield index, own * _on_queries(mask[:, image], queries)


class Multipliers:
    """Those of the layers of one run, by time group."""

    def __init__(self) -> None:
        self._layers: dict[tuple[str, str], dict[int, Tensor]] = {}

    def add(
        self, site: AttentionSite, multiplier: Tensor | None, *, group: int, together: bool
    ) -> None:
        """A layer multiplied an attention call's output.

        Args:
            site: The layer.
            multiplier: ``[1 or cells]`` fp32, ``None`` for 1.
            group: Time group of the call.
            together: Whether all layers and groups have to have one and the same number.

        Raises:
            ValueError: It is not what it was before, so that sums cannot be multiplied by it.
        """
        multiplier = _ONE if multiplier is None else multiplier
        if together and len(multiplier) > 1:
            raise ValueError(
                "sums='resized' cannot keep masks of an adapter, which differ by patch, got some "
                f"in {site.layer}; record(sums='native') can"
            )
        known = self._layers.setdefault((site.layer, site.source), {})
        before = known.setdefault(group, multiplier)
        if together:
            of_source = (held for (_, name), held in self._layers.items() if name == site.source)
            before = next(iter(next(of_source).values()))
        if before is not multiplier and not torch.equal(before, multiplier):
            where = "in a recording of sums='resized'" if together else f"in time group {group}"
            raise ValueError(
                f"the scale or mask of an adapter must not change {where}, got another in "
                f"{site.layer}"
            )

    def of(self, site: AttentionSite, groups: int) -> Tensor | None:
        """The multipliers of a layer, ``[time groups, h, w]``; ``None`` where all are 1."""
        known, (height, width) = self._known(site), site.generated_grid
        if all(bool((multiplier == 1).all()) for multiplier in known.values()):
            return None
        with torch.inference_mode(False):
            # of a group without calls there is nothing to be multiplied
            every = torch.ones(groups, site.cells // site.frames, device="cpu")
            for group, multiplier in known.items():
                every[group] = multiplier
            return every.unflatten(1, (height, width))

    def silence(self, site: AttentionSite) -> bool:
        """Whether all that a layer attended to was multiplied by 0."""
        known = self._known(site)
        return bool(known) and not any(bool(multiplier.any()) for multiplier in known.values())

    def _known(self, site: AttentionSite) -> dict[int, Tensor]:
        layers = [(name, site.source) for name in site.merged or (site.layer,)]
        return next((self._layers[name] for name in layers if name in self._layers), {})


_ONE = torch.ones(1, device="cpu")


def _multiplier(scale: float) -> Tensor | None:
    return None if scale == 1 else torch.tensor([float(scale)], device="cpu")


def _on_queries(mask: Tensor, queries: int) -> Tensor:
    """A mask ``[1, height, width]`` as the processor brings it onto its queries."""
    if len(mask) != 1:
        raise NotImplementedError(
            f"recording ip_adapter_masks of their own for every sample is not supported, got "
            f"{len(mask)} masks of one image"
        )
    mask = mask.detach().float().cpu()
    return IPAdapterMaskProcessor.downsample(mask, 1, queries, 1)[0, :, 0]
