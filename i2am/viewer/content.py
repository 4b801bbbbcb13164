"""What a page knows of one sample: pictures, maps, scores and words, as JSON values."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from i2am.attribution.direction import Direction
from i2am.attribution.joint import JointMaps
from i2am.attribution.maps import AttributionMaps
from i2am.attribution.pictures import Which, cut_place, seen
from i2am.attribution.presets import Preset, get_preset
from i2am.attribution.reduction import layers_of
from i2am.data.arrays import ImageInput, as_pil, cut_picture, masks, require_shape
from i2am.plots.titles import step_titles
from i2am.viewer.packing import COARSE, FINE, MEDIUM, encode, pack
from i2am.viewer.pictures import outline, picture

if TYPE_CHECKING:
    from PIL.Image import Image

Score = Mapping[str, Any]
"""``{"value": float, "reason": None}``, or value None and the reason."""

SCORED = {
    "imacs_g": "r2g",
    "imacs_g_share": "share",
    "imacs_g_mask_votes": "r2g_mask",
    "imacs_r": "g2r_mask",
}
"""The map that each score of a picture is computed from, under the paper's preset."""

_PATCH = re.compile(r"(\d+),(\d+)@(\d+)x(\d+)")
_BOX = re.compile(r"(\d+),(\d+),(\d+),(\d+)@(\d+)x(\d+)")


@dataclass(frozen=True)
class Stack:
    """Maps of one kind: overall ones have one query, joint ones one per cell of `asked`.

    Attributes:
        name: "share", "r2g", "r2g_mask", "g2r", "g2r_mask", "joint_g2r", "joint_r2g" or "region N".
        maps: ``[slices, queries, height, width]``, raw.
        slices: "all", "t0", "h0", "l0", ... along the first axis.
        asked: Grid of the queries, None for one query.
    """

    name: str
    maps: Tensor
    slices: tuple[str, ...]
    asked: tuple[int, int] | None = None


@dataclass(frozen=True)
class Sample:
    """One generated image with its reference and maps, ready to be packed.

    Attributes:
        id: Names the sample in links; any text, different for every sample of a report.
        generated, reference: The images.
        stacks: Their maps.
        times, heads, layers: Names of the slices "t0", "h0", "l0", ...
        mask, reference_mask: White on what was painted and on the object, for outlines and nothing
            else.
        scores: By name, as ``i2am record`` writes them; computed for whole maps.
        scored: Name of the map of each score that stands beside a picture; where another map is
            shown, the page says what the score is of.
        regions: Declared regions, by their number in "region N": name, box and true place.
        facts: What made the image, in words: model, steps, ...
        notes: Sentences a reader must know.
        normalizations, invert: How the preset draws maps.

    Raises:
        ValueError: Maps hold NaN or Inf, or a score is neither a finite number nor None with a
            reason.
    """

    id: str
    generated: "Image"
    reference: "Image"
    stacks: Sequence[Stack]
    times: Sequence[str] = ()
    heads: Sequence[str] = ()
    layers: Sequence[str] = ()
    mask: "Image | None" = None
    reference_mask: "Image | None" = None
    scores: Mapping[str, Score] = field(default_factory=dict)
    scored: Mapping[str, str] = field(default_factory=lambda: SCORED)
    regions: Sequence[Mapping[str, Any]] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    normalizations: int = 1
    invert: bool = False

    def __post_init__(self) -> None:
        for stack in self.stacks:
            if not bool(stack.maps.isfinite().all()):
                raise ValueError(f"maps must be finite, got NaN or Inf in {stack.name}")
        for name, score in self.scores.items():
            value, reason = score["value"], score["reason"]
            if reason is None if value is None else not math.isfinite(value):
                raise ValueError(
                    f"scores must be finite numbers, or None with a reason, got {value} and reason "
                    f"{reason!r} for {name}"
                )

    def document(self, *, compress: bool = True) -> dict[str, Any]:
        """Everything as JSON values: maps in two payloads, so that overall ones are there first."""
        payloads: dict[str, bytearray] = {"overall": bytearray(), "joint": bytearray()}
        entries = []
        for stack in self.stacks:
            part = "joint" if stack.asked else "overall"
            levels = [_levels(stack, name) for name in stack.slices]
            entries.append(
                {
                    "name": stack.name,
                    "part": part,
                    "offset": len(payloads[part]),
                    "grid": list(stack.maps.shape[-2:]),
                    "asked": list(stack.asked or (1, 1)),
                    "slices": list(stack.slices),
                    "levels": levels,
                }
            )
            payloads[part] += pack(stack.maps, levels)
        generated, reference = picture(self.generated), picture(self.reference)
        for image, mask in ((generated, self.mask), (reference, self.reference_mask)):
            image["outline"] = mask and outline(mask, (image["width"], image["height"]))
        return {
            "id": self.id,
            "generated": generated,
            "reference": reference,
            "times": list(self.times),
            "heads": list(self.heads),
            "layers": list(self.layers),
            "scores": {name: dict(score) for name, score in self.scores.items()},
            "scored": dict(self.scored),
            "regions": [dict(region) for region in self.regions],
            "facts": dict(self.facts),
            "notes": list(self.notes),
            "normalizations": self.normalizations,
            "invert": self.invert,
            "maps": entries,
            "payloads": {
                part: encode(bytes(data), compress=compress)
                for part, data in payloads.items()
                if data
            },
        }


