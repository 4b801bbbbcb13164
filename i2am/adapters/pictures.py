"""The masks of a recording and the pictures they belong to, which show only during the run."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from i2am.adapters.hooks import replace_method
from i2am.attribution.grid import Grid
from i2am.attribution.pictures import Box, Seen
from i2am.data.arrays import as_list, mask_batch, object_mask, sizes
from i2am.data.shapes import cut_mask, require_grid, require_shape
from i2am.layouts.spans import Sequences
from i2am.layouts.token_layout import TokenLayout


class Pictures:
    """Lays masks over the pictures of a run: checks their shape, and crops them as the run does.

    A pipeline of ours says which pictures it is painting with. Of others the calls are watched by
    which they prepare them: ``encode_image``, whose image processor may keep the middle of a
    reference alone, and ``get_crop_region`` of ``padding_mask_crop``.

    Args:
        pipe: The pipeline, or a denoiser, which shows no pictures.
        layout: Where its reference tokens come from.
        mask: Mask over the generated image, what `i2am.data.arrays.masks` takes, or None.
        reference_mask: Mask over the reference image, likewise, or ``"auto"``.
        stretch: Whether masks may have another shape than their pictures.

    Raises:
        TypeError, ValueError: As `i2am.data.arrays.mask_batch`.
    """

    def __init__(
        self, pipe: Any, layout: TokenLayout, mask: Any, reference_mask: Any, *, stretch: bool
    ) -> None:
        self._pipe, self._layout, self._stretch = pipe, layout, stretch
        self._automatic = isinstance(reference_mask, str)
        if self._automatic and reference_mask != "auto":
            raise ValueError(f"reference_mask must be a mask or 'auto', got {reference_mask!r}")
        self._masks: dict[str, Tensor | None] = {
            "generated": None if mask is None else mask_batch(mask, "mask"),
            "reference": None
            if reference_mask is None or self._automatic
            else mask_batch(reference_mask, "reference_mask"),
        }
        self._references: list[Any] = []
        self._crops: list[tuple[tuple[int, int], Box]] = []
        self._seen = {"generated": Seen(), "reference": Seen()}
        self._unknown = {"generated", "reference"}

    @property
    def mask(self) -> Tensor | None:
        """``[masks, height, width]`` over what is generated."""
        return self._laid("generated")

    @property
    def reference_mask(self) -> Tensor | None:
        """``[masks, height, width]`` over what became reference tokens."""
        return self._laid("reference")

    def provenance(self) -> dict[str, Any]:
        """What `i2am.attribution.pictures.seen` reads again."""
        return {
            which: {"size": one.size and [*one.size], "box": one.box and [*one.box]}
            for which, one in self._seen.items()
        }

    def attach(self) -> Callable[[], None]:
        """Watch how the pipeline prepares its pictures; returns what ends that."""
        undo = []
        if self._processor is not None:
            undo.append(_watch(self._pipe, "encode_image", self._note_reference))
        processor = getattr(self._pipe, "mask_processor", None)
        if hasattr(processor, "get_crop_region"):
            undo.append(_watch(processor, "get_crop_region", self._note_crop))

        def restore() -> None:
            for put_back in undo:
                put_back()

        return restore

    def begin_run(self) -> None:
        """The denoiser is called for the first time: its pictures are prepared.

        Raises:
            ValueError: A mask does not fit its picture; or it is to be made of the reference, which
                was not seen or shows no object.
        """
        shown = getattr(self._pipe, "shown", {})
        self._seen = {"generated": Seen(), "reference": Seen()}
        self._unknown = {"generated", "reference"}
        crops, self._crops = self._crops, []
        references, self._references = self._references[-self._adapters :], []
        if shown:
            references = [shown["reference"]]
            self._lay("generated", sizes(shown["generated"], "image"))
        elif crops:
            self._lay("generated", [crops[-1][0]], crops[-1][1])
        found: list[tuple[int, int]] = []
        for reference in references:
            # what another pipeline takes need not be anything we know
            with contextlib.suppress(TypeError, ValueError):
                found += sizes(reference, "reference")
        if self._automatic:
            self._masks["reference"] = self._object(references)
        self._crop_reference(found, prepared=any(isinstance(one, Tensor) for one in references))

    def meet(self, sequences: Sequences, size: Grid | None) -> None:
        """Tokens of a call are known: masks whose picture was not seen are held against them.

        Args:
            sequences: Their spans.
            size: Height and width of the denoiser's input, where it has them.

        Raises:
            ValueError: A mask has another shape, or belongs to one of several references.
        """
        generated = sequences.generated
        if "generated" in self._unknown and generated.place is not None:
            rows, columns = size or generated.grid[-2:]
            # several pictures side by side
            rows = rows * generated.place[0] // generated.grid[-2]
            columns = columns * generated.place[1] // generated.grid[-1]
            self._lay("generated", [(rows, columns)])
        mask = self._masks["reference"]
        references = sequences.keys_of("reference")
        if mask is not None and len(references) > 1:
            raise ValueError(
                "reference_mask needs one reference, whose picture it belongs to, got "
                f"{', '.join(span.name for span in references)}"
            )
        place = references[0].place if references else None
        if "reference" in self._unknown and place is not None:
            self._unknown.discard("reference")
            if mask is not None and not self._stretch:
                shape = (mask.shape[1], mask.shape[2])
                require_grid(
                    "reference_mask",
                    shape,
                    "the reference tokens",
                    place,
                    options=_STRETCH,
                )

    def _lay(self, which: str, pictures: list[tuple[int, int]], box: Box | None = None) -> None:
        """Hold a mask against the sizes of its pictures, and remember them."""
        self._unknown.discard(which)
        mask = self._masks[which]
        if mask is not None and not self._stretch:
            name, of = _NAMES[which]
            shape = (mask.shape[1], mask.shape[2])
            for number, size in enumerate(pictures):
                try:
                    require_shape(name, shape, of, size, options=_STRETCH)
                    break
                except ValueError:
                    # of several pictures it has to fit one
                    if number == len(pictures) - 1:
                        raise
        alike = len({*pictures}) == 1 and not self._stretch
        self._seen[which] = Seen(pictures[0] if alike else None, box)

    def _crop_reference(self, found: list[tuple[int, int]], *, prepared: bool) -> None:
        mask = self._masks["reference"]
        if self._processor is None or prepared:
            if found:
                self._lay("reference", found)
            return
        # embeddings were made before the block: then the mask has the picture's shape
        shapes = found or ([] if mask is None else [(mask.shape[1], mask.shape[2])])
        boxes = {kept_part(self._processor, size) for size in shapes}
        if len(boxes) > 1 and mask is not None:
            raise ValueError(
                "reference_mask must belong to reference pictures of one shape, which the image "
                f"processor crops alike, got pictures of {sorted({*shapes})}"
            )
        if shapes:
            self._lay("reference", shapes, boxes.pop() if len(boxes) == 1 else None)
        laid = self._laid("reference")
        if laid is not None and bool((laid.flatten(1).amax(1) <= 0).any()):
            raise ValueError(
                "reference_mask must cover some of what the encoder sees, but the image processor "
                "cuts the picture and leaves nothing of it"
            )

    def _laid(self, which: str) -> Tensor | None:
        mask, box = self._masks[which], self._seen[which].box
        return mask if mask is None or box is None else cut_mask(mask, box)

    @property
    def _processor(self) -> Any:
        """What prepares the reference pictures of this layout, if the pipeline has it."""
        if not self._layout.through_processor or not hasattr(self._pipe, "encode_image"):
            return None
        return getattr(self._pipe, "feature_extractor", None)

    @property
    def _adapters(self) -> int:
        denoiser = getattr(self._pipe, "unet", None)
        if denoiser is None:  # what torch.compile returns is neither true nor false
            denoiser = getattr(self._pipe, "transformer", None)
        projections = getattr(denoiser, "encoder_hid_proj", None)
        return max(len(getattr(projections, "image_projection_layers", ())), 1)

    def _object(self, references: list[Any]) -> Tensor:
        if len(references) != 1:
            raise ValueError(
                "reference_mask='auto' needs the run to show the reference picture of one adapter, "
                f"it showed {len(references)}; give i2am.data.object_mask(picture)"
            )
        parts = [
            part
            for item in as_list(references[0], "the reference picture")
            for part in (
                [*item] if isinstance(item, np.ndarray | Tensor) and item.ndim == 4 else [item]
            )
        ]
        found = [torch.from_numpy(object_mask(part, "the reference picture")) for part in parts]
        return mask_batch(found, "reference_mask")

    def _note_reference(self, result: Any, image: Any, *_: Any, **__: Any) -> None:
        self._references.append(image)

    def _note_crop(self, result: Any, image: Any, width: int, height: int, **_: Any) -> None:
        size = sizes(image, "mask_image")[0]
        self._crops.append((size, _canvas(size, result, (height, width))))


def kept_part(processor: Any, size: tuple[int, int]) -> Box | None:
    """The part of a picture that an image processor of transformers hands to its encoder.

    Args:
        processor: Resizes the shorter side or to a size, and may keep the middle, as CLIP's does.
        size: (height, width) of the picture.

    Returns:
        The part as fractions; None where it is the whole picture.

    Raises:
        ValueError: It does something else.
    """
    height, width = size
    wanted, crop = (_numbers(getattr(processor, name, None)) for name in ("size", "crop_size"))
    if getattr(processor, "do_resize", False):
        if "shortest_edge" in wanted and "longest_edge" not in wanted:
            edge, short, long = wanted["shortest_edge"], min(size), max(size)
            other = int(edge * long / short)
            height, width = (edge, other) if size[0] <= size[1] else (other, edge)
        elif {"height", "width"} <= {*wanted}:
            height, width = wanted["height"], wanted["width"]
        else:
            raise ValueError(
                f"the image processor must resize the shorter side or to a height and width, got "
                f"size={wanted}: nobody knows which part of the reference it keeps"
            )
    if not getattr(processor, "do_center_crop", False):
        return None
    rows, columns = crop["height"], crop["width"]
    if (rows, columns) == (height, width):
        return None
    top, left = (height - rows) // 2, (width - columns) // 2
    return top / height, left / width, rows / height, columns / width


def _canvas(size: tuple[int, int], crop: tuple[int, ...], made: tuple[int, int]) -> Box:
    """What a generated image covers of the picture whose crop it was made from.

    The crop keeps its shape, centred; what is then missing is filled up, beyond the crop.
    """
    (x1, y1, x2, y2), (height, width) = crop, made
    scale = min(height / (y2 - y1), width / (x2 - x1))
    rows, columns = height / scale, width / scale
    top, left = (y1 + y2 - rows) / 2, (x1 + x2 - columns) / 2
    return top / size[0], left / size[1], rows / size[0], columns / size[1]


def _numbers(value: Any) -> dict[str, int]:
    names = ("height", "width", "shortest_edge", "longest_edge")
    read = (lambda name: value.get(name)) if isinstance(value, dict) else None
    read = read or (lambda name: getattr(value, name, None))
    return {name: found for name in names if (found := read(name)) is not None}


def _watch(owner: Any, name: str, note: Callable[..., None]) -> Callable[[], None]:
    """Tell ``note(result, *arguments)`` of the calls of a method of an instance."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def watched(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        # what is not called as we know it stays unknown
        with contextlib.suppress(TypeError, ValueError):
            note(result, *args, **kwargs)
        return result

    return replace_method(owner, name, watched)


_STRETCH = "; stretch=True accepts it, for pipelines that squeeze picture and mask"
_NAMES = {
    "generated": ("mask", "its picture"),
    "reference": ("reference_mask", "its picture"),
}