def sample(
    maps: AttributionMaps,
    *,
    generated: ImageInput,
    reference: ImageInput,
    index: int = 0,
    id: str = "sample",
    mask: ImageInput | None = None,
    reference_mask: ImageInput | None = None,
    scores: Mapping[str, Score] | None = None,
    truths: Mapping[str, tuple[float, float]] | None = None,
    facts: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
    preset: str | Preset = "paper",
) -> Sample:
    """What a page shows of one sample of a recording.

    Args:
        maps: The recording; its joint maps, where it has them, let a reader point at any patch.
        generated: The generated image, see `i2am.data.arrays.pictures`. Where the run made a part
            of it alone, or saw a part of the reference, that part is shown.
        reference: The reference image.
        index: Which sample of `maps`.
        id: Its name in links and lists.
        mask: White where the image was painted, see `i2am.data.arrays.masks`; of the generated
            image's shape.
        reference_mask: White on the object in the reference; of its shape.
        scores: ``{name: {"value": float | None, "reason": str | None}}``, as ``scores.json`` has.
        truths: Where declared regions should look, as fractions of the reference's height and
            width.
        facts: What made the image, in words, shown as a list.
        notes: Sentences a reader must know.
        preset: How overall maps are read and drawn.

    Raises:
        ValueError: The maps hold NaN or Inf, a score is neither a finite number nor None with a
            reason, the preset is unknown, an image is none, or a mask has another shape.
        IndexError: There is no such sample.
    """
    preset = get_preset(preset)
    generated, mask = _shown(maps, "generated", generated, "mask", mask)
    reference, reference_mask = _shown(
        maps, "reference", reference, "reference_mask", reference_mask
    )
    maps = maps.select(samples=[index])
    if broken := maps.nonfinite():
        raise ValueError(f"maps must be finite, got NaN or Inf in {broken[0]}")
    counted = [layer.site for layer in layers_of(maps.layer_sums, preset)]
    single = all(site.reference_tokens == 1 for site in counted)
    placed = [site.layer for site in counted if site.reference_grid]
    spatial = maps.select(layers=placed) if placed else None
    layers = [] if any(site.merged for site in counted) else [site.layer for site in counted]
    alike = len({site.heads for site in counted}) == 1

    def overall(name: str, source: AttributionMaps, read: Callable[..., Tensor]) -> Stack:
        """The maps of `source` for everything together, then per time group, head and layer."""
        parts, slices = [read(source)[0, None]], ["all"]
        for axis, wanted in (("time", True), ("head", alike), ("layer", bool(layers))):
            if wanted:
                parts.append(read(source, per=axis)[0])
                numbers = [*range(len(parts[-1]))]
                if axis == "layer":
                    kept = [layer.site.layer for layer in layers_of(source.layer_sums, preset)]
                    numbers = [layers.index(layer) for layer in kept]
                slices += [f"{axis[0]}{number}" for number in numbers]
        return Stack(name, torch.cat(parts)[:, None], tuple(slices))

    stacks = []
    if Direction.REFERENCE_TO_GENERATED in maps.directions:
        read = partial(AttributionMaps.reference_to_generated, preset=preset)
        stacks.append(overall("r2g", maps, read))
        if (votes := maps.share_of) is not None:
            source = maps if votes == "uniform" or spatial is None else spatial
            stacks.append(overall("share", source, partial(read, measure="share", votes=votes)))
        # tokens without a place are in no mask
        if "mask" in maps.votes and spatial is not None:
            stacks.append(overall("r2g_mask", spatial, partial(read, votes="mask")))
    regions: list[dict[str, Any]] = []
    if Direction.GENERATED_TO_REFERENCE in maps.directions and spatial is not None:
        read = partial(AttributionMaps.generated_to_reference, preset=preset)
        stacks.append(overall("g2r", spatial, read))
        if "mask" in maps.rows:
            stacks.append(overall("g2r_mask", spatial, partial(read, weights="mask")))
        described = maps.provenance.get("regions") or {}
        for number, region in enumerate(maps.regions):
            read = partial(AttributionMaps.specific_reference, region=region, preset=preset)
            stacks.append(overall(f"region {number}", spatial, read))
            place = cut_place((truths or {}).get(region), maps.provenance)
            box = _fractions(described.get(region, region))
            regions.append({"name": region, "box": box, "truth": place and list(place)})
    if maps.joint is not None:
        stacks += _joint(maps.joint)

    told = [maps.provenance["note"]] if maps.provenance.get("note") else []
    if not maps.informative:
        told.append("Some layers have a single reference token: their maps show no cause.")
    return Sample(
        id=id,
        generated=generated,
        reference=reference,
        stacks=stacks,
        times=step_titles(maps.time_groups, maps.provenance.get("steps")),
        heads=[f"head {head}" for head in range(counted[0].heads)] if alike else [],
        layers=layers,
        mask=mask,
        reference_mask=reference_mask,
        scores=scores or {},
        scored=SCORED if preset.query_mask else {**SCORED, "imacs_r": "g2r"},
        regions=regions,
        facts=facts or {},
        notes=[*dict.fromkeys([*notes, *told])],
        normalizations=preset.normalizations,
        invert=preset.invert_single_token and single,
    )


def _shown(
    maps: AttributionMaps, which: Which, image: Any, mask_name: str, mask: Any
) -> "tuple[Image, Image | None]":
    """A picture and its mask, as far as the maps lie on them."""
    shown = _only(as_pil(image, which), which)
    outlined = None
    if mask is not None:
        values = _only(masks(mask, mask_name), mask_name)
        size, wanted = (values.shape[0], values.shape[1]), (shown.height, shown.width)
        # a model that squeezed its picture said what that was, and squeezed the mask alike
        known = seen(maps.provenance, which)
        wanted = wanted if known is None or known.size is None else known.size
        require_shape(mask_name, size, f"the {which} image", wanted)
        (outlined,) = as_pil((values > 0.5).cpu().numpy().astype("uint8") * 255, mask_name)
    picture = seen(maps.provenance, which)
    if picture is None or picture.box is None:
        return shown, outlined
    return cut_picture(shown, picture.box), outlined and cut_picture(outlined, picture.box)


def _only(found: list[Any], name: str) -> Any:
    if len(found) != 1:
        raise ValueError(f"{name} must be one image, got {len(found)}")
    return found[0]


def _joint(joint: JointMaps) -> list[Stack]:
    names = ("all", *(f"t{n}" for n in range(joint.time_groups)))
    names += tuple(f"h{n}" for n in range(joint.heads))
    choices: list[dict[str, int]] = [{}]
    choices += [{"time": group} for group in range(joint.time_groups)]
    choices += [{"head": head} for head in range(joint.heads)]
    stacks = []
    for name, read, asked in (
        ("joint_g2r", joint.generated_to_reference, joint.generated_grid),
        ("joint_r2g", joint.reference_to_generated, joint.reference_grid),
    ):
        # [slices, queries, height, width]
        maps = torch.stack([read(**choice)[0].flatten(0, 1) for choice in choices])
        stacks.append(Stack(name, maps, names, asked))
    return stacks


def _levels(stack: Stack, slice: str) -> int:
    if stack.asked is None:
        return FINE
    return MEDIUM if slice == "all" else COARSE


def _fractions(region: str) -> list[float] | None:
    """Top, left, height and width as fractions of the image; None for weights."""
    if found := _PATCH.fullmatch(region):
        row, column, rows, columns = map(int, found.groups())
        return [row / rows, column / columns, 1 / rows, 1 / columns]
    if found := _BOX.fullmatch(region):
        top, left, height, width, rows, columns = map(int, found.groups())
        return [top / rows, left / columns, height / rows, width / columns]
    return None
